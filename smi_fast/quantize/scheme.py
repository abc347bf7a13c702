"""Uniform quantization: settings, scales and zero points of the two schemes, values and integer codes.

    code = clamp(round(x / scale) + zero_point, qmin, qmax)        value = (code - zero_point) * scale

    "paper"  Eq. 5 of the paper for weights and activations, one range a tensor:
             scale = (Tmax - Tmin) / (2^k - 1), zero_point = round(-Tmin / scale), codes 0 .. 2^k - 1
    "psaq"   as PSAQ-ViT (Li et al., 2022) and the published code: weights symmetric, one scale an output channel,
             scale = max|w| / ((2^k - 1) / 2), zero_point = 0, codes -2^(k-1) .. 2^(k-1) - 1; activations as Eq. 5

Three things that the equation leaves open:

* A range that lies on one side of 0 is widened to hold 0, as torch's observers do. The zero point is kept among the
  codes, and without that everything far from 0 would be clipped to one value.
* A scale is never below `LEAST_SCALE`, as published. A tensor of zeros stays zeros, and so becomes one whose range is
  far below it.
* Rounding is to nearest, ties to even, of ``x`` times the float32 reciprocal of the scale: what torch's fake-quantize
  operations compute, which make the values here.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from smi_fast.checks import Rule, check_rules, is_finite, is_int, one_of

SCHEMES = ("paper", "psaq")
OBSERVERS = ("minmax", "percentile", "mse")
LEAST_BITS, MOST_BITS = 2, 8
LEAST_SCALE = torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class QuantConfig:
    """How a model is quantized.

    Raises:
        ValueError: a value that breaks the rule beside its field.
    """

    weight_bits: int = 4  # 2..8
    act_bits: int = 8  # of activations, 2..8
    scheme: str = "psaq"  # one of `SCHEMES`
    observer: str = "minmax"  # of activations, one of `OBSERVERS`
    percentile: float = 99.99  # of "percentile": above 50, at most 100

    def __post_init__(self) -> None:
        rules = {
            "weight_bits": _bits(self.weight_bits),
            "act_bits": _bits(self.act_bits),
            "scheme": one_of(self.scheme, SCHEMES),
            "observer": one_of(self.observer, OBSERVERS),
            "percentile": (is_finite(self.percentile) and 50 < self.percentile <= 100, "must be above 50, at most 100"),
        }
        check_rules(self, rules)

    @property
    def name(self) -> str:
        """Such as "W4/A8 psaq minmax"."""
        return f"W{self.weight_bits}/A{self.act_bits} {self.scheme} {self.observer}"


def _bits(value: int) -> Rule:
    holds = is_int(value) and LEAST_BITS <= value <= MOST_BITS
    return holds, f"must be an integer in {LEAST_BITS}..{MOST_BITS}"


@dataclass(frozen=True, eq=False)
class Affine:
    """Scale, zero point and codes of a tensor, or of each row of a matrix."""

    scale: Tensor  # [] or [rows] float32, positive
    zero_point: Tensor  # as ``scale``, int32, in qmin..qmax
    qmin: int
    qmax: int

    def to(self, device: torch.device) -> "Affine":
        """On another device."""
        return Affine(self.scale.to(device), self.zero_point.to(device), self.qmin, self.qmax)

    def fake(self, x: Tensor) -> Tensor:
        """The quantized values of ``x`` (``[rows, ...]`` for a scale a row), in its shape and dtype."""
        if self.scale.ndim == 0:
            return torch.fake_quantize_per_tensor_affine(x, self.scale, self.zero_point, self.qmin, self.qmax)
        return torch.fake_quantize_per_channel_affine(x, self.scale, self.zero_point, 0, self.qmin, self.qmax)

    def unclamped(self, x: Tensor) -> Tensor:
        """``round(x / scale) + zero_point`` in the dtype of ``x``: beyond qmin..qmax where ``x`` is clipped."""
        shape = (-1, *[1] * (x.ndim - 1)) if self.scale.ndim else ()
        return (x * (1 / self.scale).reshape(shape)).round() + self.zero_point.reshape(shape)

    def codes(self, x: Tensor) -> Tensor:
        """Integer codes of ``x``, int32; `values` of them is `fake` of ``x``, bit for bit."""
        return self.unclamped(x).clamp(self.qmin, self.qmax).int()

    def values(self, codes: Tensor) -> Tensor:
        """``(codes - zero_point) * scale`` in float32."""
        shape = (-1, *[1] * (codes.ndim - 1)) if self.scale.ndim else ()
        return (codes - self.zero_point.reshape(shape)).float() * self.scale.reshape(shape)


def code_range(bits: int, symmetric: bool) -> tuple[int, int]:
    """qmin and qmax."""
    return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if symmetric else (0, 2**bits - 1)


def asymmetric(low: Tensor, high: Tensor, bits: int) -> Affine:
    """Eq. 5: scale and zero point of values that lie between ``low`` and ``high``.

    Args:
        low, high: ``[]`` or ``[rows]``, any float dtype; one-sided ranges are widened to hold 0.
        bits: ``k``.

    Raises:
        ValueError: a range that is not finite, or upside down.
    """
    if not bool(low.isfinite().all() & high.isfinite().all() & (low <= high).all()):
        raise ValueError(f"low={low.tolist()}, high={high.tolist()}: must be finite, and low at most high")
    qmin, qmax = code_range(bits, symmetric=False)
    low, high = low.double().clamp(max=0), high.double().clamp(min=0)
    scale = ((high - low) / (qmax - qmin)).float().clamp(min=LEAST_SCALE)
    zero_point = (-low / scale.double()).round().clamp(qmin, qmax)
    return Affine(scale, zero_point.int(), qmin, qmax)


def symmetric(most: Tensor, bits: int) -> Affine:
    """Scale of values up to ``most`` in size, ``[]`` or ``[rows]``, ``most / ((2^k - 1) / 2)``; zero point 0.

    The largest positive value is clipped by half a step: it would have the code 2^(k-1), which there is not.

    Raises:
        ValueError: a size that is not finite.
    """
    if not bool(most.isfinite().all()):
        raise ValueError(f"most={most.tolist()}: must be finite")
    qmin, qmax = code_range(bits, symmetric=True)
    scale = (most.double() / ((qmax - qmin) / 2)).float().clamp(min=LEAST_SCALE)
    return Affine(scale, torch.zeros_like(scale, dtype=torch.int32), qmin, qmax)


def weight_affine(weight: Tensor, config: QuantConfig) -> Affine:
    """Scale and zero point of a weight ``[rows, columns]``: one for the tensor ("paper"), one a row ("psaq")."""
    if config.scheme == "paper":
        return asymmetric(weight.amin(), weight.amax(), config.weight_bits)
    return symmetric(weight.abs().amax(1), config.weight_bits)
