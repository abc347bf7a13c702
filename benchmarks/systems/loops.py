"""The yard-stick: the published inversion loop, written plainly, and the same loop as well tuned as eager torch allows.

Both minimise, with Adam on the pixels ``x [B, 3, H, W]`` (the canvas),

    mean_b cross_entropy(f(jitter(x_b), kept patches), y_b) + 1e-4 * sum_d ||x - x shifted by d||_F

where ``d`` runs over right, down and the two diagonals, and each Frobenius norm is taken over the whole batch. One
shift and flip is drawn for the whole batch in each iteration, but for the iterations right before and right after a
stop, which see the canvas as it is: the first of them gives the CLS scores. All patches are embedded; what is dropped
is tokens. Stopped patches keep on being smoothed and updated.

`PublishedLoop` also pays for what the published code pays for and nobody needs: the gradient of every weight, the
attention matrices of all blocks, and a wait for the loss in each iteration. `TunedLoop` does not. The terms to which
the published code gives a weight of zero are left out of both, so that neither is slower than it has to be.
"""

import copy
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers.attention import Attention
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from benchmarks.harness.engine import stages_of
from benchmarks.systems.attention import torch_attention
from smi_fast.model.from_timm import check_supported

LR, BETAS = 0.25, (0.5, 0.99)
TV_WEIGHT = 1e-4
JITTER = 1 / 8  # largest shift, as a share of the side


@dataclass(frozen=True)
class LoopOptions:
    """What sets the two loops apart."""

    frozen: bool  # no gradient for the weights
    fused: bool  # fused attention in all blocks but the last, fused Adam
    read_loss: bool  # the host waits for the loss in each iteration, and tracks the best
    dtype: torch.dtype  # bfloat16: under autocast; float32: as the weights are


