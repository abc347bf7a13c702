"""How fast an inversion would be on a GPU, by arithmetic: milliseconds a stage, and seconds an image.

    python -m benchmarks run model --device h100 --model deit_base_patch16_224 --batch 64

This is an estimate, not a measurement. It needs no GPU. What it takes for granted stands below its table
(`ASSUMPTIONS`). The counts come from ``benchmarks/speed/parts.py`` and ``counts.py``, the rates from the result files
where they hold any of the device, else from ``devices.py``. Where a stage was measured, the measured milliseconds stand
beside.
"""

import argparse
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.experiment import Row, experiment, table
from benchmarks.harness.arguments import Parser, positive
from benchmarks.harness.engine import PAPER_ITERATIONS, Stage, paper_stages
from benchmarks.harness.models import DTYPES
from benchmarks.harness.results import ESTIMATE, RESULTS, Results
from benchmarks.harness.tables import markdown
from benchmarks.speed.counts import FLASH_SIDE, launches, other_bytes, padding, pointwise_bytes
from benchmarks.speed.devices import DEVICES, FLOAT32_SHARE, Device
from benchmarks.speed.measured import Measured, Rate, StepTime
from benchmarks.speed.parts import Bucket, Part, Product, linear_products, product_dtype, product_work, work_of_parts
from smi_fast.config import InversionConfig
from smi_fast.model import load_model
from smi_fast.model.flops import iteration_flops
from smi_fast.model.spec import ViTShape
from smi_fast.tuning.measure import TILE_COLUMNS, TILE_ROWS
from smi_fast.tuning.settings import stage_batches

# outputs of a product that one multiprocessor computes at a time, as cuBLAS has them; what wastes least is taken
SIDES = (TILE_ROWS, 192, TILE_COLUMNS)
TILES = (*((TILE_ROWS, side) for side in SIDES), *((side, TILE_ROWS) for side in SIDES))
ATTENTION_SHARE = 0.5  # of the rate of products
LAUNCH_SECONDS = 1e-6  # of a kernel in a captured graph
WHOLE = "schedule"

ASSUMPTIONS = (
    "A step is the sum of its parts: no kernel runs beside another, and the host is never waited for.",
    "A product takes its FLOPs at the rate of a large one, or its bytes at that of a large copy, whichever is longer. "
    f"Tiles of {TILE_ROWS} x {', '.join(map(str, SIDES[:-1]))} or {SIDES[-1]} outputs, whichever waste least, are "
    "shared out in whole waves, and no product is split along its inner side. Where a product of the device was "
    "measured, the one nearest in shape gives the rate.",
    f"Products in float32, such as the head's, reach {FLOAT32_SHARE:.0%} of the data sheet without tensor cores.",
    "Attention fills its tiles with tokens that do not count (the tile kernel's keys to a power of two, flash's tokens "
    f"to {FLASH_SIDE}), at {ATTENTION_SHARE:.0%} of the rate of products, or moves its bytes, whichever is longer.",
    "All other kernels take their bytes at the rate of a large copy; nothing comes out of a cache.",
    f"Each of the step's launches costs {LAUNCH_SECONDS * 1e6:.0f} us more, in a captured graph.",
)


@dataclass(frozen=True)
class Parts:
    """Seconds of one iteration on a batch, by what they are spent on."""

    products: float
    attention: float
    traffic: float  # of all kernels that are neither
    launches: float

    @property
    def total(self) -> float:
        """Of the whole iteration."""
        return self.products + self.attention + self.traffic + self.launches


def filled(product: Product, sms: int) -> float:
    """The share, in 0..1, of what the device multiplies in its waves of tiles that belongs to a product."""
    m, _, n = product
    shares = []
    for rows, columns in TILES:
        tiles = math.ceil(m / rows) * math.ceil(n / columns)
        shares.append(m * n / (math.ceil(tiles / sms) * sms * rows * columns))
    return max(shares)


