"""Choose the batch of each stage by measurement.

`tune` times one iteration of each stage at a few batches (`candidates`), all on this machine and with this model, and
`choose` then takes the size of a group and the batch of each stage that make the whole schedule cheapest. Each batch
has to divide the group, so a candidate may be rounded to a neighbour that was not timed; `StageTimes.at` says what that
costs:

* On CUDA the matrix products of a stage fill the device in waves. With tiles of 128 x 256, an output ``[B * N, D]`` has
  ``ceil(D / 256)`` tiles in a row, so one wave holds ``sms // ceil(D / 256) * 128`` rows. A batch takes the time of the
  timed one that is nearest to it, times the ratio of their waves.
* On a CPU time is interpolated between the timed batches on both sides.
"""

import math
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from statistics import median
from typing import Protocol

import torch

from smi_fast.config import InversionConfig
from smi_fast.device import out_of_memory
from smi_fast.model.scaled_linear import FP8
from smi_fast.model.sparse_vit import SparseViT
from smi_fast.model.spec import ViTShape
from smi_fast.tuning.attention import tune_attention
from smi_fast.tuning.cost import memory_bytes
from smi_fast.tuning.settings import DEFAULT_BATCH, Impl
from smi_fast.tuning.store import Tuned, key_of

TILE_ROWS, TILE_COLUMNS = 128, 256
MEMORY_SHARE = 0.8  # of what is free; the estimate is rough
Say = Callable[[str], None]


class Timer(Protocol):
    """Times iterations of the engine, which this package does not know; `smi_fast.engine.timing.StageTimer` is one."""

    model: SparseViT
    config: InversionConfig
    impl: Impl

    def prepare(self, kept: int, batch: int) -> Callable[[], float]:
        """Set up a bucket; returns what measures the seconds of one of its iterations.

        Raises:
            Exception: it does not fit, see `smi_fast.device.out_of_memory`.
        """
        ...

    def drop(self, kept: int, batch: int) -> None:
        """Free a bucket."""
        ...


