"""Fold into the linear layers of a frozen model what stands beside them.

    LayerNorm's affine, W (gamma * x + beta) + b = (W * gamma) x + (b + W beta)
    attention's scale, (q / sqrt(d)) . k, into the rows of ``qkv`` that make ``q``, or into an affine norm of ``q``

Nothing else changes, so a model computes the same, but for rounding. What is multiplied are the weights as they were
loaded, in float64: a product of two rounded numbers would be rounded twice.
"""

import torch
from torch import Tensor, nn

from smi_fast.model.block import FrozenBlock, Norm
from smi_fast.model.sparse_vit import SparseViT

FULL = ("float32", "float64")


@torch.no_grad()
def fold(model: SparseViT) -> SparseViT:
    """Fold norms and scale of all blocks into their linear layers, in place; see the top of the file.

    ``norm1`` and ``norm2`` lose their affine, a layer without bias may get one, and `FrozenBlock.scale` becomes 1.
    A model that is folded already is left as it is.

    Args:
        model: in float32 or float64; cast it, or convert it to fp8, afterwards.

    Raises:
        ValueError: a model in another dtype, whose weights are rounded already.
    """
    if model.precision not in FULL:
        raise ValueError(f"model is {model.precision}: must be {' or '.join(FULL)}; fold first, then cast")
    for block in model.blocks:
        assert isinstance(block, FrozenBlock)
        assert isinstance(block.qkv, nn.Linear)
        block.norm1 = _fold_norm(block.norm1, block.qkv)
        block.norm2 = _fold_norm(block.norm2, block.fc1)
        _fold_scale(block, block.qkv)
    model.requires_grad_(False)
    return model.eval()


def _fold_norm(norm: Norm, linear: nn.Linear) -> Norm:
    """Put the affine of a norm into the layer that reads it; returns the norm without."""
    if isinstance(norm, nn.Identity) or not norm.elementwise_affine:
        return norm
    weight = linear.weight.double()
    if norm.bias is not None:
        shift = weight @ norm.bias.double()
        shift = shift if linear.bias is None else shift + linear.bias.double()
        linear.bias = nn.Parameter(shift.to(linear.weight.dtype))
    linear.weight.copy_(weight * norm.weight.double())
    return nn.LayerNorm(norm.normalized_shape, norm.eps, elementwise_affine=False)


def _fold_scale(block: FrozenBlock, qkv: nn.Linear) -> None:
    """Let the queries come out scaled. A norm of the queries without affine undoes what its input was scaled by."""
    if block.scale is not None:
        return
    inner = qkv.out_features // 3
    owner, rows = (qkv, inner) if isinstance(block.q_norm, nn.Identity) else (block.q_norm, inner // block.heads)
    scale = (inner // block.heads) ** -0.5
    parts: list[Tensor | None] = [owner.weight, owner.bias]
    if parts[0] is None:
        return
    for part in parts:
        if part is not None:
            part[:rows] = (part[:rows].double() * scale).to(part.dtype)
    block.scale = 1.0
