"""What `kernels` runs of the ViT's blocks; a case is what `kernel_cases.py` says."""

from typing import Any

import torch
from torch import Tensor

from benchmarks.speed.kernel_cases import Function, Op, Shape, randn
from benchmarks.systems.attention import torch_attention
from smi_fast.kernels.add_layer_norm import add_layer_norm, add_layer_norm_reference
from smi_fast.kernels.cls_attention import cls_attention, cls_attention_reference
from smi_fast.kernels.mlp import mlp, mlp_reference
from smi_fast.kernels.tile_attention import packed_tile_attention, parts_of, tile_attention, unsupported

EPS = 1e-6  # of the norms


def heads(draw: torch.Generator, s: Shape) -> tuple[Tensor, Tensor, Tensor]:
    """Query of CLS, and keys and values as views of one projection, as the model makes them."""
    tokens = s.kept + 1
    both = randn(draw, s, s.batch, tokens, 2, s.heads, 64, dtype=s.dtype)
    key, value = both.permute(2, 0, 3, 1, 4).unbind(0)
    return randn(draw, s, s.batch, s.heads, 1, 64, dtype=s.dtype), key, value


def attention_and_row(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """PyTorch's attention, and the softmax row beside it: what one would write without the op."""
    row = (query.float() * 64**-0.5) @ key.float().transpose(-2, -1)
    return torch_attention(query, key, value), row.softmax(-1)[:, :, 0, 1:].mean(1)


def with_backward(function: Function) -> Function:
    """Output, score and the gradients of all three inputs, for a cotangent that comes last."""

    def run(query: Tensor, key: Tensor, value: Tensor, cotangent: Tensor) -> tuple[Tensor, ...]:
        leaves = [tensor.detach().requires_grad_() for tensor in (query, key, value)]
        with torch.enable_grad():
            out, score = function(*leaves)
            return out.detach(), score.detach(), *torch.autograd.grad(out, leaves, cotangent)

    return run


def attention_ops(s: Shape) -> list[Op]:
    """Forward; forward and backward; and both with PyTorch's attention as the reference."""
    keys_and_values = 2 * s.batch * s.heads * (s.kept + 1) * 64 * s.dtype.itemsize

    def kernel(query: Tensor, key: Tensor, value: Tensor) -> Any:
        return cls_attention(query, key, value, 1, impl="triton")

    def plain(query: Tensor, key: Tensor, value: Tensor) -> Any:
        return cls_attention_reference(query, key, value, 1)

    def draw_both(draw: torch.Generator) -> tuple[Tensor, ...]:
        query, key, value = heads(draw, s)
        return query, key, value, randn(draw, s, *query.shape, dtype=s.dtype)

    tolerance = 1e-5 if s.dtype == torch.float32 else 2e-2
    rows = []
    for name, reference in (("cls_attention", plain), ("cls_attention (over SDPA and a row)", attention_and_row)):
        rows.append(Op(name, keys_and_values, lambda draw: heads(draw, s), reference, kernel, tolerance))
        title, both = f"{name}, with backward", 3 * keys_and_values
        rows.append(Op(title, both, draw_both, reference, with_backward(kernel), tolerance, with_backward))
    return rows


def with_gradient(function: Function) -> Function:
    """Output, and the gradient of the one input, for a cotangent that comes last."""

    def run(packed: Tensor, cotangent: Tensor) -> tuple[Tensor, ...]:
        leaf = packed.detach().requires_grad_()
        with torch.enable_grad():
            out = function(leaf)
            return out.detach(), *torch.autograd.grad(out, leaf, cotangent)

    return run


def of_parts_by_torch(packed: Tensor) -> Tensor:
    """PyTorch's own, of the parts of a projection."""
    return torch_attention(*parts_of(packed))


def tile_ops(s: Shape) -> list[Op]:
    """Self-attention on a whole projection beside PyTorch's: forward; and both ways, with one gradient or three.

    None where a tile does not fit into the device's shared memory: float32 beyond 128 tokens.
    """
    if unsupported(*[torch.empty(1, 1, s.kept + 1, 64, dtype=s.dtype, device=s.device)] * 3):
        return []
    inner = s.batch * (s.kept + 1) * s.heads * 64  # values of each of the three parts

    def packed(draw: torch.Generator) -> tuple[Tensor, ...]:
        return (randn(draw, s, s.batch, s.kept + 1, 3, s.heads, 64, dtype=s.dtype),)

    def draw_both(draw: torch.Generator) -> tuple[Tensor, ...]:
        cotangent = randn(draw, s, s.batch, s.kept + 1, s.heads, 64, dtype=s.dtype)
        return *packed(draw), cotangent.transpose(1, 2)

    def whole(packed: Tensor) -> Tensor:
        return packed_tile_attention(packed, impl="triton")

    def of_parts(packed: Tensor) -> Tensor:
        return tile_attention(*parts_of(packed), impl="triton")

    tolerance = 1e-5 if s.dtype == torch.float32 else 2e-2
    rows = [Op("tile_attention (over SDPA)", 4 * inner * s.dtype.itemsize, packed, of_parts_by_torch, whole, tolerance)]
    for title, kernel in (("with backward", whole), ("three gradients, with backward", of_parts)):
        name, least = f"tile_attention (over SDPA), {title}", 11 * inner * s.dtype.itemsize
        rows.append(Op(name, least, draw_both, of_parts_by_torch, with_gradient(kernel), tolerance, with_gradient))
    return rows


def width(s: Shape) -> int:
    """``D``."""
    return s.heads * 64


def tokens(draw: torch.Generator, s: Shape, *more: int) -> Tensor:
    """``[B, N, D]``, or so many of them."""
    return randn(draw, s, *more, s.batch, s.kept + 1, width(s), dtype=s.dtype)


def norm_with_backward(function: Function) -> Function:
    """Sum, normed and the gradient of both inputs, for cotangents that come last."""

    def run(x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor, cotangents: Tensor) -> tuple[Tensor, ...]:
        leaves = [tensor.detach().requires_grad_() for tensor in (x, branch)]
        with torch.enable_grad():
            total, normed = function(*leaves, weight, bias)
            return total.detach(), normed.detach(), *torch.autograd.grad((total, normed), leaves, tuple(cotangents))

    return run


def norm_ops(s: Shape) -> list[Op]:
    """Residual sum and norm: forward, and both ways."""

    def draw_all(draw: torch.Generator) -> tuple[Tensor, ...]:
        weight, bias = randn(draw, s, 2, width(s), dtype=s.dtype)
        return *tokens(draw, s, 2), weight, bias

    def draw_both(draw: torch.Generator) -> tuple[Tensor, ...]:
        return *draw_all(draw), tokens(draw, s, 2)

    def kernel(*args: Tensor) -> Any:
        return add_layer_norm(*args, EPS, impl="triton")

    def plain(*args: Tensor) -> Any:
        return add_layer_norm_reference(*args, EPS)

    tolerance = 1e-5 if s.dtype == torch.float32 else 2e-2
    rows = s.batch * (s.kept + 1)
    one_way = rows * (4 * width(s) * s.dtype.itemsize + 8)
    title = "add_layer_norm, with backward"
    return [
        Op("add_layer_norm", one_way, draw_all, plain, kernel, tolerance),
        Op(title, 2 * one_way, draw_both, plain, norm_with_backward(kernel), tolerance, norm_with_backward),
    ]


def mlp_with_backward(function: Function) -> Function:
    """Result, and the gradient of ``x``, for a cotangent that comes last."""

    def run(x: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        leaf = x.detach().requires_grad_()
        with torch.enable_grad():
            out = function(leaf, *rest[:-1])
            return out.detach(), *torch.autograd.grad(out, leaf, rest[-1])

    return run


def mlp_ops(s: Shape) -> list[Op]:
    """Both layers with four times as many hidden values: forward, and both ways; none in float32, which has no kernel.

    Bytes: of what must go through memory, GELU's results and derivative among it; FLOPs: two products each way.
    """
    if s.dtype.itemsize != 2:
        return []
    side, rows = width(s), s.batch * (s.kept + 1)

    def draw_all(draw: torch.Generator) -> tuple[Tensor, ...]:
        weight1, weight2 = (side**-0.5 * randn(draw, s, *shape) for shape in ((4 * side, side), (side, 4 * side)))
        bias1, bias2 = (randn(draw, s, sides, dtype=s.dtype) for sides in (4 * side, side))
        return tokens(draw, s), weight1.to(s.dtype), bias1, weight2.to(s.dtype), bias2

    def draw_both(draw: torch.Generator) -> tuple[Tensor, ...]:
        return *draw_all(draw), tokens(draw, s)

    def kernel(*args: Tensor) -> Tensor:
        return mlp(*args, impl="triton")

    weights, flops = 8 * side * side, 16 * rows * side * side
    forward = s.dtype.itemsize * (weights + rows * side * (2 + 8 + 4))
    both = forward + s.dtype.itemsize * (weights + rows * side * (2 + 8 + 4))
    return [
        Op("mlp", forward, draw_all, mlp_reference, kernel, 2e-2, flops=flops),
        Op(
            "mlp, with backward", both, draw_both, mlp_reference, mlp_with_backward(kernel), 2e-2, mlp_with_backward,
            2 * flops,
        ),
    ]  # fmt: skip


def block_ops(shape: Shape) -> list[Op]:
    """Every op of the blocks at a shape."""
    return attention_ops(shape) + tile_ops(shape) + norm_ops(shape) + mlp_ops(shape)
