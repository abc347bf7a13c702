"""The kernels against their plain references, per op and shape, as share of this device's copy bandwidth.

    python -m benchmarks run kernels                         the GPU, all shapes that fit into --seconds
    SMI_FAST_AUTOTUNE=1 python -m benchmarks run kernels     time launch configurations, and print a new table of them
    python -m benchmarks run kernels --device cpu            references alone: Triton needs a GPU

Each row is checked before it is timed: the kernel's result on fresh inputs against the reference's. On a GPU a row's
systems are captured in CUDA graphs of several calls on different inputs (more of them than fit into the L2 cache) and
take turns; milliseconds are of one call. The reference is plain torch without custom ops, so that the compiler sees
all of it. GB/s counts the least bytes an op must move, whatever it moves.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.experiment import Row, experiment, table
from benchmarks.harness.arguments import Parser, positive
from benchmarks.harness.models import paper_kept
from benchmarks.harness.results import RESULTS, Results
from benchmarks.harness.tables import markdown, measured_on
from benchmarks.harness.timing import copy_bandwidth, median_ratio, spread, take_turns, timed
from benchmarks.speed.block_cases import block_ops
from benchmarks.speed.kernel_cases import Op, Shape, patch_ops
from smi_fast.device import side_stream
from smi_fast.kernels.common.configs import tuned_table
from smi_fast.kernels.common.grid import Grid

MODELS = ((Grid(224, 224, 16), 12), (Grid(32, 32, 4), 3))  # DeiT-Base and the bundled teacher: grid, heads
DTYPES = (torch.bfloat16, torch.float32)
Call = Callable[[], Any]


def shapes(device: str, batches: list[int]) -> Iterator[Shape]:
    """All shapes, the most telling first: the first batch of the list, large images, low precision."""
    for batch in batches:
        for grid, heads in MODELS:
            for dtype in DTYPES:
                for kept in reversed(paper_kept(grid.patches)):
                    yield Shape(grid, batch, kept, dtype, heads, device)


def all_ops(shape: Shape) -> list[Op]:
    """Every op at a shape."""
    return patch_ops(shape) + block_ops(shape)


def tensors_of(result: Any) -> list[Tensor]:
    """The tensors of a result, in order."""
    return [result] if isinstance(result, Tensor) else [t for part in result for t in tensors_of(part)]


def check(op: Op, function: Callable[..., Any], system: str, draw: torch.Generator) -> None:
    """Hold a system's result on fresh inputs against the eager reference's.

    Raises:
        AssertionError: they differ by more than the op's tolerance, or something is not finite.
    """
    state = draw.get_state()
    expected = tensors_of(op.wrap(op.reference)(*op.draw(draw)))
    draw.set_state(state)
    found = tensors_of(function(*op.draw(draw)))
    assert len(found) == len(expected)
    for index, (one, other) in enumerate(zip(found, expected, strict=True)):
        difference = (one.double() - other.double()).norm()
        error = float(difference / other.double().norm().clamp(min=1e-30))
        assert error <= op.tolerance, f"{op.name}, {system}: result {index} is off by {error:.3g} > {op.tolerance}"


def graph_of(function: Callable[..., Any], sets: list[tuple[Any, ...]]) -> Call:
    """A replay of one call on each set of arguments."""
    stream = side_stream(sets[0][0].device)
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            for arguments in sets:
                function(*arguments)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for arguments in sets:
            function(*arguments)
    return graph.replay


def systems_of(op: Op, shape: Shape, compiled: bool) -> dict[str, Callable[..., Any]]:
    """By name: what is timed at this shape."""
    systems: dict[str, Callable[..., Any]] = {"eager": op.wrap(op.reference)}
    if compiled:
        torch._dynamo.reset()
        systems["compiled"] = op.wrap(torch.compile(op.reference, fullgraph=True, dynamic=False))
    if shape.device != "cpu":
        systems["triton"] = op.kernel
    return systems


def measure(op: Op, shape: Shape, rounds: int, compiled: bool, copy: float) -> dict[str, Any]:
    """One row: correctness, then rounds in which the systems take turns."""
    draw = torch.Generator(shape.device).manual_seed(torch.seed() % 2**31)
    systems = systems_of(op, shape, compiled)
    for name, function in systems.items():
        if name != "eager":
            check(op, function, name, draw)
    cache = 0 if shape.device == "cpu" else 2 * torch.cuda.get_device_properties(shape.device).L2_cache_size
    sets = [op.draw(draw) for _ in range(min(16, 2 + cache // op.least_bytes))]
    calls: dict[str, Call] = {}
    for name, function in systems.items():
        if shape.device == "cpu":
            calls[name] = lambda function=function: [function(*arguments) for arguments in sets]
            calls[name]()
        else:
            calls[name] = graph_of(function, sets)
    clocks = {name: partial(timed, call, shape.device) for name, call in calls.items()}
    found = take_turns(clocks, rounds, warm_up=0)
    return row(op, shape, {name: [t / len(sets) for t in times] for name, times in found.items()}, copy)


def row(op: Op, shape: Shape, seconds: dict[str, list[float]], copy: float) -> dict[str, Any]:
    """One line of the CSV; what was not measured stays empty."""
    line: dict[str, Any] = {
        "op": op.name,
        "image": shape.grid.height,
        "patch": shape.grid.patch,
        "batch": shape.batch,
        "kept": shape.kept,
        "dtype": str(shape.dtype).removeprefix("torch."),
        "least_bytes": op.least_bytes,
        "flops": op.flops,
    }
    for name in ("eager", "compiled", "triton"):
        line |= dict.fromkeys((f"{name}_us_p20", f"{name}_us_p50", f"{name}_us_p80"))
        line |= spread(seconds[name], 1e6, 2, f"{name}_us") if name in seconds else {}
    ours = seconds.get("triton")
    speed = op.least_bytes / statistics.median(ours) if ours else 0.0
    line["triton_gb_per_s"] = round(speed / 1e9, 1) if ours else None
    line["share_of_copy"] = round(speed / copy, 3) if ours else None
    line["triton_tflop_per_s"] = round(op.flops / statistics.median(ours) / 1e12, 1) if ours and op.flops else None
    for name in ("eager", "compiled"):
        theirs = seconds.get(name)
        line[f"speed_up_over_{name}"] = round(median_ratio(theirs, ours), 2) if theirs and ours else None
    return line | {"copy_gb_per_s": round(copy / 1e9, 1), "rounds": len(seconds["eager"])}


def ends(shape: Shape) -> bool:
    """Is it the last stage's shape, or the dense one's?"""
    stages = paper_kept(shape.grid.patches)
    return shape.kept in (stages[0], stages[-1])


def run(args: argparse.Namespace, results: Results) -> None:
    """Rows until the time is spent; what was left out is printed."""
    device, batches = args.device, args.batches
    begin, copy = time.monotonic(), copy_bandwidth(device)
    print(f"a large copy moves {copy / 1e9:.1f} GB/s", flush=True)
    compiled_shapes = [shape for shape in shapes(device, batches[:1]) if ends(shape)][: args.compiled]
    for shape in shapes(device, batches):
        if time.monotonic() - begin > args.seconds:
            print(f"left out for want of time: this and later shapes: {shape}", flush=True)
            break
        for op in all_ops(shape):
            if args.only not in op.name:
                continue
            line = measure(op, shape, args.rounds, shape in compiled_shapes, copy)
            results.append(line)
            print(
                f"{line['op']:50s} {shape.grid.height}/{shape.grid.patch} B={shape.batch:3d} K={shape.kept:3d} "
                f"{line['dtype']:8s} eager {line['eager_us_p50']!s:>9} us  compiled {line['compiled_us_p50']!s:>9}  "
                f"triton {line['triton_us_p50']!s:>8}  share of copy {line['share_of_copy']}",
                flush=True,
            )


@experiment("kernels", "each kernel beside its plain reference, eager and compiled, as share of copy bandwidth")
def main(arguments: Sequence[str]) -> None:
    """Parse, measure, write."""
    parser = Parser("kernels", __doc__)
    parser.share("device", default="cuda", help="cpu times the references alone")
    parser.add_argument("--batches", type=positive, nargs="+", default=[128, 119, 32, 256, 479])
    parser.share("rounds", default=25)
    parser.add_argument("--seconds", type=float, default=600.0, help="start no shape after that many")
    parser.add_argument("--compiled", type=int, default=8, help="compile the references of so many shapes (slow)")
    parser.add_argument("--only", default="", help="ops whose name contains this")
    parser.share("out")
    args = parser.parse(arguments)
    if args.only and not any(args.only in op.name for op in all_ops(next(shapes("cpu", [1])))):
        parser.error(f"--only {args.only}: no op has that in its name")
    run(args, Results(args.out or RESULTS / f"kernels-{args.device}.csv", "kernels", args.device))
    if tuned_table():
        print(f"PINNED, as measured:\n{tuned_table()}")


@table("kernels on a GPU", "kernels-cuda.csv")
@table("references on a CPU", "kernels-cpu.csv")
def kernel_table(rows: list[Row]) -> str:
    """Every op at the last stage and dense; microseconds are medians of one call."""
    first = rows[0]
    kept = {image: [int(row["kept"]) for row in rows if row["image"] == image] for image in {r["image"] for r in rows}}
    rows = [row for row in rows if int(row["kept"]) in (min(kept[row["image"]]), max(kept[row["image"]]))]
    rows = [row for row in rows if row["batch"] == first["batch"]]
    with_kernels = any(row["triton_us_p50"] for row in rows)
    columns = ["op", "image/patch", "B", "K", "dtype", "least MB", "eager us", "compiled us"]
    columns += ["Triton us", "share of copy", "TFLOP/s"] if with_kernels else []
    about = (
        f"{measured_on(first, 'triton')}; a large "
        f"copy moves {first['copy_gb_per_s']} GB/s. Medians of {first['rounds']} rounds in which the systems took "
        "turns; results were compared first."
    )
    lines = []
    for row in rows:
        cells = [row["op"], f"{row['image']}/{row['patch']}", row["batch"], row["kept"], row["dtype"]]
        cells += [f"{int(row['least_bytes']) / 1e6:.2f}", row["eager_us_p50"], row["compiled_us_p50"]]
        if with_kernels:
            around = f"{row['triton_us_p50']} ({row['triton_us_p20']} to {row['triton_us_p80']})"
            cells += [around if row["triton_us_p50"] else "", row["share_of_copy"], row["triton_tflop_per_s"] or "-"]
        lines.append([cell or "not measured" for cell in cells])
    return markdown(about, columns, lines)
