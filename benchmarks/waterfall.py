"""What each technique is worth: one a row, each row in a fresh process, each adding one to the row before it.

    python -m benchmarks.waterfall --device cpu

Every row holds its gradient against float32 before it is timed, then the rows take turns at each stage of the paper's
schedule. A row's speed is that over the whole schedule: 50, 50, 100, 100 and 3700 iterations. Peak memory is of the
timed stages; then each row inverts the bundled teacher for a while, for the loss and top-1 of its images.
"""

import argparse
import multiprocessing as mp
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import (
    RESULTS,
    about,
    copy_bandwidth,
    device_argument,
    grid_of,
    matmul_rate,
    model_name,
    positive,
    quantile,
    write_csv,
)
from benchmarks.techniques import WATERFALL, Bench, Technique
from smi_fast.config import PAPER_STOPS
from smi_fast.schedule import Stage, plan_stages
from smi_fast.storage.environment import peak_memory_bytes

ITERATIONS = 4000


def serve(technique: Technique, args: argparse.Namespace, stages: tuple[Stage, ...], pipe: Any) -> None:
    """A process of its own: set up, then answer orders until ``None``."""
    torch.set_num_threads(args.threads)
    begin = time.perf_counter()
    bench = Bench(technique, args.model, args.batch, args.device, stages)
    error = bench.check()
    for stage in range(len(stages)):
        bench.milliseconds(stage, 2)
    flops = [bench.flops(stage) for stage in range(len(stages))]
    pipe.send((bench.facts() | {"error": error, "seconds_setup": time.perf_counter() - begin}, flops))
    for order, *details in iter(pipe.recv, None):
        if order == "time":
            pipe.send((bench.milliseconds(*details), peak_memory_bytes(torch.device(args.device))))
        else:
            pipe.send(bench.quality(*details))


class Row:
    """A technique in its process."""

    def __init__(self, technique: Technique, args: argparse.Namespace, stages: tuple[Stage, ...]) -> None:
        context = mp.get_context("spawn")
        self.technique, self.stages = technique, stages
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(technique, args, stages, theirs), daemon=True)
        self.process.start()
        theirs.close()
        self.facts: dict[str, Any] = {}
        self.flops: list[int] = []
        self.milliseconds: list[list[float]] = [[] for _ in stages]
        self.memory = 0
        self.quality: dict[str, float] = {}

    def ready(self) -> None:
        """Wait until it is set up."""
        self.facts, self.flops = self.answer()

    def answer(self) -> Any:
        """What the process answers to the last order.

        Raises:
            RuntimeError: the process ended without an answer; its own error is on the terminal.
        """
        try:
            return self.pipe.recv()
        except EOFError:
            self.process.join()
            raise RuntimeError(f"{self.technique.name}: its process ended with {self.process.exitcode}") from None

    def time(self, stage: int, steps: int, count: bool) -> None:
        """One round at one stage."""
        self.pipe.send(("time", stage, steps))
        milliseconds, self.memory = self.answer()
        if count:
            self.milliseconds[stage].append(milliseconds)

    def close(self) -> None:
        """End the process."""
        self.pipe.send(None)
        self.process.join()


def seconds_an_image(row: Row, share: float = 0.5) -> float:
    """Over the whole schedule, from the medians (or another quantile) of the stages."""
    return sum(
        stage.length * quantile(times, share) / 1e3 / batch
        for stage, times, batch in zip(row.stages, row.milliseconds, row.facts["batches"], strict=True)
    )


def line(row: Row, first: Row, rate: float, args: argparse.Namespace) -> dict[str, Any]:
    """One line of the CSV."""
    seconds = seconds_an_image(row)
    batches, stages = row.facts["batches"], row.stages
    flops = sum(f / batch * stage.length for f, batch, stage in zip(row.flops, batches, stages, strict=True))
    columns: dict[str, Any] = {
        "row": row.technique.name,
        "model": args.model,
        "dtype": row.technique.dtype,
        "batches": " ".join(map(str, batches)),
        "seconds_an_image": round(seconds, 4),
        "image_iterations_per_s": round(ITERATIONS / seconds, 1),
        "over_published": round(seconds_an_image(first) / seconds, 2),
        "tflop_per_s": round(flops / seconds / 1e12, 4),
        "share_of_matmul": round(flops / seconds / rate, 3),
    }
    for index, (stage, times) in enumerate(zip(stages, row.milliseconds, strict=True)):
        columns[f"patches_{index}"] = stage.kept
        for name, share in (("p20", 0.2), ("p50", 0.5), ("p80", 0.8)):
            columns[f"ms_{index}_{name}"] = round(quantile(times, share), 3)
        columns[f"tflop_per_s_{index}"] = round(row.flops[index] / quantile(times, 0.5) / 1e9, 4)
    return columns | {
        "gradient_error": f"{row.facts['error']:.2g}",
        "peak_memory_mib": round(row.memory / 2**20),
        "seconds_compile": round(row.facts["seconds_compile"], 1),
        "seconds_setup": round(row.facts["seconds_setup"], 1),
        "final_loss": round(row.quality["final_loss"], 4),
        "teacher_top1": round(row.quality["teacher_top1"], 3),
        "rounds": len(row.milliseconds[0]),
        "threads": args.threads,
        "matmul_tflop_per_s": round(rate / 1e12, 4),
        "copy_gb_per_s": round(copy_bandwidth(args.device) / 1e9, 1) if row is first else "",
        **about(args.device),
    }


