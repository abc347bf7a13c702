"""Cost of an iteration against batch, resolution, model and sparsity, one axis at a time around a base point.

    python -m benchmarks run scaling --device cpu

On each axis the cost is fitted with ``ms = c * value^e``; the measured exponent stands beside the one that the FLOP
count of ``smi_fast/model/flops.py`` predicts. Losses are checked at each point before anything is timed. The points of
an axis take turns for a number of rounds, so that a change in the machine's speed hits all of them. On CUDA a round is
made of captured graphs, as in the inverter. Every axis gets an equal share of ``--seconds``; points and rounds that do
not fit are left out, which is printed.
"""

import argparse
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.experiment import Row, experiment, table
from benchmarks.harness.arguments import Parser, positive
from benchmarks.harness.engine import FixedStep
from benchmarks.harness.models import DTYPES, build_model, fixed_keep, grid_of, paper_kept
from benchmarks.harness.results import RESULTS, Results
from benchmarks.harness.tables import markdown, measured_on
from benchmarks.harness.timing import quantile, spread, take_turns
from smi_fast.config import InversionConfig
from smi_fast.model.flops import iteration_flops
from smi_fast.model.sparse_vit import SparseViT

MODELS = ("deit_tiny_patch16_224", "deit_small_patch16_224", "deit_base_patch16_224", "vit_large_patch16_224")
IMAGES = (224, 384, 448)
BATCHES = {"cpu": (1, 2, 4, 8, 16, 32), "cuda": (8, 16, 32, 64, 128, 256)}
AXES = ("sparsity", "batch", "model", "resolution")
SETUP_SHARE = 0.7  # of an axis's time that may go into setting points up
MOST_ROUNDS = 15
UNITS = {
    "sparsity": "kept patches",
    "batch": "images",
    "model": "million weights",
    "resolution": "pixels a side",
}


@dataclass(frozen=True)
class Point:
    """What is timed: ``kept`` of a model's patches at a resolution, and a batch."""

    model: str
    image: int  # side in pixels
    batch: int
    kept: int


@dataclass(frozen=True)
class Plan:
    """How it is timed, the same for all points."""

    device: str
    dtype: str
    impl: str
    steps: int  # iterations in a round; on CUDA rounded up to whole captured graphs
    seconds: float  # for everything


@dataclass
class Timed:
    """A point that is set up; ``value`` is its place on the axis."""

    point: Point
    value: float
    flops: int  # of one image in one iteration
    clock: Callable[[], float]  # measures the seconds of an iteration once
    seconds: list[float] = field(default_factory=list)  # an iteration, one entry a round


