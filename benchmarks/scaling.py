"""Cost of an iteration against batch, resolution, model and sparsity, one axis at a time around a base point.

    python -m benchmarks.scaling --device cpu

On each axis the cost is fitted with ``ms = c * value^e``; the measured exponent stands beside the one that the FLOP
count of ``smi_fast/flops.py`` predicts. Losses are checked at each point before anything is timed. The points of an
axis take turns for a number of rounds, so that a change in the machine's speed hits all of them. Every axis gets an
equal share of ``--seconds``; points and rounds that do not fit are left out, which is printed.
"""

import argparse
import importlib.util
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import (
    DTYPES,
    RESULTS,
    about,
    build_model,
    check_step,
    device_argument,
    fixed_keep,
    grid_of,
    make_step,
    model_name,
    paper_kept,
    positive,
    quantile,
    state_at,
    synchronize,
    write_csv,
)
from smi_fast.config import InversionConfig
from smi_fast.model.flops import iteration_flops
from smi_fast.model.sparse_vit import SparseViT

MODELS = ("deit_tiny_patch16_224", "deit_small_patch16_224", "deit_base_patch16_224", "vit_large_patch16_224")
IMAGES = (224, 384, 448)
BATCHES = {"cpu": (1, 2, 4, 8, 16, 32), "cuda": (8, 16, 32, 64, 128, 256)}
AXES = ("sparsity", "batch", "model", "resolution")
SETUP_SHARE = 0.7  # of an axis's time that may go into setting points up
MOST_ROUNDS = 15


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
    steps: int  # iterations in a round
    seconds: float  # for everything


@dataclass
class Timed:
    """A point that is set up; ``value`` is its place on the axis."""

    point: Point
    value: float
    flops: int  # of one image in one iteration
    step: Callable[[], None]
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
        model, config = self.model(point), InversionConfig()
        state = state_at(model, config, fixed_keep(point.batch, model.grid.patches, point.kept))
        run = make_step(model, config, state, self.plan.impl)
        check_step(model, config, state, run)

        @torch.no_grad()
        def step() -> None:
            run(state)

        return Timed(point, value_of(axis, point, model), iteration_flops(model.shape, point.kept), step)

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
        for index in range(MOST_ROUNDS + 1):
            start = time.monotonic()
            if index > 2 and start + longest > until:
                break
            for one in ready:
                seconds = self._round(one)
                one.seconds += [seconds] * (index > 0)  # the first round warms up
            longest = time.monotonic() - start
        print(f"{axis}: {len(ready)} points, {len(ready[0].seconds)} rounds", flush=True)
        return sorted(ready, key=lambda one: one.value)

    def _round(self, one: Timed) -> float:
        """Seconds of an iteration."""
        synchronize(self.plan.device)
        begin = time.perf_counter()
        for _ in range(self.plan.steps):
            one.step()
        synchronize(self.plan.device)
        return (time.perf_counter() - begin) / self.plan.steps


