"""``smi-fast quantize --real``: the model executed in 8 bits, and what that is worth."""

from typing import Any

import torch

from smi_fast.cli.work import WorkBar
from smi_fast.datasets import RealImages
from smi_fast.model import SparseViT
from smi_fast.quantize import Calibration
from smi_fast.quantize.execute import MODES, LowBitViT, why_not_real
from smi_fast.quantize.measure import real_report

REAL = "real.safetensors"
BATCH = 64  # images in a forward that is timed


def check_real(mode: str, device: torch.device) -> None:
    """Refuse a mode that is unknown, or not available on the device, before any work starts.

    Raises:
        ValueError: with the reason.
    """
    if mode not in ("none", *MODES):
        raise ValueError(f"--real {mode!r}: must be none, {', '.join(MODES)}")
    if mode != "none" and (reason := why_not_real(mode, device)):
        raise ValueError(f"--real {mode!r}: {reason}")


def measure(
    model: SparseViT, low: LowBitViT, calibration: Calibration, images: RealImages | None, bar: WorkBar
) -> dict[str, Any]:
    """Speed and size beside float32, on real images or else those of the calibration set, `BATCH` at a time."""
    bar("timing 8 bits and float32, both compiled too", 0, 1)
    if images is None:
        known = torch.cat([pixels for pixels, _ in calibration.batches])
        pixels = known[torch.arange(BATCH) % len(known)]
    else:
        indices = [i * len(images) // BATCH for i in range(BATCH)]
        pixels, _ = next(images.batches(model, BATCH, indices))
    return real_report(model, low, pixels)
