"""``mlp``: two linear layers with GELU between, whose hidden values are written as they leave the first product.

    h = x W1^T + b1      a = gelu(h) = h P(h)              P the normal distribution function: the exact, erf GELU
    out = a W2^T + b2    d = gelu'(h) = P(h) + h p(h)      p its density

With the gradient ``g`` of ``out``, and frozen weights,

    dh = (g W2) * d      dx = dh W1

Two of the four products are kernels with an epilogue: ``x W1^T`` keeps ``h`` in float32 registers and writes ``a`` and
``d``, ``g W2`` multiplies its sum by ``d`` and writes ``dh``. Both round once, to the dtype of ``x``. The other two are
torch's own products. ``d`` is saved in place of ``h``, at the same size, so that the backward computes no GELU.

Bytes beside the products, of ``M`` rows and ``F`` hidden values: ``d`` written once and read once, ``2 M F`` values.
GELU and its backward as kernels of their own read ``h``, write ``a``, read ``h`` and ``da``, write ``dh``: ``5 M F``.

``P`` needs ``exp(-h^2 / 2)``, as ``p`` does, and a polynomial in ``t = 1 / (1 + 0.3 |h|)``:

    P(-|h|) = exp(-h^2 / 2) t (c0 + c1 t + ... + c5 t^5)          P(|h|) = 1 - P(-|h|)

The coefficients are the minimax fit of the relative error, 1.6e-6, and 4e-6 in float32 down to ``h = -8``: a hundredth
of half a rounding of float16. On sm_90 both results take 20 instructions a value; with ``erf`` they take 37.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from smi_fast.kernels.add_layer_norm import rows_of
from smi_fast.kernels.cls_attention import power_of_two
from smi_fast.kernels.common.check import FLOATS, Expected, check, leading_letters
from smi_fast.kernels.common.configs import best, pinned
from smi_fast.kernels.common.dispatch import Impl, choose, tl, triton, why_not_triton
from smi_fast.kernels.common.launch import Arguments, Config, Launch, ProductConfig

MULTIPLE = 16  # of widths: rows begin where wide loads may
GROUP = 8  # rows of tiles that go through the same columns of the weight before the next


def mlp_reference(x: Tensor, weight1: Tensor, bias1: Tensor | None, weight2: Tensor, bias2: Tensor | None) -> Tensor:
    """Plain torch; shapes as in `mlp`."""
    return F.linear(F.gelu(F.linear(x, weight1, bias1)), weight2, bias2)


def hidden_reference(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Plain torch: GELU of the first layer and its derivative, ``[..., F]`` both."""
    exact = torch.promote_types(x.dtype, torch.float32)
    h = F.linear(x.to(exact), weight.to(exact), None if bias is None else bias.to(exact))
    density = (-0.5 * h.square()).exp() / math.sqrt(2 * math.pi)
    return F.gelu(h).to(x.dtype), (torch.special.ndtr(h) + h * density).to(x.dtype)


def hidden_backward_reference(d_out: Tensor, weight: Tensor, slope: Tensor) -> Tensor:
    """Plain torch: the gradient before GELU, ``(d_out weight) * slope``."""
    exact = torch.promote_types(d_out.dtype, torch.float32)
    return (d_out.to(exact) @ weight.to(exact) * slope.to(exact)).to(d_out.dtype)


@triton.jit
def gelu_and_slope(h):
    """GELU and its derivative in float32; see the top of the file."""
    root = tl.rsqrt(1 + 0.3 * tl.abs(h))  # one instruction, where a division takes seven
    t = root * root
    series = 0.23310555517673492 - 0.08264715224504471 * t
    series = -0.037066198885440826 + series * t
    series = 0.15550456941127777 + series * t
    series = 0.1107226312160492 + series * t
    tail = (0.12037981301546097 + series * t) * t
    bell = tl.exp2(h * h * -0.7213475204444817)
    share = tl.where(h < 0, 0.0, 1.0) + bell * tl.where(h < 0, tail, -tail)
    return h * share, share + h * 0.3989422804014327 * bell


