"""The files of a run."""

from pathlib import Path
from typing import Any

from smi_fast.images import Process, SparseImages
from smi_fast.images.render import preview_grid, process_strip
from smi_fast.storage.files import write_json
from smi_fast.storage.folder import IMAGES, PREVIEW, PROCESS, REPORT, STRIP


def write_run(out: Path, images: SparseImages, process: Process, report: dict[str, Any]) -> None:
    """Write all files of a run; each is complete or absent."""
    images.save(out / IMAGES, overwrite=True)
    process.save(out / PROCESS, overwrite=True)
    preview_grid(images).save(out / PREVIEW)
    process_strip(process, images.provenance.class_names).save(out / STRIP)
    write_json(out / REPORT, report, overwrite=True)
