"""``add_layer_norm``: a residual sum and the layer norm of it, each tensor read and written once.

    sum = x + branch                                              rounded to the dtype of x
    normed[m] = (sum[m] - mean[m]) rstd[m] weight + bias          rstd = 1 / sqrt(variance + eps), over the last axis

The norm is that of the rounded sum, as in the two separate ops: the backward has no other sum to start from, and mean
and rstd then belong to what it reads. Statistics and products are float32. With the gradients ``g`` of ``normed`` and
``r`` of ``sum``, which the residual path brings,

    u = g weight       xhat = (sum - mean) rstd       dx = rstd (u - mean(u) - xhat mean(u xhat)) + r

``dx`` is the gradient of both ``x`` and ``branch``, and autograd gets one tensor for both. Weight and bias are frozen:
they have no gradient.

Bytes, of ``M`` rows of ``D`` values: the forward reads ``x`` and ``branch`` and writes ``sum`` and ``normed``, the
backward reads ``sum``, ``g`` and ``r`` and writes ``dx``: ``4 M D`` values each way, and two floats a row. Without a
branch ``sum`` is ``x`` itself and is not written. A program holds whole rows in registers; where one warp does, the
sums need no shared memory and no barrier.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from smi_fast.kernels.cls_attention import dense_rows, power_of_two
from smi_fast.kernels.common.check import FLOATS, Expected, check, leading_letters
from smi_fast.kernels.common.configs import best
from smi_fast.kernels.common.dispatch import Impl, choose, tl, triton, why_not_triton
from smi_fast.kernels.common.launch import Arguments, Config, Launch

MOST_WIDTH = 4096  # of a row, in the registers of a program

Statistics = tuple[Tensor, Tensor]  # mean and rstd of each row


def add_layer_norm_reference(
    x: Tensor, branch: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """Plain torch; shapes as in `add_layer_norm`."""
    total = x if branch is None else x + branch
    return total, F.layer_norm(total, total.shape[-1:], weight, bias, eps)


def statistics_reference(total: Tensor, eps: float) -> Statistics:
    """Plain torch: mean and rstd of each row, ``[...]`` in float32 at least."""
    values = total.to(torch.promote_types(total.dtype, torch.float32))
    return values.mean(-1), (values.var(-1, correction=0) + eps).rsqrt()


def add_layer_norm_backward_reference(
    total: Tensor, statistics: Statistics, weight: Tensor | None, d_normed: Tensor, d_sum: Tensor | None
) -> Tensor:
    """Plain torch: the gradient of ``x`` and of ``branch``, from those of ``normed`` and, unless None, of ``sum``."""
    exact = torch.promote_types(total.dtype, torch.float32)
    mean, rstd = (number[..., None] for number in statistics)
    xhat, slope = (total.to(exact) - mean) * rstd, d_normed.to(exact)
    if weight is not None:
        slope = slope * weight.to(exact)
    dx = rstd * (slope - slope.mean(-1, keepdim=True) - xhat * (slope * xhat).mean(-1, keepdim=True))
    return (dx if d_sum is None else dx + d_sum.to(exact)).to(total.dtype)


@triton.jit(do_not_specialize=["rows"])
def norm_kernel(
    x, branch,  # [M, D], rows strided; no branch: None
    weight, bias,  # [D] or None
    total, normed,  # [M, D]; total is not written without a branch
    mean, rstd,  # [M] float32
    rows, x_m, branch_m, eps,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, channel = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, BLOCK_D)
    filled = channel < D
    inside = (row < rows)[:, None] & filled[None, :]
    at = row[:, None] * D + channel[None, :]

    values = tl.load(x + row[:, None] * x_m + channel[None, :], mask=inside, other=0.0).to(tl.float32)
    if branch is not None:
        values += tl.load(branch + row[:, None] * branch_m + channel[None, :], mask=inside, other=0.0).to(tl.float32)
        rounded = values.to(total.dtype.element_ty)
        tl.store(total + at, rounded, mask=inside)
        values = rounded.to(tl.float32)

    middle = tl.sum(values, 1) / D
    away = tl.where(inside, values - middle[:, None], 0.0)
    over = 1 / tl.sqrt_rn(tl.sum(away * away, 1) / D + eps)
    tl.store(mean + row, middle, mask=row < rows)
    tl.store(rstd + row, over, mask=row < rows)
    result = away * over[:, None]
    if weight is not None:
        result *= tl.load(weight + channel, mask=filled, other=0.0).to(tl.float32)[None, :]
    if bias is not None:
        result += tl.load(bias + channel, mask=filled, other=0.0).to(tl.float32)[None, :]
    tl.store(normed + at, result.to(normed.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def norm_backward_kernel(
    total,  # [M, D], rows strided
    mean, rstd,  # [M] float32
    weight,  # [D] or None
    d_normed, d_sum,  # [M, D], rows strided; no gradient of the sum: None
    dx,  # [M, D]
    rows, total_m, normed_m, sum_m,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, channel = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, BLOCK_D)
    inside = (row < rows)[:, None] & (channel < D)[None, :]

    values = tl.load(total + row[:, None] * total_m + channel[None, :], mask=inside, other=0.0).to(tl.float32)
    slope = tl.load(d_normed + row[:, None] * normed_m + channel[None, :], mask=inside, other=0.0).to(tl.float32)
    if weight is not None:
        slope *= tl.load(weight + channel, mask=channel < D, other=0.0).to(tl.float32)[None, :]
    middle = tl.load(mean + row, mask=row < rows, other=0.0)
    over = tl.load(rstd + row, mask=row < rows, other=0.0)
    xhat = (values - middle[:, None]) * over[:, None]  # no number of a row beyond D, but the slope is 0 there
    level, share = tl.sum(slope, 1) / D, tl.sum(slope * xhat, 1) / D
    result = (slope - level[:, None] - xhat * share[:, None]) * over[:, None]
    if d_sum is not None:
        result += tl.load(d_sum + row[:, None] * sum_m + channel[None, :], mask=inside, other=0.0).to(tl.float32)
    tl.store(dx + row[:, None] * D + channel[None, :], result.to(dx.dtype.element_ty), mask=inside)


def rows_of(tensor: Tensor) -> Tensor:
    """``[..., D]`` as ``[M, D]``, copied only where rows are not dense or not one distance apart."""
    return dense_rows(tensor.reshape(-1, tensor.shape[-1]))


def sides_of(width: int, config: Config) -> dict[str, Any]:
    """Constants of both kernels."""
    return {"D": width, "BLOCK_D": power_of_two(width), "BLOCK": config.block}


def norm_launch(
    x: Tensor,
    branch: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    config: Config | None = None,
) -> tuple[Launch, tuple[Tensor, ...]]:
    """Launch of the forward on ``[M, D]``, and what it fills: sum (``x`` without a branch), normed, mean and rstd."""
    count, width = x.shape
    normed = x.new_empty(count, width)
    total = x if branch is None else torch.empty_like(normed)
    mean, rstd = (x.new_empty(count, dtype=torch.float32) for _ in range(2))
    tensors = (x, branch, weight, bias, eps)
    config = config or best("add_layer_norm", power_of_two(width), lambda tried: norm_launch(*tensors, tried)[0])
    arguments: Arguments = {"x": x, "branch": branch, "weight": weight, "bias": bias, "total": total, "normed": normed}
    arguments |= {"mean": mean, "rstd": rstd, "rows": count, "eps": eps}
    arguments |= {"x_m": x.stride(0), "branch_m": 0 if branch is None else branch.stride(0)}
    grid = (triton.cdiv(count, config.block),)
    return Launch(norm_kernel, grid, arguments, sides_of(width, config), config.warps), (total, normed, mean, rstd)


def norm_backward_launch(
    total: Tensor,
    statistics: Statistics,
    weight: Tensor | None,
    d_normed: Tensor,
    d_sum: Tensor | None,
    config: Config | None = None,
) -> tuple[Launch, Tensor]:
    """Launch of the backward on ``[M, D]``, and the gradient that it fills."""
    count, width = total.shape
    dx = total.new_empty(count, width)
    tensors, kind = (total, statistics, weight, d_normed, d_sum), power_of_two(width)
    config = config or best("add_layer_norm_backward", kind, lambda tried: norm_backward_launch(*tensors, tried)[0])
    arguments: Arguments = {"total": total, "mean": statistics[0], "rstd": statistics[1], "weight": weight}
    arguments |= {"d_normed": d_normed, "d_sum": d_sum, "dx": dx, "rows": count}
    arguments |= {"total_m": total.stride(0), "normed_m": d_normed.stride(0)}
    arguments |= {"sum_m": 0 if d_sum is None else d_sum.stride(0)}
    grid = (triton.cdiv(count, config.block),)
    return Launch(norm_backward_kernel, grid, arguments, sides_of(width, config), config.warps), dx


def unsupported(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> str | None:
    """Why the kernels cannot take these tensors, None if they can."""
    if x.dtype == torch.float64:
        return "float64 has no kernel"
    if x.shape[-1] > MOST_WIDTH:
        return f"rows of {x.shape[-1]}, the kernel takes up to {MOST_WIDTH}"
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is not None and parameter.requires_grad:
            return f"{name} requires a gradient, and the kernel gives one to x and branch alone"
    return None


def run_forward(
    x: Tensor, branch: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sum, normed, mean and rstd from the kernel; where it cannot run, from the reference."""
    if why_not_triton(x) or unsupported(x, None, None):
        total, normed = add_layer_norm_reference(x, branch, weight, bias, eps)
        return total.contiguous(), normed.contiguous(), *statistics_reference(total, eps)
    rows = None if branch is None else rows_of(branch)
    launch, (total, normed, mean, rstd) = norm_launch(rows_of(x), rows, weight, bias, eps)
    launch.run()
    return total.view(x.shape), normed.view(x.shape), mean.view(x.shape[:-1]), rstd.view(x.shape[:-1])


