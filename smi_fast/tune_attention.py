"""Choose how self-attention is computed at each number of tokens, by measurement; on CUDA alone."""

import math
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor

from smi_fast.model.attention import attention
from smi_fast.model.sparse_vit import SparseViT

CHOICES = ("flash", "efficient", "math", "tile", "plain")
CALLS = 20  # in one timing


def tune_attention(
    model: SparseViT, batches: dict[int, int], rounds: int, say: Callable[[str], None]
) -> dict[int, str]:
    """The fastest choice, forward and backward, for each number of tokens; the model is left with it.

    Nothing is measured on a CPU, for a model that knows no choices, or where one was made for it already.

    Args:
        model: knows choices if it has ``choose_attention(tokens, name)`` and ``attention_choices``.
        batches: the batch to measure at, by number of tokens.
        rounds: timings of each choice; they take turns, and the median counts.
        say: told what is being done.
    """
    if model.device.type != "cuda" or not hasattr(model, "choose_attention"):
        return {}
    made: dict[int, str] = getattr(model, "attention_choices", {})
    chosen = {}
    for tokens, batch in batches.items():
        if tokens in made:
            continue
        say(f"measuring attention of {tokens} tokens at batch {batch}")
        timed: dict[str, list[float]] = {name: [] for name in CHOICES}
        for _ in range(rounds + 1):  # the first one sets things up
            for name, each in timed.items():
                each.append(attention_seconds(model, tokens, batch, name))
        seconds = {name: median(each[1:]) for name, each in timed.items()}
        name = min(seconds, key=lambda name: seconds[name])
        if math.isfinite(seconds[name]):
            chosen[tokens] = name
    apply_attention(model, chosen)
    return chosen


def apply_attention(model: SparseViT, chosen: dict[int, str]) -> None:
    """Let a model that knows choices make these, where none was made for it."""
    choose: Any = getattr(model, "choose_attention", None)
    made: dict[int, str] = getattr(model, "attention_choices", {})
    for tokens, name in chosen.items():
        if choose is not None and tokens not in made:
            choose(tokens, name)


def attention_seconds(model: SparseViT, tokens: int, batch: int, name: str) -> float:
    """Of one forward and backward of a choice, ``[B, H, N, d]``; infinite where it does not run at this shape."""
    shape, call = model.shape, attention
    options: dict[str, Any] = {"choice": name}
    size = (batch, shape.heads, tokens, shape.head_width)
    inputs = [torch.randn(size, device=model.device, dtype=model.dtype, requires_grad=True) for _ in range(3)]
    try:
        for warm in (True, False):
            torch.cuda.synchronize(model.device)
            begin = time.perf_counter()
            for _ in range(1 if warm else CALLS):
                output: Tensor = call(*inputs, **options)
                torch.autograd.grad(output, inputs, torch.ones_like(output))
            torch.cuda.synchronize(model.device)
    except (RuntimeError, ValueError):  # not at this width, dtype or size; out of memory is one, too
        return math.inf
    return (time.perf_counter() - begin) / CALLS
