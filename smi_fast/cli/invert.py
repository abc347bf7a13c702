"""``smi-fast invert``: the main job."""

from typing import Annotated

import typer
from rich.console import Console

from smi_fast.checks import check, count
from smi_fast.cli.command import command
from smi_fast.cli.options import ModelOptions, Output, RunOptions
from smi_fast.cli.outputs import write_run
from smi_fast.cli.progress import BarProgress
from smi_fast.cli.recipe import RecipeOptions, Saved
from smi_fast.engine import Inverter, Snapshots
from smi_fast.engine.observe import default_iterations
from smi_fast.engine.report import build_report
from smi_fast.images import SparseImages
from smi_fast.model.flops import iteration_flops
from smi_fast.model.labels import parse_labels
from smi_fast.model.sparse_vit import SparseViT
from smi_fast.schedule import sparsity
from smi_fast.storage.folder import PREVIEW, make_folder
from smi_fast.tuning.settings import Target, decide


@command
def invert(
    output: Output,
    model: ModelOptions,
    recipe: RecipeOptions,
    machine: RunOptions,
    labels: Annotated[
        str | None,
        typer.Option(help="Class ids or names with commas between, or 'all'. [default: the recipe's, or all]"),
    ] = None,
    per_label: Annotated[int, typer.Option("--count", help="Images for each label.")] = 1,
    deterministic: Annotated[
        bool,
        typer.Option(
            "--deterministic",
            help="Same seed, device and versions: same bytes. Slower on a GPU.",
            rich_help_panel=RunOptions.PANEL,
        ),
    ] = False,
) -> None:
    """Synthesise images of the given labels, and write them with previews and a report."""
    saved = recipe.load()
    config, machine = saved.config, machine.like(saved)
    check("--count", per_label, count(per_label))
    asked = machine.batches()
    dtype, device = machine.target()
    output.check()
    vit = model.load(dtype, device, saved)
    targets, ids = _targets(vit, saved, labels, per_label)
    console = output.console()
    settings = decide(
        Target.of(vit),
        config,
        batch_size=asked,
        impl=machine.chosen_impl,
        images=len(targets),
    )
    for note in settings.notes:
        console.print(note, soft_wrap=True, highlight=False)
    inverter = Inverter(vit, config, batch_size=settings.batches, impl=settings.impl, deterministic=deterministic)
    settings.apply(vit)
    inverter.batch_source = settings.source
    inverter.snapshots = Snapshots(vit, default_iterations(inverter.stages))
    make_folder(output.out)
    images, interrupted = run(inverter, targets, console, ids)
    if images is None:
        raise typer.Exit(130)  # as a shell reports an interrupt
    report = build_report(inverter, images, interrupted)
    write_run(output.out, images, inverter.snapshots.process(), report)
    summary = f"teacher top-1 {images.top1:.3f}, sparsity {sparsity(inverter.stages, vit.grid.patches):.2f}"
    where = output.out / PREVIEW
    typer.echo(f"{len(images)} images, {summary}, {report['seconds_per_image']:.2f} s per image: {where}")
    if interrupted:
        raise typer.Exit(130)


def _targets(vit: SparseViT, saved: Saved, labels: str | None, per_label: int) -> tuple[list[int], list[int]]:
    """Labels and image ids of the run: those that were asked for, else those of the recipe's run."""
    if labels is None and per_label == 1 and saved.labels:
        targets = parse_labels(list(saved.labels), vit.info, vit.shape.num_classes)
        return targets, list(saved.image_ids) or list(range(len(targets)))
    targets = parse_labels("all" if labels is None else labels, vit.info, vit.shape.num_classes) * per_label
    return targets, list(range(len(targets)))


def run(
    inverter: Inverter, targets: list[int], console: Console, ids: list[int] | None = None
) -> tuple[SparseImages | None, bool]:
    """All groups under a progress bar; after Ctrl-C, those that were finished, and True."""
    work = [float(iteration_flops(inverter.model.shape, stage.kept)) for stage in inverter.stages]
    done: list[SparseImages] = []
    interrupted = False
    with BarProgress(console, len(targets), inverter.stages, work) as progress:
        inverter.progress = progress
        try:
            for batch in inverter.stream(targets, ids):
                done.append(batch)
        except KeyboardInterrupt:
            interrupted = True
    if interrupted:
        finished = sum(len(batch) for batch in done)
        console.print(f"interrupted: {finished} of {len(targets)} images were finished; they are kept")
    return (SparseImages.cat(done) if done else None), interrupted
