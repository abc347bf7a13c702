"""What each technique is worth: one a row, each row in a fresh process, each adding one to the row before it.

    python -m benchmarks run waterfall --device cpu

Every row holds its gradient against float32 before it is timed, then the rows take turns at each stage of the paper's
schedule, the last stage first. A row's speed is that over the whole schedule: 50, 50, 100, 100 and 3700 iterations.
Peak memory is of the timed stages; then each row inverts the bundled teacher for a while, for the loss and top-1 of its
images. The CSV gets each stage and each inversion when it is measured; what is not known yet is empty.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.experiment import Row, experiment, table
from benchmarks.harness.arguments import Parser, positive
from benchmarks.harness.engine import PAPER_ITERATIONS, Stage, paper_stages
from benchmarks.harness.models import grid_of
from benchmarks.harness.results import RESULTS, Results
from benchmarks.harness.tables import markdown, measured_on
from benchmarks.harness.timing import copy_bandwidth, matmul_rate, quantile, spread, take_turns
from benchmarks.harness.workers import Worker
from benchmarks.systems.techniques import WATERFALL, Bench, Technique
from smi_fast.config import InversionConfig

SCHEDULE_COLUMNS = ("seconds_an_image", "image_iterations_per_s", "over_published", "tflop_per_s", "share_of_matmul")


def checked_bench(technique: Technique, model: str, batch: int, device: str, stages: tuple[Stage, ...]) -> Bench:
    """A bench whose gradient is right, warmed up; called in the row's process."""
    bench = Bench(technique, model, batch, device, stages)
    bench.check()
    bench.warm_up()
    return bench


@dataclass
class Timed:
    """A row in its process, and what is known of it."""

    technique: Technique
    stages: tuple[Stage, ...]
    worker: Worker
    facts: dict[str, Any] = field(default_factory=dict)  # of `Bench.facts`
    seconds: dict[int, list[float]] = field(default_factory=dict)  # by stage: one entry a round
    quality: dict[str, float] = field(default_factory=dict)  # of `Bench.quality`
    memory: int = 0

    def ready(self) -> None:
        """Wait until it is set up."""
        self.facts = self.worker.ready().call("facts")

    def seconds_an_image(self) -> float | None:
        """Over the whole schedule, from the medians of the stages; None before all of them are measured."""
        if len(self.seconds) < len(self.stages):
            return None
        stages = zip(self.stages, self.facts["batches"], strict=True)
        return sum(
            stage.length * quantile(self.seconds[index], 0.5) / batch for index, (stage, batch) in enumerate(stages)
        )

    def flops_an_image(self) -> float:
        """True FLOPs over the whole schedule."""
        stages = zip(self.facts["flops"], self.facts["batches"], self.stages, strict=True)
        return sum(flops / batch * stage.length for flops, batch, stage in stages)


@dataclass(frozen=True)
class Ceilings:
    """What the device reached in this run."""

    flops_per_s: float  # of a large bf16 matrix product
    bytes_per_s: float  # of a large copy


def measure_ceilings(device: str) -> Ceilings:
    """In a few seconds."""
    return Ceilings(matmul_rate(device, torch.bfloat16), copy_bandwidth(device))


def of_schedule(row: Timed, first: Timed, ceilings: Ceilings) -> dict[str, Any]:
    """The columns about the whole schedule, empty before all stages are measured."""
    seconds, published = row.seconds_an_image(), first.seconds_an_image()
    if seconds is None or published is None:
        return dict.fromkeys(SCHEDULE_COLUMNS)
    rate = row.flops_an_image() / seconds
    figures = (
        round(seconds, 4),
        round(PAPER_ITERATIONS / seconds, 1),
        round(published / seconds, 2),
        round(rate / 1e12, 4),
        round(rate / ceilings.flops_per_s, 3),
    )
    return dict(zip(SCHEDULE_COLUMNS, figures, strict=True))


def of_stage(row: Timed, index: int) -> dict[str, Any]:
    """The columns about one stage, empty before it is measured."""
    columns: dict[str, Any] = {f"patches_{index}": row.stages[index].kept}
    if index not in row.seconds:
        names = (*(f"ms_{index}_p{share}" for share in (20, 50, 80)), f"tflop_per_s_{index}")
        return columns | dict.fromkeys(names)
    times = row.seconds[index]
    columns |= spread(times, 1e3, 3, f"ms_{index}")
    return columns | {f"tflop_per_s_{index}": round(row.facts["flops"][index] / quantile(times, 0.5) / 1e12, 4)}


