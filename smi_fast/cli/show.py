"""``smi-fast show``: pictures of a saved run, made again."""

from pathlib import Path
from typing import Annotated

import typer

from smi_fast.cli.command import command
from smi_fast.images import Process, SparseImages
from smi_fast.images.render import preview_grid, process_strip
from smi_fast.storage.folder import IMAGES, PREVIEW, PROCESS, STRIP


@command
def show(
    run: Annotated[Path, typer.Argument(help="Folder of a run, or its images.safetensors.")],
    out: Annotated[Path | None, typer.Option(help="Folder for the pictures. [default: the run's]")] = None,
    limit: Annotated[int, typer.Option(help="At most this many images in the preview.")] = 100,
    columns: Annotated[int | None, typer.Option(help="Images in a row. [default: about square]")] = None,
    pngs: Annotated[bool, typer.Option("--pngs", help="Also one PNG per image, in a folder pngs/.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace pictures that are there.")] = False,
) -> None:
    """Draw preview and process pictures of a saved run again."""
    path = run / IMAGES if run.is_dir() else run
    images = SparseImages.load(path)
    out = out or path.parent
    strip_source = path.parent / PROCESS
    names = [PREVIEW, STRIP] if strip_source.exists() else [PREVIEW]
    for name in names:
        if (out / name).exists() and not overwrite:
            raise FileExistsError(f"{out / name} exists; give --overwrite, or another folder with --out")
    out.mkdir(parents=True, exist_ok=True)
    preview_grid(images, columns=columns, limit=limit).save(out / PREVIEW)
    if strip_source.exists():
        process_strip(Process.load(strip_source), images.provenance.class_names).save(out / STRIP)
    if pngs:
        images.save_pngs(out / "pngs", overwrite=overwrite)
    typer.echo(f"{len(images)} images, teacher top-1 {images.top1:.3f}: {out / PREVIEW}")
