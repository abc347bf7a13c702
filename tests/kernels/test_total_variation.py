"""The total variation kernel: no farther from float64 than eager torch is."""

import pytest
import torch

from smi_fast.kernels.common.grid import Grid
from smi_fast.kernels.total_variation import TVNorm, total_variation
from tests.kernels.cases import BATCH, DEVICE, FEW, GRIDS, assert_near_truth, counts, label, make_case

pytestmark = pytest.mark.kernel
NORMS: tuple[TVNorm, ...] = ("pixel", "image", "batch")


# `image` and `batch` are one kernel; the lengths it reads are computed in plain torch
@pytest.mark.parametrize(
    ("grid", "norm"), [(grid, norm) for norm in NORMS for grid in (FEW if norm == "batch" else GRIDS)], ids=label
)
def test_value_and_gradient(grid: Grid, norm: TVNorm) -> None:
    for kept in counts(grid):
        case = make_case(grid, kept)
        truth = total_variation(case.canvas.double(), case.keep, grid, norm, impl="torch")
        eager = total_variation(case.canvas, case.keep, grid, norm, impl="torch")
        found = total_variation(case.canvas, case.keep, grid, norm, impl="triton")
        pairs = 4 * max(2, kept * grid.patch**2)
        assert_near_truth(found[0], eager[0], truth[0], torch.float32, terms=pairs)
        assert_near_truth(found[1], eager[1], truth[1], torch.float32)


@pytest.mark.parametrize("norm", NORMS)
def test_a_constant_image_has_none(norm: TVNorm) -> None:
    case = make_case(Grid(8, 12, 4), 3)
    value, gradient = total_variation(torch.full_like(case.canvas, 0.3), case.keep, case.grid, norm, impl="triton")
    assert torch.equal(value, torch.zeros(BATCH, device=DEVICE))
    assert torch.equal(gradient, torch.zeros_like(gradient))


def test_it_is_the_same_each_time() -> None:
    case = make_case(Grid(32, 32, 16), 4)
    first, second = (total_variation(case.canvas, case.keep, case.grid, "batch", impl="triton") for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
