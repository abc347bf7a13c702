"""``smi-fast invert``: the main job."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from smi_fast.cli import options as o
from smi_fast.cli.batches import parse_batch_size, tuned_or_default, usable_impl
from smi_fast.cli.outputs import write_run
from smi_fast.cli.progress import BarProgress
from smi_fast.config import InversionConfig
from smi_fast.engine import Inverter, Snapshots
from smi_fast.engine.batches import even_batches
from smi_fast.engine.report import build_report
from smi_fast.engine.snapshots import default_iterations
from smi_fast.images import SparseImages
from smi_fast.model import load_model
from smi_fast.model.flops import iteration_flops
from smi_fast.model.labels import parse_labels
from smi_fast.model.sparse_vit import SparseViT
from smi_fast.schedule import plan_stages, sparsity
from smi_fast.storage.folder import PREVIEW, check_folder, make_folder
from smi_fast.tuning.attention import apply_attention
from smi_fast.tuning.store import key_of


def invert(
    out: Annotated[Path, typer.Option(help="Folder for the results; must be new or empty.")],
    model: o.Model = "demo",
    labels: Annotated[str, typer.Option(help="Class ids or names, separated by commas, or 'all'.")] = "all",
    count: Annotated[int, typer.Option(help="Images for each label.")] = 1,
    iterations: o.Iterations = 4000,
    stop: o.Stops = None,
    dense: o.Dense = False,
    preset: Annotated[str, typer.Option(help="'paper', or 'reference': what the published code computes.")] = "paper",
    tv_norm: Annotated[str | None, typer.Option(help="pixel, image or batch. [default: the preset's]")] = None,
    tv_weight: Annotated[float | None, typer.Option(help="Weight of total variation. [default: the norm's]")] = None,
    l2_weight: Annotated[float, typer.Option(help="Weight of the 2-norm of the pixels.")] = 0.0,
    jitter: Annotated[float, typer.Option(help="Largest random shift, as a share of the side.")] = 0.125,
    flip: Annotated[bool, typer.Option(help="Mirror an image in half of the iterations.")] = True,
    lr: Annotated[float, typer.Option(help="Adam's learning rate.")] = 0.25,
    lr_schedule: Annotated[str, typer.Option(help="constant or cosine.")] = "constant",
    seed: Annotated[int, typer.Option(help="Same seed, same images.")] = 0,
    batch_size: o.BatchSize = "auto",
    dtype: o.DType = "auto",
    device: o.Device = "auto",
    impl: o.Impl = "compiled",
    checkpoint: o.Checkpoint = None,
    pretrained: o.Pretrained = None,
    image_size: o.ImageSize = None,
    deterministic: Annotated[
        bool, typer.Option("--deterministic", help="Same seed, device and versions: same bytes. Slower on a GPU.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Write into a folder that is not empty.")] = False,
    quiet: o.Quiet = False,
) -> None:
    """Synthesise images of the given labels, and write them with previews and a report."""
    config = InversionConfig(
        iterations=iterations,
        stops=o.parse_stops(stop, dense, iterations),
        preset=preset,  # type: ignore[arg-type]
        seed=seed,
        lr=lr,
        lr_schedule=lr_schedule,  # type: ignore[arg-type]
        jitter=jitter,
        flip=flip,
        tv_norm=tv_norm,  # type: ignore[arg-type]
        tv_weight=tv_weight,
        l2_weight=l2_weight,
    )
    if count < 1:
        raise ValueError(f"--count {count}: must be at least 1")
    given = parse_batch_size(batch_size, config)
    o.check_impl(impl)
    check_folder(out, overwrite)
    where = o.parse_device(device)
    vit = load_model(
        model,
        pretrained=pretrained,
        checkpoint=checkpoint,
        img_size=image_size,
        dtype=o.parse_dtype(dtype, where),
        device=where,
    )
    targets = parse_labels(labels, vit.info, vit.shape.num_classes) * count
    snapshots = Snapshots(vit, default_iterations(config))
    console = Console(stderr=True, quiet=quiet)
    batches, source = (given, "given") if given else use_tuned(vit, config, impl, console)
    inverter = Inverter(
        vit,
        config,
        batch_size=even_batches(len(targets), batches),
        impl=impl,  # type: ignore[arg-type]
        snapshots=snapshots,
        deterministic=deterministic,
    )
    make_folder(out)
    images, interrupted = run(inverter, targets, console)
    if images is None:
        raise typer.Exit(130)  # as a shell reports an interrupt
    report = build_report(inverter, images, interrupted, source)
    write_run(out, images, snapshots.process(), report)
    summary = f"teacher top-1 {images.top1:.3f}, sparsity {sparsity(inverter.stages, vit.grid.patches):.2f}"
    typer.echo(f"{len(images)} images, {summary}, {report['seconds_per_image']:.2f} s an image: {out / PREVIEW}")
    if interrupted:
        raise typer.Exit(130)


def use_tuned(model: SparseViT, config: InversionConfig, impl: str, console: Console) -> tuple[tuple[int, ...], str]:
    """Where no batch was given: the batch of each stage, and where it came from; the model takes tuned choices over."""
    stages = plan_stages(model.grid.patches, config.stops, config.iterations)
    key = key_of(model.shape, stages, model.device, model.precision, usable_impl(impl, model.device))
    batches, tuned = tuned_or_default(key, config, lambda line: console.print(line, soft_wrap=True, highlight=False))
    if tuned is not None:
        apply_attention(model, tuned.attention)
    return batches, "default" if tuned is None else "tuned"


def run(inverter: Inverter, targets: list[int], console: Console) -> tuple[SparseImages | None, bool]:
    """All batches under a progress bar; after Ctrl-C, those that were finished, and True."""
    work = [float(iteration_flops(inverter.model.shape, stage.kept)) for stage in inverter.stages]
    done: list[SparseImages] = []
    interrupted = False
    with BarProgress(console, len(targets), inverter.stages, work) as progress:
        inverter.progress = progress
        try:
            for batch in inverter.stream(targets):
                done.append(batch)
        except KeyboardInterrupt:
            interrupted = True
    if interrupted:
        finished = sum(len(batch) for batch in done)
        console.print(f"interrupted: {finished} of {len(targets)} images were finished; they are kept")
    return (SparseImages.cat(done) if done else None), interrupted