def measure(rows: list[Row], args: argparse.Namespace) -> None:
    """All rows at all stages, taking turns; then the quality of each."""
    for stage in range(len(rows[0].stages)):
        for turn in range(args.rounds + 1):
            for row in rows:
                row.time(stage, args.steps, count=turn > 0)  # the first round warms up
        print(f"{rows[0].stages[stage].kept} patches: {args.rounds} rounds done", flush=True)
    # nothing is timed any more: on a GPU's machine, with its cores, all of them at once
    for group in [rows] if args.device != "cpu" else [[row] for row in rows]:
        for row in group:
            row.pipe.send(("quality", args.quality_iterations))
        for row in group:
            row.quality = row.answer()
            print(f"{row.technique.name}: {row.quality}", flush=True)


def plot(lines: list[dict[str, Any]], path: Path) -> None:
    """Speed of each row, and a roofline of its stages as shares of the measured matrix product rate."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (speeds, roof) = pyplot.subplots(2, 1, figsize=(9, 9), layout="constrained")
    names = [row["row"] for row in lines]
    bars = speeds.barh(names, [row["image_iterations_per_s"] for row in lines])
    speeds.bar_label(bars, [f"{row['over_published']}x" for row in lines], padding=3)
    speeds.margins(x=0.1)
    speeds.invert_yaxis()
    speeds.set(
        xlabel="image-iterations/s over the whole schedule", title=f"{lines[0]['model']}, {lines[0]['device_name']}"
    )
    count = sum(key.startswith("patches_") for key in lines[0])
    for row in lines:
        shares = [row[f"tflop_per_s_{i}"] / row["matmul_tflop_per_s"] for i in range(count)]
        roof.plot([str(row[f"patches_{i}"]) for i in range(count)], shares, marker="o", label=row["row"])
    roof.axhline(1, color="black", linewidth=1)
    roof.set(xlabel="kept patches of the stage", ylabel="share of the measured matrix product rate", ylim=(0, 1.05))
    roof.legend(fontsize="small")
    figure.savefig(path, dpi=120)
    print(f"written to {path}")


def main() -> None:
    """Parse, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=device_argument, default="cpu")
    parser.add_argument("--model", type=model_name, default="deit_tiny_patch16_224")
    parser.add_argument("--batch", type=positive, default=8, help="of every row before the batch per bucket")
    parser.add_argument("--rounds", type=positive, default=7)
    parser.add_argument("--steps", type=positive, default=2, help="iterations in a round; 10 or more use CUDA graphs")
    parser.add_argument("--threads", type=positive, default=torch.get_num_threads())
    parser.add_argument("--quality-iterations", type=positive, default=200)
    parser.add_argument("--rows", nargs="+", help="names of rows; the first is always there. [default: all]")
    parser.add_argument("--plot", action="store_true", help="draw a figure beside the CSV; needs matplotlib")
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args()
    known = [technique.name for technique in WATERFALL]
    for name in args.rows or ():
        if name not in known:
            parser.error(f"--rows {name!r}: must be among {', '.join(map(repr, known))}")
    stages = plan_stages(grid_of(args.model).patches, PAPER_STOPS, ITERATIONS)
    rows: list[Row] = []
    rate = matmul_rate(args.device, torch.bfloat16)
    for technique in WATERFALL:
        reason = technique.why_not(torch.device(args.device))
        if reason or (args.rows and rows and technique.name not in args.rows):
            print(f"{technique.name}: left out, {reason or 'not asked for'}", flush=True)
            continue
        print(f"{technique.name}: setting up", flush=True)
        rows.append(Row(technique, args, stages))
        if args.device == "cpu":
            rows[-1].ready()
    if args.device != "cpu":  # compilation is most of it, a core each
        for row in rows:
            row.ready()
    measure(rows, args)
    rate = max(rate, matmul_rate(args.device, torch.bfloat16))  # a ceiling: other work can only lower it
    lines = [line(row, rows[0], rate, args) for row in rows]
    for row in rows:
        row.close()
    for entry in lines:
        print(
            f"{entry['row']:22s} {entry['image_iterations_per_s']:10.1f} image-it/s  {entry['over_published']:6.2f}x  "
            f"{entry['share_of_matmul']:.0%} of matmul  top-1 {entry['teacher_top1']}"
        )
    out = args.out or RESULTS / f"waterfall-{args.device}-{args.model}-b{args.batch}.csv"
    write_csv(lines, out)
    if args.plot:
        plot(lines, out.with_suffix(".png"))


if __name__ == "__main__":
    main()
