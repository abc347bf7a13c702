"""Groups of images, and the batch in which each stage works on them.

A group goes through the stages together. How many images it has is fixed; in what batches a stage takes them is decided
when the group's turn comes, in the engine's own thread, which is also where a batch turns out not to fit into memory.
"""

import itertools
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field

from smi_fast.engine.observe import StageClock
from smi_fast.tuning.settings import split_evenly


@dataclass(frozen=True)
class Group:
    """Some images of a label stream."""

    index: int
    labels: list[int]
    image_ids: list[int]
    gone: threading.Event  # set when nobody waits for the images any more
    clock: StageClock = field(default_factory=StageClock)

    def __len__(self) -> int:
        return len(self.labels)


def cut_groups(pairs: Iterator[tuple[int, int]], size: int, gone: threading.Event) -> Iterator[Group]:
    """Cut a stream of (label, image id), of any length, into groups of ``size``; the last may be short."""
    for index in itertools.count():
        chunk = list(itertools.islice(pairs, size))
        if not chunk:
            return
        yield Group(index, [label for label, _ in chunk], [image_id for _, image_id in chunk], gone)


class Batches:
    """The batch of each stage: the largest that is allowed, and what each group gets.

    Args:
        limits: of each stage; each divides the largest, which is the size of a group.
        coupled: images depend on their batch-mates. Then a group is one batch, and never filled up.
    """

    def __init__(self, limits: tuple[int, ...], coupled: bool) -> None:
        self.limits, self.coupled, self.group_size = limits, coupled, max(limits)

    def of(self, group: Group) -> tuple[int, list[int]]:
        """How many images a group is filled up to, and the batch of each stage, each of which divides that number.

        A short group that is the first is all there is, so it is cut evenly. Later ones are filled up with spare
        images, so that every batch runs on the graphs that are there.
        """
        if self.coupled:
            return len(group), [len(group)] * len(self.limits)
        if group.index == 0:
            size, batches = split_evenly(len(group), self.limits)
            return size, list(batches)
        return self.group_size, list(self.limits)

    def lower(self, stage: int, batch: int) -> int:
        """A batch of a stage did not fit: the smaller one to go on with, which is the most for later groups too."""
        smaller = halved(batch)
        most = min(self.limits[stage], smaller)
        fits = next(size for size in range(most, 0, -1) if self.group_size % size == 0)
        self.limits = (*self.limits[:stage], fits, *self.limits[stage + 1 :])
        return smaller


def halved(batch: int) -> int:
    """The largest divisor of ``batch`` that is at most half of it; 0 for 1."""
    return next((size for size in range(batch // 2, 0, -1) if batch % size == 0), 0)
