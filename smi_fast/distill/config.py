"""What a transfer of knowledge does: `DistillConfig` and its checks."""

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

Mode = Literal["probe", "finetune"]
Optimiser = Literal["sgd", "adamw"]
LRSchedule = Literal["constant", "cosine"]


@dataclass(frozen=True)
class DistillConfig:
    """A whole training but for teacher, student and images. The defaults are those of the paper's section 5.2.

    Raises:
        ValueError: a field breaks the rule that its message names.
    """

    steps: int  # optimiser steps in all
    mode: Mode = "probe"  # "probe": the head alone, on a frozen backbone; "finetune": every weight
    temperature: float = 20.0  # of both softmaxes in Eq. 6
    scale_by_t2: bool = True  # times temperature^2, as the published code does; Eq. 6 does not have it
    optimizer: Optimiser = "sgd"  # "adamw" for a ViT from scratch
    lr: float = 0.1
    lr_schedule: LRSchedule = "constant"  # or "cosine", down to 0 at the last step
    momentum: float = 0.9  # of "sgd"
    weight_decay: float = 1e-4
    batch_size: int = 128  # images a step
    flip: bool = True  # mirror half of the images of a batch, their kept patches with them
    pool: int = 10_000  # most images at a time, where images are inverted on the way; the oldest leave first
    seed: int = 0  # of what a batch holds
    eval_every: int = 100  # steps between two rows of the curve
    checkpoint_every: int = 100  # steps between two checkpoints; every row of the curve has one too
    cache: bool | None = None  # keep what frozen models say of an image; None: where that saves work

    def __post_init__(self) -> None:
        _check(self)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able, and enough to build the same configuration again."""
        return asdict(self)

    def lr_at(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        if self.lr_schedule == "constant":
            return self.lr
        return self.lr * (1 + math.cos(math.pi * step / self.steps)) / 2

    @property
    def views(self) -> int:
        """In how many ways an image may be shown: as it is, and mirrored."""
        return 2 if self.flip else 1


def _check(c: DistillConfig) -> None:
    """Each field against its rule; the first that breaks one is named."""
    rules: dict[str, tuple[bool, str]] = {
        "mode": (c.mode in get_args(Mode), f"must be one of {get_args(Mode)}"),
        "temperature": (_finite(c.temperature) and c.temperature > 0, "must be a positive number"),
        "scale_by_t2": (isinstance(c.scale_by_t2, bool), "must be True or False"),
        "optimizer": (c.optimizer in get_args(Optimiser), f"must be one of {get_args(Optimiser)}"),
        "lr": (_finite(c.lr) and c.lr > 0, "must be a positive number"),
        "lr_schedule": (c.lr_schedule in get_args(LRSchedule), f"must be one of {get_args(LRSchedule)}"),
        "momentum": (_finite(c.momentum) and 0 <= c.momentum < 1, "must be a number in [0, 1)"),
        "weight_decay": (_finite(c.weight_decay) and c.weight_decay >= 0, "must be finite and at least 0"),
        "flip": (isinstance(c.flip, bool), "must be True or False"),
        "seed": (is_int(c.seed) and 0 <= c.seed < 2**63, "must be an integer in 0..2**63-1"),
        "cache": (c.cache in (None, True, False), "must be True, False or None"),
    }
    for name in ("steps", "batch_size", "pool", "eval_every", "checkpoint_every"):
        value = getattr(c, name)
        rules[name] = (is_int(value) and value >= 1, "must be an integer of at least 1")
    for name, (holds, rule) in rules.items():
        if not holds:
            raise ValueError(f"{name}={getattr(c, name)!r}: {rule}")


def is_int(value: Any) -> bool:
    """An int that is no bool?"""
    return isinstance(value, int) and not isinstance(value, bool)


def _finite(value: float) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