class SpeedModel:
    """Estimates for one device.

    Args:
        device: its figures.
        rates: measured ones of products, which are taken first; see `Measured.rates`.
    """

    def __init__(self, device: Device, rates: Sequence[Rate] = ()) -> None:
        self.device, self.rates = device, rates

    def product_seconds(self, part: Part, product: Product, bucket: Bucket) -> float:
        """Of one product ``(M, K, N)`` in the dtype of its part."""
        work, dtype = product_work(part, product, bucket.dtype), product_dtype(part, bucket.dtype)
        rate = self.device.flops_per_s(dtype)
        if self.rates and dtype == bucket.dtype:
            near = min(self.rates, key=lambda one: _distance(one.product, product))
            rate = near.flops_per_s / filled(near.product, self.device.sms)
        return max(work.flops / rate / filled(product, self.device.sms), work.bytes / self.device.copy)

    def attention_seconds(self, b: Bucket) -> float:
        """Forward and backward in the blocks that compute all tokens; bf16 and float32 alike."""
        work = work_of_parts(b)[Part.ATTENTION]
        rate = ATTENTION_SHARE * self.device.flops_per_s(b.dtype)
        return max(work.flops * padding(b) / rate, work.bytes / self.device.copy)

    def iteration(self, b: Bucket) -> Parts:
        """One iteration of a bucket."""
        return Parts(
            products=sum(self.product_seconds(part, product, b) for part, product in linear_products(b)),
            attention=self.attention_seconds(b),
            traffic=(pointwise_bytes(b) + other_bytes(b)) / self.device.copy,
            launches=launches(b) * LAUNCH_SECONDS,
        )


def _distance(one: Product, other: Product) -> float:
    """Of two shapes: the factors between their sides, added up as logarithms."""
    return sum(abs(math.log(a / b)) for a, b in zip(one, other, strict=True))


@dataclass(frozen=True)
class Job:
    """What is estimated: a model's paper schedule, with a batch a stage."""

    model: str
    shape: ViTShape
    dtype: str
    stages: tuple[Stage, ...]
    batches: tuple[int, ...]

    def buckets(self) -> list[Bucket]:
        """One a stage."""
        stages = zip(self.stages, self.batches, strict=True)
        return [Bucket(self.shape, batch, stage.kept, DTYPES[self.dtype]) for stage, batch in stages]


def rows_of(key: str, job: Job, folder: Path) -> list[dict[str, Any]]:
    """The rows of a device: one a stage, and one of the whole schedule.

    Args:
        key: of `DEVICES`.
        job: what is estimated.
        folder: of the result files.
    """
    device, buckets = DEVICES[key], job.buckets()
    measured = Measured(folder, device.name)
    rates, copy = measured.rates(job.model, buckets[0]), measured.copy()
    speed = SpeedModel(replace(device, copy=copy or device.copy), rates)
    parts = [speed.iteration(bucket) for bucket in buckets]
    times = [measured.step(job.model, bucket) for bucket in buckets]
    about = {"device": key, "model": job.model, "dtype": job.dtype}
    known = " and ".join(["products"] * bool(rates) + ["copies"] * bool(copy))
    source = {"rates": f"{known} as measured here, else {device.source}" if known else device.source}
    rows = [about | _stage_row(index, job, parts[index], times[index]) | source for index in range(len(job.stages))]
    return [*rows, about | _whole_row(job, parts, times) | source]


def _stage_row(index: int, job: Job, parts: Parts, time: StepTime | None) -> dict[str, Any]:
    stage, bucket = job.stages[index], job.buckets()[index]
    passes = stage.length / bucket.batch  # iterations of the batch that one image pays for
    return {
        "stage": index + 1,
        "kept": stage.kept,
        "iterations": stage.length,
        "batch": bucket.batch,
        "launches": launches(bucket),
        "tflop": round(bucket.batch * iteration_flops(job.shape, stage.kept) / 1e12, 4),
        "mb": round((pointwise_bytes(bucket) + other_bytes(bucket)) / 1e6, 1),
        **{f"{name}_ms": round(seconds * 1e3, 4) for name, seconds in asdict(parts).items()},
        "ms": round(parts.total * 1e3, 4),
        "measured_ms": None if time is None else round(time.ms, 4),
        "image_iterations_per_s": round(bucket.batch / parts.total, 1),
        "seconds_an_image": round(passes * parts.total, 5),
        "measured_seconds_an_image": None if time is None else round(passes * time.ms / 1e3, 5),
        "measured_in": None if time is None else time.source,
    }


def _whole_row(job: Job, parts: Sequence[Parts], times: Sequence[StepTime | None]) -> dict[str, Any]:
    """Of the whole schedule; what is of one batch is empty."""
    passes = [stage.length / batch for stage, batch in zip(job.stages, job.batches, strict=True)]
    seconds = sum(count * one.total for count, one in zip(passes, parts, strict=True))
    known = [time.ms / 1e3 for time in times if time is not None]
    measured = sum(c * s for c, s in zip(passes, known, strict=True)) if len(known) == len(passes) else None
    iterations = job.stages[-1].end
    columns: dict[str, Any] = dict.fromkeys(_stage_row(0, job, parts[0], None))
    return columns | {
        "stage": WHOLE,
        "iterations": iterations,
        "batch": " ".join(map(str, job.batches)),
        "image_iterations_per_s": round(iterations / seconds, 1),
        "seconds_an_image": round(seconds, 5),
        "measured_seconds_an_image": None if measured is None else round(measured, 5),
        "measured_in": None if measured is None else "its stages",
    }


