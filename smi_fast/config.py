"""What an inversion does: `InversionConfig`, its presets, and the checks on both."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import Any, Literal, get_args

from smi_fast.kernels.total_variation import TVNorm

Preset = Literal["paper", "reference"]
LRSchedule = Literal["constant", "cosine"]

# Stops of the paper for 4000 iterations: 196 -> 137 -> 95 -> 66 -> 46 patches.
PAPER_STOPS = ((50, 0.3), (100, 0.3), (200, 0.3), (300, 0.3))


@dataclass(frozen=True)
class PresetRules:
    """How a preset computes."""

    stop_updates: bool  # a stopped patch gets no total variation and no optimiser step
    mean_loss: bool  # cross-entropy as a mean over the batch, which ties an image to its batch-mates
    tv_norm: TVNorm  # the norm used where the configuration names none


PRESETS: Mapping[str, PresetRules] = MappingProxyType(
    {
        "paper": PresetRules(stop_updates=True, mean_loss=False, tv_norm="pixel"),
        "reference": PresetRules(stop_updates=False, mean_loss=True, tv_norm="batch"),
    }
)

# Measured on the demo teacher: the table is under "Prior weights" in CONTRIBUTING.md. "batch" is the published weight.
TV_WEIGHTS: Mapping[str, float] = MappingProxyType({"pixel": 1e-4, "image": 1e-3, "batch": 1e-4})


@dataclass(frozen=True)
class InversionConfig:
    """A whole inversion but for the model, the labels and the machine.

    Raises:
        ValueError: a field breaks the rule that its message names.
    """

    iterations: int = 4000  # optimiser steps an image gets
    stops: tuple[tuple[int, float], ...] = PAPER_STOPS  # (after this many iterations, drop this share of kept patches)
    preset: Preset = "paper"  # "paper": stopping is real; "reference": what the published code computes
    seed: int = 0  # with an image's id, the key of its random stream
    lr: float = 0.25  # Adam's learning rate
    lr_schedule: LRSchedule = "constant"  # or "cosine", down to 0 at the last iteration
    betas: tuple[float, float] = (0.5, 0.99)  # Adam's decay rates
    eps: float = 1e-8  # Adam's epsilon
    jitter: float = 1 / 8  # largest shift, as a share of the image's side
    flip: bool = True  # mirror an image in half of the iterations
    tv_norm: TVNorm | None = None  # None: the preset's
    tv_weight: float | None = None  # None: the measured default of that norm
    l2_weight: float = 0.0  # weight of the 2-norm of an image's updated pixels

    def __post_init__(self) -> None:
        try:
            object.__setattr__(self, "stops", tuple((iteration, float(ratio)) for iteration, ratio in self.stops))
        except (TypeError, ValueError):
            raise ValueError(f"stops={self.stops!r}: must be pairs of an iteration and a ratio") from None
        if not isinstance(self.betas, tuple | list):
            raise ValueError(f"betas={self.betas!r}: must be two numbers in [0, 1)")
        object.__setattr__(self, "betas", tuple(self.betas))
        _check(self)

    @property
    def rules(self) -> PresetRules:
        """The rules of the preset."""
        return PRESETS[self.preset]

    @property
    def resolved_tv_norm(self) -> TVNorm:
        """The total-variation norm in force."""
        return self.tv_norm or self.rules.tv_norm

    @property
    def resolved_tv_weight(self) -> float:
        """The total-variation weight in force."""
        return TV_WEIGHTS[self.resolved_tv_norm] if self.tv_weight is None else self.tv_weight

    def to_dict(self) -> dict[str, Any]:
        """JSON-able, and enough to build the same configuration again with `from_dict`."""
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "InversionConfig":
        """The inverse of `to_dict`; raises ``ValueError`` on a field it does not know."""
        unknown = set(fields) - set(cls.__dataclass_fields__)
        if unknown:
            raise ValueError(f"config has unknown fields {sorted(unknown)}; known: {sorted(cls.__dataclass_fields__)}")
        return cls(**fields)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check(c: InversionConfig) -> None:
    """Each field against its rule; the first that breaks one is named."""
    rules = {
        "iterations": (_is_int(c.iterations) and c.iterations >= 1, "must be an integer of at least 1"),
        "preset": (isinstance(c.preset, str) and c.preset in PRESETS, f"must be one of {sorted(PRESETS)}"),
        "seed": (_is_int(c.seed) and 0 <= c.seed < 2**63, "must be an integer in 0..2**63-1"),
        "lr": (_finite(c.lr) and c.lr > 0, "must be a positive number"),
        "lr_schedule": (c.lr_schedule in get_args(LRSchedule), f"must be one of {get_args(LRSchedule)}"),
        "betas": (
            len(c.betas) == 2 and all(_finite(b) and 0 <= b < 1 for b in c.betas),
            "must be two numbers in [0, 1)",
        ),
        "eps": (_finite(c.eps) and c.eps > 0, "must be a positive number"),
        "jitter": (_finite(c.jitter) and 0 <= c.jitter <= 0.5, "must lie in 0..0.5, a share of the image's side"),
        "flip": (isinstance(c.flip, bool), "must be True or False"),
        "tv_norm": (c.tv_norm in (None, *get_args(TVNorm)), f"must be one of {get_args(TVNorm)}"),
        "tv_weight": (c.tv_weight is None or _weight(c.tv_weight), "must be finite and at least 0"),
        "l2_weight": (_weight(c.l2_weight), "must be finite and at least 0"),
    }
    for name, (holds, rule) in rules.items():
        if not holds:
            raise ValueError(f"{name}={getattr(c, name)!r}: {rule}")
    check_stops(c.stops, c.iterations)


def _finite(value: float) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _weight(value: float) -> bool:
    return _finite(value) and value >= 0


def check_stops(stops: tuple[tuple[int, float], ...], iterations: int) -> None:
    """Hold a stopping schedule to its rules, as far as they do not depend on the number of patches.

    Raises:
        ValueError: an iteration outside ``1..iterations-1``, out of order or twice; a ratio outside ``(0, 1)``.
    """
    previous = 0
    for iteration, ratio in stops:
        where = f"stops: ({iteration}, {ratio})"
        if not _is_int(iteration) or iteration < 1:
            raise ValueError(f"{where}: the iteration must be an integer of at least 1, a stop needs CLS scores")
        if iteration >= iterations:
            raise ValueError(f"{where}: must come before the last iteration; iterations={iterations}")
        if iteration == previous:
            raise ValueError(f"{where}: iteration {iteration} is named twice; give one stop with the joint ratio")
        if iteration < previous:
            raise ValueError(f"{where}: comes after a stop at {previous}; stops must ascend")
        if not (_finite(ratio) and 0 < ratio < 1):
            raise ValueError(f"{where}: the ratio must lie strictly between 0 and 1")
        previous = iteration