@torch.library.custom_op("smi_fast::add_layer_norm", mutates_args=())
def _add_norm(
    x: Tensor, branch: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sum, normed, mean and rstd."""
    return run_forward(x, branch, weight, bias, eps)


@_add_norm.register_fake
def _(
    x: Tensor, branch: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), *fresh_results(x)


@torch.library.custom_op("smi_fast::layer_norm", mutates_args=())
def _norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Normed, mean and rstd; an op of its own, since an op must not return its input."""
    return run_forward(x, None, weight, bias, eps)[1:]


@_norm.register_fake
def _(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    return fresh_results(x)


def fresh_results(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Fresh memory of normed, mean and rstd."""
    exact = torch.promote_types(x.dtype, torch.float32)
    return x.new_empty(x.shape), x.new_empty(x.shape[:-1], dtype=exact), x.new_empty(x.shape[:-1], dtype=exact)


@torch.library.custom_op("smi_fast::add_layer_norm_backward", mutates_args=())
def _norm_backward(
    total: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, d_normed: Tensor, d_sum: Tensor | None
) -> Tensor:
    """The kernel; where it cannot run, the reference."""
    if why_not_triton(total) or unsupported(total, None, None):
        return add_layer_norm_backward_reference(total, (mean, rstd), weight, d_normed, d_sum).contiguous()
    statistics = mean.reshape(-1), rstd.reshape(-1)
    rows = None if d_sum is None else rows_of(d_sum)
    launch, dx = norm_backward_launch(rows_of(total), statistics, weight, rows_of(d_normed), rows)
    launch.run()
    return dx.view(total.shape)


@_norm_backward.register_fake
def _(
    total: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, d_normed: Tensor, d_sum: Tensor | None
) -> Tensor:
    return total.new_empty(total.shape)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, _, weight, _, _ = inputs
    total, _, mean, rstd = output
    ctx.save_for_backward(total, mean, rstd, weight)
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, d_sum: Tensor | None, d_normed: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    dx = d_sum if d_normed is None else _norm_backward(*ctx.saved_tensors, d_normed, d_sum)
    return dx, dx, None, None, None


def _save_without_branch(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, _, _ = inputs
    _, mean, rstd = output
    ctx.save_for_backward(x, mean, rstd, weight)
    ctx.mark_non_differentiable(mean, rstd)


def _backward_without_branch(ctx: Any, d_normed: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    return _norm_backward(*ctx.saved_tensors, d_normed, None), None, None, None


_add_norm.register_autograd(_backward, setup_context=_save_for_backward)
_norm.register_autograd(_backward_without_branch, setup_context=_save_without_branch)


def add_layer_norm(
    x: Tensor,
    branch: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    *,
    impl: Impl | None = None,
) -> tuple[Tensor, Tensor]:
    """``x + branch``, and the layer norm of that over the last axis.

    Args:
        x: ``[..., D]``; any strides.
        branch: as ``x``, or None for a norm alone.
        weight, bias: ``[D]`` in the dtype of ``x``, or None; as in ``nn.LayerNorm``.
        eps: added to the variance.
        impl: see ``dispatch.py``. The kernel takes at most 32 bits, rows of up to 4096, and frozen weights.

    Returns:
        sum: ``[..., D]``, ``x`` itself without a branch; normed: the same shape; both in the dtype of ``x``.

    Raises:
        ValueError: a shape, dtype, device or ``impl`` that does not fit; an ``eps`` that is negative or not finite.
    """
    _check(x, branch, weight, bias)
    if not (math.isfinite(eps) and eps >= 0):
        raise ValueError(f"add_layer_norm: eps={eps}: must be finite and at least 0")
    if choose("add_layer_norm", impl, x, unsupported(x, weight, bias)) == "torch":
        return add_layer_norm_reference(x, branch, weight, bias, eps)
    if branch is None:
        return x, _norm(x, weight, bias, float(eps))[0]
    return _add_norm(x, branch, weight, bias, float(eps))[:2]


def _check(x: Tensor, branch: Tensor | None, weight: Tensor | None, bias: Tensor | None) -> None:
    if branch is not None and branch.shape != x.shape:
        shapes = f"branch of shape {tuple(branch.shape)}: must be {tuple(x.shape)}, as x"
        raise ValueError(f"add_layer_norm: {shapes}")
    leading, own = leading_letters(x), (x.dtype,)
    expected: dict[str, Expected] = {"x": (x, leading, FLOATS)}
    for name, tensor, shape in (("branch", branch, leading), ("weight", weight, "D"), ("bias", bias, "D")):
        if tensor is not None:
            expected[name] = (tensor, shape, own)
    check("add_layer_norm", expected)