@triton.jit
def halves(tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Left and right half of a tile."""
    return tl.split(tl.permute(tl.reshape(tile, (ROWS, 2, COLUMNS // 2)), (0, 2, 1)))


@triton.jit
def store_gelu(h, bias, hidden, slope, row, column, rows, N: tl.constexpr):
    """GELU and its derivative of some columns of the product."""
    down, across = tl.arange(0, h.shape[0]), column + tl.arange(0, h.shape[1])
    if bias is not None:
        h += tl.load(bias + across, mask=across < N, other=0.0).to(tl.float32)[None, :]
    value, derivative = gelu_and_slope(h)
    inside = (down < rows - row)[:, None] & (across < N)[None, :]
    base, at = row.to(tl.int64) * N, down[:, None] * N + across[None, :]
    tl.store(hidden + base + at, value.to(hidden.dtype.element_ty), mask=inside)
    tl.store(slope + base + at, derivative.to(slope.dtype.element_ty), mask=inside)


@triton.jit
def place_of_tile(rows, N: tl.constexpr, BLOCK: tl.constexpr, COLUMNS: tl.constexpr, GROUP: tl.constexpr):
    """First row and column of a program's tile; programs side by side share rows and columns in the cache."""
    tiles, across = tl.cdiv(rows, BLOCK), tl.cdiv(N, COLUMNS)
    program = tl.program_id(0)
    first = program // (GROUP * across) * GROUP
    size = tl.minimum(tiles - first, GROUP)
    inside = program % (GROUP * across)
    return (first + inside % size) * BLOCK, inside // size * COLUMNS


@triton.jit
def load_inner(at, most, SIDE: tl.constexpr, LENGTH: tl.constexpr):
    """A block whose last axis goes on to ``most``; without a mask where all blocks are full."""
    if LENGTH % SIDE == 0:
        return tl.load(at)
    return tl.load(at, mask=(tl.arange(0, SIDE) < most)[None, :], other=0.0)


@triton.jit
def tile_product(
    left, right,  # [M, K], rows strided; [N, K] or, not ROWS_ARE_COLUMNS, [K, N], rows strided
    row, column, rows, left_m, right_m,
    K: tl.constexpr, N: tl.constexpr, ROWS_ARE_COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, STEPS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A tile of the product in float32. Rows and columns beyond the last are those of the last, and are not stored."""
    deep, down, across = tl.arange(0, DEPTH), tl.arange(0, BLOCK), tl.arange(0, COLUMNS)
    of_left = left + row.to(tl.int64) * left_m + tl.minimum(down, rows - 1 - row)[:, None] * left_m + deep[None, :]
    if ROWS_ARE_COLUMNS:
        of_right = right + column.to(tl.int64) * right_m
        of_right += tl.minimum(across, N - 1 - column)[:, None] * right_m + deep[None, :]
    else:
        of_right = right + column + deep[:, None] * right_m + across[None, :]
    total = tl.zeros((BLOCK, COLUMNS), tl.float32)
    for step in tl.range(STEPS, num_stages=STAGES):
        one = load_inner(of_left, K - step * DEPTH, DEPTH, K)
        if ROWS_ARE_COLUMNS:
            other = tl.trans(load_inner(of_right, K - step * DEPTH, DEPTH, K))
            of_right += DEPTH
        else:
            if K % DEPTH == 0:
                other = load_inner(of_right, N - column, COLUMNS, N)
            else:
                filled = (deep < K - step * DEPTH)[:, None] & (across < N - column)[None, :]
                other = tl.load(of_right, mask=filled, other=0.0)
            of_right += DEPTH * right_m
        total = tl.dot(one, other, total)
        of_left += DEPTH
    return total


@triton.jit(do_not_specialize=["rows"])
def hidden_kernel(
    x, weight, bias,  # [M, K], rows strided; [N, K], rows strided; [N] or None
    hidden, slope,  # [M, N]
    rows, x_m, weight_m,
    K: tl.constexpr, N: tl.constexpr, GROUP: tl.constexpr,
    BLOCK: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, STEPS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    row, column = place_of_tile(rows, N, BLOCK, COLUMNS, GROUP)
    h = tile_product(
        x, weight, row, column, rows, x_m, weight_m, K, N, True, BLOCK, COLUMNS, DEPTH, STEPS, STAGES
    )  # fmt: skip
    # a quarter after the other: the intermediate values of whole tiles do not fit into registers beside them
    left, right = halves(h, BLOCK, COLUMNS)
    first, second = halves(left, BLOCK, COLUMNS // 2)
    third, fourth = halves(right, BLOCK, COLUMNS // 2)
    store_gelu(first, bias, hidden, slope, row, column, rows, N)
    store_gelu(second, bias, hidden, slope, row, column + COLUMNS // 4, rows, N)
    store_gelu(third, bias, hidden, slope, row, column + COLUMNS // 2, rows, N)
    store_gelu(fourth, bias, hidden, slope, row, column + 3 * COLUMNS // 4, rows, N)


@triton.jit(do_not_specialize=["rows"])
def hidden_backward_kernel(
    d_out, weight,  # [M, K], rows strided; [K, N], rows strided
    slope, d_hidden,  # [M, N]
    rows, out_m, weight_m,
    K: tl.constexpr, N: tl.constexpr, GROUP: tl.constexpr,
    BLOCK: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, STEPS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    row, column = place_of_tile(rows, N, BLOCK, COLUMNS, GROUP)
    total = tile_product(
        d_out, weight, row, column, rows, out_m, weight_m, K, N, False, BLOCK, COLUMNS, DEPTH, STEPS, STAGES
    )  # fmt: skip
    down, across = tl.arange(0, BLOCK), column + tl.arange(0, COLUMNS)
    inside = (down < rows - row)[:, None] & (across < N)[None, :]
    base, at = row.to(tl.int64) * N, down[:, None] * N + across[None, :]
    total *= tl.load(slope + base + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(d_hidden + base + at, total.to(d_hidden.dtype.element_ty), mask=inside)


def product_launch(kernel: Any, arguments: Arguments, sides: tuple[int, int, int], config: Config) -> Launch:
    """A launch of either kernel; ``sides``: rows, depth and columns of the product."""
    assert isinstance(config, ProductConfig)
    rows, depth, columns = sides
    tiles = triton.cdiv(rows, config.block) * triton.cdiv(columns, config.columns)
    constants = {"K": depth, "N": columns, "GROUP": GROUP, "BLOCK": config.block, "COLUMNS": config.columns}
    constants |= {"DEPTH": config.depth, "STEPS": triton.cdiv(depth, config.depth), "STAGES": config.stages}
    return Launch(kernel, (tiles,), arguments | {"rows": rows}, constants, config.warps)


def hidden_launch(
    x: Tensor, weight: Tensor, bias: Tensor | None, config: Config | None = None
) -> tuple[Launch, Tensor, Tensor]:
    """Launch of the first product on ``[M, D]``, and what it fills: GELU and its derivative, ``[M, F]``."""
    sides = (*x.shape, len(weight))
    hidden, slope = (x.new_empty(len(x), len(weight)) for _ in range(2))
    config = config or best("mlp", power_of_two(len(x)), lambda tried: hidden_launch(x, weight, bias, tried)[0])
    arguments: Arguments = {"x": x, "weight": weight, "bias": bias, "hidden": hidden, "slope": slope}
    arguments |= {"x_m": x.stride(0), "weight_m": weight.stride(0)}
    return product_launch(hidden_kernel, arguments, sides, config), hidden, slope


def hidden_backward_launch(
    d_out: Tensor, weight: Tensor, slope: Tensor, config: Config | None = None
) -> tuple[Launch, Tensor]:
    """Launch of the product of a gradient ``[M, E]`` with ``weight [E, F]``, and the ``[M, F]`` that it fills."""
    sides, tensors = (*d_out.shape, weight.shape[1]), (d_out, weight, slope)
    d_hidden = torch.empty_like(slope)
    kind = power_of_two(len(d_out))
    config = config or best("mlp_backward", kind, lambda tried: hidden_backward_launch(*tensors, tried)[0])
    arguments: Arguments = {"d_out": d_out, "weight": weight, "slope": slope, "d_hidden": d_hidden}
    arguments |= {"out_m": d_out.stride(0), "weight_m": weight.stride(0)}
    return product_launch(hidden_backward_kernel, arguments, sides, config), d_hidden


def unsupported(x: Tensor, weight1: Tensor, bias1: Tensor | None, weight2: Tensor, bias2: Tensor | None) -> str | None:
    """Why the kernels cannot take these tensors, None if they can."""
    if x.dtype.itemsize != 2:
        return f"{str(x.dtype).removeprefix('torch.')} has no kernel, 16 bits have"
    for name, width in (("D", x.shape[-1]), ("F", len(weight1)), ("E", len(weight2))):
        if width % MULTIPLE:
            return f"{name}={width}, the kernel takes multiples of {MULTIPLE}"
    named = {"weight1": weight1, "bias1": bias1, "weight2": weight2, "bias2": bias2}
    for name, parameter in named.items():
        if parameter is not None and parameter.requires_grad:
            return f"{name} requires a gradient, and the kernel gives one to x alone"
        if parameter is not None and parameter.stride(-1) != 1:
            return f"{name} is strided, and the kernel makes no copy of it"
    return _short_of_memory(x) if x.device.type == "cuda" else None


def _short_of_memory(x: Tensor) -> str | None:
    shared = torch.cuda.get_device_properties(x.device).shared_memory_per_block_optin
    for op in ("mlp", "mlp_backward"):
        config = pinned(op, power_of_two(x.numel() // x.shape[-1]))
        assert isinstance(config, ProductConfig)
        if config.shared > shared:
            return f"its tiles need {config.shared} bytes of shared memory, there are {shared}"
    return None


def runs(x: Tensor) -> bool:
    """Can a kernel run on the device of a tensor, in its dtype?"""
    return why_not_triton(x) is None and x.dtype.itemsize == 2


@torch.library.custom_op("smi_fast::mlp_hidden", mutates_args=())
def _hidden(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """GELU of a linear layer and its derivative, ``[..., F]``: the kernel; where it cannot run, the reference."""
    if not runs(x):
        return hidden_reference(x, weight, bias)
    launch, hidden, slope = hidden_launch(rows_of(x), weight, bias)
    launch.run()
    return hidden.view(*x.shape[:-1], -1), slope.view(*x.shape[:-1], -1)


@_hidden.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    shape = (*x.shape[:-1], weight.shape[0])
    return x.new_empty(shape), x.new_empty(shape)


@torch.library.custom_op("smi_fast::mlp_hidden_backward", mutates_args=())
def _hidden_backward(d_out: Tensor, weight: Tensor, slope: Tensor) -> Tensor:
    """``(d_out weight) * slope``, ``[..., F]``: the kernel; where it cannot run, the reference."""
    if not runs(d_out):
        return hidden_backward_reference(d_out, weight, slope)
    launch, d_hidden = hidden_backward_launch(rows_of(d_out), weight, slope.view(-1, slope.shape[-1]))
    launch.run()
    return d_hidden.view(slope.shape)


@_hidden_backward.register_fake
def _(d_out: Tensor, weight: Tensor, slope: Tensor) -> Tensor:
    return torch.empty_like(slope)


class _Mlp(torch.autograd.Function):
    """The four products. Not one op, so that a graph shows torch's two, and what is alive between them."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight1: Tensor, bias1: Tensor | None, weight2: Tensor, bias2: Tensor | None
    ) -> Tensor:
        hidden, slope = _hidden(x, weight1, bias1)
        ctx.save_for_backward(weight1, weight2, slope)
        return F.linear(hidden, weight2, bias2)

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        weight1, weight2, slope = ctx.saved_tensors
        return _hidden_backward(d_out, weight2, slope) @ weight1, None, None, None, None


def mlp(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    *,
    impl: Impl | None = None,
) -> Tensor:
    """``gelu(x W1^T + b1) W2^T + b2``, with the exact GELU of ``nn.GELU()``.

    The kernels write the derivative of GELU whether or not a backward follows.

    Args:
        x: ``[..., D]``; any strides.
        weight1, bias1: ``[F, D]`` and ``[F]`` or None, as in ``nn.Linear``.
        weight2, bias2: ``[E, F]`` and ``[E]`` or None.
        impl: see ``dispatch.py``. The kernels take 16 bits, widths in multiples of 16, and frozen weights.

    Returns:
        ``[..., E]`` in the dtype of ``x``.

    Raises:
        ValueError: a shape, dtype, device or ``impl`` that does not fit; all tensors must have one dtype.
    """
    own = (x.dtype,)
    expected: dict[str, Expected] = {"x": (x, leading_letters(x), FLOATS)}
    expected |= {"weight1": (weight1, "F D", own), "weight2": (weight2, "E F", own)}
    for name, bias, letter in (("bias1", bias1, "F"), ("bias2", bias2, "E")):
        if bias is not None:
            expected[name] = (bias, letter, own)
    check("mlp", expected)
    layers = (weight1, bias1, weight2, bias2)
    if choose("mlp", impl, x, unsupported(x, *layers)) == "torch":
        return mlp_reference(x, *layers)
    return _Mlp.apply(x, *layers)