@dataclass(frozen=True)
class Jitter:
    """One shift in pixels, and whether the image is mirrored after it."""

    dy: int
    dx: int
    flip: bool

    def images(self, canvas: Tensor) -> Tensor:
        """``[B, 3, H, W]``, shifted with wrap-around and perhaps mirrored."""
        moved = canvas.roll((self.dy, self.dx), (2, 3))
        return moved.flip(3) if self.flip else moved

    def cells(self, keep: Tensor, grid: tuple[int, int], patch: int) -> Tensor:
        """``[B, K]`` ids of the cells that the patches ``keep`` land on, the shift rounded to whole patches."""
        ids = torch.arange(grid[0] * grid[1], device=keep.device).reshape(grid)
        ids = ids.roll(((2 * self.dy + patch) // (2 * patch), (2 * self.dx + patch) // (2 * patch)), (0, 1))
        if self.flip:
            ids = ids.flip(1)
        # ids says which patch a cell shows; its inverse says which cell shows a patch
        return ids.flatten().argsort()[keep]


def batch_total_variation(canvas: Tensor) -> Tensor:
    """The sum of the Frobenius norms of four neighbour differences, each over the whole ``[B, 3, H, W]``: a scalar."""
    differences = (
        canvas[..., 1:] - canvas[..., :-1],
        canvas[..., 1:, :] - canvas[..., :-1, :],
        canvas[..., 1:, 1:] - canvas[..., :-1, :-1],
        canvas[..., 1:, :-1] - canvas[..., :-1, 1:],
    )
    return torch.stack([torch.linalg.vector_norm(difference) for difference in differences]).sum()


def attend(layer: Attention, x: Tensor, fused: bool) -> tuple[Tensor, Tensor | None]:
    """Self-attention of one block: ``[B, N, D]``, and unless ``fused`` its matrices ``[B, H, N, N]``."""
    batch, tokens, _ = x.shape
    heads = layer.qkv(x).reshape(batch, tokens, 3, layer.num_heads, -1).permute(2, 0, 3, 1, 4)
    query, key, value = layer.q_norm(heads[0]), layer.k_norm(heads[1]), heads[2]  # [B, H, N, d]
    matrices = None
    if fused:
        # under autocast a norm of queries or keys is float32
        out = torch_attention(query.to(value.dtype), key.to(value.dtype), value)
    else:
        matrices = (query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5).softmax(-1)
        out = matrices @ value
    return layer.proj(out.transpose(1, 2).flatten(2)), matrices


class InversionLoop:
    """What both loops share; build one of its subclasses.

    Attributes:
        canvas: ``[B, 3, H, W]`` leaf tensor in the dtype of the weights; its ``grad`` is that of the last step.
        keep: ``[B, K]`` int64, ascending in each row.
        loss: scalar tensor, of the last step; NaN before the first.
        best_loss: the least loss so far, where the loop reads it; else infinity.
    """

    def __init__(
        self,
        vit: VisionTransformer,
        labels: Tensor,
        mean: Sequence[float],
        std: Sequence[float],
        seed: int,
        options: LoopOptions,
    ) -> None:
        check_supported(vit, type(vit).__name__)
        self.vit = copy.deepcopy(vit).eval().requires_grad_(not options.frozen)
        self.options = options
        weight = self.vit.patch_embed.proj.weight
        self.labels = labels.to(weight.device)
        limits = [[(limit - m) / s for m, s in zip(mean, std, strict=True)] for limit in (0, 1)]
        self.low, self.high = torch.tensor(limits, dtype=weight.dtype, device=weight.device)[..., None, None]
        self.random = random.Random(seed)
        generator = torch.Generator(weight.device).manual_seed(seed)
        shape = (len(labels), 3, *self.vit.patch_embed.img_size)
        canvas = torch.randn(shape, generator=generator, dtype=weight.dtype, device=weight.device)
        self.canvas = canvas.requires_grad_()
        # False would also turn off the default, which is one launch for a list of tensors
        self.optimizer = torch.optim.Adam([self.canvas], LR, BETAS, fused=True if options.fused else None)
        self.keep = self._all_patches()
        self.maps: list[Tensor] = []  # attention matrices of the last forward, of the last block at the end
        self.loss = torch.tensor(math.nan)
        self.best_loss = math.inf

    def set_keep(self, keep: Tensor) -> None:
        """Go on with other kept patches: ``[B, K]`` int64.

        Raises:
            ValueError: another dtype, number of images or number of patches.
        """
        batch, patches = self._all_patches().shape
        if keep.dtype != torch.int64 or keep.ndim != 2 or len(keep) != batch or not 1 <= keep.shape[1] <= patches:
            raise ValueError(
                f"keep of shape {tuple(keep.shape)} and {keep.dtype}: must be int64 [B, K] with B={batch} and K in "
                f"1..{patches}"
            )
        self.keep = keep.to(self.canvas.device)

    def step(self, jitter: bool = True) -> None:
        """One iteration at the kept patches: forward, backward, Adam, clamp to colours that exist."""
        images, cells = self.canvas, self.keep
        if jitter:
            drawn = self._draw()
            images = drawn.images(images)
            cells = drawn.cells(cells, self.vit.patch_embed.grid_size, self.vit.patch_embed.patch_size[0])
        low_precision = self.options.dtype == torch.bfloat16
        with torch.autocast(self.canvas.device.type, torch.bfloat16, enabled=low_precision):
            logits = self._forward(images, cells)
        loss = F.cross_entropy(logits.to(self.canvas.dtype), self.labels)
        loss = loss + TV_WEIGHT * batch_total_variation(self.canvas)
        self.loss = loss.detach()
        if self.options.read_loss:
            self.best_loss = min(self.best_loss, loss.item())
        # the canvas's alone: gradients of weights, where there are any, pile up as they do in the published code
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        with torch.no_grad():
            self.canvas.clamp_(self.low, self.high)

    def gradient(self, canvas: Tensor) -> Tensor:
        """``[B, 3, H, W]``: of the loss at that canvas and the kept patches, images not moved."""
        with torch.no_grad():
            self.canvas.copy_(canvas)
        with torch.enable_grad():
            self.step(jitter=False)
        gradient = self.canvas.grad
        assert gradient is not None
        return gradient.detach().clone()

    def run(self, iterations: int, stops: Sequence[tuple[int, float]]) -> None:
        """The whole schedule, from the canvas as it is and all patches.

        Args:
            iterations: how many steps.
            stops: after how many steps to drop which share of the kept patches.

        Raises:
            ValueError: stops out of order or beyond the last iteration.
        """
        self.keep = self._all_patches()
        stages = stages_of(self.keep.shape[1], stops, iterations)
        survivors = {stage.start: stage.kept for stage in stages[1:]}
        for done in range(iterations):
            if done in survivors:
                self._drop(survivors[done])
            self.step(jitter=done not in survivors and done + 1 not in survivors)

    def _all_patches(self) -> Tensor:
        patches = torch.arange(self.vit.patch_embed.num_patches, device=self.canvas.device)
        return patches.repeat(len(self.canvas), 1)

    def _draw(self) -> Jitter:
        height, width = (int(side * JITTER) for side in self.canvas.shape[2:])
        dy, dx = self.random.randint(-height, height), self.random.randint(-width, width)
        return Jitter(dy, dx, self.random.random() > 0.5)

    def _forward(self, images: Tensor, cells: Tensor) -> Tensor:
        """Logits ``[B, classes]`` from the tokens of ``cells [B, K]``; leaves the attention matrices in ``maps``."""
        vit = self.vit
        tokens = vit._pos_embed(vit.patch_embed(images))  # [B, prefix + L, D]
        prefix = torch.arange(vit.num_prefix_tokens, device=cells.device).expand(len(cells), -1)
        index = torch.cat([prefix, cells + vit.num_prefix_tokens], 1)
        x = vit.norm_pre(tokens.gather(1, index[..., None].expand(-1, -1, tokens.shape[2])))
        maps = []
        block: Any
        for i, block in enumerate(vit.blocks):
            fused = self.options.fused and i < len(vit.blocks) - 1
            attended, matrices = attend(block.attn, block.norm1(x), fused)
            x = x + block.ls1(attended)
            x = x + block.ls2(block.mlp(block.norm2(x)))
            if matrices is not None:
                maps.append(matrices)
        self.maps = maps
        return vit.forward_head(vit.norm(x))

    def _drop(self, count: int) -> None:
        """Go on with the ``count`` patches that CLS attended to most in the last forward."""
        scores = self.maps[-1][:, :, 0, self.vit.num_prefix_tokens :].mean(1)  # [B, K]
        slots = scores.topk(count).indices.sort().values
        self.keep = self.keep.gather(1, slots)


class PublishedLoop(InversionLoop):
    """The published loop: see the top of this file.

    Args:
        vit: a timm ``VisionTransformer``; a copy of it is used.
        labels: ``[B]`` int64, the class each image is to show.
        mean, std: of the model's colour space, RGB in 0..1.
        seed: of the start and of the jitter.

    Raises:
        ValueError: a model that has an option the forward here does not know.
    """

    def __init__(
        self, vit: VisionTransformer, labels: Tensor, mean: Sequence[float], std: Sequence[float], seed: int
    ) -> None:
        options = LoopOptions(frozen=False, fused=False, read_loss=True, dtype=torch.float32)
        super().__init__(vit, labels, mean, std, seed, options)


class TunedLoop(InversionLoop):
    """The same job with frozen weights, fused attention and optimiser, and no wait in the loop.

    Args:
        vit, labels, mean, std, seed: as in `PublishedLoop`.
        dtype: ``torch.float32``, or ``torch.bfloat16`` for a forward and backward under autocast.

    Raises:
        ValueError: a model that has an option the forward here does not know; another dtype.
    """

    def __init__(
        self,
        vit: VisionTransformer,
        labels: Tensor,
        mean: Sequence[float],
        std: Sequence[float],
        seed: int,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"dtype={dtype}: must be torch.float32 or torch.bfloat16")
        super().__init__(
            vit, labels, mean, std, seed, LoopOptions(frozen=True, fused=True, read_loss=False, dtype=dtype)
        )
