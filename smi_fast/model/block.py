"""`FrozenBlock`: a transformer block whose weights are frozen, in the forms that `SparseViT` needs.

Shape letters: B images, K kept patches, M tokens that go on, N = K + prefix tokens, D width, H heads, d head width.

A residual sum and the norm that reads it are one op, so the sum at the end of a block is left to the norm that opens
the next: blocks hand on a `Stream`.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from smi_fast.kernels.add_layer_norm import add_layer_norm
from smi_fast.kernels.cls_attention import cls_attention
from smi_fast.kernels.mlp import mlp
from smi_fast.kernels.tile_attention import parts_of
from smi_fast.model.attention import attention, attention_weights, packed_attention
from smi_fast.model.scaled_linear import ScaledLinear

Norm = nn.LayerNorm | nn.Identity


class Stream(NamedTuple):
    """The residual stream between blocks, its last sum not taken yet."""

    x: Tensor  # [B, M, D]
    branch: Tensor | None = None  # [B, M, D], to be added; None for nothing

    @property
    def total(self) -> Tensor:
        """The sum, ``[B, M, D]``."""
        return self.x if self.branch is None else self.x + self.branch


def add_norm(norm: Norm, stream: Stream) -> tuple[Tensor, Tensor]:
    """The sum of a stream, and the norm of it."""
    if isinstance(norm, nn.Identity):
        return stream.total, stream.total
    return add_layer_norm(stream.x, stream.branch, norm.weight, norm.bias, norm.eps)


class FrozenBlock(nn.Module):
    """A pre-norm transformer block; LayerScale, where a model has it, is folded into ``proj`` and ``fc2``.

    ``scale`` is that of attention's logits: None for ``1 / sqrt(d)``, 1 where the queries come scaled, see `fold`.
    """

    def __init__(
        self,
        heads: int,
        norms: tuple[Norm, Norm],
        attention_layers: tuple[nn.Linear, Norm, Norm, nn.Linear],
        mlp_layers: tuple[nn.Linear, Callable[[Tensor], Tensor], nn.Linear],
    ) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = norms
        self.qkv: nn.Linear | ScaledLinear
        self.qkv, self.q_norm, self.k_norm, self.proj = attention_layers
        self.fc1, self.act, self.fc2 = mlp_layers
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

    def _feed_forward(self, x: Tensor) -> Tensor:
        """``[B, M, D]`` to ``[B, M, D]``; in one op where it computes what the layers do."""
        exact = isinstance(self.act, nn.GELU) and self.act.approximate == "none"
        if exact and x.dtype.itemsize == 2 and isinstance(self.fc1, nn.Linear) and isinstance(self.fc2, nn.Linear):
            return mlp(x, self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias)
        return self.fc2(self.act(self.fc1(x)))

    def _finish(self, x: Tensor, attended: Tensor) -> Stream:
        """Projection and MLP; ``x [B, M, D]``, ``attended [B, H, M, d]``."""
        x, normed = add_norm(self.norm2, Stream(x, self.proj(attended.transpose(1, 2).flatten(2))))
        return Stream(x, self._feed_forward(normed))

    def forward(self, stream: Stream, choice: str | None = None) -> Stream:
        """The block for ``[B, N, D]``; ``choice`` of attention as in `attention`."""
        x, normed = add_norm(self.norm1, stream)
        packed = self._pack(self.qkv(normed), 3)
        if isinstance(self.q_norm, nn.Identity) and isinstance(self.k_norm, nn.Identity):
            return self._finish(x, packed_attention(packed, choice=choice, scale=self.scale))
        query, key, value = parts_of(packed)
        query, key = self.q_norm(query), self.k_norm(key)
        return self._finish(x, attention(query, key, value, choice=choice, scale=self.scale))

    def forward_with_attention(self, stream: Stream) -> tuple[Stream, Tensor]:
        """The block with its attention map written out: ``[B, N, D]``, and ``[B, H, N, N]`` in float32 at least."""
        x, normed = add_norm(self.norm1, stream)
        query, key, value = parts_of(self._pack(self.qkv(normed), 3))
        weights = attention_weights(self.q_norm(query), self.k_norm(key), self.scale)
        return self._finish(x, weights.to(value.dtype) @ value), weights

    def forward_last(self, stream: Stream, prefix: int, reads: int) -> tuple[Stream, Tensor]:
        """The block for the first ``reads`` tokens alone: ``[B, reads, D]``, and the CLS scores ``[B, K]``."""
        x, normed = add_norm(self.norm1, stream)
        inner = self.qkv.out_features // 3
        (query,) = parts_of(self._pack(self._project(first_tokens(normed, reads), 0, inner), 1))
        key, value = parts_of(self._pack(self._project(normed, inner, 3 * inner), 2))
        attended, scores = cls_attention(self.q_norm(query), self.k_norm(key), value, prefix, scale=self.scale)
        return self._finish(first_tokens(x, reads), attended), scores

    def forward_with_scores(self, stream: Stream, prefix: int, choice: str | None = None) -> tuple[Stream, Tensor]:
        """The block for all tokens, for heads that average the patches: ``[B, N, D]``, CLS scores ``[B, K]``."""
        x, normed = add_norm(self.norm1, stream)
        query, key, value = parts_of(self._pack(self.qkv(normed), 3))
        query, key = self.q_norm(query), self.k_norm(key)
        _, scores = cls_attention(query[:, :, :1], key, value, prefix, scale=self.scale)
        return self._finish(x, attention(query, key, value, choice=choice, scale=self.scale)), scores


def first_tokens(x: Tensor, count: int) -> Tensor:
    """``[B, count, D]`` of ``[B, N, D]``; a split, whose backward is a concatenation and not a scatter into zeros."""
    return x.split([count, x.shape[1] - count], 1)[0]
