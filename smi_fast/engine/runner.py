"""`Runner`: the iterations of one bucket on buffers whose addresses never change; `Runners` builds and keeps them.

On CUDA many iterations are one launch of a CUDA graph that is captured by hand.
"""

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from smi_fast.config import InversionConfig
from smi_fast.device import capturing, current, release, side_stream
from smi_fast.engine.compiler import compile_step
from smi_fast.engine.state import State
from smi_fast.engine.step import build_step
from smi_fast.model.sparse_vit import SparseViT

Function = Callable[[State], None]

# Even, since the two canvases change places in each iteration and a capture must end as it began. At 10 the launch of
# a graph is spread over ten iterations, and the stages of the paper (50, 50, 100, 100, 3700) leave no rest.
UNROLLED = 10
WARM_UP = 2  # even as well
IN_FLIGHT = 3  # launches the host may be ahead of the device, so that progress is true and an interrupt soon felt


class Bucket(NamedTuple):
    """The static shapes of one stage."""

    batch: int
    kept: int


class Runner:
    """Runs a step on static buffers: load images, advance, store them.

    On CUDA ``UNROLLED`` iterations are one launch of a captured graph. What is left over at the end of a stage, or
    before a snapshot, is replayed one by one, from captures that are made when they are first needed. So all
    iterations work in the memory of the captures.

    Args:
        step: one iteration, in place on a `State`.
        example: a state of the bucket's shapes.
        pool: for the captures, see `capture`; None for no capture (always on a CPU).
    """

    def __init__(self, step: Function, example: State, pool: Any) -> None:
        self._step, self._pool = step, pool
        self.state = example.clone()
        self.state.turned = False
        # by how many iterations they do, and whether the canvases have changed places: a capture knows which it reads
        self._captured: dict[tuple[int, bool], torch.cuda.CUDAGraph] = {}
        if pool is not None:
            warm_up(step, self.state)
            self._graph(UNROLLED)
        self._launched: deque[torch.cuda.Event] = deque()

    def load(self, group: State, start: int) -> None:
        """Take over the images of a group from ``start`` on."""
        self.state.load_rows(group, start)

    def store(self, group: State, start: int) -> None:
        """Put them back."""
        self.state.store_rows(group, start)

    def advance(self, most: int) -> int:
        """Run one or more iterations, up to ``most``; returns how many. On CUDA they are launched, not waited for."""
        done = 1
        if self._pool is None:
            self._step(self.state)
        else:
            done = UNROLLED if most >= UNROLLED and not self.state.turned else 1
            self._graph(done).replay()
            if done % 2 and self.state.spare is not None:
                self.state.turn()
        self._throttle()
        return done

    def _graph(self, iterations: int) -> torch.cuda.CUDAGraph:
        """The capture of so many iterations from where the canvases are."""
        key = (iterations, self.state.turned)
        if key not in self._captured:
            self._captured[key] = capture(self._step, self.state, iterations, self._pool)
        return self._captured[key]

    def _throttle(self) -> None:
        """Let the host wait for a launch that is some way back; the device never runs dry of work."""
        if not self.state.canvas.is_cuda:
            return
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.state.canvas.device))
        self._launched.append(event)
        if len(self._launched) > IN_FLIGHT:
            self._launched.popleft().synchronize()


def warm_up(step: Function, state: State) -> None:
    """Run a step as a capture will, on the stream of captures; the contents of ``state`` are lost.

    What a first call sets up (modules, workspaces) does not belong into a capture, and fails or replays wrong there.
    """
    device = state.canvas.device
    stream, outside = side_stream(device), torch.cuda.current_stream(device)
    state.iteration.zero_()
    with capturing, current(device):
        stream.wait_stream(outside)
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                step(state)
                state.iteration.zero_()
        outside.wait_stream(stream)


def capture(step: Function, state: State, iterations: int, pool: Any) -> torch.cuda.CUDAGraph:
    """Capture iterations on the buffers of ``state``; nothing runs, and its contents and the canvases' places stay.

    Args:
        step: one iteration, which was warmed up; waits for nothing and reads no host value that changes.
        state: static buffers, which each replay reads and writes.
        iterations: how many a replay does. After an odd number the canvases have changed places.
        pool: memory that captures share, from ``torch.cuda.graph_pool_handle``; they never run side by side.

    Raises:
        RuntimeError: the step waits for the device, or does something else that cannot be captured.
    """
    device, turned, graph = state.canvas.device, state.turned, torch.cuda.CUDAGraph()
    # a consumer of finished images may go on allocating in its own thread meanwhile
    options = {"pool": pool, "stream": side_stream(device), "capture_error_mode": "thread_local"}
    with capturing, current(device), torch.cuda.graph(graph, **options):
        for _ in range(iterations):
            step(state)
    if state.turned != turned:
        state.turn()
    return graph


@dataclass(frozen=True)
class Source:
    """What the step of every bucket is built from."""

    model: SparseViT
    config: InversionConfig
    compiled: bool
    graphs: bool = True  # capture CUDA graphs, on CUDA


class Runners:
    """The runner of each bucket, built when it is met first."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.seconds_compile = 0.0  # tracing, compiling, the first run, and the captures
        self._runners: dict[Bucket, Runner] = {}
        self._captures = source.graphs and source.model.device.type == "cuda"
        self._pool: Any = None

    @property
    def met(self) -> frozenset[Bucket]:
        """Those that have a runner."""
        return frozenset(self._runners)

    def has(self, bucket: Bucket) -> bool:
        """Is its runner there, with no compilation to wait for?"""
        return bucket in self._runners

    def of(self, state: State, start: int, batch: int) -> Runner:
        """The runner of ``batch`` images of ``state``, built where there is none yet.

        Raises:
            Exception: it does not fit on the device, see `smi_fast.device.out_of_memory`; or what inductor raises where
                a step does not compile.
        """
        bucket = Bucket(batch, state.keep.shape[1])
        if bucket not in self._runners:
            begin = time.perf_counter()
            with current(self.source.model.device):
                self._runners[bucket] = self._make(state.rows(start, batch))
            if self.source.compiled or self._captures:
                self.seconds_compile += time.perf_counter() - begin
        return self._runners[bucket]

    def _make(self, example: State) -> Runner:
        if self._captures and not self._runners:  # a pool ends with the last capture in it, and takes no more
            self._pool = torch.cuda.graph_pool_handle()
        step = self._build(example)
        release(self.source.model.device)  # what compiling took, on another stream than the captures
        return Runner(step, example, self._pool)

    def drop(self, bucket: Bucket) -> None:
        """Forget a bucket and the memory it holds."""
        self._runners.pop(bucket, None)
        release(self.source.model.device)

    def _build(self, example: State) -> Function:
        """The step for the shapes of ``example``; each bucket gets a function of its own."""
        built = build_step(self.source.model, self.source.config)
        if not self.source.compiled:
            return torch.no_grad()(built)
        return compile_step(built, example)
