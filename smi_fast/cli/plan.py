"""``smi-fast plan``: stages, work, memory and time, without a run."""

from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from smi_fast.cli import options as o
from smi_fast.cli.batches import parse_batch_size, tuned_or_default
from smi_fast.config import InversionConfig
from smi_fast.engine.batches import even_batches
from smi_fast.model import load_model
from smi_fast.model.flops import iteration_flops, run_flops
from smi_fast.model.scaled_linear import FP8
from smi_fast.schedule import plan_stages, sparsity
from smi_fast.storage.environment import device_name
from smi_fast.tuning.cost import estimate
from smi_fast.tuning.store import key_of


def plan(
    model: o.Model = "demo",
    iterations: o.Iterations = 4000,
    stop: o.Stops = None,
    dense: o.Dense = False,
    images: Annotated[int, typer.Option(help="Images of the whole run.")] = 1,
    batch_size: o.BatchSize = "auto",
    dtype: o.DType = "auto",
    device: o.Device = "auto",
    impl: o.Impl = "compiled",
    image_size: o.ImageSize = None,
) -> None:
    """Show the stages of a run, its FLOPs, and estimates of memory and time; nothing is inverted or downloaded."""
    config = InversionConfig(iterations=iterations, stops=o.parse_stops(stop, dense, iterations))
    if images < 1:
        raise ValueError(f"--images {images}: must be at least 1")
    given = parse_batch_size(batch_size, config)
    o.check_impl(impl)
    where = o.parse_device(device)
    compute = o.parse_dtype(dtype, where)
    shape = load_model(model, pretrained=None if model == "demo" else False, img_size=image_size).shape
    stages = plan_stages(shape.grid.patches, config.stops, iterations)
    if given is None:
        precision = "fp8" if compute is FP8 else dtype_name(compute)
        given, _ = tuned_or_default(key_of(shape, stages, where, precision, impl), config, typer.echo)
    batches = even_batches(images, given)
    flops, cost = run_flops(shape, stages), estimate(shape, stages, batches, where, compute)

    table = Table(title=f"{model}, {shape.grid.height} x {shape.grid.width}, patch {shape.grid.patch}")
    for header in ("stage", "iterations", "patches", "tokens", "batch", "sparsity", "GFLOP / image-iteration"):
        table.add_column(header, justify="right")
    for index, stage in enumerate(stages):
        table.add_row(
            str(index + 1),
            f"{stage.start}..{stage.end - 1}",
            str(stage.kept),
            str(stage.kept + shape.prefix),
            str(batches[index]),
            f"{1 - stage.kept / shape.grid.patches:.2f}",
            f"{iteration_flops(shape, stage.kept) / 1e9:.3g}",
        )
    console = Console()
    console.print(table)
    for line in (
        f"sparsity at the end    {sparsity(stages, shape.grid.patches):.3f}",
        f"FLOPs an image         {flops.true / 1e12:.4g} T (true), {flops.paper / 1e12:.4g} T (the paper's convention)",
        f"memory, estimated      {cost.memory_bytes / 2**30:.2f} GiB at the batches above",
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
