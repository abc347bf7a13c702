"""The gather and ungather kernels against their references, bit for bit."""

import pytest
import torch

from smi_fast.kernels.common.grid import Grid, Moves, slot_of_patch
from smi_fast.kernels.patch_gather import patch_gather
from smi_fast.kernels.patch_ungather import patch_scatter, patch_ungather
from tests.kernels.cases import BATCH, DEVICE, GRIDS, counts, generator, label, make_case, some_ids, sweep

pytestmark = pytest.mark.kernel


@pytest.mark.parametrize(("grid", "dtype"), sweep(), ids=label)
def test_gather_is_exact(grid: Grid, dtype: torch.dtype) -> None:
    for kept in counts(grid):
        case = make_case(grid, kept)
        where = (case.canvas, case.keep, case.moves, grid.patch, dtype)
        assert torch.equal(patch_gather(*where, impl="triton"), patch_gather(*where, impl="torch"))


@pytest.mark.parametrize(("grid", "dtype"), sweep(), ids=label)
def test_ungather_is_exact(grid: Grid, dtype: torch.dtype) -> None:
    for kept in counts(grid):
        case, draw = make_case(grid, kept), generator(kept)
        gradient = torch.randn(BATCH, kept, grid.patch_values, generator=draw).to(DEVICE, dtype)
        slots = slot_of_patch(case.keep, grid.patches)
        everything = torch.arange(grid.patches, device=DEVICE).repeat(BATCH, 1)
        for ids in (case.keep, everything, some_ids(grid, BATCH, 1 + kept // 2, draw)):
            where = (gradient, slots, ids, case.moves, grid)
            assert torch.equal(patch_ungather(*where, impl="triton"), patch_ungather(*where, impl="torch"))


@pytest.mark.parametrize(("grid", "dtype"), sweep(), ids=label)
def test_scatter_is_exact(grid: Grid, dtype: torch.dtype) -> None:
    for kept in counts(grid):
        case, draw = make_case(grid, kept), generator(kept + 3)
        gradient = torch.randn(BATCH, kept, grid.patch_values, generator=draw).to(DEVICE, dtype)
        where = (gradient, slot_of_patch(case.keep, grid.patches), case.moves, grid)
        assert torch.equal(patch_scatter(*where, impl="triton"), patch_scatter(*where, impl="torch"))


def test_every_remainder_of_a_shift() -> None:
    for patch in (4, 3):
        grid = Grid(2 * patch, 3 * patch, patch)
        steps = torch.arange(-2 * patch, 2 * patch + 1)
        # the two directions are computed separately, so a few pairs are enough where programs are slow
        pairs = torch.cartesian_prod(steps, steps) if DEVICE == "cuda" else torch.stack([steps, steps.roll(3)], 1)
        shift = pairs.to(DEVICE)
        batch = len(shift)
        canvas = torch.randn(batch, 3, grid.height, grid.width, generator=generator(0)).to(DEVICE)
        keep = torch.tensor([[0, 2, 4]], device=DEVICE).repeat(batch, 1)
        flip = torch.arange(batch, device=DEVICE) % 2 == 0
        where = (canvas, keep, Moves(shift, flip), patch, torch.float32)
        assert torch.equal(patch_gather(*where, impl="triton"), patch_gather(*where, impl="torch"))


@pytest.mark.parametrize("grid", GRIDS[:4], ids=label)
def test_backward_is_that_of_the_reference(grid: Grid) -> None:
    case = make_case(grid, (grid.patches + 1) // 2)
    gradients = []
    for impl in ("triton", "torch"):
        leaf = case.canvas.clone().requires_grad_()
        windows = patch_gather(leaf, case.keep, case.moves, grid.patch, torch.float32, impl=impl)
        draws = torch.randn(windows.shape, generator=generator(1)).to(DEVICE)
        gradients += torch.autograd.grad(windows, leaf, draws)
    assert torch.equal(*gradients)


def test_views_are_as_good_as_copies() -> None:
    grid = Grid(8, 12, 4)
    case = make_case(grid, 3)
    wide = torch.stack([case.canvas, case.canvas * 0], -1)[..., 0]
    keep = torch.stack([case.keep, case.keep * 0], -1)[..., 0]
    assert not wide.is_contiguous()
    assert not keep.is_contiguous()
    found = patch_gather(wide, keep, case.moves, 4, torch.float32, impl="triton")
    assert torch.equal(found, patch_gather(case.canvas, case.keep, case.moves, 4, torch.float32, impl="torch"))
