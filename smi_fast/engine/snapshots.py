"""Canvases on the way, for the strip that shows the inversion process."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from smi_fast.config import InversionConfig
from smi_fast.engine.state import State
from smi_fast.images import Process
from smi_fast.images.sparse_images import to_uint8
from smi_fast.model.sparse_vit import SparseViT


def default_iterations(config: InversionConfig, columns: int = 8) -> list[int]:
    """The start, each stop, the end, and even steps between, up to about ``columns``."""
    named = {0, *(iteration for iteration, _ in config.stops), config.iterations}
    extra = max(columns - len(named), 0)
    last = max(iteration for iteration in named if iteration < config.iterations)
    even = {last + (config.iterations - last) * i // (extra + 1) for i in range(1, extra + 1)}
    return sorted(named | even)


class Snapshots:
    """Copies the first ``rows`` images of a batch at chosen iterations, counted in steps done."""

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
