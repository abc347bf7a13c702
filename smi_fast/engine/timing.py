"""`StageTimer`: how long one iteration of a bucket takes, through the same runner that the inverter uses."""

import math
import time
from collections.abc import Callable

import torch

from smi_fast.config import InversionConfig
from smi_fast.device import wait
from smi_fast.engine.randomness import draw
from smi_fast.engine.runner import UNROLLED, Bucket, Runner, Runners, Source
from smi_fast.engine.state import State, new_state
from smi_fast.model.sparse_vit import SparseViT
from smi_fast.tuning.settings import Impl

ROUND_SECONDS = 0.2  # a timing shorter than this is mostly noise


class StageTimer:
    """A `smi_fast.tuning.measure.Timer`.

    Args:
        model: in the dtype and on the device that count.
        config: the recipe.
        impl: "compiled" or "eager".
    """

    def __init__(self, model: SparseViT, config: InversionConfig, impl: Impl) -> None:
        self.model, self.config, self.impl = model, config, impl
        self.runners = Runners(Source(model, config, impl == "compiled"))

    def prepare(self, kept: int, batch: int) -> Callable[[], float]:
        """Build and warm up the runner of a bucket; returns what measures the seconds of one iteration.

        Raises:
            Exception: it does not fit on the device, see `smi_fast.device.out_of_memory`.
        """
        state = state_at(self.model, self.config, kept, batch)
        runner = self.runners.of(state, 0, batch)
        iterations = _warm_up(runner, state)
        return lambda: _seconds(runner, state, iterations)

    def drop(self, kept: int, batch: int) -> None:
        """Free a bucket."""
        self.runners.drop(Bucket(batch, kept))


@torch.no_grad()
def state_at(model: SparseViT, config: InversionConfig, kept: int, batch: int) -> State:
    """The start of ``batch`` images, with ``kept`` patches of each chosen at random, the same ones each time."""
    labels = [index % model.shape.num_classes for index in range(batch)]
    state = new_state(model, config, labels, draw(config, range(batch), model.grid))
    if kept == model.grid.patches:
        return state
    state.scores.copy_(torch.rand(state.scores.shape, generator=torch.Generator().manual_seed(0)))
    return state.stopped(config.strategy, kept, 0)


def _warm_up(runner: Runner, state: State) -> int:
    """Run a first time, and say how many iterations make a timing."""
    most = len(state.rates)
    first = min(UNROLLED, most) if state.canvas.is_cuda else 1
    for _ in range(2):  # the first one may set things up
        seconds = _seconds(runner, state, first)
    return min(most, first * max(1, math.ceil(ROUND_SECONDS / (first * seconds))))


@torch.no_grad()
def _seconds(runner: Runner, state: State, iterations: int) -> float:
    """Of one iteration, over so many."""
    runner.load(state, 0)
    wait(state.canvas.device)
    begin, done = time.perf_counter(), 0
    while done < iterations:
        done += runner.advance(iterations - done)
    wait(state.canvas.device)
    return (time.perf_counter() - begin) / done
