"""`Buckets`: the runner of each bucket, built when it is met first."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from smi_fast.config import InversionConfig
from smi_fast.engine.compiler import compile_step
from smi_fast.engine.rows import take_rows
from smi_fast.engine.runner import Runner
from smi_fast.engine.state import State
from smi_fast.engine.step import build_step
from smi_fast.model.sparse_vit import SparseViT
from smi_fast.priors import Prior

Function = Callable[[State], None]


class Bucket(NamedTuple):
    """The static shapes of one stage."""

    batch: int
    kept: int


@dataclass(frozen=True)
class Recipe:
    """What the step of every bucket is built from."""

    model: SparseViT
    config: InversionConfig
    priors: Sequence[Prior]
    compiled: bool
    graphs: bool  # capture CUDA graphs


class Buckets:
    """Builds and keeps the runners."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.seconds_compile = 0.0  # tracing, compiling, and the first run or capture
        self._runners: dict[Bucket, Runner] = {}
        captures = recipe.graphs and recipe.model.device.type == "cuda"
        self._memory = torch.cuda.graph_pool_handle() if captures else None

    @property
    def met(self) -> frozenset[Bucket]:
        """Those that have a runner."""
        return frozenset(self._runners)

    def has(self, bucket: Bucket) -> bool:
        """Is its runner there, with no compilation to wait for?"""
        return bucket in self._runners

    def runner(self, state: State, start: int, batch: int) -> Runner:
        """The runner of ``batch`` images of ``state``, built where there is none yet.

        Raises:
            torch.OutOfMemoryError: it does not fit on the device.
            Exception: what inductor raises where a step does not compile.
        """
        bucket = Bucket(batch, state.keep.shape[1])
        if bucket not in self._runners:
            begin = time.perf_counter()
            example = take_rows(state, start, batch)
            self._runners[bucket] = Runner(self._compile(example), example, self._memory)
            if self.recipe.compiled:
                self.seconds_compile += time.perf_counter() - begin
        return self._runners[bucket]

    def drop(self, bucket: Bucket) -> None:
        """Forget a bucket and the memory it holds."""
        self._runners.pop(bucket, None)
        if self.recipe.model.device.type == "cuda":
            torch.cuda.empty_cache()

    def _compile(self, example: State) -> Function:
        """The step for the shapes of ``example``; each bucket gets a function of its own."""
        recipe = self.recipe
        built = build_step(recipe.model, recipe.config, recipe.priors)
        if not recipe.compiled:
            return torch.no_grad()(built)
        return compile_step(built, example)
