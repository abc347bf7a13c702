"""`Tuned`: what a measurement on this machine chose, kept in one JSON file from one process to the next.

The file is ``tuned.json`` in `cache_home`: ``{"format": ..., "entries": [...]}``, one entry for each `Key`. What this
version does not know, at the top or in an entry, stays when the file is written again.
"""

import fcntl
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from smi_fast.config import InversionConfig
from smi_fast.model.spec import ViTShape
from smi_fast.storage.environment import cache_home, device_name
from smi_fast.storage.files import write_json

FORMAT = "smi_fast.tuned.v2"


@dataclass(frozen=True)
class Key:
    """What a choice holds for: device, model, and the parts of the recipe that decide what an iteration costs.

    The lengths of the stages are no part of it: they weigh, but seldom turn, a choice.
    """

    device: str  # in words, see `device_name`
    shape: dict[str, Any]  # the fields of a `ViTShape`
    precision: str  # see `SparseViT.precision`
    impl: str
    kept: tuple[int, ...]  # patches in each stage
    stop_updates: bool  # of the strategy
    priors: list[dict[str, Any]]  # as the recipe has them
    torch: str


@dataclass(frozen=True)
class Tuned:
    """A choice, and the timings it was made from."""

    key: Key
    batches: tuple[int, ...]  # of each stage; each divides the largest
    gain: float  # predicted images per second, relative to the default batch
    timings: tuple[dict[int, float], ...] = ()  # of each stage: seconds of one iteration by batch
    attention: dict[int, str] = field(default_factory=dict)  # choice of `attention` by number of tokens


def key_of(shape: ViTShape, config: InversionConfig, device: torch.device, precision: str, impl: str) -> Key:
    """The key of a recipe for a model on a device."""
    kept = tuple(stage.kept for stage in config.stages(shape.grid.patches))
    recipe = {"stop_updates": config.strategy.stop_updates, "priors": config.to_dict()["priors"]}
    return Key(device_name(device), asdict(shape), precision, impl, kept, torch=torch.__version__, **recipe)


def tuned_path() -> Path:
    """Where choices are kept."""
    return cache_home() / "tuned.json"


def lookup(key: Key) -> Tuned | None:
    """The choice for a key, if there is one.

    Raises:
        ValueError: naming the path: the file is broken, or not one of these.
    """
    return next((tuned for tuned in all_tuned() if tuned.key == key), None)


def all_tuned() -> list[Tuned]:
    """Every choice in the file; raises as `lookup`."""
    path = tuned_path()
    try:
        return [_from_entry(entry) for entry in _read(path)["entries"]]
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise _refusal(path, f"{type(error).__name__}: {error}") from error


def save(tuned: Tuned) -> Path:
    """Put a choice into the file, in the place of an older one for its key; returns the path.

    Processes take turns, so that none loses the choice of another; the file is written whole or not at all.

    Raises:
        ValueError: as `lookup`; the file is as it was.
        OSError: it cannot be written.
    """
    path = tuned_path()
    path.parent.mkdir(parents=True, exist_ok=True)
    with _turn(path):
        all_tuned()  # nothing is added to a file that could not be read again
        content = _read(path)
        entry, entries = _to_entry(tuned), content["entries"]
        place = next((i for i, old in enumerate(entries) if old.get("key") == entry["key"]), len(entries))
        entries[place : place + 1] = [{**(entries[place] if place < len(entries) else {}), **entry}]
        write_json(path, content, overwrite=True)
    return path


@contextmanager
def _turn(path: Path) -> Iterator[None]:
    """One process at a time; the lock is a file of its own, since a rename would leave it behind."""
    with path.with_suffix(".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _read(path: Path) -> dict[str, Any]:
    """The file as it is, or an empty one where there is none."""
    if not path.exists():
        return {"format": FORMAT, "entries": []}
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:  # bytes that are no text are one, too
        raise _refusal(path, str(error)) from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise _refusal(path, "it has another format")
    entries = content.get("entries")
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise _refusal(path, "its entries are no list of objects")
    return content


def _refusal(path: Path, reason: str) -> ValueError:
    return ValueError(f"{str(path)!r}: not a whole {FORMAT} file; move it away, and tune again: {reason}")


def _to_entry(tuned: Tuned) -> dict[str, Any]:
    """As JSON will read it back: lists for tuples, text for numbers that are keys."""
    entry: dict[str, Any] = json.loads(json.dumps(asdict(tuned)))
    return entry


def _from_entry(entry: dict[str, Any]) -> Tuned:
    known = {name: entry["key"][name] for name in (part.name for part in fields(Key))}
    return Tuned(
        key=Key(**known | {"kept": tuple(known["kept"])}),
        batches=tuple(int(batch) for batch in entry["batches"]),
        gain=float(entry["gain"]),
        timings=tuple({int(batch): float(s) for batch, s in times.items()} for times in entry["timings"]),
        attention={int(tokens): str(name) for tokens, name in entry["attention"].items()},
    )
