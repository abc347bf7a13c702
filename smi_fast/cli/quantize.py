"""``smi-fast quantize``: fewer bits, calibrated on synthetic, real or random images."""

import time
import warnings
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
import typer
from rich.console import Console
from rich.table import Table

from smi_fast.checks import check, count
from smi_fast.cli.command import command
from smi_fast.cli.options import ModelOptions, Output, parse_device
from smi_fast.cli.real import REAL, check_real, measure
from smi_fast.cli.work import WorkBar
from smi_fast.config import help_text
from smi_fast.datasets import RealImages, open_dataset, random_indices, top1
from smi_fast.images import SparseImages
from smi_fast.model import SparseViT
from smi_fast.quantize import Calibration, LayerRow, QuantConfig, QuantizedViT, layer_report, save_quantized
from smi_fast.quantize import quantize as quantize_model
from smi_fast.quantize.calibration import BATCH, DEFAULT_COUNT
from smi_fast.quantize.execute import LowBitViT, save_low_bit, to_low_bit
from smi_fast.quantize.layers import worst_first
from smi_fast.storage.environment import device_name, versions
from smi_fast.storage.files import write_json
from smi_fast.storage.folder import IMAGES, REPORT, make_folder

QUANTIZED = "quantized.safetensors"
DATASETS = ("folder", "cifar10", "imagenet")
EXECUTION = "simulated: fake-quantized in float32, no faster than the original"
WORST = 12  # rows of the table; all are in the report


@dataclass(frozen=True)
class QuantOptions:
    """How the model is quantized."""

    PANEL: ClassVar[str] = "Quantization"

    weights: int = field(default=4, metadata=help_text("Bits of weights, 2 to 8."))
    activations: int = field(default=8, metadata=help_text("Bits of activations, 2 to 8."))
    scheme: str = field(default="psaq", metadata=help_text("'psaq' (weights by output channel), or 'paper' (Eq. 5)."))
    observer: str = field(default="minmax", metadata=help_text("Ranges of activations: minmax, percentile or mse."))
    percentile: float = field(default=99.99, metadata=help_text("Of --observer percentile."))
    sensitivity: bool = field(
        default=False,
        metadata={"help": "Also quantize each tensor alone, and compare the logits.", "flags": ("--sensitivity",)},
    )
    real: str = field(
        default="none",
        metadata=help_text("Also execute in 8 bits, through torchao, and measure it: dynamic, static (int8), fp8 (some "
                           "GPUs)."),
    )  # fmt: skip

    def config(self) -> QuantConfig:
        """The configuration; raises ``ValueError`` naming the flag where it breaks a rule."""
        try:
            return QuantConfig(self.weights, self.activations, self.scheme, self.observer, self.percentile)
        except ValueError as error:
            flags = str(error).replace("weight_bits=", "--weights ").replace("act_bits=", "--activations ")
            raise ValueError(flags) from None


@dataclass(frozen=True)
class CalibrationOptions:
    """The images that ranges come from."""

    PANEL: ClassVar[str] = "Calibration"

    calibrate: str = field(
        metadata=help_text("Images to calibrate with: folder of a run (or its images.safetensors), 'gaussian', or real "
                           "ones: folder:PATH, cifar10:PATH, imagenet:PATH (of the training set)."),
    )  # fmt: skip
    count: int = field(default=DEFAULT_COUNT, metadata=help_text("Images to calibrate with, chosen by the seed."))
    seed: int = field(default=0, metadata=help_text("Same seed, same images to calibrate with."))


@command
def quantize(
    output: Output,
    calibration: CalibrationOptions,
    model: ModelOptions,
    quantization: QuantOptions,
    evaluate: Annotated[
        str | None, typer.Option(help="Real images to measure top-1 on: folder:PATH, cifar10:PATH, imagenet:PATH.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Evaluate at most this many images. [default: all]")] = None,
    device: Annotated[str, typer.Option(help="'auto', 'cpu', 'cuda' or 'cuda:N'.")] = "auto",
) -> None:
    """Quantize a model in simulation, say what each layer loses, and write it with a report."""
    config, real = quantization.config(), quantization.real
    if limit is not None:
        check("--limit", limit, count(limit))
    output.check()
    where = parse_device(device)
    vit = model.load(torch.float32, where)
    check_real(real, where)
    data = None if evaluate is None else _open_for_evaluation(evaluate, vit)
    out, seed, quiet, sensitivity = output.out, calibration.seed, output.quiet, quantization.sensitivity
    console = output.console(soft_wrap=True, highlight=False)
    images = _calibration(calibration.calibrate, vit, calibration.count, seed, console)
    make_folder(out)
    start = time.perf_counter()
    with WorkBar(console) as bar:
        quantized = quantize_model(vit, images, config, bar)
        seconds = time.perf_counter() - start
        rows = layer_report(vit, quantized, images, sensitivity, bar)
        low = None if real == "none" else to_low_bit(vit, real, images.batches)
        evaluation = None if data is None else _evaluate(vit, quantized, low, data, limit, bar)
        measured = None if low is None else measure(vit, low, images, data, bar)
    save_quantized(quantized, out / QUANTIZED, overwrite=True)
    if low is not None:
        save_low_bit(out / REAL, low, overwrite=True)
    report = _report(vit, quantized, rows, seed) | {"evaluation": evaluation, "seconds": seconds, "real": measured}
    report["calibration"] = {"name": images.name, "images": len(images)}
    report["bytes"] = {"quantized": (out / QUANTIZED).stat().st_size, "float32": _float_bytes(vit)}
    write_json(out / REPORT, report, overwrite=True)
    if not quiet:
        Console().print(_table(worst_first(rows)[:WORST], len(rows)))
    _say(vit, config, report, out)


