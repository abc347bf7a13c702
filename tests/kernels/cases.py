"""Shapes and inputs that the kernels are swept over, on a GPU or under Triton's interpreter."""

import math
import os
from dataclasses import dataclass

import torch
from torch import Tensor

from smi_fast.kernels.common.dispatch import INTERPRETED
from smi_fast.kernels.common.grid import Grid, Moves

DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
# bfloat16 is left out under the interpreter: its conversions truncate and its dot products are wrong
LOW = (torch.float16,) if INTERPRETED else (torch.float16, torch.bfloat16)
DTYPES = (torch.float32, *LOW)
# fixed where the run is slow and must be the same each time; fresh on a GPU. pytest's header shows it
SEED = int(os.environ.get("SMI_FAST_TEST_SEED", 0 if DEVICE == "cpu" else int.from_bytes(os.urandom(3))))

# Patch sides 4, 8, 14, 16, 32, an odd one and single pixels; square and not; one patch, a row, a column. Blocks that
# hold several patches, one patch, and part of one; full and not. The interpreter's time depends on the number of
# programs, so it gets the smallest grid of each kind
GRIDS = (
    (
        Grid(8, 12, 4),
        Grid(9, 15, 3),
        Grid(24, 16, 8),
        Grid(14, 28, 14),
        Grid(32, 16, 16),
        Grid(32, 64, 32),
        Grid(3, 5, 1),
    )
    if DEVICE == "cpu"
    else (
        Grid(8, 12, 4),
        Grid(9, 15, 3),
        Grid(32, 32, 4),
        Grid(24, 16, 8),
        Grid(28, 42, 14),
        Grid(48, 32, 16),
        Grid(32, 64, 32),
        Grid(3, 5, 1),
        Grid(16, 16, 16),
    )
)
# for a second look (another dtype, another norm) at code that all grids went through
FEW = GRIDS[:2] if DEVICE == "cpu" else GRIDS
BATCH = 2 if DEVICE == "cpu" else 3  # with and without a flip


def sweep(dtypes: tuple[torch.dtype, ...] = DTYPES) -> list[tuple[Grid, torch.dtype]]:
    """All grids in the first dtype, a few in the others."""
    return [(grid, dtype) for dtype in dtypes for grid in (GRIDS if dtype == dtypes[0] else FEW)]


def label(value: object) -> str:
    """For test ids; a grid such as ``8x12p4``."""
    return f"{value.height}x{value.width}p{value.patch}" if isinstance(value, Grid) else str(value)


@dataclass(frozen=True)
class Case:
    """A batch of images with their kept patches and movements."""

    grid: Grid
    canvas: Tensor  # [B, 3, H, W] float32
    keep: Tensor  # [B, K]
    moves: Moves


def generator(salt: int) -> torch.Generator:
    """Draws of one test."""
    return torch.Generator().manual_seed(SEED + salt)


def some_ids(grid: Grid, batch: int, count: int, draw: torch.Generator) -> Tensor:
    """``[batch, count]`` patch ids, ascending in each row."""
    rows = [torch.randperm(grid.patches, generator=draw)[:count].sort().values for _ in range(batch)]
    return torch.stack(rows).to(DEVICE)


def make_case(grid: Grid, kept: int, batch: int = BATCH) -> Case:
    """Every image is moved another way: whole images, whole patches, both signs, with and without a flip."""
    draw = generator(grid.height + 31 * kept)
    canvas = torch.randn(batch, 3, grid.height, grid.width, generator=draw)
    far = torch.tensor([2 * grid.height, 2 * grid.width])
    shift = (torch.rand(batch, 2, generator=draw) * (2 * far + 1)).long() - far
    flip = torch.arange(batch) % 2 == 0
    keep = some_ids(grid, batch, kept, draw)
    return Case(grid, canvas.to(DEVICE), keep, Moves(shift.to(DEVICE), flip.to(DEVICE)))


def counts(grid: Grid) -> list[int]:
    """How many patches to keep: one, some, all, and on a GPU all but one."""
    more = {max(1, grid.patches - 1)} if DEVICE == "cuda" else set()
    return sorted({1, (grid.patches + 1) // 2, grid.patches} | more)


def assert_near_truth(found: Tensor, eager: Tensor, truth: Tensor, dtype: torch.dtype, terms: int = 2) -> None:
    """As near to float64 as eager torch is in the same dtype, but for roundings relative to the largest element.

    A sum of ``terms`` positive numbers along a tree is off by a rounding for each of its log2(terms) levels.
    """
    assert found.shape == truth.shape
    error, allowed = ((x.double() - truth).abs().max() for x in (found, eager))
    slack = math.log2(terms) * torch.finfo(dtype).eps * truth.abs().max()
    assert error <= allowed + slack, f"off by {error:.3g}, eager by {allowed:.3g}, a rounding is {slack:.3g}"
