"""Checkpoints of a training: weights that are trained, the optimiser's state, and how far it has come. No pickle.

Frozen weights are not in it: the student is built as at the start, and its hash is part of the fingerprint.
"""

import contextlib
import errno
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor, nn
from torch.optim import Optimizer

from smi_fast.storage.files import load_tensors, save_tensors

FORMAT = "smi_fast.distill/1"
WEIGHT, STATE = "weight.", "optimizer."


@dataclass
class Marks:
    """How far a training has come."""

    step: int = 0  # steps done
    seconds: float = 0.0  # in training, without inversion and evaluation
    loss: float = 0.0  # of the last step
    rows: int = 0  # of the curve
    best: float | None = None  # accuracy


@contextlib.contextmanager
def saving(path: Path) -> Iterator[None]:
    """Tell what could not be written, and that what was there is still there."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        number = getattr(error, "errno", None) or (errno.ENOSPC if "No space left" in str(error) else errno.EIO)
        reason = getattr(error, "strerror", None) or str(error)
        raise OSError(
            number, f"{reason}; the file that was there is whole, free some room and resume", str(path)
        ) from error


def save_checkpoint(
    path: Path, model: nn.Module, optimizer: Optimizer, marks: Marks, fingerprint: Mapping[str, Any]
) -> None:
    """Write a checkpoint, atomically.

    Raises:
        OSError: it could not be written; the one before it is whole.
    """
    tensors: dict[str, Tensor] = {
        WEIGHT + name: value for name, value in model.named_parameters() if value.requires_grad
    }
    for index, entries in optimizer.state_dict()["state"].items():
        for key, value in entries.items():
            if isinstance(value, Tensor):
                tensors[f"{STATE}{index}.{key}"] = value
    with saving(path):
        save_tensors(path, FORMAT, tensors, {"marks": asdict(marks), "fingerprint": fingerprint}, overwrite=True)


def load_checkpoint(path: Path, fingerprint: Mapping[str, Any]) -> tuple[dict[str, Tensor], Marks]:
    """Read a checkpoint of the same training.

    Raises:
        ValueError: there is none, it is damaged, or it is of a training that differs; the first difference is named.
    """
    if not path.is_file():
        raise ValueError(f"resume=True: there is no checkpoint {str(path)!r}; start without resume")
    tensors, marks, made = load_tensors(path, FORMAT, lambda t, m: (t, Marks(**m["marks"]), m["fingerprint"]))
    for name in (*fingerprint, *made):
        if made.get(name) != fingerprint.get(name):
            raise ValueError(
                f"resume=True: {name}={fingerprint.get(name)!r}, but {str(path)!r} was made with {made.get(name)!r}; "
                "resume with what it was started with, or start anew"
            )
    return tensors, marks


def restore(tensors: Mapping[str, Tensor], model: nn.Module, optimizer: Optimizer) -> None:
    """Put a checkpoint's tensors into a model and its optimiser."""
    weights = {name.removeprefix(WEIGHT): value for name, value in tensors.items() if name.startswith(WEIGHT)}
    model.load_state_dict(weights, strict=False)
    state = optimizer.state_dict()
    for name, value in tensors.items():
        if name.startswith(STATE):
            index, _, key = name.removeprefix(STATE).partition(".")
            state["state"].setdefault(int(index), {})[key] = value
    optimizer.load_state_dict(state)
