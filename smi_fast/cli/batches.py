"""``--batch-size``: a number, one for each stage, or what ``smi-fast tune`` chose."""

from collections.abc import Callable

import torch

from smi_fast.config import InversionConfig
from smi_fast.engine.batches import stage_batches
from smi_fast.engine.compiler import why_not_compile
from smi_fast.tuning.measure import DEFAULT_BATCH
from smi_fast.tuning.store import Key, Tuned, lookup


def parse_batch_size(text: str, config: InversionConfig) -> tuple[int, ...] | None:
    """``64`` or ``28,40,57,81,119`` to a batch for each stage; None for ``auto``.

    Raises:
        ValueError: neither of these, another count than there are stages, or what `stage_batches` refuses.
    """
    if text == "auto":
        return None
    words = text.split(",")
    try:
        sizes = [int(word) for word in words]
    except ValueError:
        sizes = [0]
    if min(sizes) < 1:
        raise ValueError(
            f"--batch-size {text!r}: must be 'auto', a number of at least 1, or one for each stage with commas between"
        )
    try:
        stages, may_differ = len(config.stops) + 1, config.rules.stop_updates
        return stage_batches(sizes if len(sizes) > 1 else sizes[0], stages, may_differ)
    except ValueError as error:
        rule = str(error).partition(": ")[2]
        raise ValueError(f"--batch-size {text!r}: {rule}") from None


def usable_impl(impl: str, device: torch.device) -> str:
    """What ``impl`` comes to on this machine: eager where nothing can be compiled."""
    return "eager" if impl == "compiled" and why_not_compile(device.type) else impl


def tuned_or_default(
    key: Key, config: InversionConfig, say: Callable[[str], None]
) -> tuple[tuple[int, ...], Tuned | None]:
    """The batch of each stage where none was given; says so where it was tuned, or the file cannot be read.

    Under ``reference``, whose images hang on their batch, it is always the default.
    """
    default = (DEFAULT_BATCH,) * len(key.kept)
    if not config.rules.stop_updates:
        return default, None
    try:
        tuned = lookup(key)
        if tuned is not None:
            batches = stage_batches(tuned.batches, len(key.kept), True)
            say(f"batch size {', '.join(map(str, batches))}: tuned on this machine")
            return batches, tuned
    except ValueError as error:
        say(f"batch size {DEFAULT_BATCH}, since what was tuned cannot be read: {error}")
    return default, None
