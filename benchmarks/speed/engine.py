"""Our engine against the yard-stick: one iteration at all patches (dense) and at the last stage's (sparse).

    python -m benchmarks run engine --device cpu

Each system lives in a process of its own, so that its peak memory is its own. Before anything is timed, their input
gradients are compared (see `check_agreement`); then the systems take turns for a number of rounds, so that a change in
the machine's speed hits all of them. Writes one CSV row a system and prints the ratios round by round.
"""

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch

from benchmarks.experiment import Row, experiment, table
from benchmarks.harness.arguments import Parser
from benchmarks.harness.models import grid_of, paper_kept, relative_error
from benchmarks.harness.results import RESULTS, Results
from benchmarks.harness.tables import markdown, measured_on
from benchmarks.harness.timing import median_ratio, quantile, spread, take_turns
from benchmarks.harness.workers import Worker
from benchmarks.systems.fixed import FixedSystem, Setting, System, paper_gradient
from smi_fast.config import InversionConfig

SYSTEMS = (
    System("published", "fp32"),
    System("tuned", "bf16"),
    System("eager", "fp32"),
    System("eager", "bf16"),
    System("compiled", "fp32"),
    System("compiled", "bf16"),
)
TITLES = {"published": "published loop", "tuned": "tuned eager", "eager": "ours, eager", "compiled": "**compiled**"}


@dataclass
class Timed:
    """A system in its process, and what is known of it."""

    system: System
    kept: int
    worker: Worker
    flops: int
    seconds: list[float] = field(default_factory=list)
    memory: int = 0


def check_agreement(systems: list[Timed], setting: Setting) -> None:
    """Input gradients on one canvas and one set of patches, before anything is timed.

    The eager rows (under ``reference``) must equal the published loop's; the compiled rows, which are compiled for the
    preset that is timed, must equal the eager step of that preset, run here in float32.

    Raises:
        AssertionError: a system that does not compute what the others do.
    """
    kept, grid = systems[0].kept, grid_of(setting.model)
    sides = (setting.batch, 3, grid.height, grid.width)
    canvas = torch.randn(sides, generator=torch.Generator().manual_seed(7))
    found = {str(one.system): torch.from_numpy(one.worker.call("gradient", canvas.numpy())) for one in systems}
    paper = paper_gradient(setting, kept, canvas)
    for name, gradient in found.items():
        truth = paper if name.startswith("compiled") else found[str(SYSTEMS[0])]
        error, limit = relative_error(gradient, truth), 1e-3 if name.endswith("fp32") else 0.1
        print(f"  {name:15s} gradient within {error:.1e} of {'eager fp32' if truth is paper else 'the published loop'}")
        assert error < limit, f"{name} at {kept} patches: relative error {error:.3g} of the gradient, limit {limit}"


def row(one: Timed, setting: Setting, baseline: Timed) -> dict[str, Any]:
    """One line of the CSV."""
    rate = setting.batch / quantile(one.seconds, 0.5)
    return {
        "system": one.system.name,
        "dtype": one.system.dtype,
        **asdict(setting),
        "patches": one.kept,
        **spread(one.seconds, 1e3, 2),
        "ms_min": round(min(one.seconds) * 1e3, 2),
        "rounds": len(one.seconds),
        "image_iterations_per_s": round(rate, 1),
        "true_gflop_per_s": round(rate * one.flops / 1e9, 1),
        "speed_up_over_published_p50": round(median_ratio(baseline.seconds, one.seconds), 2),
        "peak_memory_mib": round(one.memory / 2**20),
        "seconds_setup": round(one.worker.seconds_setup, 1),
    }


def measure(setting: Setting, kept: int, rounds: int, steps: int, systems: Sequence[System] = SYSTEMS) -> list[Timed]:
    """The systems at one number of patches, taking turns."""
    ready = []
    for system in systems:
        print(f"{kept} patches: setting up {system}", flush=True)
        worker = Worker(str(system), torch.get_num_threads(), FixedSystem, system, setting, kept).ready()
        ready.append(Timed(system, kept, worker, worker.call("flops")))
    check_agreement(ready, setting)
    clocks = {str(one.system): partial(one.worker.call, "time", steps) for one in ready}
    seconds = take_turns(clocks, rounds)
    print(f"{kept} patches: {rounds} rounds done", flush=True)
    for one in ready:
        one.seconds, one.memory = seconds[str(one.system)], one.worker.call("memory")
        one.worker.close()
    return ready


