"""`Runner`: the iterations of one bucket, on buffers whose addresses never change."""

from collections import deque
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from smi_fast.engine.graphs import UNROLLED, capture
from smi_fast.engine.rows import load_rows, store_rows
from smi_fast.engine.state import State

IN_FLIGHT = 3  # launches the host may be ahead of the device, so that progress is true and an interrupt soon felt


class Runner:
    """Runs a step on static buffers: load images, advance, store them.

    On CUDA ``UNROLLED`` iterations are one launch of a captured graph; what is left over is launched step by step.

    Args:
        step: one iteration, in place on a `State`.
        example: a state of the bucket's shapes.
        pool: for the captures, see `capture`; None for no capture (always on a CPU).
    """

    def __init__(self, step: Callable[[State], None], example: State, pool: Any) -> None:
        self._step = step
        self._home = example.clone()
        self.state = replace(self._home)
        self._replay = None if pool is None else capture(step, self.state, pool)
        self._launched: deque[torch.cuda.Event] = deque()

    def load(self, group: State, start: int) -> None:
        """Take over the images of a group from ``start`` on."""
        self.state = replace(self._home)  # the canvases may have changed places
        load_rows(self.state, group, start)

    def store(self, group: State, start: int) -> None:
        """Put them back."""
        store_rows(group, self.state, start)

    def advance(self, most: int) -> int:
        """Run one or more iterations, up to ``most``; returns how many. On CUDA they are launched, not waited for."""
        done = 1
        # a capture knows which canvas is read first
        if self._replay is not None and most >= UNROLLED and self.state.canvas is self._home.canvas:
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
