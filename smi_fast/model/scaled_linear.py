"""`ScaledLinear`: a frozen linear layer whose two products run on 8-bit floats.

    y  = s_x s_W  q(x)  q(W)^T + b         q: x / s rounded to e4m3
    dx = s_dy s_W q'(dy) q(W)              q': dy / s rounded to e5m2 or e4m3

Each tensor has one scale ``s``, the smallest power of two at which it fits the format. Dividing by it is exact, and a
value rounds the same whatever else is in the tensor, as long as it is no smaller than ``2^-13`` of the largest (e4m3;
``2^-28`` in e5m2): an image hardly depends on its batch-mates. Scales of activations and gradients are worked out on
the device at each product; nothing waits for the host.

NaN and infinite values become NaN and are left out of the scale, so that they reach the outputs of their own rows and
no others. Weights are frozen: there is no weight gradient, and nothing of the input is saved for the backward.

All of it is plain ATen operations, which inductor fuses into the neighbours; ``torch._scaled_mm`` is the product.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

FP8 = torch.float8_e4m3fn
GRADIENTS = (torch.float8_e5m2, torch.float8_e4m3fn)
MULTIPLE = 16  # `torch._scaled_mm` takes no other widths


def quantise(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Round to 8-bit floats of one scale.

    Args:
        x: any shape, floating point; NaN and infinite values give NaN.
        dtype: ``torch.float8_e4m3fn`` or ``torch.float8_e5m2``.

    Returns:
        ``q``, of the shape of ``x`` in ``dtype``, and the scale, a float32 scalar: ``x`` is about ``scale * q``.
    """
    broken = ~x.isfinite()
    largest = x.masked_fill(broken, 0).abs().amax().float()
    limits = torch.finfo(torch.float32)
    scale = _power_of_two((largest / torch.finfo(dtype).max).clamp(min=limits.tiny))
    # conversions differ in what they make of infinity and of values beyond the format: neither is left here
    return (x / scale).masked_fill(broken, torch.nan).to(dtype), scale


def _power_of_two(x: Tensor) -> Tensor:
    """The smallest power of two that is no less than a positive normal float32."""
    mantissa = 0x7FFFFF
    return ((x.view(torch.int32) + mantissa) & ~mantissa).view(torch.float32)


def scaled_linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None = None, dtype: torch.dtype = FP8) -> Tensor:
    """Quantise, dequantise, multiply in float32.

    Args:
        x: ``[..., in]``, rounded to ``dtype``.
        weight: ``[out, in]``, rounded to e4m3.
        bias: ``[out]`` or None.
        dtype: e4m3; of a gradient e5m2 or e4m3.

    Returns:
        ``[..., out]`` float32. With ``dy``, ``weight.T`` and no bias it is the gradient of the input.
    """
    (values, scale), (weights, weight_scale) = quantise(x, dtype), quantise(weight, FP8)
    product = (values.float() * scale) @ (weights.float() * weight_scale).T
    return product if bias is None else product + bias.float()


class _Product(torch.autograd.Function):
    """``[M, in]`` to ``[M, last - first]`` bfloat16, some outputs of a layer; see the top of the file.

    The layer goes through as an object: it is frozen, so autograd need not know its tensors.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: "ScaledLinear", first: int, last: int) -> Tensor:
        ctx.layer, ctx.first, ctx.last = layer, first, last
        bias = None if layer.bias is None else layer.bias[first:last]
        # short accumulators, as is usual forward; not for gradients, whose small sums count
        return _multiply(x, FP8, layer.weight[first:last], layer.scale, bias, use_fast_accum=True)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor, None, None, None]:
        layer = ctx.layer
        weight = layer.transposed[:, ctx.first : ctx.last]
        return _multiply(d_y, layer.gradient, weight, layer.scale), None, None, None


def _multiply(
    x: Tensor,
    dtype: torch.dtype,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    use_fast_accum: bool = False,
) -> Tensor:
    """``x weight^T + bias`` in bfloat16; ``x`` is to be quantised, ``weight`` is."""
    values, own = quantise(x, dtype)
    values = values.contiguous()  # row by row, as the product wants it
    return torch._scaled_mm(
        values, weight.t(), own, scale, bias=bias, out_dtype=torch.bfloat16, use_fast_accum=use_fast_accum
    )


class ScaledLinear(nn.Module):
    """A frozen ``nn.Linear`` on 8-bit floats, bfloat16 outside.

    Args:
        linear: what it computes; widths in multiples of 16.
        gradient: format of the output's gradient, ``torch.float8_e5m2`` or ``torch.float8_e4m3fn``.

    Raises:
        ValueError: another format, or another width.
    """

    weight: Tensor  # [out, in] e4m3
    transposed: Tensor  # [in, out] e4m3, a copy: the product wants its second operand column by column
    scale: Tensor  # float32 scalar, of the weight
    bias: Tensor | None  # [out] bfloat16

    def __init__(self, linear: nn.Linear, gradient: torch.dtype = torch.float8_e5m2) -> None:
        super().__init__()
        if gradient not in GRADIENTS:
            raise ValueError(f"gradient={gradient}: must be one of {', '.join(map(str, GRADIENTS))}")
        if not fits(linear):
            widths = f"in_features={linear.in_features}, out_features={linear.out_features}"
            raise ValueError(f"{widths}: must be multiples of {MULTIPLE}")
        self.in_features, self.out_features, self.gradient = linear.in_features, linear.out_features, gradient
        weight, scale = quantise(linear.weight.detach(), FP8)
        self.register_buffer("weight", weight.contiguous())
        self.register_buffer("transposed", weight.t().contiguous())
        self.register_buffer("scale", scale)
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().to(torch.bfloat16))

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in]`` to ``[..., out]`` bfloat16."""
        return self.part(x, 0, self.out_features)

    def part(self, x: Tensor, first: int, last: int) -> Tensor:
        """Outputs ``first`` to ``last`` alone, both multiples of 16: ``[..., in]`` to ``[..., last - first]``."""
        y = _Product.apply(x.reshape(-1, self.in_features), self, first, last)
        return y.view(*x.shape[:-1], last - first)


def fits(linear: nn.Linear) -> bool:
    """Has the layer widths that the product takes?"""
    return linear.in_features % MULTIPLE == 0 and linear.out_features % MULTIPLE == 0
