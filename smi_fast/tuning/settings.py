"""`decide`: the one place that chooses batch, dtype, implementation and attention.

It decides from the recipe, the model's shape, the device, what `smi-fast tune` stored, and what the caller asked for.
`Inverter`, ``invert``, ``plan``, ``distill`` and ``tune`` all ask here, so that they agree.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from smi_fast.checks import check, count, one_of
from smi_fast.config import InversionConfig
from smi_fast.model.fp8 import why_not_fp8
from smi_fast.model.scaled_linear import FP8
from smi_fast.model.sparse_vit import SparseViT
from smi_fast.model.spec import ViTShape
from smi_fast.storage.environment import bf16_is_fast, processor
from smi_fast.storage.inductor import why_not_compile
from smi_fast.tuning.store import Tuned, key_of, lookup

Impl = Literal["eager", "compiled"]
BatchSize = int | Sequence[int]
DEFAULT_BATCH = 64
IMPLS = ("compiled", "eager")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": FP8}


@dataclass(frozen=True)
class Target:
    """What runs, and where; enough to decide without the weights."""

    shape: ViTShape
    precision: str  # see `SparseViT.precision`
    device: torch.device

    @classmethod
    def of(cls, model: SparseViT) -> "Target":
        """That of a model."""
        return cls(model.shape, model.precision, model.device)


@dataclass(frozen=True)
class Settings:
    """What was decided."""

    batches: tuple[int, ...]  # of each stage; each divides the largest
    source: str  # of the batches: "given", "tuned" or "default"
    impl: Impl
    attention: dict[int, str]  # choices that were tuned, by number of tokens
    notes: tuple[str, ...] = ()  # what the user should know, a line each

    def apply(self, model: SparseViT) -> None:
        """Let a model attend as was tuned, where nobody chose otherwise."""
        for tokens, name in self.attention.items():
            if tokens not in model.attention_choices:
                model.choose_attention(tokens, name)


def decide(
    target: Target,
    config: InversionConfig,
    *,
    batch_size: BatchSize | None = None,
    impl: Impl = "compiled",
    images: int | None = None,
) -> Settings:
    """Decide how to run a recipe.

    Args:
        target: of the model.
        config: the recipe.
        batch_size: images in work at a time, or one number for each stage; None takes what was tuned, else 64.
        impl: "compiled" or "eager"; "compiled" becomes "eager" where the machine cannot compile.
        images: of the whole run, for batches that leave no rest; None where that is not known.

    Raises:
        ValueError: a batch size or an ``impl`` that breaks a rule, or a strategy that does not fit the model's grid.
    """
    check("impl", impl, one_of(impl, IMPLS))
    stages = config.stages(target.shape.grid.patches)
    notes, tuned = [], None
    if impl == "compiled" and (reason := why_not_compile(target.device.type)):
        notes.append(f"impl='compiled' is not available here, running eager: {reason}")
        impl = "eager"
    if target.precision == "bfloat16" and not bf16_is_fast(target.device):
        notes.append(f"bf16 is slow here, float32 is faster: {processor()}")
    batches, source = (DEFAULT_BATCH,) * len(stages), "default"
    if batch_size is not None:
        batches, source = stage_batches(batch_size, len(stages), config), "given"
    elif not config.couples_batch:
        tuned = _tuned(target, config, impl, notes)
    if tuned is not None:
        batches, source = stage_batches(tuned.batches, len(stages), config), "tuned"
        notes.append(f"batch size {', '.join(map(str, batches))}: tuned on this machine")
    if images is not None and not config.couples_batch:
        batches = even_batches(images, batches)
    return Settings(batches, source, impl, {} if tuned is None else dict(tuned.attention), tuple(notes))


def _tuned(target: Target, config: InversionConfig, impl: str, notes: list[str]) -> Tuned | None:
    """What was tuned for this, if anything, and if it can be read."""
    try:
        return lookup(key_of(target.shape, config, target.device, target.precision, impl))
    except ValueError as error:
        notes.append(f"batch size {DEFAULT_BATCH}, since what was tuned cannot be read: {error}")
        return None


def stage_batches(batch_size: BatchSize, stages: int, config: InversionConfig) -> tuple[int, ...]:
    """A batch for each stage.

    >>> stage_batches(64, 3, config)
    (64, 64, 64)

    Raises:
        ValueError: a number that is no integer of at least 1, another count than there are stages, one that does not
            divide the largest, or different ones where images depend on their batch-mates.
    """
    sizes = tuple(batch_size) if isinstance(batch_size, Sequence) else (batch_size,) * stages
    for size in sizes:
        if not count(size)[0]:
            raise ValueError(f"batch_size={batch_size!r}: must be an integer of at least 1, or one for each stage")
    if len(sizes) != stages:
        raise ValueError(f"batch_size={batch_size!r}: {len(sizes)} numbers for {stages} stages")
    for size in sizes:
        if max(sizes) % size:
            raise ValueError(f"batch_size={batch_size!r}: each must divide the largest, {max(sizes)}; {size} does not")
    if len(set(sizes)) > 1:
        config.require_independent(f"batch_size={batch_size!r}: all stages must have one batch")
    return sizes


def even_batches(images: int, limits: tuple[int, ...]) -> tuple[int, ...]:
    """Batches, one a stage, none above its limit, that take ``images`` images in as few groups and with little filling.

    Args:
        images: how many there are, at least 1.
        limits: the largest batch of each stage.

    Returns:
        A batch for each stage; the largest is the size of a group.
    """
    most = max(limits)
    group = -(-images // -(-images // most))  # as many groups as full ones would be, all of one size
    return split_evenly(group, limits)[1]


def split_evenly(images: int, limits: tuple[int, ...]) -> tuple[int, tuple[int, ...]]:
    """A number not far above ``images``, and a batch for each stage that divides it and is not above its limit."""
    while True:
        chunks = [-(-images // limit) for limit in limits]
        if all(images % number == 0 for number in chunks):
            return images, tuple(images // number for number in chunks)
        images += 1


def decide_dtype(name: str | None, device: torch.device) -> torch.dtype:
    """The compute dtype: ``fp32``, ``bf16`` or ``fp8``; None or ``auto`` takes bf16 where the device has units for it.

    Raises:
        ValueError: another name, or fp8 on a device that has no such units.
    """
    if name in (None, "auto"):
        return torch.bfloat16 if bf16_is_fast(device) else torch.float32
    if name not in DTYPES:
        raise ValueError(f"dtype={name!r}: must be one of auto, {', '.join(DTYPES)}")
    if DTYPES[name] is FP8 and (reason := why_not_fp8(device)):
        raise ValueError(f"dtype={name!r}: device {str(device)!r} has {reason}; use bf16")
    return DTYPES[name]


def precision_of(dtype: torch.dtype) -> str:
    """`SparseViT.precision` of a model that is loaded in a dtype."""
    return "fp8" if dtype is FP8 else str(dtype).removeprefix("torch.")
