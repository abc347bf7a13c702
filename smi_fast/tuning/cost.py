"""Estimates of memory and time, made without running an inversion."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from smi_fast.device import wait
from smi_fast.model.flops import run_flops
from smi_fast.model.scaled_linear import FP8, MULTIPLE
from smi_fast.model.spec import ViTShape
from smi_fast.schedule import Stage

# A rough share of the matrix product rate for the compiled step; it makes an estimate, not a bound. On two Zen 4 cores
# bf16 reached 144 GFLOP/s of the 315 to 400 of such products (DeiT-Tiny, 46 patches). Not measured on a
# GPU, nor in fp8, where attention stays in bf16 and the share must be smaller.
EFFICIENCY = 0.4


@dataclass(frozen=True)
class Cost:
    """Estimates for a whole run, compilation left out."""

    memory_bytes: int
    seconds_per_image: float
    matmul_flops_per_s: float


def memory_bytes(shape: ViTShape, batch: int, dtype: torch.dtype, kept: int | None = None) -> int:
    """Weights, optimiser state and activations on ``kept`` patches; None for all, as in the first stage."""
    size = _outside(dtype).itemsize  # weights are there twice in fp8
    inner = shape.heads * shape.head_width
    weights = shape.depth * (4 * shape.width * inner + 2 * shape.width * shape.mlp_width)
    weights += shape.grid.patch_values * shape.width + (shape.grid.patches + shape.num_classes) * shape.width
    tokens = (shape.grid.patches if kept is None else kept) + shape.prefix
    # a block keeps for its backward: two inputs, two norms, q, k, v, attention's output and weights, hidden twice
    per_token = 4 * shape.width + 4 * inner + 2 * shape.mlp_width
    activations = shape.depth * tokens * (per_token + shape.heads * tokens) * size
    canvases = 6 * 3 * shape.grid.height * shape.grid.width * 4  # canvas, moments, gradient, windows, temporary
    return weights * size + batch * (activations + canvases)


@torch.no_grad()
def matmul_rate(shape: ViTShape, batch: int, device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of the MLP's first product on this device, best of a few, in about 0.3 s."""
    a = torch.randn(batch * (shape.grid.patches // 4 + 1), shape.width, device=device)
    b = torch.randn(shape.mlp_width, shape.width, device=device)
    product = _product(a, b, dtype)
    best, until = float("inf"), time.perf_counter() + 0.3
    while time.perf_counter() < until:
        begin = time.perf_counter()
        for _ in range(4):
            product()
        wait(device)
        best = min(best, (time.perf_counter() - begin) / 4)
    return 2 * a.shape[0] * a.shape[1] * b.shape[0] / best


def _product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Callable[[], Tensor]:
    """``a b^T`` in a dtype; widths that have no fp8 product are taken in bfloat16, as the model does."""
    if dtype is not FP8 or b.shape[0] % MULTIPLE or b.shape[1] % MULTIPLE:
        left, right = a.to(_outside(dtype)), b.to(_outside(dtype))
        return lambda: torch.nn.functional.linear(left, right)
    left, right, one = a.to(FP8), b.to(FP8).t(), torch.ones((), device=a.device)
    return lambda: torch._scaled_mm(left, right, one, one, out_dtype=torch.bfloat16, use_fast_accum=True)


def _outside(dtype: torch.dtype) -> torch.dtype:
    """The dtype of what a model holds besides the linear layers of its blocks."""
    return torch.bfloat16 if dtype is FP8 else dtype


def estimate(
    shape: ViTShape, stages: tuple[Stage, ...], batches: tuple[int, ...], device: torch.device, dtype: torch.dtype
) -> Cost:
    """Memory from the shapes, of the largest stage; time from a short matrix product and a typical share of its rate.

    Args:
        shape: of the model.
        stages: of the schedule.
        batches: of each stage.
        device: where the product is timed.
        dtype: what the model computes in.
    """
    rate = matmul_rate(shape, max(batches), device, dtype)
    seconds = run_flops(shape, stages).true / (EFFICIENCY * rate)
    memory = max(memory_bytes(shape, b, dtype, stage.kept) for b, stage in zip(batches, stages, strict=True))
    return Cost(memory, seconds, rate)
