"""The curve of a training: a row each so many steps, as CSV and, if wished, for TensorBoard."""

import csv
import importlib.util
import io
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from smi_fast.distill.checkpoint import saving
from smi_fast.storage.files import write_atomically


@dataclass(frozen=True)
class CurveRow:
    """A point of the curve."""

    step: int  # steps done
    images: int  # that were had by then, those that were inverted on the way counted as they came
    seconds: float  # of training and inversion, over all resumes, without evaluation
    loss: float  # of the last step
    accuracy: float | None  # what the evaluation gave; None where there is none


def read_curve(path: Path, rows: int) -> list[CurveRow]:
    """The first rows of a file of `write_curve`; what a killed run wrote after its checkpoint is left out.

    Raises:
        ValueError: there are fewer, or they cannot be read.
    """
    if rows == 0:
        return []
    try:
        with path.open(newline="") as file:
            found = [_row(entry) for entry in csv.DictReader(file)][:rows]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"path={str(path)!r}: cannot be read as a curve: {error}") from error
    if len(found) < rows:
        raise ValueError(f"path={str(path)!r}: has {len(found)} rows, the checkpoint was made after {rows}")
    return found


def _row(entry: dict[str, str]) -> CurveRow:
    accuracy = float(entry["accuracy"]) if entry["accuracy"] else None
    numbers = float(entry["seconds"]), float(entry["loss"])
    return CurveRow(int(entry["step"]), int(entry["images"]), *numbers, accuracy)


def write_curve(path: Path, rows: list[CurveRow]) -> None:
    """Write all rows, atomically.

    Raises:
        OSError: it could not be written; the file that was there is whole.
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, [field.name for field in fields(CurveRow)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(row) for row in rows)
    with saving(path):
        write_atomically(path, text.getvalue().encode(), overwrite=True)


def has_tensorboard() -> bool:
    """Is the package installed?"""
    return importlib.util.find_spec("tensorboard") is not None


def open_tensorboard(folder: Path, step: int) -> Any:
    """A ``SummaryWriter`` that takes back what was written after ``step`` steps.

    Raises:
        ValueError: the package is not installed.
    """
    if not has_tensorboard():
        raise ValueError("tensorboard=True: the package is not installed; pip install 'smi-fast[tensorboard]'")
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder), purge_step=step + 1)


def write_scalars(writer: Any, row: CurveRow) -> None:
    """One row for TensorBoard."""
    for name in ("loss", "accuracy", "images", "seconds"):
        value = getattr(row, name)
        if value is not None:
            writer.add_scalar(name, value, row.step)
    writer.flush()
