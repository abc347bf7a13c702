"""`SparseViT`: the forward of a frozen Vision Transformer on kept patches only.

Shape letters: B images, K kept patches, N = K + prefix tokens, D width, H heads, d head width, P patch side.
Two cuts make it cheaper than a forward of the whole model, and change nothing in its result:

* only kept patches are embedded, and their position embeddings are gathered;
* in the last block, query, softmax, projection and MLP are computed for the tokens that the head reads alone (keys
  and values for all). The softmax row of CLS there is the CLS score.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smi_fast.kernels.cls_attention import cls_attention
from smi_fast.kernels.common.check import check_ids
from smi_fast.kernels.common.grid import Grid, Moves
from smi_fast.kernels.patch_gather import patch_gather
from smi_fast.kernels.tile_attention import parts_of
from smi_fast.model.attention import attention, attention_weights, packed_attention, require
from smi_fast.model.scaled_linear import ScaledLinear
from smi_fast.model.spec import ModelInfo, Needs, ViTShape

Norm = nn.LayerNorm | nn.Identity


class ViTOutput(NamedTuple):
    """What one forward gives; the last two hold the blocks that were asked for, by number."""

    logits: Tensor  # [B, classes] float32
    cls_scores: Tensor  # [B, K] float32
    features: dict[int, Tensor]  # outputs of blocks, [B, N, D] each
    attention: dict[int, Tensor]  # attention maps of blocks after the softmax, [B, H, N, N] float32 each


class FrozenBlock(nn.Module):
    """A pre-norm transformer block; LayerScale, where a model has it, is folded into ``proj`` and ``fc2``.

    ``scale`` is that of attention's logits: None for ``1 / sqrt(d)``, 1 where the queries come scaled, see `fold`.
    """

    def __init__(
        self,
        heads: int,
        norms: tuple[Norm, Norm],
        attention_layers: tuple[nn.Linear, Norm, Norm, nn.Linear],
        mlp: tuple[nn.Linear, Callable[[Tensor], Tensor], nn.Linear],
    ) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = norms
        self.qkv: nn.Linear | ScaledLinear
        self.qkv, self.q_norm, self.k_norm, self.proj = attention_layers
        self.fc1, self.act, self.fc2 = mlp
        self.scale: float | None = None

    def _pack(self, projected: Tensor, parts: int) -> Tensor:
        """``[B, N, parts * H * d]`` to ``[B, N, parts, H, d]``."""
        return projected.unflatten(2, (parts, self.heads, -1))

    def _project(self, x: Tensor, first: int, last: int) -> Tensor:
        """Outputs ``first`` to ``last`` of ``qkv``: ``[B, M, D]`` to ``[B, M, last - first]``."""
        if isinstance(self.qkv, ScaledLinear):
            return self.qkv.part(x, first, last)
        weight, bias = self.qkv.weight, self.qkv.bias
        return F.linear(x, weight[first:last], None if bias is None else bias[first:last])

    def _finish(self, x: Tensor, attended: Tensor) -> Tensor:
        """Projection, MLP and both residual sums; ``x [B, M, D]``, ``attended [B, H, M, d]``."""
        x = x + self.proj(attended.transpose(1, 2).flatten(2))
        return x + self.fc2(self.act(self.fc1(self.norm2(x))))

    def forward(self, x: Tensor, choice: str | None = None) -> Tensor:
        """``[B, N, D]`` to ``[B, N, D]``; ``choice`` of attention as in `attention`."""
        packed = self._pack(self.qkv(self.norm1(x)), 3)
        if isinstance(self.q_norm, nn.Identity) and isinstance(self.k_norm, nn.Identity):
            return self._finish(x, packed_attention(packed, choice=choice, scale=self.scale))
        query, key, value = parts_of(packed)
        query, key = self.q_norm(query), self.k_norm(key)
        return self._finish(x, attention(query, key, value, choice=choice, scale=self.scale))

    def forward_with_attention(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The block with its attention map written out: ``[B, N, D]``, and ``[B, H, N, N]`` in float32 at least."""
        query, key, value = parts_of(self._pack(self.qkv(self.norm1(x)), 3))
        weights = attention_weights(self.q_norm(query), self.k_norm(key), self.scale)
        return self._finish(x, weights.to(value.dtype) @ value), weights

    def forward_last(self, x: Tensor, prefix: int, reads: int) -> tuple[Tensor, Tensor]:
        """The block for the first ``reads`` tokens alone: ``[B, reads, D]``, and the CLS scores ``[B, K]``."""
        normed = self.norm1(x)
        inner = self.qkv.out_features // 3
        (query,) = parts_of(self._pack(self._project(first_tokens(normed, reads), 0, inner), 1))
        key, value = parts_of(self._pack(self._project(normed, inner, 3 * inner), 2))
        attended, scores = cls_attention(self.q_norm(query), self.k_norm(key), value, prefix, scale=self.scale)
        return self._finish(first_tokens(x, reads), attended), scores

    def forward_with_scores(self, x: Tensor, prefix: int, choice: str | None = None) -> tuple[Tensor, Tensor]:
        """The block for all tokens, for heads that average the patches: ``[B, N, D]``, CLS scores ``[B, K]``."""
        query, key, value = parts_of(self._pack(self.qkv(self.norm1(x)), 3))
        query, key = self.q_norm(query), self.k_norm(key)
        _, scores = cls_attention(query[:, :, :1], key, value, prefix, scale=self.scale)
        return self._finish(x, attention(query, key, value, choice=choice, scale=self.scale)), scores


def first_tokens(x: Tensor, count: int) -> Tensor:
    """``[B, count, D]`` of ``[B, N, D]``; a split, whose backward is a concatenation and not a scatter into zeros."""
    return x.split([count, x.shape[1] - count], 1)[0]


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
        features: dict[int, Tensor] = {}
        maps: dict[int, Tensor] = {}
        last = self.shape.depth - 1
        for index, block in enumerate(self.blocks):
            assert isinstance(block, FrozenBlock)
            if index in needs.attention:
                x, maps[index] = block.forward_with_attention(x)
            elif index < last:
                x = block(x, choice)
            else:
                break
            if index in needs.features:
                features[index] = x
        if last in maps:
            scores = maps[last][:, :, 0, self.shape.prefix :].mean(1)
        elif last in needs.features or not self.shape.reads:
            x, scores = self._last.forward_with_scores(x, self.shape.prefix, choice)
            features |= {last: x} if last in needs.features else {}
        else:
            x, scores = self._last.forward_last(x, self.shape.prefix, self.shape.reads)
        return ViTOutput(self._head(x), scores, features, maps)

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
