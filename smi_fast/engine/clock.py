"""How long stages take, without making the device wait."""

import contextlib
import time
from collections.abc import Iterator

import torch

Mark = torch.cuda.Event | float


class StageClock:
    """Marks on the device's own time line where there is CUDA, on the host's clock elsewhere."""

    def __init__(self) -> None:
        self._stages: list[tuple[int, Mark, Mark]] = []

    @contextlib.contextmanager
    def stage(self, number: int) -> Iterator[None]:
        """What is launched in the block belongs to that stage; nothing waits."""
        begin = _mark()
        yield
        self._stages.append((number, begin, _mark()))

    def seconds(self) -> list[tuple[int, float]]:
        """The stages with their times, in the order they were run in; waits for the device."""
        return [(number, _between(begin, end)) for number, begin, end in self._stages]


def _mark() -> Mark:
    if not torch.cuda.is_available():
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _between(begin: Mark, end: Mark) -> float:
    if isinstance(begin, float) or isinstance(end, float):
        assert isinstance(begin, float)
        assert isinstance(end, float)
        return end - begin
    end.synchronize()
    return begin.elapsed_time(end) / 1e3
