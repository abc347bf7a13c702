"""What quantization costs, layer by layer: so that a user sees which one hurts."""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from smi_fast.model import SparseViT
from smi_fast.quantize.calibration import Calibration
from smi_fast.quantize.forward import Site, unchanged
from smi_fast.quantize.observers import Progress, go_through, silent
from smi_fast.quantize.quantized import QuantizedViT, linears
from smi_fast.quantize.scheme import Affine


@dataclass(frozen=True)
class LayerRow:
    """One tensor, before and after it is quantized; ``dataclasses.asdict`` of it is JSON."""

    name: str  # of the site, or of the layer whose weight it is; one of each kind may have the same
    kind: str  # "activation" or "weight"
    low: float  # least value
    high: float  # largest value
    scale: float  # the largest, of a weight with one a row
    clipped: float  # share of the values whose code had to be clamped
    sqnr_db: float | None  # 10 log10 of sum x^2 / sum (x - q)^2; None where nothing was lost
    logits_sqnr_db: float | None = None  # likewise of the logits, where this tensor alone is quantized


class _Sums:
    """Running extremes, clipped values and squared sums of one tensor, in float64."""

    def __init__(self, affine: Affine) -> None:
        self.affine = affine
        self.low, self.high = math.inf, -math.inf
        self.count = self.clipped = 0
        self.signal = self.noise = 0.0

    def add(self, x: Tensor) -> None:
        affine = self.affine.to(x.device)
        codes = affine.unclamped(x)
        low, high = x.aminmax()
        self.low, self.high = min(self.low, float(low)), max(self.high, float(high))
        self.count += x.numel()
        self.clipped += int(((codes < affine.qmin) | (codes > affine.qmax)).sum())
        self.signal += squares(x)
        self.noise += squares(x - affine.fake(x))

    def row(self, name: str, kind: str, logits_sqnr_db: float | None) -> LayerRow:
        return LayerRow(
            name=name,
            kind=kind,
            low=self.low,
            high=self.high,
            scale=float(self.affine.scale.max()),
            clipped=self.clipped / self.count,
            sqnr_db=decibels(self.signal, self.noise),
            logits_sqnr_db=logits_sqnr_db,
        )


def squares(x: Tensor) -> float:
    """The sum of squares, taken in float64."""
    return float(torch.linalg.vector_norm(x, dtype=torch.float64)) ** 2


def decibels(signal: float, noise: float) -> float | None:
    """``10 log10(signal / noise)``; None where there is no noise, or nothing but noise."""
    return None if noise == 0 or signal == 0 else 10 * math.log10(signal / noise)


@torch.no_grad()
def layer_report(
    model: SparseViT,
    quantized: QuantizedViT,
    calibration: Calibration,
    sensitivity: bool = False,
    progress: Progress = silent,
) -> list[LayerRow]:
    """A row for every quantized weight and activation.

    Each is measured by itself, on what the full-precision model computes; errors of layers before it do not count.

    Args:
        model: that ``quantized`` was made from.
        quantized: of `quantize`, or loaded.
        calibration: any images of the model's size.
        sensitivity: also quantize each tensor alone and compare the logits: one more forward of the set a row.
        progress: is told what is done.

    Returns:
        The weights in the order of the layers, then the activations in the order of the forward.

    Raises:
        ValueError: images of another size.
    """
    calibration.check(model)
    sums = {name: _Sums(affine) for name, affine in quantized.activations.items()}

    def note(name: str, tensor: Tensor) -> Tensor:
        sums[name].add(tensor)
        return tensor

    truth = torch.cat(go_through(model, calibration, note, progress, "errors"))
    alone = _sensitivity(model, quantized, calibration, truth, progress) if sensitivity else {}
    rows = []
    for name, layer in linears(model).items():
        weight = _Sums(quantized.weights[name])
        weight.add(layer.weight)
        rows.append(weight.row(name, "weight", alone.get(("weight", name))))
    return rows + [sums[name].row(name, "activation", alone.get(("activation", name))) for name in sums]


def _sensitivity(
    model: SparseViT, quantized: QuantizedViT, calibration: Calibration, truth: Tensor, progress: Progress
) -> dict[tuple[str, str], float | None]:
    """SQNR of the logits ``truth`` with one tensor alone quantized, by kind and name."""
    signal = squares(truth)
    total = len(quantized.weights) + len(quantized.activations)
    found: dict[tuple[str, str], float | None] = {}

    def measure(kind: str, name: str, changed: SparseViT, site: Site) -> None:
        progress("one at a time", len(found), total)
        logits = torch.cat(go_through(changed, calibration, site, silent, ""))
        found[kind, name] = decibels(signal, squares(logits - truth))

    swapped = copy.deepcopy(model)
    for name, layer in linears(swapped).items():
        exact = layer.weight.clone()
        layer.weight.copy_(quantized.weights[name].to(exact.device).fake(exact))
        measure("weight", name, swapped, unchanged)
        layer.weight.copy_(exact)
    for name in quantized.activations:
        measure("activation", name, model, _only(name, quantized.site))
    progress("one at a time", total, total)
    return found


def _only(wanted: str, site: Callable[[str, Tensor], Tensor]) -> Site:
    return lambda name, tensor: site(name, tensor) if name == wanted else tensor


def worst_first(rows: list[LayerRow]) -> list[LayerRow]:
    """By what a row costs: the SQNR of the logits where that was measured, else of the tensor; exact ones last."""

    def cost(row: LayerRow) -> float:
        sqnr = row.sqnr_db if row.logits_sqnr_db is None else row.logits_sqnr_db
        return math.inf if sqnr is None else sqnr

    return sorted(rows, key=cost)