def row(axis: str, one: Timed, plan: Plan, where: dict[str, str]) -> dict[str, Any]:
    """One line of the CSV."""
    p20, p50, p80 = (quantile(one.seconds, share) for share in (0.2, 0.5, 0.8))
    return {
        **where,
        "dtype": plan.dtype,
        "impl": plan.impl,
        "axis": axis,
        "value": f"{one.value:g}",
        **asdict(one.point),
        "rounds": len(one.seconds),
        "ms_p20": round(p20 * 1e3, 3),
        "ms_p50": round(p50 * 1e3, 3),
        "ms_p80": round(p80 * 1e3, 3),
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


def exponents(rows: Sequence[dict[str, Any]]) -> dict[str, tuple[float, float]]:
    """By axis with two points or more: the measured exponent and the one of the FLOP count."""
    found = {}
    for axis in dict.fromkeys(row["axis"] for row in rows):
        some = [row for row in rows if row["axis"] == axis]
        values = [float(row["value"]) for row in some]
        if len(set(values)) > 1:
            measured = exponent(values, [float(row["ms_p50"]) for row in some])
            found[axis] = measured, exponent(values, [float(row["gflop_an_iteration"]) for row in some])
    return found


def run(bench: Bench, base: Point, axes: Sequence[str]) -> list[dict[str, Any]]:
    """All axes, each in its share of the time that is left."""
    plan, rows = bench.plan, list[dict[str, Any]]()
    end, where = time.monotonic() + plan.seconds, about(plan.device)
    for index, axis in enumerate(axes):
        until = time.monotonic() + (end - time.monotonic()) / (len(axes) - index)
        points = make_axis(axis, base, plan.device)
        rows += [row(axis, one, plan, where) for one in bench.measure(axis, points, until)]
        bench.models = {key: model for key, model in bench.models.items() if key == (base.model, base.image)}
    return rows


def report(rows: list[dict[str, Any]]) -> None:
    """The rows, and the exponents."""
    for line in rows:
        print(
            f"{line['axis']:10s} {line['value']:>8s}  {line['model']:24s} {line['image']} px  B={line['batch']:<4d} "
            f"K={line['kept']:<4d} {line['ms_p50']:9.2f} ms ({line['ms_p20']:.2f}..{line['ms_p80']:.2f})  "
            f"{line['image_iterations_per_s']:9.1f} image-it/s  {line['true_gflop_per_s']:9.1f} GFLOP/s"
        )
    for axis, (measured, predicted) in exponents(rows).items():
        print(f"{axis:10s} cost grows with exponent {measured:.2f}, FLOPs with {predicted:.2f}")


def plot(rows: list[dict[str, Any]], path: Path) -> None:
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
        panel.set(xlabel=axis, title=f"{some[0]['impl']} {some[0]['dtype']}", ylabel="ms an iteration")
        panel.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line; nonsense ends in a message that names the argument."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=device_argument, default="cpu")
    parser.add_argument("--model", type=model_name, default="deit_tiny_patch16_224", help="of the base point")
    parser.add_argument("--batch", type=positive, default=None, help="of the base point; 8 on a CPU, else 64")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="bf16")
    parser.add_argument("--impl", choices=("eager", "compiled"), default=None, help="eager on a CPU, else compiled")
    parser.add_argument("--axes", nargs="+", choices=AXES, default=list(AXES))
    parser.add_argument("--seconds", type=positive, default=None, help="420 on a CPU, else 220")
    parser.add_argument("--steps", type=positive, default=None, help="iterations in a round; 1 on a CPU, else 10")
    parser.add_argument("--threads", type=positive, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--plot", type=Path, default=None, help="a picture of the fits; needs matplotlib")
    args = parser.parse_args(arguments)
    if args.plot and importlib.util.find_spec("matplotlib") is None:
        parser.error("argument --plot: matplotlib is not installed: pip install 'smi-fast[plots]'")
    on_cpu = args.device == "cpu"
    unset = {"batch": (8, 64), "impl": ("eager", "compiled"), "seconds": (420, 220), "steps": (1, 10)}
    for name, (cpu, gpu) in unset.items():
        if getattr(args, name) is None:
            setattr(args, name, cpu if on_cpu else gpu)
    return args


def main() -> None:
    """Parse, measure, write."""
    args = parse()
    torch.set_num_threads(args.threads)
    grid = grid_of(args.model)
    base = Point(args.model, grid.height, args.batch, paper_kept(grid.patches)[-1])
    bench = Bench(Plan(args.device, args.dtype, args.impl, args.steps, args.seconds))
    rows = run(bench, base, args.axes)
    report(rows)
    write_csv(rows, args.out or RESULTS / f"scaling-{args.device.partition(':')[0]}.csv")
    if args.plot:
        plot(rows, args.plot)
        print(f"drawn to {args.plot}")


if __name__ == "__main__":
    main()
