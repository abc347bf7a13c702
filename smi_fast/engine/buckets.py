"""`Buckets`: the runner of each bucket, built when it is met first, or ahead of time in the background."""

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import torch

from smi_fast.config import InversionConfig
from smi_fast.engine.compiler import compile_step
from smi_fast.engine.rows import take_rows
from smi_fast.engine.runner import Runner
from smi_fast.engine.state import State, stop_patches
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
    """Builds and keeps the runners.

    One compilation runs at a time, and none while a graph is captured. A bucket that is being compiled in the
    background is waited for when it is met.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.seconds_compile = 0.0  # time that somebody waited for
        self._runners: dict[Bucket, Runner] = {}
        self._ahead: dict[Bucket, Future[Function]] = {}
        self._building = threading.Lock()
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
            ahead = self._ahead.pop(bucket, None)
            step = self._compile(example) if ahead is None else ahead.result()
            with self._building:
                self._runners[bucket] = Runner(step, example, self._memory)
            if self.recipe.compiled:
                self.seconds_compile += time.perf_counter() - begin
        return self._runners[bucket]

    def ahead(self, state: State, batch: int, kept: int) -> None:
        """Compile the bucket of ``batch`` images and ``kept`` patches in the background, while ``state`` is in work."""
        bucket = Bucket(batch, kept)
        if not self.recipe.compiled or bucket in self._runners or bucket in self._ahead:
            return
        following = stop_patches(take_rows(state, 0, batch), kept, self.recipe.config.rules.stop_updates)
        thread = ThreadPoolExecutor(1, thread_name_prefix="smi_fast_compile")
        self._ahead[bucket] = thread.submit(self._compile, following)
        thread.shutdown(wait=False)  # it ends with its work

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
        with self._building:
            return compile_step(built, example)
