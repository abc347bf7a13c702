"""What a transfer of knowledge does: `DistillConfig` and its checks."""

import math
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

from smi_fast.checks import check_rules, count, flag, is_finite, not_negative, one_of, positive, seed
from smi_fast.config import help_text

Mode = Literal["probe", "finetune"]
Optimiser = Literal["sgd", "adamw"]
LRSchedule = Literal["constant", "cosine"]


@dataclass(frozen=True)
class DistillConfig:
    """A whole training but for teacher, student and images. The defaults are those of the paper's section 5.2.

    Raises:
        ValueError: a field breaks the rule that its message names.
    """

    steps: int = field(metadata=help_text("Optimiser steps in all."))
    mode: Mode = field(
        default="probe", metadata=help_text("probe: a new head on a frozen backbone; finetune: every weight.")
    )
    temperature: float = field(default=20.0, metadata=help_text("Of both softmaxes in Eq. 6."))
    scale_by_t2: bool = field(
        default=True, metadata=help_text("Multiply by temperature^2, as the published code does; Eq. 6 does not.")
    )
    optimizer: Optimiser = field(
        default="sgd", metadata=help_text("sgd, or adamw (for a ViT from scratch, at a lower learning rate).")
    )
    lr: float = field(default=0.1, metadata=help_text("Learning rate."))
    lr_schedule: LRSchedule = field(
        default="constant", metadata=help_text("constant, or cosine: down to 0 at the last step.")
    )
    momentum: float = field(default=0.9, metadata=help_text("Of sgd."))
    weight_decay: float = field(default=1e-4, metadata=help_text("Weight decay."))
    batch_size: int = field(default=128, metadata=help_text("Images per optimiser step."))
    flip: bool = field(
        default=True, metadata=help_text("Mirror half of the images of a batch, and their kept patches with them.")
    )
    pool: int = field(
        default=10_000,
        metadata=help_text("Most images to train on at a time, where they are inverted on the way; the oldest leave."),
    )
    seed: int = field(default=0, metadata=help_text("Of images, batches, and weights that start from scratch."))
    eval_every: int = field(default=100, metadata=help_text("Steps between two rows of the curve."))
    checkpoint_every: int = field(
        default=100, metadata=help_text("Steps between two checkpoints; every row of the curve has one too.")
    )
    cache: bool | None = field(
        default=None, metadata=help_text("Keep what frozen models say of an image; None: where that saves work.")
    )

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
