"""Ranges of activations, from what a full-precision model computes on a calibration set.

    "minmax"      least and largest value of all images
    "percentile"  between the (100 - p)th and the pth percentile
    "mse"         the range, of 100 that shrink evenly towards 0, whose squared error of quantization is least

The set is gone through once for the extremes of every site and, where more is asked, a second time for a histogram
between them. So a range hangs neither on the order of the images nor on how they are batched, but for the rounding of
the forward itself.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from smi_fast.model import SparseViT
from smi_fast.quantize.calibration import Calibration
from smi_fast.quantize.forward import Site, forward_sites
from smi_fast.quantize.scheme import Affine, QuantConfig, asymmetric

BINS = 8192  # of a histogram: 32 to a step of 8 bits
SHRINKS = 100  # ranges that "mse" tries
Range = tuple[float, float]
Progress = Callable[[str, int, int], None]  # what is done, how much of it, of how much


def silent(what: str, done: int, total: int) -> None:
    """The progress that nobody sees."""


@torch.no_grad()
def go_through(model: SparseViT, calibration: Calibration, site: Site, progress: Progress, what: str) -> list[Tensor]:
    """A forward of each batch of a calibration set, on the model's device; returns the logits of each."""
    logits = []
    for index, (pixels, keep) in enumerate(calibration.batches):
        progress(what, index, len(calibration.batches))
        kept = None if keep is None else keep.to(model.device)
        logits.append(forward_sites(model, pixels.to(model.device), kept, site))
    progress(what, len(calibration.batches), len(calibration.batches))
    return logits


def observe(
    model: SparseViT, calibration: Calibration, config: QuantConfig, progress: Progress = silent
) -> dict[str, Affine]:
    """Scale and zero point of every site, on the CPU.

    Raises:
        ValueError: a site whose values are not finite, or images that do not fit the model.
    """
    calibration.check(model)
    ranges = extremes(model, calibration, progress)
    if config.observer != "minmax":
        counts = histograms(model, calibration, ranges, progress)
        for name, (low, high) in ranges.items():
            if config.observer == "percentile":
                ranges[name] = percentile_range(counts[name], low, high, config.percentile)
            else:
                ranges[name] = mse_range(counts[name], low, high, config.act_bits)
    return {name: _affine(name, low, high, config.act_bits) for name, (low, high) in ranges.items()}


def _affine(name: str, low: float, high: float, bits: int) -> Affine:
    return asymmetric(torch.tensor(low, dtype=torch.float64), torch.tensor(high, dtype=torch.float64), bits)


def extremes(model: SparseViT, calibration: Calibration, progress: Progress = silent) -> dict[str, Range]:
    """Least and largest value of every site, in the order of the forward.

    Raises:
        ValueError: a site whose values are not finite.
    """
    found: dict[str, Range] = {}

    def site(name: str, tensor: Tensor) -> Tensor:
        if not tensor.isfinite().all():
            raise ValueError(f"calibration set {calibration.name!r}: values at {name} are not finite")
        low, high = (float(extreme) for extreme in tensor.aminmax())
        before = found.get(name, (low, high))
        found[name] = min(low, before[0]), max(high, before[1])
        return tensor

    go_through(model, calibration, site, progress, "ranges")
    return found


def histograms(
    model: SparseViT, calibration: Calibration, ranges: dict[str, Range], progress: Progress = silent
) -> dict[str, Tensor]:
    """Counts ``[BINS]`` int64 of every site's values, in even bins between its extremes."""
    found: dict[str, Tensor] = {}

    def site(name: str, tensor: Tensor) -> Tensor:
        counts = bin_counts(tensor, *ranges[name])
        found[name] = found[name] + counts if name in found else counts
        return tensor

    go_through(model, calibration, site, progress, "histograms")
    return found


def bin_counts(tensor: Tensor, low: float, high: float) -> Tensor:
    """Counts ``[BINS]`` int64, on the CPU; a value beyond ``low`` or ``high`` counts in the bin at that end."""
    if low == high:
        return torch.zeros(BINS, dtype=torch.int64).index_fill(0, torch.tensor([0]), tensor.numel())
    place = (tensor.double() - low) * (BINS / (high - low))
    return torch.bincount(place.long().clamp_(0, BINS - 1).flatten(), minlength=BINS).cpu()


def percentile_range(counts: Tensor, low: float, high: float, percentile: float) -> Range:
    """The bin edges outside of which lie at most ``100 - percentile`` of a hundred values, on either side."""
    spare = int(int(counts.sum()) * (100 - percentile) / 100)  # values that may be beyond an end
    width = (high - low) / BINS
    below = int((counts.cumsum(0) <= spare).sum())  # whole bins
    above = int((counts.flip(0).cumsum(0) <= spare).sum())
    return low + below * width, high - above * width


def mse_range(counts: Tensor, low: float, high: float, bits: int) -> Range:
    """The shrunken range of least squared error, the widest of equals; a bin's values count as its centre."""
    filled = counts.nonzero().flatten()
    centres = low + (filled + 0.5).double() * ((high - low) / BINS)
    shrinks = torch.arange(SHRINKS, 0, -1, dtype=torch.float64) / SHRINKS
    tried = asymmetric(shrinks * min(low, 0.0), shrinks * max(high, 0.0), bits)
    scale, zero_point = tried.scale.double()[:, None], tried.zero_point[:, None]
    codes = ((centres / scale).round() + zero_point).clamp(tried.qmin, tried.qmax)  # [SHRINKS, filled]
    errors = ((codes - zero_point) * scale - centres).square() @ counts[filled].double()
    best = float(shrinks[errors.argmin()])
    return best * min(low, 0.0), best * max(high, 0.0)
