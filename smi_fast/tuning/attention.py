"""Choose how self-attention is computed at each number of tokens, by measurement; on CUDA alone."""

import math
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor

from smi_fast.device import capturing, current, side_stream, wait
from smi_fast.model.attention import NAMES, packed_attention
from smi_fast.model.sparse_vit import SparseViT

CALLS = 20  # in one capture, which is one timing
Clock = Callable[[], float]


def tune_attention(
    model: SparseViT, batches: dict[int, int], rounds: int, say: Callable[[str], None]
) -> dict[int, str]:
    """The fastest choice, forward and backward, for each number of tokens; the model is left with it.

    Choices are timed as the engine runs them: on a packed projection, in a captured graph. Nothing is measured on a
    CPU, or where a choice was made already.

    Args:
        model: whose heads and width count.
        batches: the batch to measure at, by number of tokens.
        rounds: timings of each choice; they take turns, and the median counts.
        say: told what is being done.
    """
    if model.device.type != "cuda":
        return {}
    chosen = {}
    for tokens, batch in batches.items():
        if tokens in model.attention_choices:
            continue
        say(f"measuring attention of {tokens} tokens at batch {batch}")
        clocks = {name: attention_clock(model, tokens, batch, name) for name in NAMES}
        timed: dict[str, list[float]] = {name: [] for name in NAMES}
        for _ in range(rounds + 1):  # the first one sets things up
            for name, each in timed.items():
                each.append(clocks[name]())
        seconds = {name: median(each[1:]) for name, each in timed.items()}
        name = min(seconds, key=lambda name: seconds[name])
        if math.isfinite(seconds[name]):
            chosen[tokens] = name
    for tokens, name in chosen.items():
        model.choose_attention(tokens, name)
    return chosen


def attention_clock(model: SparseViT, tokens: int, batch: int, name: str) -> Clock:
    """What measures the seconds of one forward and backward of a choice.

    Args:
        model: on CUDA; its heads, dtype and device count.
        tokens, batch: of the packed projection ``[B, N, 3, H, d]``.
        name: the choice.

    Returns:
        A function that replays a capture of `CALLS` calls, and waits for it. It is infinite where the choice does not
        run at this shape, width or dtype, or memory runs out.
    """
    heads, device, dtype = (model.shape.heads, model.shape.head_width), model.device, model.dtype
    try:
        packed = torch.randn((batch, tokens, 3, *heads), device=device, dtype=dtype, requires_grad=True)
        # as the layer behind attention hands it back: [B, H, N, d], laid out [B, N, H, d]
        cotangent = torch.randn((batch, tokens, *heads), device=device, dtype=dtype).transpose(1, 2)
        capture = _Capture(lambda: _both_ways(packed, cotangent, name), device)
    except (RuntimeError, ValueError):  # not at this width, dtype or size; out of memory is one, too
        return lambda: math.inf

    def seconds() -> float:
        wait(device)
        begin = time.perf_counter()
        capture.replay()
        wait(device)
        return (time.perf_counter() - begin) / CALLS

    return seconds


def _both_ways(packed: Tensor, cotangent: Tensor, name: str) -> Any:
    """Output and the gradient of the projection."""
    with torch.enable_grad():
        output = packed_attention(packed, choice=name)
        return torch.autograd.grad(output, packed, cotangent)


class _Capture:
    """`CALLS` calls, to be replayed; what a first call sets up is left out. It holds ``call`` and what that reads."""

    def __init__(self, call: Callable[[], Any], device: torch.device) -> None:
        self.call, self.device, self.graph = call, device, torch.cuda.CUDAGraph()
        stream = side_stream(device)
        with capturing, current(device):
            outside = torch.cuda.current_stream(device)
            stream.wait_stream(outside)
            with torch.cuda.stream(stream):
                call()
            outside.wait_stream(stream)
            with torch.cuda.graph(self.graph, stream=stream, capture_error_mode="thread_local"):
                for _ in range(CALLS):
                    call()

    def replay(self) -> None:
        """Launch them."""
        with current(self.device):
            self.graph.replay()
