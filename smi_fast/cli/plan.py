"""``smi-fast plan``: stages, work, memory and time, without a run."""

from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from smi_fast.cli import options as o
from smi_fast.config import check_stops
from smi_fast.cost import estimate
from smi_fast.flops import iteration_flops, run_flops
from smi_fast.model import load_model
from smi_fast.report import device_name
from smi_fast.schedule import plan_stages, sparsity


def plan(
    model: o.Model = "demo",
    iterations: o.Iterations = 4000,
    stop: o.Stops = None,
    dense: o.Dense = False,
    images: Annotated[int, typer.Option(help="Images of the whole run.")] = 1,
    batch_size: o.BatchSize = 64,
    dtype: o.DType = "auto",
    device: o.Device = "auto",
    image_size: o.ImageSize = None,
) -> None:
    """Show the stages of a run, its FLOPs, and estimates of memory and time; nothing is inverted or downloaded."""
    stops = o.parse_stops(stop, dense, iterations)
    check_stops(stops, iterations)
    if images < 1 or batch_size < 1:
        raise ValueError(f"--images {images}, --batch-size {batch_size}: both must be at least 1")
    where = o.parse_device(device)
    compute = o.parse_dtype(dtype, where)
    shape = load_model(model, pretrained=None if model == "demo" else False, img_size=image_size).shape
    stages = plan_stages(shape.grid.patches, stops, iterations)
    batch = min(images, batch_size)
    flops, cost = run_flops(shape, stages), estimate(shape, stages, batch, where, compute)

    table = Table(title=f"{model}, {shape.grid.height} x {shape.grid.width}, patch {shape.grid.patch}")
    for header in ("stage", "iterations", "patches", "tokens", "sparsity", "GFLOP / image-iteration"):
        table.add_column(header, justify="right")
    for index, stage in enumerate(stages):
        table.add_row(
            str(index + 1),
            f"{stage.start}..{stage.end - 1}",
            str(stage.kept),
            str(stage.kept + shape.prefix),
            f"{1 - stage.kept / shape.grid.patches:.2f}",
            f"{iteration_flops(shape, stage.kept) / 1e9:.3g}",
        )
    console = Console()
    console.print(table)
    for line in (
        f"sparsity at the end    {sparsity(stages, shape.grid.patches):.3f}",
        f"FLOPs an image         {flops.true / 1e12:.4g} T (true), {flops.paper / 1e12:.4g} T (the paper's convention)",
        f"memory, estimated      {cost.memory_bytes / 2**30:.2f} GiB at batch {batch}",
        f"time, estimated        {cost.seconds_per_image:.3g} s an image, {_duration(cost.seconds_per_image * images)} "
        f"for {images}, without compilation",
        f"  on {device_name(where)}, {dtype_name(compute)} matrix products at {cost.matmul_flops_per_s / 1e9:,.0f} "
        "GFLOP/s (measured just now)",
    ):
        console.print(line, highlight=False)


def dtype_name(dtype: object) -> str:
    """``float32`` for ``torch.float32``."""
    return str(dtype).removeprefix("torch.")


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
