"""`ScaledLinear`: rounding and products against exact truth and the float32 reference."""

import pytest
import torch
from torch import Tensor, nn

from smi_fast.model.scaled_linear import FP8, ScaledLinear, quantise, scaled_linear_reference

E5M2 = torch.float8_e5m2
ROUNDING = {FP8: 2.0**-4, E5M2: 2.0**-3}  # largest relative error of a normal value
BF16 = torch.finfo(torch.bfloat16).eps / 2
GRADIENTS = pytest.mark.parametrize("gradient", [E5M2, FP8], ids=str)


def randn(*shape: int, seed: int = 0) -> Tensor:
    """bfloat16 values, so that the layer's input is exact."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def linear(width: int = 48, out: int = 80, bias: bool = True) -> nn.Linear:
    layer = nn.Linear(width, out, bias=bias, dtype=torch.bfloat16)
    layer.weight.data = randn(out, width, seed=1) * width**-0.5
    if bias:
        layer.bias.data = randn(out, seed=2)
    return layer


def gradient_of(layer: nn.Module, x: Tensor, d_y: Tensor) -> Tensor:
    leaf = x.clone().requires_grad_()
    (found,) = torch.autograd.grad(layer(leaf), leaf, d_y)
    return found


# --- rounding


def finite_values(dtype: torch.dtype) -> Tensor:
    every = torch.arange(256, dtype=torch.uint8).view(dtype).float()
    return every[every.isfinite()].unique()


@pytest.mark.parametrize("dtype", [FP8, E5M2], ids=str)
@pytest.mark.parametrize("magnitude", [2.0**-110, 0.37, 448.0, 449.0, 1e30])
def test_values_go_to_the_nearest_of_the_format(dtype: torch.dtype, magnitude: float) -> None:
    x = torch.cat([torch.linspace(-1, 1, 999), 2.0 ** -torch.arange(40.0)]) * magnitude
    values, scale = quantise(x, dtype)
    assert scale.shape == ()
    assert torch.frexp(scale)[0] == 0.5, "the scale is a power of two"
    largest = magnitude / float(scale) / torch.finfo(dtype).max
    assert 0.5 < largest <= 1
    away = (x.double() / scale.double())[:, None] - finite_values(dtype).double()
    error = (x.double() / scale.double() - values.double()).abs()
    assert torch.equal(error, away.abs().min(1).values)


def test_a_value_rounds_the_same_beside_larger_ones() -> None:
    x = randn(999).clamp(-4, 4)
    x = x[x.abs() > 2**-6]
    alone, scale = quantise(x, FP8)
    beside, larger = quantise(torch.cat([x, torch.tensor([100.0]).bfloat16()]), FP8)
    assert larger == 16 * scale
    assert torch.equal(alone.float() * scale, beside[:-1].float() * larger)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [FP8, E5M2], ids=str)
def test_what_is_not_finite_stays_so(dtype: torch.dtype, bad: float) -> None:
    x = randn(5, 48)
    x[2, 7] = bad
    values, scale = quantise(x, dtype)
    assert values.float().isnan().nonzero().tolist() == [[2, 7]]
    rest, own = quantise(torch.cat([x[:2], x[3:]]), dtype)
    assert torch.equal(torch.cat([values[:2], values[3:]]).float() * scale, rest.float() * own)


# --- the layer


@GRADIENTS
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [(1,), (3, 13), (128,)], ids=str)
def test_layer_is_its_reference(gradient: torch.dtype, bias: bool, rows: tuple[int, ...]) -> None:
    plain = linear(bias=bias)
    layer = ScaledLinear(plain, gradient)
    x, d_y = randn(*rows, 48, seed=3), randn(*rows, 80, seed=4) * 1e-6
    y, d_x = layer(x), gradient_of(layer, x, d_y)
    assert y.dtype == d_x.dtype == torch.bfloat16
    for found, truth in (
        (y, scaled_linear_reference(x, plain.weight, plain.bias)),
        (d_x, scaled_linear_reference(d_y, plain.weight.T, None, gradient)),
    ):
        assert found.shape == truth.shape
        # one rounding to bfloat16; float32 sums of another order
        assert ((found.float() - truth).abs() <= BF16 * truth.abs() + 1e-6 * truth.abs().max()).all()


@GRADIENTS
def test_error_is_that_of_rounding(gradient: torch.dtype) -> None:
    plain = linear(256, 384, bias=False)
    layer, weight = ScaledLinear(plain, gradient), plain.weight.detach().double()
    x, d_y = randn(200, 256, seed=3), randn(200, 384, seed=4) * 1e-6
    cases = (layer(x), x, weight.T, FP8), (gradient_of(layer, x, d_y), d_y, weight, gradient)
    for found, left, right, kind in cases:
        left, first, second = left.double(), ROUNDING[kind], ROUNDING[FP8]
        truth, terms = left @ right, left.abs() @ right.abs()
        error = (found.double() - truth).abs()
        # half a step between subnormal values of e4m3 is 2^-10 scales, and a scale at most 2 / 448 of the largest
        small = left.abs().max() * right.abs().sum(0) + right.abs().max() * left.abs().sum(1, keepdim=True)
        assert (error <= (first + second + first * second) * terms + 2.0**-17 * small + BF16 * truth.abs()).all()
        # errors of the terms are independent, and at most uniform in [-rounding, rounding]
        deviation = ((first**2 + second**2) / 3) ** 0.5
        assert 0.3 * deviation < error.norm() / truth.norm() < deviation


@pytest.mark.parametrize("power", [-100, -40, 40, 100])
def test_range(power: int) -> None:
    layer = ScaledLinear(linear(bias=False))
    x, d_y = randn(7, 48, seed=3), randn(7, 80, seed=4)
    assert torch.equal(layer(x * 2.0**power), layer(x) * 2.0**power)
    assert torch.equal(gradient_of(layer, x, d_y * 2.0**power), gradient_of(layer, x, d_y) * 2.0**power)


def test_zero() -> None:
    layer = ScaledLinear(linear())
    x, d_y = torch.zeros(2, 3, 48).bfloat16(), torch.zeros(2, 3, 80).bfloat16()
    assert layer.bias is not None
    assert torch.equal(layer(x), layer.bias.expand(2, 3, -1))
    assert torch.equal(gradient_of(layer, x, d_y), x)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_failure_stays_in_its_row(bad: float) -> None:
    layer = ScaledLinear(linear())
    x, d_y = randn(5, 48, seed=3), randn(5, 80, seed=4)
    others = torch.arange(5) != 2
    zeroed, d_zeroed = x * others[:, None], d_y * others[:, None]
    hurt, d_hurt = x.clone(), d_y.clone()
    hurt[2, 7], d_hurt[2, 7] = bad, bad
    for found, kept in ((layer(hurt), layer(zeroed)), (gradient_of(layer, x, d_hurt), gradient_of(layer, x, d_zeroed))):
        assert not found[2].isfinite().any()
        assert torch.equal(found[others], kept[others])


def test_part() -> None:
    layer = ScaledLinear(linear())
    x, d_y = randn(2, 3, 48, seed=3), randn(2, 3, 80, seed=4)
    leaf = x.clone().requires_grad_()
    for first, last in ((0, 32), (32, 80)):
        y = layer.part(leaf, first, last)
        assert torch.equal(y, layer(x)[..., first:last])
        alone = torch.zeros_like(d_y)
        alone[..., first:last] = d_y[..., first:last]
        (found,) = torch.autograd.grad(y, leaf, d_y[..., first:last])
        torch.testing.assert_close(found, gradient_of(layer, x, alone), rtol=2 * BF16, atol=1e-5)


def test_refused() -> None:
    with pytest.raises(ValueError, match="in_features=24, out_features=80: must be multiples of 16"):
        ScaledLinear(linear(24, 80))
    with pytest.raises(ValueError, match=r"gradient=torch.int8: must be one of torch.float8_e5m2, torch.float8_e4m3fn"):
        ScaledLinear(linear(), torch.int8)
