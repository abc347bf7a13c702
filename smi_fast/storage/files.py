"""Files that are written whole or not at all, and the tensor files of this package."""

import contextlib
import errno
import json
import os
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import Tensor, dtype

Built = TypeVar("Built")

# The only metadata entry of a tensor file. One, since safetensors writes several in a random order, and the same
# images are to give the same bytes.
METADATA_KEY = "smi_fast"


def write_atomically(path: str | Path, content: bytes | Callable[[Path], None], overwrite: bool = False) -> None:
    """Write a file so that a crash or a full disk leaves what was there before.

    The content goes to a hidden sibling, which is synced to disk and then renamed. Missing folders are made.

    Args:
        path: the file.
        content: the bytes, or a function that writes the file at the path it is given.
        overwrite: replace a file that exists.

    Raises:
        FileExistsError: ``path`` exists and ``overwrite`` is false; nothing is written.
        OSError: the system could not write; ``path`` is as it was.
    """
    path = Path(path)
    if path.exists() and not overwrite:
        raise FileExistsError(errno.EEXIST, "exists already, and overwrite is False", str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        # made here for the mode that the umask asks for: safetensors makes files that only their owner can read
        temporary.touch(exist_ok=False)
        mode = temporary.stat().st_mode
        if isinstance(content, bytes):
            temporary.write_bytes(content)
        else:
            content(temporary)
        temporary.chmod(mode)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    # makes the rename itself durable; not every file system lets a folder be synced
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_json(path: str | Path, value: Any, overwrite: bool = False) -> None:
    """Write ``value`` as indented JSON, atomically.

    Raises:
        FileExistsError: as `write_atomically`.
        TypeError: a value that JSON has no form for.
        ValueError: a NaN or an infinity, which JSON does not have; use ``None``.
    """
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    write_atomically(path, (text + "\n").encode(), overwrite)


def save_tensors(
    path: str | Path, kind: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any], overwrite: bool
) -> None:
    """Write tensors and JSON-able metadata as one safetensors file, atomically; ``kind`` is format and version.

    Raises:
        FileExistsError: as `write_atomically`.
    """
    # through numpy, which unlike torch's writer takes tensors that share memory
    arrays = {name: tensor.detach().cpu().contiguous().numpy() for name, tensor in tensors.items()}
    entry = json.dumps({"format": kind, **metadata}, sort_keys=True)
    write_atomically(path, lambda temporary: save_file(arrays, temporary, {METADATA_KEY: entry}), overwrite)


def load_tensors(path: str | Path, kind: str, build: Callable[[dict[str, Tensor], dict[str, Any]], Built]) -> Built:
    """Read a file of `save_tensors` and hand its tensors (on the CPU) and metadata to ``build``.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: naming the path: the file is truncated, not ours, of another version, or ``build`` refuses it.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(errno.ENOENT, "no such file", str(path))
    try:
        with safe_open(path, framework="pt") as file:
            metadata = _read_metadata(file.metadata(), kind)
            return build({name: file.get_tensor(name) for name in file.keys()}, metadata)  # noqa: SIM118 - no mapping
    except (SafetensorError, TypeError, ValueError, KeyError) as error:
        raise ValueError(f"path={str(path)!r}: not a whole {kind} file: {error}") from error


def _read_metadata(entries: dict[str, str] | None, kind: str) -> dict[str, Any]:
    if not entries or METADATA_KEY not in entries:
        raise ValueError("it has no smi_fast metadata")
    metadata = json.loads(entries[METADATA_KEY])
    found = metadata.pop("format")
    if found != kind:
        raise ValueError(f"its format is {found!r}")
    return metadata


def check_tensor(name: str, tensor: Tensor, shape: tuple[int | None, ...], kind: dtype) -> None:
    """Hold a tensor to a dtype and a shape, in which ``None`` stands for any size.

    Raises:
        ValueError: naming the tensor, what it is and what it must be.
    """
    wanted = "[" + ", ".join("any" if size is None else str(size) for size in shape) + "]"
    fits = len(tensor.shape) == len(shape) and all(
        want in (None, size) for want, size in zip(shape, tensor.shape, strict=True)
    )
    if not fits or tensor.dtype != kind:
        raise ValueError(f"{name} is {list(tensor.shape)} {tensor.dtype}: must be {wanted} {kind}")