def line(row: Timed, first: Timed, ceilings: Ceilings) -> dict[str, Any]:
    """One line of the CSV, but for the model; what is not known yet is empty."""
    loss, top1 = row.quality.get("final_loss"), row.quality.get("teacher_top1")
    columns = {
        "row": row.technique.name,
        "dtype": row.technique.dtype,
        "batches": " ".join(map(str, row.facts["batches"])),
        **of_schedule(row, first, ceilings),
    }
    for index in range(len(row.stages)):
        columns |= of_stage(row, index)
    return columns | {
        "gradient_error": f"{row.facts['error']:.2g}",
        "peak_memory_mib": round(row.memory / 2**20) if row.memory else None,
        "seconds_compile": round(row.facts["seconds_compile"], 1),
        "seconds_setup": round(row.worker.seconds_setup, 1),
        "final_loss": None if loss is None else round(loss, 4),
        "teacher_top1": None if top1 is None else round(top1, 3),
        "rounds": min(map(len, row.seconds.values())),
        "matmul_tflop_per_s": round(ceilings.flops_per_s / 1e12, 4),
        "copy_gb_per_s": round(ceilings.bytes_per_s / 1e9, 1),
    }


class Sheet:
    """The CSV of a run, written anew as more becomes known of its rows."""

    def __init__(self, model: str, ceilings: Ceilings, results: Results) -> None:
        self.model, self.ceilings, self.results = model, ceilings, results

    def write(self, rows: list[Timed]) -> None:
        """What is known of all rows by now."""
        for index, row in enumerate(rows):
            ours = InversionConfig() if row.technique.system == "ours" else None
            self.results.put(index, {"model": self.model} | line(row, rows[0], self.ceilings), ours)


def set_up(args: argparse.Namespace) -> list[Timed]:
    """The rows that were asked for and that the device can have; what is left out is printed."""
    stages, rows = paper_stages(grid_of(args.model).patches), list[Timed]()
    for technique in WATERFALL:
        reason = technique.why_not(torch.device(args.device))
        if reason or (args.rows and rows and technique.name not in args.rows):
            print(f"{technique.name}: left out, {reason or 'not asked for'}", flush=True)
            continue
        print(f"{technique.name}: setting up", flush=True)
        details = (technique, args.model, args.batch, args.device, stages)
        rows.append(Timed(technique, stages, Worker(technique.name, args.threads, checked_bench, *details)))
        if args.device == "cpu":
            rows[-1].ready()
    if args.device != "cpu":  # compilation is most of it, a core each
        for row in rows:
            row.ready()
    return rows


def measure(rows: list[Timed], args: argparse.Namespace, sheet: Sheet) -> None:
    """All rows at all stages, taking turns; the last stage, which is most of the schedule, comes first."""
    for index in reversed(range(len(rows[0].stages))):
        clocks = {row.technique.name: partial(row.worker.call, "seconds", index, args.steps) for row in rows}
        found = take_turns(clocks, args.rounds)
        for row in rows:
            row.seconds[index] = found[row.technique.name]
        sheet.write(rows)
        print(f"{rows[0].stages[index].kept} patches: {args.rounds} rounds done", flush=True)
    for row in rows:
        row.memory = row.worker.call("memory")
    # a ceiling: other work can only lower it
    again = matmul_rate(args.device, torch.bfloat16)
    sheet.ceilings = replace(sheet.ceilings, flops_per_s=max(sheet.ceilings.flops_per_s, again))
    sheet.write(rows)


def invert(rows: list[Timed], args: argparse.Namespace, sheet: Sheet) -> None:
    """Let each row invert the teacher, and close it."""
    # nothing is timed any more: on a GPU's machine, with its cores, all of them at once
    for group in [rows] if args.device != "cpu" else [[row] for row in rows]:
        for row in group:
            row.worker.ask("quality", args.quality_iterations)
        for row in group:
            row.quality = row.worker.answer()
            sheet.write(rows)
            columns = line(row, rows[0], sheet.ceilings)
            print(
                f"{columns['row']:22s} {columns['image_iterations_per_s']:10.1f} image-it/s  "
                f"{columns['over_published']:6.2f}x  {columns['share_of_matmul']:.0%} of matmul  "
                f"top-1 {columns['teacher_top1']}",
                flush=True,
            )
            row.worker.close()


