"""CUDA graphs, captured by hand: many iterations in one launch."""

from collections.abc import Callable
from typing import Any

import torch

from smi_fast.engine.state import State

# Even, since the two canvases change places in each iteration and a capture must end as it began. At 10 the launch of
# a graph is spread over ten iterations, and the stages of the paper (50, 50, 100, 100, 3700) leave no rest.
UNROLLED = 10
WARM_UP = 2  # even as well


def capture(step: Callable[[State], None], state: State, pool: Any) -> Callable[[], None]:
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
    canvas, spare = state.canvas, state.spare
    state.iteration.zero_()
    stream = torch.cuda.Stream(canvas.device)
    stream.wait_stream(torch.cuda.current_stream(canvas.device))
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            step(state)
            state.iteration.zero_()
    torch.cuda.current_stream(canvas.device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    # a consumer of finished images may go on allocating in its own thread meanwhile
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        for _ in range(UNROLLED):
            step(state)
    assert state.canvas is canvas
    assert state.spare is spare
    return graph.replay
