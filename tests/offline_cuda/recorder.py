"""What the stand-in records, as rows; and what a test makes it do: run out of memory, fail a call.

Found through ctypes in the process itself, since the library is preloaded. ``stub/record.c`` is the other side.
"""

import contextlib
import ctypes
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

# the calls that can be made to fail, as a device does that has no memory left
Fault = Literal["memory", "instantiate", "module"]
UNKNOWN = -1


@dataclass(frozen=True)
class Row:
    """One thing that a device was told, in the order of the calls."""

    kind: str  # KERNEL PRODUCT COPY FILL WAIT MALLOC FREE HOSTALLOC EVENT CAPTURE GRAPH MODULE CUBLAS COMPLAINT ...
    name: str
    grid: tuple[int, int, int] = (0, 0, 0)
    block: tuple[int, int, int] = (0, 0, 0)
    device: int = 0
    stream: int = 0  # 0: the default stream; -1: none
    thread: int = 0
    capture: int = 0  # the capture it went into, 0 for none
    bytes: int = 0
    registers: int = UNKNOWN  # per thread, of a Triton kernel; not known of kernels that libraries bring
    spilled: int = UNKNOWN  # bytes per thread, likewise
    shared: int = 0  # bytes per block
    m: int = 0  # shape of a product, and how many of it
    n: int = 0
    k: int = 0
    batch: int = 1
    nodes: int = 0  # of a graph

    @property
    def is_work(self) -> bool:
        """Does a device spend time on it?"""
        return self.kind in ("KERNEL", "PRODUCT", "COPY", "FILL")


@dataclass(frozen=True)
class Memory:
    """What a bucket adds, in bytes."""

    allocated: int  # what it holds besides the pool of its capture
    buffers: int  # of it, the tensors of its state
    pool: int  # what the capture took for its pool


class _Row(ctypes.Structure):
    """`Row` as C has it."""

    _fields_ = (
        ("kind", ctypes.c_char_p),
        ("name", ctypes.c_char_p),
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("device", ctypes.c_int),
        ("stream", ctypes.c_int),
        ("thread", ctypes.c_int),
        ("capture", ctypes.c_ulonglong),
        ("bytes", ctypes.c_long),
        ("registers", ctypes.c_int),
        ("spilled", ctypes.c_int),
        ("shared", ctypes.c_int),
        ("m", ctypes.c_int),
        ("n", ctypes.c_int),
        ("k", ctypes.c_int),
        ("batch", ctypes.c_int),
        ("nodes", ctypes.c_int),
    )

    def read(self) -> Row:
        values = {name: getattr(self, name) for name, *_ in self._fields_}
        texts = {name: (values[name] or b"").decode() for name in ("kind", "name")}
        return Row(**(values | texts | {name: tuple(values[name]) for name in ("grid", "block")}))


def is_present() -> bool:
    """Does this process run on the stand-in?"""
    return hasattr(ctypes.CDLL(None), "offline_reset")


class Recorder:
    """The stand-in under this process."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL(None)
        self._library.offline_count.restype = ctypes.c_long
        self._library.offline_row_bytes.restype = ctypes.c_size_t
        self._library.offline_fail_next.restype = ctypes.c_bool
        assert self._library.offline_row_bytes() == ctypes.sizeof(_Row)

    def reset(self) -> None:
        """Forget all rows."""
        self._library.offline_reset()

    def rows(self) -> list[Row]:
        """All rows since the last reset."""
        found = []
        row = _Row()
        for index in range(self._library.offline_count()):
            self._library.offline_row(ctypes.c_long(index), ctypes.byref(row))
            found.append(row.read())
        return found

    @contextlib.contextmanager
    def memory_of(self, size: int) -> Iterator[None]:
        """Each device has ``size`` bytes, what is in use already included."""
        self._library.offline_limit_memory(ctypes.c_size_t(size))
        try:
            yield
        finally:
            self._library.offline_limit_memory(ctypes.c_size_t(0))

    @contextlib.contextmanager
    def failing(self, fault: Fault, times: int = 1) -> Iterator[None]:
        """The next calls of a kind run out of memory; those that are left do so no more at the end of the block."""
        assert self._library.offline_fail_next(fault.encode(), times)
        try:
            yield
        finally:
            self._library.offline_fail_next(fault.encode(), 0)
