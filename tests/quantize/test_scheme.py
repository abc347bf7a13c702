"""Scales, zero points, codes and values against integer arithmetic written anew in numpy, which must agree exactly."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from smi_fast.quantize import QuantConfig
from smi_fast.quantize.scheme import LEAST_SCALE, Affine, asymmetric, symmetric, weight_affine

BITS = range(2, 9)


def numpy_codes(x: Any, low: float, high: float, bits: int, symmetrically: bool) -> tuple[Any, Any, int]:
    """Codes, values and zero point of one range, in int64 and float32."""
    if symmetrically:
        qmin, qmax = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
        scale = np.float32(max(-low, high) / (((1 << bits) - 1) / 2))
    else:
        qmin, qmax = 0, (1 << bits) - 1
        low, high = min(low, 0.0), max(high, 0.0)
        scale = np.float32((high - low) / ((1 << bits) - 1))
    scale = max(scale, np.finfo(np.float32).eps)
    zero = 0 if symmetrically else min(max(int(np.rint(-low / float(scale))), qmin), qmax)
    reciprocal = np.float32(1) / scale
    codes = np.rint(x * reciprocal).astype(np.int64) + zero
    codes = np.minimum(np.maximum(codes, qmin), qmax)
    return codes, (codes - zero).astype(np.float32) * scale, zero


def assert_same(affine: Affine, x: Tensor, codes: Any, values: Any) -> None:
    own = affine.codes(x)
    assert np.array_equal(own.numpy(), codes)
    assert torch.equal(affine.fake(x), torch.from_numpy(values))
    assert torch.equal(affine.values(own), affine.fake(x)), "codes do not give the values back"


KINDS = ("normal", "outlier", "positive", "negative", "constant", "zeros", "tiny", "huge")


def draw(kind: str, seed: int, shape: tuple[int, ...] = (6, 37)) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    if kind == "outlier":
        x[0, 0] = 1e4
    ways = {
        "positive": x.abs() + 3,
        "negative": -x.abs() - 0.01,
        "constant": torch.full(shape, float(x[0, 0])),
        "zeros": torch.zeros(shape),
        "tiny": x * 1e-6,
        "huge": x * 1e35,
    }
    return ways.get(kind, x)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(BITS), st.sampled_from(KINDS), st.integers(0, 2**31), st.sampled_from([1.0, 0.5, 1.5]))
def test_activations(bits: int, kind: str, seed: int, stretch: float) -> None:
    """Also values beyond the range, which are clipped, and a range beyond the values."""
    x = draw(kind, seed)
    low, high = float(x.min()) * stretch, float(x.max()) * stretch
    affine = asymmetric(torch.tensor(low, dtype=torch.float64), torch.tensor(high, dtype=torch.float64), bits)
    codes, values, zero = numpy_codes(x.numpy(), low, high, bits, symmetrically=False)
    assert int(affine.zero_point) == zero
    assert_same(affine, x, codes, values)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(BITS), st.sampled_from(KINDS), st.integers(0, 2**31))
def test_weights_of_psaq(bits: int, kind: str, seed: int) -> None:
    weight = draw(kind, seed)
    affine = weight_affine(weight, QuantConfig(weight_bits=bits, scheme="psaq"))
    assert affine.scale.shape == (6,)
    assert not affine.zero_point.any()
    rows = [numpy_codes(row, float(row.min()), float(row.max()), bits, symmetrically=True) for row in weight.numpy()]
    assert_same(affine, weight, np.stack([row[0] for row in rows]), np.stack([row[1] for row in rows]))


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(BITS), st.sampled_from(KINDS), st.integers(0, 2**31))
def test_weights_of_the_paper(bits: int, kind: str, seed: int) -> None:
    weight = draw(kind, seed)
    affine = weight_affine(weight, QuantConfig(weight_bits=bits, scheme="paper"))
    assert affine.scale.shape == ()
    low, high = float(weight.min()), float(weight.max())
    codes, values, zero = numpy_codes(weight.numpy(), low, high, bits, symmetrically=False)
    assert int(affine.zero_point) == zero
    assert_same(affine, weight, codes, values)


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from(BITS),
    st.lists(st.floats(-(2.0**99), 2.0**99, width=32, allow_subnormal=False), min_size=1, max_size=20),
)
def test_any_values(bits: int, numbers: list[float]) -> None:
    x = torch.tensor([numbers], dtype=torch.float32)
    codes, values, _ = numpy_codes(x.numpy(), float(x.min()), float(x.max()), bits, symmetrically=False)
    assert_same(asymmetric(x.min(), x.max(), bits), x, codes, values)
    codes, values, _ = numpy_codes(x.numpy(), float(x.min()), float(x.max()), bits, symmetrically=True)
    assert_same(symmetric(x.abs().max(), bits), x, codes, values)


@pytest.mark.parametrize("bits", BITS)
def test_ranges_and_errors(bits: int) -> None:
    """The published formulas, and no value in the range off by more than half a step and the zero point's rounding."""
    x = torch.linspace(-1, 3, 1001)
    affine = asymmetric(x.min(), x.max(), bits)
    assert (affine.qmin, affine.qmax) == (0, 2**bits - 1)
    assert float(affine.scale) == pytest.approx(4 / (2**bits - 1), rel=1e-6)
    assert float((affine.fake(x) - x).abs().max()) <= float(affine.scale) * 1.001
    assert set(affine.codes(x).tolist()) == set(range(2**bits))
    affine = symmetric(torch.tensor(3.0), bits)
    assert (affine.qmin, affine.qmax) == (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    assert float(affine.scale) == pytest.approx(3 / ((2**bits - 1) / 2), rel=1e-6)
    assert float(affine.fake(torch.tensor([[3.0]]))) == pytest.approx(3 - float(affine.scale) / 2, rel=1e-6)


def test_one_sided_ranges_hold_zero() -> None:
    high = asymmetric(torch.tensor(5.0), torch.tensor(10.0), 8)
    assert (int(high.zero_point), float(high.scale)) == (0, pytest.approx(10 / 255))
    low = asymmetric(torch.tensor(-10.0), torch.tensor(-5.0), 8)
    assert (int(low.zero_point), float(low.scale)) == (255, pytest.approx(10 / 255))
    x = torch.tensor([5.0, 7.3, 10.0])
    assert torch.allclose(high.fake(x), x, atol=0.02)
    assert torch.allclose(low.fake(-x), -x, atol=0.02)


def test_constants() -> None:
    zero = torch.zeros(())
    assert float(asymmetric(zero, zero, 8).scale) == LEAST_SCALE == float(symmetric(zero, 4).scale)
    for value in (3.7, -3.7):
        constant = torch.tensor(value)
        assert float(asymmetric(constant, constant, 4).fake(constant)) == pytest.approx(value, rel=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weight_bits": 1}, r"weight_bits=1: must be an integer in 2\.\.8"),
        ({"weight_bits": 9}, "weight_bits=9"),
        ({"act_bits": 16}, r"act_bits=16: .*2\.\.8"),
        ({"act_bits": 4.0}, r"act_bits=4\.0"),
        ({"act_bits": True}, "act_bits=True"),
        ({"scheme": "int4"}, "scheme='int4': must be one of 'paper', 'psaq'"),
        ({"observer": "max"}, "observer='max': must be one of 'minmax', 'percentile', 'mse'"),
        ({"percentile": 50}, "percentile=50: must be above 50, at most 100"),
        ({"percentile": 100.1}, r"percentile=100\.1"),
        ({"percentile": float("nan")}, "percentile=nan"),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        QuantConfig(**settings)


@pytest.mark.parametrize(("low", "high"), [(0.0, float("inf")), (float("nan"), 1.0), (2.0, 1.0)])
def test_bad_ranges(low: float, high: float) -> None:
    with pytest.raises(ValueError, match="must be finite, and low at most high"):
        asymmetric(torch.tensor(low), torch.tensor(high), 8)
    with pytest.raises(ValueError, match="most=inf: must be finite"):
        symmetric(torch.tensor(float("inf")), 8)
