"""How long stages take, without making the device wait."""

import contextlib
import time
from collections.abc import Iterator

import torch

Mark = torch.cuda.Event | float


class StageClock:
    """Marks on the device's own time line on CUDA, on the host's clock elsewhere."""

    def __init__(self) -> None:
        self._stages: list[tuple[int, Mark, Mark]] = []

    @contextlib.contextmanager
    def stage(self, number: int, device: torch.device) -> Iterator[None]:
        """What is launched on the device in the block belongs to that stage; nothing waits."""
        begin = _mark(device)
        yield
        self._stages.append((number, begin, _mark(device)))

    def seconds(self) -> list[tuple[int, float]]:
        """The stages with their times, in the order they were run in; waits for the device."""
        return [(number, _between(begin, end)) for number, begin, end in self._stages]


def _mark(device: torch.device) -> Mark:
    if device.type != "cuda":
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
