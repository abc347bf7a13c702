"""`SparseViT`: the forward of a frozen Vision Transformer on kept patches only.

Shape letters: B images, K kept patches, N = K + prefix tokens, D width, H heads, d head width, P patch side.
Two cuts make it cheaper than a forward of the whole model, and change nothing in its result:

* only kept patches are embedded, and their position embeddings are gathered;
* in the last block, query, softmax, projection and MLP are computed for the tokens that the head reads alone (keys
  and values for all). The softmax row of CLS there is the CLS score.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from smi_fast.kernels.common.check import check_ids
from smi_fast.kernels.common.grid import Grid, Moves
from smi_fast.kernels.patch_gather import patch_gather
from smi_fast.model.attention import require
from smi_fast.model.block import FrozenBlock, Norm, Stream
from smi_fast.model.scaled_linear import ScaledLinear
from smi_fast.model.spec import ModelInfo, Needs, ViTShape


class ViTOutput(NamedTuple):
    """What one forward gives; the last two hold the blocks that were asked for, by number."""

    logits: Tensor  # [B, classes] float32
    cls_scores: Tensor  # [B, K] float32
    features: dict[int, Tensor]  # outputs of blocks, [B, N, D] each
    attention: dict[int, Tensor]  # attention maps of blocks after the softmax, [B, H, N, N] float32 each


@dataclass
class ViTParts:
    """The pieces of a `SparseViT`, as an adapter hands them over."""

    patch_embed: nn.Linear  # [3 * P * P] -> [D]
    prefix_tokens: Tensor  # [prefix, D], position embedding added
    pos_embed: Tensor  # [L, D]
    norm_pre: Norm
    blocks: list[FrozenBlock]
    norm: Norm  # before the head reads its tokens
    fc_norm: Norm  # after they are pooled
    heads: list[nn.Linear]  # one for each token that is read; their logits are averaged


class SparseViT(nn.Module):
    """A frozen Vision Transformer that runs on the kept patches of an image.

    Build one with `smi_fast.load_model`. Compute dtype is that of the patch embedding; the final norm and the head
    stay in float32 at least, since the loss is read off them.

    ``attention_choices`` says what attends in the blocks, by the number of tokens, prefix included; see
    `choose_attention`. It is looked at when a forward is run or traced.
    """

    def __init__(self, shape: ViTShape, info: ModelInfo, parts: ViTParts) -> None:
        super().__init__()
        self.shape, self.info = shape, info
        self.patch_embed = parts.patch_embed
        self.prefix_tokens = nn.Parameter(parts.prefix_tokens)
        self.pos_embed = nn.Parameter(parts.pos_embed)
        self.norm_pre, self.norm, self.fc_norm = parts.norm_pre, parts.norm, parts.fc_norm
        self.blocks = nn.ModuleList(parts.blocks)
        self.heads = nn.ModuleList(parts.heads)
        self.attention_choices: dict[int, str] = {}
        self.requires_grad_(False)
        self.eval()

    @property
    def grid(self) -> Grid:
        """The patch grid of the images the model takes."""
        return self.shape.grid

    @property
    def dtype(self) -> torch.dtype:
        """Compute dtype of the blocks; what is left of them beside linear layers, where these are in fp8."""
        return self.patch_embed.weight.dtype

    @property
    def precision(self) -> str:
        """What the linear layers of the blocks compute in: "fp8", or the name of the dtype, such as "bfloat16"."""
        if any(isinstance(module, ScaledLinear) for module in self.modules()):
            return "fp8"
        return str(self.dtype).removeprefix("torch.")

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.patch_embed.weight.device

    def with_dtype(self, dtype: torch.dtype) -> "SparseViT":
        """Cast to a compute dtype, in place; final norm and head are cast to float32 at least.

        Raises:
            ValueError: the model is in fp8, which has no way back.
        """
        if self.precision == "fp8":
            raise ValueError(f"dtype={dtype}: {self.info.name} is in fp8, and its weights are rounded; load it again")
        self.to(dtype)
        exact = torch.promote_types(dtype, torch.float32)
        for module in (self.norm, self.fc_norm, self.heads):
            module.to(exact)
        return self

    def choose_attention(self, tokens: int, name: str) -> None:
        """Let ``name`` attend where there are ``tokens`` tokens; the last block's few queries have their own op.

        Args:
            tokens: prefix tokens and kept patches.
            name: one of `smi_fast.model.attention.NAMES`.

        Raises:
            ValueError: a number of tokens that the model never has; a name that is unknown, or cannot run on this
                device, in this dtype or at this width (the reason is given).
        """
        least, most = self.shape.prefix + 1, self.shape.prefix + self.grid.patches
        if not least <= tokens <= most:
            raise ValueError(f"tokens={tokens}: must lie in {least}..{most}, prefix tokens and kept patches")
        one = torch.empty((), dtype=self.dtype, device=self.device)
        require(f"name={name!r}", name, one.expand(1, self.shape.heads, tokens, self.shape.head_width))
        self.attention_choices[tokens] = name

    def forward(self, pixels: Tensor, keep: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Classify images from their kept patches.

        Args:
            pixels: ``[B, 3, H, W]``, normalised colours.
            keep: ``[B, K]`` int64 patch ids, or None for all patches.

        Returns:
            logits ``[B, classes]`` and CLS scores ``[B, K]``, float32 (float64 for a float64 model).

        Raises:
            ValueError: a shape or dtype that does not fit the model, or ids that are none of its patches or do not
                ascend (they are read, so the call waits for the device).
        """
        windows, keep = self.cut(pixels, keep)
        output = self.forward_patches(windows, keep)
        return output.logits, output.cls_scores

    def cut(self, pixels: Tensor, keep: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The kept patches ``[B, K, 3 * P * P]`` in the compute dtype, and their ids ``[B, K]``, all where None.

        Raises:
            ValueError: as `forward`.
        """
        self._check(pixels, keep)
        batch = pixels.shape[0]
        if keep is None:
            keep = torch.arange(self.grid.patches, device=pixels.device).expand(batch, -1)
        still = torch.zeros(batch, 2, dtype=torch.int64, device=pixels.device)
        return patch_gather(pixels, keep, Moves(still, still[:, 0].bool()), self.grid.patch, self.dtype), keep

    def forward_patches(self, windows: Tensor, cells: Tensor, needs: Needs = Needs()) -> ViTOutput:  # noqa: B008 - frozen
        """The forward on patches that are already cut out.

        Args:
            windows: ``[B, K, 3 * P * P]`` in the compute dtype.
            cells: ``[B, K]`` int64, the grid cell whose position embedding each patch takes.
            needs: which block outputs and attention maps to hand over, with plain block numbers (`Needs.of`).
        """
        x = self.patch_embed(windows) + self.pos_embed[cells]
        x = torch.cat([self.prefix_tokens.expand(len(x), -1, -1), x], dim=1)  # [B, N, D]
        x = self.norm_pre(x)
        choice = self.attention_choices.get(x.shape[1])
        stream = Stream(x)
        features: dict[int, Tensor] = {}
        maps: dict[int, Tensor] = {}
        last = self.shape.depth - 1
        for index, block in enumerate(self.blocks):
            assert isinstance(block, FrozenBlock)
            if index in needs.attention:
                stream, maps[index] = block.forward_with_attention(stream)
            elif index < last:
                stream = block(stream, choice)
            else:
                break
            if index in needs.features:
                stream = Stream(stream.total)
                features[index] = stream.x
        if last in maps:
            scores = maps[last][:, :, 0, self.shape.prefix :].mean(1)
        elif last in needs.features or not self.shape.reads:
            stream, scores = self._last.forward_with_scores(stream, self.shape.prefix, choice)
            if last in needs.features:
                stream = Stream(stream.total)
                features[last] = stream.x
        else:
            stream, scores = self._last.forward_last(stream, self.shape.prefix, self.shape.reads)
        return ViTOutput(self._head(stream.total), scores, features, maps)

    @property
    def _last(self) -> FrozenBlock:
        block = self.blocks[-1]
        assert isinstance(block, FrozenBlock)
        return block

    def _head(self, x: Tensor) -> Tensor:
        """Logits from ``[B, reads, D]`` (or all tokens, where the head averages the patches)."""
        x = self.norm(x.to(torch.promote_types(self.dtype, torch.float32)))
        if self.shape.reads == 0:
            return self.heads[0](self.fc_norm(x[:, self.shape.prefix :].mean(1)))
        logits = [head(self.fc_norm(x[:, i])) for i, head in enumerate(self.heads)]
        return torch.stack(logits).mean(0)

    def _check(self, pixels: Tensor, keep: Tensor | None) -> None:
        size = (3, self.grid.height, self.grid.width)
        if pixels.ndim != 4 or tuple(pixels.shape[1:]) != size or not pixels.is_floating_point():
            raise ValueError(
                f"pixels of shape {tuple(pixels.shape)} and {pixels.dtype}: {self.info.name} takes floating point "
                f"[B, {size[0]}, {size[1]}, {size[2]}]"
            )
        if keep is None:
            return
        if keep.ndim != 2 or keep.shape[0] != pixels.shape[0] or keep.dtype != torch.int64:
            raise ValueError(
                f"keep of shape {tuple(keep.shape)} and {keep.dtype}: must be int64 [B, K] with B={pixels.shape[0]}"
            )
        if not 1 <= keep.shape[1] <= self.grid.patches:
            raise ValueError(f"keep holds {keep.shape[1]} patches per image: must be 1..{self.grid.patches}")
        if not torch.compiler.is_compiling():
            check_ids("keep", keep, self.grid.patches)
