"""What can be seen of a run while it goes on: events, losses, snapshots, stage times. None of it makes a GPU wait."""

import contextlib
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from smi_fast.engine.state import State
from smi_fast.images import Process
from smi_fast.images.sparse_images import to_uint8
from smi_fast.model.sparse_vit import SparseViT
from smi_fast.schedule import Stage

Mark = torch.cuda.Event | float


class Progress:
    """Receives the engine's events; but for a warning, methods do nothing here. Called from the engine's own thread."""

    def group_started(self, index: int, images: int) -> None:
        """Group ``index`` (from 0) begins, with that many images."""

    def compiling(self, bucket: int, buckets: int, kept: int) -> None:
        """Bucket ``bucket`` of ``buckets`` (from 1), of ``kept`` patches, is being compiled."""

    def compiled(self, seconds: float) -> None:
        """That compilation is done."""

    def stage_started(self, index: int, stage: Stage, first: int, images: int) -> None:
        """Stage ``index`` (from 0) begins for ``images`` images of the group, from its image ``first`` on."""

    def stepped(self, iteration: int, loss: float | None) -> None:
        """These images have come to ``iteration``; ``loss`` is a recent mean over them, where one was read."""

    def image_failed(self, image_id: int, iteration: int) -> None:
        """A step of the image was not finite at ``iteration`` (from 0); the image was stopped there."""

    def out_of_memory(self, index: int, batch: int, smaller: int) -> None:
        """A batch of stage ``index`` (from 0) did not fit; the stage goes on with ``smaller`` images at a time."""
        warnings.warn(
            f"stage {index + 1}: out of device memory at a batch of {batch}, going on with {smaller}", stacklevel=2
        )

    def group_finished(self, index: int, images: int) -> None:
        """Group ``index`` is done."""


class LossReader:
    """The mean loss over a batch, as of some recent step.

    On CUDA each reading is copied to pinned memory behind the steps already queued, and handed out once it has
    arrived; no step waits for it. On a CPU it is there at once.
    """

    def __init__(self, state: State) -> None:
        self.losses = state.losses
        self.pinned: Tensor | None = None
        self.arrived: torch.cuda.Event | None = None
        if self.losses.is_cuda:
            self.pinned = torch.empty((), dtype=self.losses.dtype, pin_memory=True)

    def poll(self) -> float | None:
        """The loss of the last reading that has arrived, or None."""
        if self.pinned is None:
            return float(self._mean())
        value = None
        if self.arrived is not None:
            if not self.arrived.query():
                return None
            value = float(self.pinned)
        self.pinned.copy_(self._mean(), non_blocking=True)
        self.arrived = torch.cuda.Event()
        self.arrived.record()
        return value

    def _mean(self) -> Tensor:
        """Images whose step was not finite do not count."""
        return self.losses.sum(1).nanmean()


class StageClock:
    """How long stages take: marks on the device's own time line on CUDA, on the host's clock elsewhere."""

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


def default_iterations(stages: Sequence[Stage], columns: int = 8) -> list[int]:
    """Iterations worth a snapshot: the start, each stop, the end, and even steps between, up to about ``columns``."""
    end = stages[-1].end
    named = {0, *(stage.start for stage in stages), end}
    extra = max(columns - len(named), 0)
    last = stages[-1].start
    even = {last + (end - last) * i // (extra + 1) for i in range(1, extra + 1)}
    return sorted(named | even)


class Snapshots:
    """Copies of the first images of a run at chosen iterations, for the strip that shows how they came to be.

    Args:
        model: for its colours and its grid.
        iterations: counted in steps done.
        rows: how many images.
    """

    def __init__(self, model: SparseViT, iterations: Iterable[int], rows: int = 8) -> None:
        self.model, self.rows = model, rows
        self.iterations = frozenset(iterations)
        self._columns: list[tuple[int, Tensor, Tensor]] = []  # iteration, [m, 3, H, W] uint8, [m, L] bool
        self._labels, self._image_ids = torch.zeros(2, 0, dtype=torch.int64)

    def offer(self, iteration: int, state: State, image_ids: Sequence[int]) -> None:
        """Take a copy if ``iteration`` is one of those asked for; ``image_ids`` of the images that are real."""
        if iteration not in self.iterations:
            return
        ids = torch.tensor(list(image_ids[: self.rows]), dtype=torch.int64)
        rows, info = len(ids), self.model.info
        kept = torch.zeros(rows, self.model.grid.patches, dtype=torch.bool)
        kept.scatter_(1, state.keep[:rows].cpu(), True)
        self._columns.append((iteration, to_uint8(state.canvas[:rows].cpu(), info.mean, info.std), kept))
        self._labels, self._image_ids = state.labels[:rows].cpu(), ids

    def next_after(self, iteration: int, end: int) -> int:
        """The next iteration that is asked for, or ``end`` if that comes first."""
        return min([end, *(wanted for wanted in self.iterations if wanted > iteration)])

    def process(self) -> Process:
        """The snapshots taken so far."""
        iterations, pixels, kept = zip(*self._columns, strict=True)
        return Process(
            iterations=iterations,
            pixels=torch.stack(pixels),
            kept=torch.stack(kept),
            labels=self._labels,
            image_ids=self._image_ids,
            patch=self.model.grid.patch,
        )
