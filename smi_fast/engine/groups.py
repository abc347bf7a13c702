"""Groups: the images that go through the stages together."""

import itertools
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from smi_fast.engine.batches import even_batches
from smi_fast.engine.clock import StageClock


@dataclass(frozen=True)
class Group:
    """Images on their way through the stages together; those after the first ``wanted`` fill it up."""

    index: int
    labels: list[int]
    image_ids: list[int]
    wanted: int
    batches: list[int]  # of each stage; the largest is the size of the group
    gone: threading.Event  # set when nobody waits for the images any more
    clock: StageClock = field(default_factory=StageClock)


def cut_groups(
    pairs: Iterator[tuple[int, int]], limits: Callable[[], tuple[int, ...]], fill: bool, gone: threading.Event
) -> Iterator[Group]:
    """Cut a stream of labels and image ids into groups.

    Args:
        pairs: labels with image ids, of any length.
        limits: the batch of each stage as it is by then.
        fill: fill the last group up with spare images; without, it is left short and its batches are as large as it.
        gone: goes with each group.
    """
    for index in itertools.count():
        batches = limits()
        chunk = list(itertools.islice(pairs, max(batches)))
        if not chunk:
            return
        wanted = len(chunk)
        if not fill:
            batches = (wanted,) * len(batches)
        elif index == 0:
            batches = even_batches(wanted, batches)
        chunk += chunk[-1:] * (max(batches) - wanted)
        yield Group(index, [label for label, _ in chunk], [i for _, i in chunk], wanted, list(batches), gone)