def report(rows: list[Row], blocks: dict[str, list[Timed]]) -> None:
    """The rows, and our best sparse row against the published loop of each block, round by round."""
    for line in rows:
        print(
            f"{line['system']:10s} {line['dtype']:5s} {line['patches']:>4s} patches  {line['ms_p50']:>8s} ms "
            f"({line['ms_p20']}..{line['ms_p80']})  {line['image_iterations_per_s']:>8s} image-it/s  "
            f"{line['speed_up_over_published_p50']:>5s}x published  {line['peak_memory_mib']} MiB"
        )
    compiled = [one for one in blocks["sparse"] if one.system.name == "compiled"]
    ours = min(compiled, key=lambda one: statistics.median(one.seconds))
    for name, systems in blocks.items():
        ratios = [theirs / mine for mine, theirs in zip(ours.seconds, systems[0].seconds, strict=True)]
        around = f"{quantile(ratios, 0.2):.2f}..{quantile(ratios, 0.8):.2f}"
        print(f"{ours.system} sparse is {statistics.median(ratios):.2f}x the published loop {name} (p20..p80 {around})")


@experiment("engine", "one iteration of the engine beside the published loop and a tuned eager one")
def main(arguments: Sequence[str]) -> None:
    """Parse, measure, write."""
    parser = Parser("engine", __doc__)
    for name in ("device", "model", "batch"):
        parser.share(name)
    parser.share("rounds", default=15)
    parser.share("steps", default=2, help="iterations a system runs in a round")
    parser.share("threads")
    parser.add_argument("--stages", nargs="+", choices=("sparse", "dense"), default=["sparse", "dense"])
    parser.add_argument("--quick", action="store_true", help="published, tuned and the bf16 compiled system alone")
    parser.share("out")
    args = parser.parse(arguments)
    if "sparse" not in args.stages:
        parser.error("--stages: sparse must be among them, since speed-ups are told for it")
    setting = Setting(args.model, args.batch, args.device)
    patches = grid_of(args.model).patches
    systems = tuple(SYSTEMS[i] for i in (0, 1, 5)) if args.quick else SYSTEMS
    kept = {"sparse": paper_kept(patches)[-1], "dense": patches}
    out = args.out or RESULTS / f"engine-{args.device}-{args.model}-b{args.batch}.csv"
    results, blocks = Results(out, "engine", args.device), dict[str, list[Timed]]()
    for name in args.stages:
        blocks[name] = measure(setting, kept[name], args.rounds, args.steps, systems)
        for one in blocks[name]:
            ours = one.system.name in ("eager", "compiled")
            results.append(row(one, setting, blocks[name][0]), InversionConfig() if ours else None)
    report(results.rows, blocks)


@table("engine", "engine-cpu-deit_tiny_patch16_224-b8.csv")
def engine_table(rows: list[Row]) -> str:
    """One iteration of the engine beside the yard-stick; milliseconds are of one iteration on a batch."""
    first = rows[0]
    about = (
        f"{first['model']} geometry with random weights, batch {first['batch']}, {measured_on(first)}. "
        f"Medians of {first['rounds']} rounds in which the systems "
        "took turns (20th to 80th percentile in brackets); the input gradients of all rows were compared first."
    )
    columns = ["system", "dtype", "patches", "ms per iteration", "image-iterations/s", "over published", "peak memory"]
    cells = []
    for line in rows:
        milliseconds = f"{line['ms_p50']} ({line['ms_p20']} to {line['ms_p80']})"
        rates = [line["image_iterations_per_s"], f"{line['speed_up_over_published_p50']}x"]
        what = [TITLES[line["system"]], line["dtype"], line["patches"]]
        cells.append([*what, milliseconds, *rates, f"{line['peak_memory_mib']} MiB"])
    return markdown(about, columns, cells)