def plot(lines: list[Row], path: Path) -> None:
    """Speed of each row, and a roofline of its stages as shares of the measured matrix product rate."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (speeds, roof) = pyplot.subplots(2, 1, figsize=(9, 9), layout="constrained")
    names = [row["row"] for row in lines]
    bars = speeds.barh(names, [float(row["image_iterations_per_s"]) for row in lines])
    speeds.bar_label(bars, [f"{row['over_published']}x" for row in lines], padding=3)
    speeds.margins(x=0.1)
    speeds.invert_yaxis()
    speeds.set(
        xlabel="image-iterations/s over the whole schedule", title=f"{lines[0]['model']}, {lines[0]['device_name']}"
    )
    count = sum(key.startswith("patches_") for key in lines[0])
    for row in lines:
        shares = [float(row[f"tflop_per_s_{i}"]) / float(row["matmul_tflop_per_s"]) for i in range(count)]
        roof.plot([str(row[f"patches_{i}"]) for i in range(count)], shares, marker="o", label=row["row"])
    roof.axhline(1, color="black", linewidth=1)
    roof.set(xlabel="kept patches of the stage", ylabel="share of the measured matrix product rate", ylim=(0, 1.05))
    roof.legend(fontsize="small")
    figure.savefig(path, dpi=120)
    print(f"written to {path}")


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = Parser("waterfall", __doc__)
    parser.share("device")
    parser.share("model")
    parser.share("batch", help="of every row before the batch per bucket")
    parser.share("rounds", default=7)
    parser.share("steps", default=2, help="iterations in a round; 10 or more use CUDA graphs")
    parser.share("threads")
    parser.add_argument("--quality-iterations", type=positive, default=200)
    parser.add_argument("--rows", nargs="+", help="names of rows; the first is always there. [default: all]")
    parser.add_argument("--plot", action="store_true", help="draw a figure beside the CSV; needs matplotlib")
    parser.share("out")
    args = parser.parse(arguments)
    known = [technique.name for technique in WATERFALL]
    for name in args.rows or ():
        if name not in known:
            parser.error(f"--rows {name!r}: must be among {', '.join(map(repr, known))}")
    args.out = args.out or RESULTS / f"waterfall-{args.device}-{args.model}-b{args.batch}.csv"
    return args


@experiment("waterfall", "what each technique is worth, from the published loop on, a row each")
def main(arguments: Sequence[str]) -> None:
    """Parse, measure, write."""
    args = parse(arguments)
    results = Results(args.out, "waterfall", args.device)
    sheet = Sheet(args.model, measure_ceilings(args.device), results)
    rows = set_up(args)
    measure(rows, args, sheet)
    invert(rows, args, sheet)
    if args.plot:
        plot(results.rows, args.out.with_suffix(".png"))


@table("waterfall on a GPU", "waterfall-cuda-deit_base_patch16_224-b64.csv")
@table("waterfall on a CPU", "waterfall-cpu-deit_tiny_patch16_224-b8.csv")
def waterfall_table(rows: list[Row]) -> str:
    """A row a technique; milliseconds are of one iteration of the stage on its batch."""
    first = rows[0]
    count = sum(key.startswith("patches_") for key in first)
    stages = [f"ms at {first[f'patches_{index}']}" for index in range(count)]
    columns = ["row", "image-it/s", "over published", *stages, "share of matmul", "MiB", "compile s", "loss", "top-1"]
    about = (
        f"{first['model']}, {measured_on(first)}; bf16 matrix "
        f"products reach {first['matmul_tflop_per_s']} TFLOP/s, a large copy {first['copy_gb_per_s']} GB/s. Batch "
        f"{first['batches'].split()[0]} a stage, in the row of batches {rows[-1]['batches']}. Medians of "
        f"{first['rounds']} rounds in which the rows took turns (20th to 80th percentile for the last stage); "
        "gradients were checked first. Loss and top-1: of a short inversion of the bundled teacher by the same means."
    )
    cells = []
    for row in rows:
        times = [row[f"ms_{index}_p50"] for index in range(count)]
        times[-1] += f" ({row[f'ms_{count - 1}_p20']} to {row[f'ms_{count - 1}_p80']})"
        over, share = row["over_published"], row["share_of_matmul"]
        what = [row["row"], row["image_iterations_per_s"], over and f"{over}x", *times]
        what += [share and f"{float(share):.0%}", row["peak_memory_mib"], row["seconds_compile"]]
        cells.append([cell or "not measured" for cell in (*what, row["final_loss"], row["teacher_top1"])])
    measured = {row["row"] for row in rows}
    missing = [technique.name for technique in WATERFALL if technique.name not in measured]
    note = f"\nNot measured here: {', '.join(missing)}.\n" if missing else ""
    return markdown(about, columns, cells) + note