def parse(arguments: Sequence[str]) -> tuple[argparse.Namespace, Job]:
    """The command line, and what it asks for."""
    parser = Parser("model", __doc__)
    parser.add_argument("--device", choices=tuple(DEVICES), nargs="+", default=["h100"])
    parser.share("model", default="deit_base_patch16_224")
    parser.add_argument("--batch", type=positive, nargs="+", default=[64], help="one, or one for each stage")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="bf16")
    parser.add_argument("--stages", action="store_true", help="print each stage, and what its time is spent on")
    parser.share("out")
    args = parser.parse(arguments)
    shape = load_model(args.model, pretrained=False).shape
    stages = paper_stages(shape.grid.patches)
    try:
        given = args.batch if len(args.batch) > 1 else args.batch[0]
        batches = stage_batches(given, len(stages), InversionConfig())
    except ValueError as error:
        parser.error(f"argument --batch: {error}")
    return args, Job(args.model, shape, args.dtype, stages, batches)


@experiment("model", "an estimate of the speed on a GPU that is not here, by counts and rates")
def main(arguments: Sequence[str]) -> None:
    """Parse, compute, write, print."""
    args, job = parse(arguments)
    results = Results(args.out or RESULTS / "model-estimates.csv", "model", ESTIMATE)
    for key in args.device:
        for row in rows_of(key, job, RESULTS):
            results.append(row, InversionConfig())
    print()
    print(stage_table(results.rows) if args.stages else model_table(results.rows))


def assumptions(rows: Sequence[Row]) -> str:
    """What an estimate takes for granted, a line each."""
    rates = {f"{row['device']}: {row['rates']}." for row in rows}
    return "\nAssumptions:\n\n" + "".join(f"* {line}\n" for line in (*sorted(rates), *ASSUMPTIONS))


def stage_table(rows: list[Row]) -> str:
    """Each stage of each device, and what its time is spent on."""
    spent = ("products", "attention", "traffic", "launches")
    columns = ["device", "kept", "batch", "launches", "MB", *(f"{name} ms" for name in spent), "ms", "measured ms"]
    columns += ["image-it/s", "s an image"]
    lines = []
    for row in rows:
        of_batch = [row[name] for name in ("kept", "batch", "launches", "mb", *(f"{name}_ms" for name in spent), "ms")]
        if row["stage"] == WHOLE:
            of_batch[0] = WHOLE
        cells = [row["device"], *of_batch, _measured(row, "measured_ms")]
        lines.append([*cells, row["image_iterations_per_s"], row["seconds_an_image"]])
    return markdown(_about(rows), columns, lines) + assumptions(rows)


@table("estimates of speed", "model-estimates.csv")
def model_table(rows: list[Row]) -> str:
    """A line a device: milliseconds of one iteration of each stage on its batch, and the whole schedule."""
    kept = [row["kept"] for row in rows if row["device"] == rows[0]["device"] and row["stage"] != WHOLE]
    columns = ["device", *(f"ms at {count}" for count in kept), "image-it/s", "s an image", "measured s an image"]
    lines = []
    for device in dict.fromkeys(row["device"] for row in rows):
        mine = [row for row in rows if row["device"] == device]
        times = [f"{float(row['ms']):.2f}" + _beside(row) for row in mine if row["stage"] != WHOLE]
        whole = next(row for row in mine if row["stage"] == WHOLE)
        cells = [device, *times, f"{float(whole['image_iterations_per_s']):.0f}"]
        cells += [f"{float(whole['seconds_an_image']):.3f}", _measured(whole, "measured_seconds_an_image")]
        lines.append(cells)
    return markdown(_about(rows), columns, lines) + assumptions(rows)


def _about(rows: list[Row]) -> str:
    first = rows[0]
    batches = next(row["batch"] for row in rows if row["stage"] == WHOLE)
    return (
        f"An estimate, not a measurement: {first['model']}, {first['dtype']}, batches {batches} in the stages of the "
        f"paper's schedule of {PAPER_ITERATIONS} iterations; compiled, in captured graphs, commit {first['commit']}."
    )


def _measured(row: Row, name: str) -> str:
    return row[name] or "not measured"


def _beside(row: Row) -> str:
    return f" (measured {float(row['measured_ms']):.2f})" if row["measured_ms"] else ""