def wave_rows(shape: ViTShape, device: torch.device) -> int:
    """Rows ``B * N`` that one wave of tiles holds; 0 on a CPU, which has none."""
    if device.type != "cuda":
        return 0
    sms = torch.cuda.get_device_properties(device).multi_processor_count
    return max(1, sms // -(-shape.width // TILE_COLUMNS)) * TILE_ROWS


def candidates(shape: ViTShape, kept: int, device: torch.device, dtype: torch.dtype, most: int) -> list[int]:
    """Batches worth a timing for a stage, ascending.

    On CUDA the largest for 1, 2, 3, 4, 6, 8, 12, ... waves, on a CPU the powers of two from 4; none above ``most`` or
    above what is estimated to fit into memory. Where that leaves none, the largest allowed.

    Args:
        shape: of the model.
        kept: patches in the stage.
        device: where it runs.
        dtype: what it computes in; for the memory.
        most: the largest batch allowed, at least 1.
    """
    image = memory_bytes(shape, 1, dtype, kept) - memory_bytes(shape, 0, dtype, kept)
    most = max(1, min(most, int(MEMORY_SHARE * free_bytes(device)) // image))
    rows, tokens = wave_rows(shape, device), kept + shape.prefix
    doubling = [2**power for power in range(2, most.bit_length())]
    if rows:
        waves = {1, 2, 3, *doubling, *(count * 3 // 2 for count in doubling)}
        sizes = sorted({count * rows // tokens for count in waves})
    else:
        sizes = doubling
    return [size for size in sizes if 1 <= size <= most] or [most]


def free_bytes(device: torch.device) -> int:
    """Memory that is free on a device, or in the machine for a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True)
class StageTimes:
    """What was measured of a stage: seconds of one iteration, by batch."""

    length: int  # iterations in the stage
    tokens: int  # N
    wave: int  # see `wave_rows`
    seconds: dict[int, float]

    @property
    def most(self) -> int:
        """The largest batch measured; larger ones are not guessed at."""
        return max(self.seconds)

    def at(self, batch: int) -> float:
        """Seconds of one iteration at any batch up to the largest."""
        known = sorted(self.seconds)
        if self.wave:
            near = min(known, key=lambda size: abs(size - batch))
            return self.seconds[near] * self._waves(batch) / self._waves(near)
        above = next(size for size in known if size >= batch)
        below = max((size for size in known if size <= batch), default=0)
        if below in (0, above):  # below the smallest nothing is known, so nothing is promised
            return self.seconds[above]
        share = (batch - below) / (above - below)
        return (1 - share) * self.seconds[below] + share * self.seconds[above]

    def cost(self, batch: int) -> float:
        """Seconds that the stage takes of an image."""
        return self.length * self.at(batch) / batch

    def _waves(self, batch: int) -> int:
        return -(-batch * self.tokens // self.wave)


def choose(stages: list[StageTimes]) -> tuple[int, ...]:
    """The batch of each stage for which an image takes least; each divides the largest, which is the group.

    All groups up to the largest batch measured are tried; in each, one stage in turn runs on the whole group, and the
    others on the divisor that is best for them. Of equals, the smallest group.
    """
    best, chosen = math.inf, tuple[int, ...]()
    for group in range(1, max(stage.most for stage in stages) + 1):
        divisors = [size for size in range(1, group + 1) if group % size == 0]
        sizes = [min((d for d in divisors if d <= s.most), key=s.cost) for s in stages]
        for whole, stage in enumerate(stages):
            if stage.most < group:
                continue
            batches = (*sizes[:whole], group, *sizes[whole + 1 :])
            seconds = seconds_per_image(stages, batches)
            if seconds < best:
                best, chosen = seconds, batches
    return chosen


def seconds_per_image(stages: list[StageTimes], batches: Iterable[int]) -> float:
    """Of the whole schedule, as measured or guessed from it."""
    return sum(stage.cost(batch) for stage, batch in zip(stages, batches, strict=True))


def tune(timer: Timer, *, most: int = 512, rounds: int = 3, say: Say = print) -> Tuned:
    """Measure a recipe on the model's device, and choose the batch of each stage.

    Args:
        timer: of the model, in the dtype and on the device that count, and the recipe.
        most: the largest batch to try.
        rounds: timings of each candidate; the candidates of a stage take turns, and the median counts.
        say: told what is being done.

    Raises:
        ValueError: ``most`` or ``rounds`` below 1, or a recipe that couples batch-mates.
        MemoryError: a stage for which no candidate fits into device memory.
    """
    if most < 1 or rounds < 1:
        raise ValueError(f"most={most}, rounds={rounds}: both must be at least 1")
    model, config = timer.model, timer.config
    config.require_independent("tune")
    shape, device = model.shape, model.device
    stages = config.stages(shape.grid.patches)
    dtype = FP8 if model.precision == "fp8" else model.dtype
    sizes = [candidates(shape, stage.kept, device, dtype, most) for stage in stages]
    middle = {
        stage.kept + shape.prefix: batches[len(batches) // 2] for stage, batches in zip(stages, sizes, strict=True)
    }
    choices = tune_attention(model, middle, rounds, say)
    times = []
    for stage, batches in zip(stages, sizes, strict=True):
        seconds = _time_stage(timer, stage.kept, batches, rounds, say)
        times.append(StageTimes(stage.length, stage.kept + shape.prefix, wave_rows(shape, device), seconds))
    chosen = choose(times)
    usual = (min(DEFAULT_BATCH, *(stage.most for stage in times)),) * len(times)
    gain = seconds_per_image(times, usual) / seconds_per_image(times, chosen)
    key = key_of(shape, config, device, model.precision, timer.impl)
    return Tuned(key, chosen, gain, tuple(stage.seconds for stage in times), choices)


def _time_stage(timer: Timer, kept: int, batches: list[int], rounds: int, say: Say) -> dict[int, float]:
    """Seconds of one iteration for each batch that fits; the largest is built first, while memory is whole."""
    ready: dict[int, Callable[[], float]] = {}
    doing = "compiling bucket of" if timer.impl == "compiled" else "preparing"
    for batch in reversed(batches):
        say(f"{doing} {kept} patches at batch {batch}")
        try:
            ready[batch] = timer.prepare(kept, batch)
        except Exception as error:
            if not out_of_memory(error):
                raise
            say(f"out of device memory with {kept} patches at batch {batch}: left out")
            timer.drop(kept, batch)
    if not ready:
        raise MemoryError(f"out of device memory with {kept} patches at a batch of {min(batches)}, the smallest tried")
    timed: dict[int, list[float]] = {batch: [] for batch in sorted(ready)}
    for _ in range(rounds):
        for batch, each in timed.items():
            say(f"measuring {kept} patches at batch {batch}")
            each.append(ready[batch]())
    for batch in batches:
        timer.drop(kept, batch)
    return {batch: median(each) for batch, each in timed.items()}
