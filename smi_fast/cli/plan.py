"""``smi-fast plan``: stages, work, memory and time, without a run."""

from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from smi_fast.checks import check, count
from smi_fast.cli.command import command
from smi_fast.cli.options import ModelOptions, RunOptions
from smi_fast.cli.recipe import RecipeOptions
from smi_fast.model import load_model
from smi_fast.model.flops import iteration_flops, run_flops
from smi_fast.schedule import sparsity
from smi_fast.storage.environment import device_name
from smi_fast.tuning.cost import estimate
from smi_fast.tuning.settings import Target, decide, precision_of


@command
def plan(
    model: ModelOptions,
    recipe: RecipeOptions,
    machine: RunOptions,
    images: Annotated[int, typer.Option(help="Images of the whole run.")] = 1,
) -> None:
    """Show the stages of a run, its FLOPs, and estimates of memory and time; nothing is inverted or downloaded."""
    saved = recipe.load()
    config = saved.config
    check("--images", images, count(images))
    asked = machine.batches()
    compute, where = machine.target()
    name = model.model or saved.model or "demo"
    shape = load_model(name, pretrained=None if name == "demo" else False, img_size=model.image_size).shape
    stages = config.stages(shape.grid.patches)
    target = Target(shape, precision_of(compute), where)
    settings = decide(target, config, batch_size=asked, impl=machine.chosen_impl, images=images)
    batches = settings.batches
    for note in settings.notes:
        typer.echo(note)
    flops, cost = run_flops(shape, stages), estimate(shape, stages, batches, where, compute)

    table = Table(title=f"{name}, {shape.grid.height} x {shape.grid.width}, patch {shape.grid.patch}")
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
        f"FLOPs per image        {flops.true / 1e12:.4g} T (true), {flops.paper / 1e12:.4g} T (the paper's convention)",
        f"memory, estimated      {cost.memory_bytes / 2**30:.2f} GiB at the batches above",
        f"time, estimated        {cost.seconds_per_image:.3g} s per image, without compilation, "
        f"{_duration(cost.seconds_per_image * images)} for {images}",
        f"  on {device_name(where)}, {precision_of(compute)} matrix products at {cost.matmul_flops_per_s / 1e9:,.0f} "
        "GFLOP/s (measured just now)",
    ):
        console.print(line, highlight=False)


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