def make_axis(axis: str, base: Point, device: str) -> list[Point]:
    """Its points, the ends first and then towards the middle, since a fit needs the ends most."""
    side = grid_of(base.model).patch
    if axis == "sparsity":
        found = [replace(base, kept=kept) for kept in paper_kept((base.image // side) ** 2)]
    elif axis == "batch":
        found = [replace(base, batch=batch) for batch in BATCHES[device.partition(":")[0]]]
    elif axis == "model":
        found = [replace(base, model=model) for model in dict.fromkeys((*MODELS, base.model))]
    else:
        found = [replace(base, image=image, kept=paper_kept((image // side) ** 2)[-1]) for image in IMAGES]
    return [found[i // 2] if i % 2 == 0 else found[-1 - i // 2] for i in range(len(found))]


def value_of(axis: str, point: Point, model: SparseViT) -> float:
    """A point's place on an axis: patches, images, pixels of the side, or million weights of the blocks."""
    if axis == "model":
        return round(sum(weight.numel() for weight in model.blocks.parameters()) / 1e6, 3)
    return float({"sparsity": point.kept, "batch": point.batch, "resolution": point.image}[axis])


class Bench:
    """Sets points up; models are kept while their resolution lasts."""

    def __init__(self, plan: Plan, build: Callable[..., SparseViT] = build_model) -> None:
        self.plan, self.build = plan, build
        self.models: dict[tuple[str, int], SparseViT] = {}

    def model(self, point: Point) -> SparseViT:
        """Of a point, with random weights."""
        key = (point.model, point.image)
        if key not in self.models:
            self.models[key] = self.build(point.model, self.plan.device, DTYPES[self.plan.dtype], point.image)
        return self.models[key]

    def set_up(self, axis: str, point: Point) -> Timed:
        """Build, compile, check the losses."""
        model = self.model(point)
        keep = fixed_keep(point.batch, model.grid.patches, point.kept)
        step = FixedStep(model, InversionConfig(), keep, self.plan.impl).check()
        flops, clock = iteration_flops(model.shape, point.kept), partial(step.seconds, self.plan.steps)
        return Timed(point, value_of(axis, point, model), flops, clock)

    def measure(self, axis: str, points: list[Point], until: float) -> list[Timed]:
        """The points of an axis in rounds until ``time.monotonic() == until``; ends of the axis first."""
        begin, longest, ready = time.monotonic(), 0.0, list[Timed]()
        for point in points:
            start = time.monotonic()
            if len(ready) > 1 and start + longest > begin + SETUP_SHARE * (until - begin):
                print(f"{axis}: left out for want of time: {point}", flush=True)
                continue
            ready.append(self.set_up(axis, point))
            longest = max(longest, time.monotonic() - start)
        seconds = take_turns({one.point: one.clock for one in ready}, MOST_ROUNDS, until=until)
        for one in ready:
            one.seconds = seconds[one.point]
        print(f"{axis}: {len(ready)} points, {len(ready[0].seconds)} rounds", flush=True)
        return sorted(ready, key=lambda one: one.value)


def row(axis: str, one: Timed, plan: Plan) -> dict[str, Any]:
    """One line of the CSV."""
    p50 = quantile(one.seconds, 0.5)
    return {
        "dtype": plan.dtype,
        "impl": plan.impl,
        "axis": axis,
        "value": f"{one.value:g}",
        **asdict(one.point),
        "rounds": len(one.seconds),
        **spread(one.seconds, 1e3, 3),
        "image_iterations_per_s": round(one.point.batch / p50, 2),
        "gflop_an_iteration": round(one.point.batch * one.flops / 1e9, 6),
        "true_gflop_per_s": round(one.point.batch * one.flops / p50 / 1e9, 1),
    }


def exponent(values: Sequence[float], costs: Sequence[float]) -> float:
    """``e`` of the least squares fit of ``log cost = log c + e log value``.

    Raises:
        ValueError: fewer than two different values, or one that is not positive.
    """
    if len(set(values)) < 2 or min(*values, *costs) <= 0:
        raise ValueError(f"values={list(values)}, costs={list(costs)}: needs two different points, all positive")
    x, y = ([math.log(number) for number in numbers] for numbers in (values, costs))
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    spread = sum((a - mean_x) ** 2 for a in x)
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / spread


def exponents(rows: Sequence[Row]) -> dict[str, tuple[float, float]]:
    """By axis with two points or more: the measured exponent and the one of the FLOP count."""
    found = {}
    for axis in dict.fromkeys(row["axis"] for row in rows):
        some = [row for row in rows if row["axis"] == axis]
        values = [float(row["value"]) for row in some]
        if len(set(values)) > 1:
            measured = exponent(values, [float(row["ms_p50"]) for row in some])
            found[axis] = measured, exponent(values, [float(row["gflop_an_iteration"]) for row in some])
    return found


def run(bench: Bench, base: Point, axes: Sequence[str], results: Results) -> None:
    """All axes, each in its share of the time that is left."""
    plan = bench.plan
    end = time.monotonic() + plan.seconds
    for index, axis in enumerate(axes):
        until = time.monotonic() + (end - time.monotonic()) / (len(axes) - index)
        points = make_axis(axis, base, plan.device)
        for one in bench.measure(axis, points, until):
            results.append(row(axis, one, plan), InversionConfig())
        bench.models = {key: model for key, model in bench.models.items() if key == (base.model, base.image)}


def report(rows: list[Row]) -> None:
    """The rows, and the exponents."""
    for line in rows:
        print(
            f"{line['axis']:10s} {line['value']:>8s}  {line['model']:24s} {line['image']} px  B={line['batch']:<4s} "
            f"K={line['kept']:<4s} {line['ms_p50']:>9s} ms ({line['ms_p20']}..{line['ms_p80']})  "
            f"{line['image_iterations_per_s']:>9s} image-it/s  {line['true_gflop_per_s']:>9s} GFLOP/s"
        )
    for axis, (measured, predicted) in exponents(rows).items():
        print(f"{axis:10s} cost grows with exponent {measured:.2f}, FLOPs with {predicted:.2f}")


def plot(rows: list[Row], path: Path) -> None:
    """One panel an axis: milliseconds of an iteration, and a line of the FLOP count's slope through the median."""
    from matplotlib.figure import Figure

    fits = exponents(rows)
    figure = Figure(figsize=(3.2 * len(fits), 3), layout="constrained")
    panels = figure.subplots(1, len(fits), squeeze=False)[0]
    for panel, (axis, (measured, predicted)) in zip(panels, fits.items(), strict=True):
        some = [row for row in rows if row["axis"] == axis]
        values, ms = ([float(row[name]) for row in some] for name in ("value", "ms_p50"))
        work = [float(row["gflop_an_iteration"]) for row in some]
        rate = quantile([w / m for w, m in zip(work, ms, strict=True)], 0.5)
        panel.loglog(values, ms, "o-", label=f"measured, {measured:.2f}")
        panel.loglog(values, [w / rate for w in work], "--", label=f"FLOPs, {predicted:.2f}")
        panel.set(xlabel=axis, title=f"{some[0]['impl']} {some[0]['dtype']}", ylabel="ms per iteration")
        panel.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = Parser("scaling", __doc__)
    parser.share("device")
    parser.share("model", help="of the base point")
    parser.share("batch", default=None, help="of the base point; 8 on a CPU, else 64")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="bf16")
    parser.add_argument("--impl", choices=("eager", "compiled"), default=None, help="eager on a CPU, else compiled")
    parser.add_argument("--axes", nargs="+", choices=AXES, default=list(AXES))
    parser.add_argument("--seconds", type=positive, default=None, help="420 on a CPU, else 220")
    parser.share("steps", help="iterations in a round; 1 on a CPU, else 10")
    parser.share("threads")
    parser.share("out")
    parser.add_argument("--plot", type=Path, default=None, help="a picture of the fits; needs matplotlib")
    args = parser.parse(arguments)
    unset = {"batch": (8, 64), "impl": ("eager", "compiled"), "seconds": (420, 220), "steps": (1, 10)}
    for name, (cpu, gpu) in unset.items():
        if getattr(args, name) is None:
            setattr(args, name, cpu if args.device == "cpu" else gpu)
    return args


@experiment("scaling", "cost against sparsity, batch, model and resolution, with exponents beside those of the FLOPs")
def main(arguments: Sequence[str]) -> None:
    """Parse, measure, write."""
    args = parse(arguments)
    grid = grid_of(args.model)
    base = Point(args.model, grid.height, args.batch, paper_kept(grid.patches)[-1])
    bench = Bench(Plan(args.device, args.dtype, args.impl, args.steps, args.seconds))
    out = args.out or RESULTS / f"scaling-{args.device.partition(':')[0]}.csv"
    results = Results(out, "scaling", args.device)
    run(bench, base, args.axes, results)
    report(results.rows)
    if args.plot:
        plot(results.rows, args.plot)
        print(f"drawn to {args.plot}")


@table("scaling on a GPU", "scaling-cuda.csv")
@table("scaling on a CPU", "scaling-cpu.csv")
def scaling_table(rows: list[Row]) -> str:
    """By axis: the exponent of the measured cost beside that of the FLOP count, and the rates at both ends."""
    first = rows[0]
    about = (
        f"{measured_on(first)}; {first['impl']}, {first['dtype']}. "
        f"Medians of at least {min(int(row['rounds']) for row in rows)} rounds in which the points of an axis took "
        "turns; losses were checked first."
    )
    columns = ["axis", "from", "to", "points", "ms per iteration", "GFLOP/s", "measured exponent", "predicted"]
    cells = []
    for axis, (measured, predicted) in exponents(rows).items():
        some = [row for row in rows if row["axis"] == axis]
        low, high = some[0], some[-1]
        ends = [f"{low[name]} to {high[name]}" for name in ("ms_p50", "true_gflop_per_s")]
        what = [axis, f"{low['value']} {UNITS[axis]}", high["value"], str(len(some))]
        cells.append([*what, *ends, f"{measured:.2f}", f"{predicted:.2f}"])
    return markdown(about, columns, cells)
