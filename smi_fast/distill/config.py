"""What a transfer of knowledge does: `DistillConfig` and its checks."""

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from smi_fast.checks import check_rules, count, flag, is_finite, not_negative, one_of, positive, seed

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
    """Hold each field to its rule; the first one broken is named."""
    rules = {
        "mode": one_of(c.mode, get_args(Mode)),
        "temperature": positive(c.temperature),
        "scale_by_t2": flag(c.scale_by_t2),
        "optimizer": one_of(c.optimizer, get_args(Optimiser)),
        "lr": positive(c.lr),
        "lr_schedule": one_of(c.lr_schedule, get_args(LRSchedule)),
        "momentum": (is_finite(c.momentum) and 0 <= c.momentum < 1, "must be a number in [0, 1)"),
        "weight_decay": not_negative(c.weight_decay),
        "flip": flag(c.flip),
        "seed": seed(c.seed),
        "cache": (c.cache is None or isinstance(c.cache, bool), "must be True, False or None"),
    }
    whole = ("steps", "batch_size", "pool", "eval_every", "checkpoint_every")
    check_rules(c, rules | {name: count(getattr(c, name)) for name in whole})
