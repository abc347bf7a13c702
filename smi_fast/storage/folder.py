"""The folder of a run: the names of its files, and the checks before any work starts."""

import os
from pathlib import Path

IMAGES, PROCESS, PREVIEW, STRIP, REPORT = (
    "images.safetensors",
    "process.safetensors",
    "preview.png",
    "process.png",
    "report.json",
)


def check_folder(out: Path, overwrite: bool) -> None:
    """Refuse a folder that is not new or empty, before any work starts; nothing is made.

    Raises:
        FileExistsError: it holds something, and ``overwrite`` is not given.
        NotADirectoryError: it is a file.
        PermissionError: it cannot be written.
    """
    if not out.exists():
        return
    if not out.is_dir():
        raise NotADirectoryError(f"--out {str(out)!r}: is a file, not a folder")
    if any(out.iterdir()) and not overwrite:
        raise FileExistsError(f"--out {str(out)!r}: is not empty; name another folder, or give --overwrite")
    if not os.access(out, os.W_OK | os.X_OK):
        raise PermissionError(f"--out {str(out)!r}: cannot be written")


def make_folder(out: Path) -> None:
    """Make the folder, and those above it; raises ``PermissionError`` where that cannot be."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PermissionError(f"--out {str(out)!r}: cannot be made: {error.strerror}") from None
