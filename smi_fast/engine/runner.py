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

    On CUDA ``UNROLLED`` iterations are one launch of a captured graph; what is left over is launched step by step.

    Args:
        step: one iteration, in place on a `State`.
        example: a state of the bucket's shapes.
        pool: for the captures, see `capture`; None for no capture (always on a CPU).
    """

    def __init__(self, step: Function, example: State, pool: Any) -> None:
        self._step = step
        self.state = example.clone()
        self.state.turned = False
        self._replay = None if pool is None else capture(step, self.state, pool)
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
        # a capture knows which canvas is read first
        if self._replay is not None and most >= UNROLLED and not self.state.turned:
            self._replay()
            done = UNROLLED
        else:
            self._step(self.state)
        self._throttle()
        return done

    def _throttle(self) -> None:
        """Let the host wait for a launch that is some way back; the device never runs dry of work."""
        if not self.state.canvas.is_cuda:
            return
        event = torch.cuda.Event()
        event.record()
        self._launched.append(event)
        if len(self._launched) > IN_FLIGHT:
            self._launched.popleft().synchronize()


def capture(step: Function, state: State, pool: Any) -> Callable[[], None]:
    """Capture ``UNROLLED`` iterations on the buffers of ``state``, whose contents are lost.

    The step runs on a side stream first: what a first call sets up (modules, workspaces) does not belong into a
    capture, and fails or replays wrong there.

    Args:
        step: one iteration; waits for nothing and reads no host value that changes.
        state: static buffers, which each replay reads and writes.
        pool: memory that captures share, from ``torch.cuda.graph_pool_handle``; they never run side by side.

    Returns:
        A function that launches the captured iterations.

    Raises:
        RuntimeError: the step waits for the device, or does something else that cannot be captured.
    """
    device = state.canvas.device
    state.iteration.zero_()
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            step(state)
            state.iteration.zero_()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    # a consumer of finished images may go on allocating in its own thread meanwhile
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        for _ in range(UNROLLED):
            step(state)
    assert not state.turned
    return graph.replay


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
        self.seconds_compile = 0.0  # tracing, compiling, and the first run or capture
        self._runners: dict[Bucket, Runner] = {}
        captures = source.graphs and source.model.device.type == "cuda"
        self._memory = torch.cuda.graph_pool_handle() if captures else None

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
            torch.OutOfMemoryError: it does not fit on the device.
            Exception: what inductor raises where a step does not compile.
        """
        bucket = Bucket(batch, state.keep.shape[1])
        if bucket not in self._runners:
            begin = time.perf_counter()
            example = state.rows(start, batch)
            self._runners[bucket] = Runner(self._build(example), example, self._memory)
            if self.source.compiled:
                self.seconds_compile += time.perf_counter() - begin
        return self._runners[bucket]

    def drop(self, bucket: Bucket) -> None:
        """Forget a bucket and the memory it holds."""
        self._runners.pop(bucket, None)
        if self.source.model.device.type == "cuda":
            torch.cuda.empty_cache()

    def _build(self, example: State) -> Function:
        """The step for the shapes of ``example``; each bucket gets a function of its own."""
        built = build_step(self.source.model, self.source.config)
        if not self.source.compiled:
            return torch.no_grad()(built)
        return compile_step(built, example)