def _calibration(spec: str, model: SparseViT, count: int, seed: int, console: Console) -> Calibration:
    """Images by the words of ``--calibrate``.

    Raises:
        FileNotFoundError: no such run or data set.
        ValueError: images that do not fit, or too few of them.
    """
    if spec == "gaussian":
        return Calibration.gaussian(model.grid, count, seed)
    if spec.partition(":")[0] in DATASETS:
        return _real_calibration(spec, model, count, seed)
    path = Path(spec)
    if not path.exists():
        kinds = ", ".join(f"{kind}:PATH" for kind in DATASETS)
        raise FileNotFoundError(f"--calibrate {spec!r}: no such run; must be one, 'gaussian', or {kinds}")
    images = SparseImages.load(path / IMAGES if path.is_dir() else path)
    with warnings.catch_warnings(record=True) as noted:
        warnings.simplefilter("always")
        calibration = Calibration.from_images(images, model, count, seed, name=spec)
    for warning in noted:
        console.print(f"[yellow]{warning.message}")
    return calibration


def _real_calibration(spec: str, model: SparseViT, count: int, seed: int) -> Calibration:
    images = open_dataset(spec, train=True)
    if not 1 <= count <= len(images):
        raise ValueError(f"--count {count}: must be in 1..{len(images)}, the images of {images.name}")
    chosen = random_indices(len(images), count, seed)
    pixels = [batch for batch, _ in images.batches(model, BATCH, chosen)]
    return Calibration.from_pixels(torch.cat(pixels), name=f"{images.name}, {count} images, seed {seed}")


def _open_for_evaluation(spec: str, model: SparseViT) -> RealImages:
    """Labelled images of as many classes as the model has, looked at before any work starts."""
    images = open_dataset(spec)
    if images.labels is None:
        raise ValueError(f"--evaluate {spec!r}: the images have no labels")
    if images.num_classes not in (None, model.shape.num_classes):
        told = f"it has {images.num_classes} classes, {model.info.name} has {model.shape.num_classes}"
        raise ValueError(f"--evaluate {spec!r}: {told}")
    return images


def _evaluate(
    model: SparseViT,
    quantized: QuantizedViT,
    low: LowBitViT | None,
    images: RealImages,
    limit: int | None,
    bar: WorkBar,
) -> dict[str, Any]:
    """Top-1 of the models on the same images, all patches of them."""
    total = len(images) if limit is None else min(limit, len(images))
    runs = {
        "float32": lambda pixels: model(pixels.to(model.device))[0].cpu(),
        "quantized": lambda pixels: quantized(pixels.to(model.device)).cpu(),
    }
    if low is not None:
        runs["real"] = lambda pixels: low(pixels.to(model.device)).cpu()
    found: dict[str, Any] = {"data": images.name, "images": total, "top1": {}}
    for name, run in runs.items():

        def tell(done: int, name: str = name) -> None:
            bar(f"top-1, {name}", done, total)

        with torch.no_grad():
            found["top1"][name] = top1(run, images, model, limit=limit, progress=tell)
    return found


def _float_bytes(model: SparseViT) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def _report(model: SparseViT, quantized: QuantizedViT, rows: list[LayerRow], seed: int) -> dict[str, Any]:
    return {
        "execution": EXECUTION,
        "config": asdict(quantized.config),
        "layers": [asdict(row) for row in rows],
        "model": {"name": model.info.name, "sha256": model.info.sha256},
        "device": device_name(model.device),
        "versions": versions(),
        "seed": seed,
    }


def _table(rows: list[LayerRow], total: int) -> Table:
    """The rows that lose most."""
    table = Table(title=f"the worst {len(rows)} of {total} tensors")
    headers = ("tensor", "kind", "least", "largest", "clipped", "SQNR dB", "logits' dB")
    measured = any(row.logits_sqnr_db is not None for row in rows)
    for header in headers if measured else headers[:-1]:
        table.add_column(header, justify="left" if header in ("tensor", "kind") else "right")
    for row in rows:
        sqnr = ["exact" if value is None else f"{value:.1f}" for value in (row.sqnr_db, row.logits_sqnr_db)]
        cells = (row.name, row.kind, f"{row.low:.3g}", f"{row.high:.3g}", f"{row.clipped:.2%}", *sqnr)
        table.add_row(*(cells if measured else cells[:-1]))
    return table


def _say(model: SparseViT, config: QuantConfig, report: dict[str, Any], out: Path) -> None:
    """What was done, in words."""
    size = report["bytes"]
    typer.echo(f"{model.info.name}, {config.name}, calibrated on {report['calibration']['name']}")
    typer.echo(EXECUTION)
    if report["evaluation"] is not None:
        top1, data = report["evaluation"]["top1"], report["evaluation"]
        figures = f"{top1['quantized']:.4f} quantized, {top1['float32']:.4f} in float32"
        if "real" in top1:
            figures += f", {top1['real']:.4f} executed in 8 bits"
        typer.echo(f"top-1 {figures}, on {data['images']} images of {data['data']}")
    if report["real"] is not None:
        typer.echo(report["real"]["words"])
    typer.echo(f"{size['quantized'] / 1e6:.2f} MB for {size['float32'] / 1e6:.2f} in float32: {out / QUANTIZED}")
