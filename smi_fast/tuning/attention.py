"""Choose how self-attention is computed at each number of tokens, by measurement; on CUDA alone."""

import math
import time
from collections.abc import Callable
from statistics import median

import torch

from smi_fast.model.attention import NAMES, attention
from smi_fast.model.sparse_vit import SparseViT

CALLS = 20  # in one timing


def tune_attention(
    model: SparseViT, batches: dict[int, int], rounds: int, say: Callable[[str], None]
) -> dict[int, str]:
    """The fastest choice, forward and backward, for each number of tokens; the model is left with it.

    Nothing is measured on a CPU, or where a choice was made already.

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
        timed: dict[str, list[float]] = {name: [] for name in NAMES}
        for _ in range(rounds + 1):  # the first one sets things up
            for name, each in timed.items():
                each.append(attention_seconds(model, tokens, batch, name))
        seconds = {name: median(each[1:]) for name, each in timed.items()}
        name = min(seconds, key=lambda name: seconds[name])
        if math.isfinite(seconds[name]):
            chosen[tokens] = name
    for tokens, name in chosen.items():
        model.choose_attention(tokens, name)
    return chosen


def attention_seconds(model: SparseViT, tokens: int, batch: int, name: str) -> float:
    """Of one forward and backward of a choice, ``[B, H, N, d]``; infinite where it does not run at this shape."""
    shape = model.shape
    size = (batch, shape.heads, tokens, shape.head_width)
    inputs = [torch.randn(size, device=model.device, dtype=model.dtype, requires_grad=True) for _ in range(3)]
    try:
        for warm in (True, False):
            torch.cuda.synchronize(model.device)
            begin = time.perf_counter()
            for _ in range(1 if warm else CALLS):
                output = attention(*inputs, choice=name)
                torch.autograd.grad(output, inputs, torch.ones_like(output))
            torch.cuda.synchronize(model.device)
    except (RuntimeError, ValueError):  # not at this width, dtype or size; out of memory is one, too
        return math.inf
    return (time.perf_counter() - begin) / CALLS
