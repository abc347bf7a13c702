"""The mask and composite kernels bit for bit; the statistics kernel no farther from float64 than eager torch is."""

import pytest
import torch
from torch import Tensor

from smi_fast.kernels.common.grid import Grid
from smi_fast.kernels.patch_mask import composite, kept_statistics, patch_mask
from tests.kernels.cases import DEVICE, DTYPES, FEW, GRIDS, assert_near_truth, counts, generator, label, some_ids, sweep

pytestmark = pytest.mark.kernel


def colours(grid: Grid, channels: int, dtype: torch.dtype, salt: int) -> Tensor:
    values = 1 + 250 * torch.rand(2, channels, grid.height, grid.width, generator=generator(salt))
    return values.to(DEVICE, dtype)


@pytest.mark.parametrize("grid", GRIDS, ids=label)
def test_mask_is_exact(grid: Grid) -> None:
    for kept in counts(grid):
        keep = some_ids(grid, 2, kept, generator(kept))
        assert torch.equal(patch_mask(keep, grid, impl="triton"), patch_mask(keep, grid, impl="torch"))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8], ids=str)
def test_ids_of_any_integer_dtype(dtype: torch.dtype) -> None:
    grid = Grid(8, 12, 4)
    keep = torch.tensor([[1, 3, 4], [0, 2, 5]], device=DEVICE)
    pixels = colours(grid, 3, torch.float32, 0)
    assert torch.equal(patch_mask(keep.to(dtype), grid, impl="triton"), patch_mask(keep, grid, impl="torch"))
    found, want = (
        (composite(pixels, ids, grid, pixels * 2, impl="triton"), *kept_statistics(pixels, ids, grid, impl="triton"))
        for ids in (keep.to(dtype), keep)
    )
    assert all(torch.equal(*pair) for pair in zip(found, want, strict=True))


@pytest.mark.parametrize(("grid", "dtype"), sweep((*DTYPES, torch.float64, torch.uint8)), ids=label)
def test_composite_is_exact(grid: Grid, dtype: torch.dtype) -> None:
    for channels, kept in zip((3, 1, 4, 3), counts(grid), strict=False):
        keep = some_ids(grid, 2, kept, generator(kept))
        pixels, other = colours(grid, channels, dtype, 0), colours(grid, channels, dtype, 1)
        colour, row = other[0, :, :1, :1], other[:1, :, :, :1]
        fills = (other, colour, other[0], row, colour.float(), other[0, 0], other.transpose(0, 1)[:1, :1])
        for fill in fills if grid in FEW else fills[:2]:  # how a fill is strided has nothing to do with the grid
            found = composite(pixels, keep, grid, fill, impl="triton")
            assert found.dtype == dtype
            assert torch.equal(found, composite(pixels, keep, grid, fill, impl="torch"))


def test_nothing_shows_through() -> None:
    grid = Grid(8, 12, 4)
    keep = torch.tensor([[1, 3, 4], [0, 2, 5]], device=DEVICE)
    mask = patch_mask(keep, grid)[:, None].expand(-1, 3, -1, -1)
    pixels = torch.where(mask, 1.0, float("nan"))
    assert torch.equal(composite(pixels, keep, grid, 1 / pixels.nan_to_num(0.0) - 1, impl="triton")[mask], pixels[mask])
    fill = torch.where(mask, float("nan"), 2.0)
    assert torch.equal(composite(pixels, keep, grid, fill, impl="triton"), torch.where(mask, 1.0, 2.0))


def test_views_are_as_good_as_copies() -> None:
    grid = Grid(8, 12, 4)
    keep = torch.tensor([[1, 3, 4], [0, 2, 5]], device=DEVICE)
    strided = torch.stack([colours(grid, 3, torch.float32, 0)] * 2, -1)[..., 0]
    fill = colours(Grid(12, 8, 4), 3, torch.float32, 1).transpose(2, 3)
    assert not fill.is_contiguous()
    ids = torch.stack([keep, keep], -1)[..., 0]
    want = composite(strided.contiguous(), keep, grid, fill.contiguous(), impl="torch")
    assert torch.equal(composite(strided, ids, grid, fill, impl="triton"), want)
    assert torch.equal(patch_mask(ids, grid, impl="triton"), patch_mask(keep, grid, impl="torch"))
    for ours, theirs in zip(
        kept_statistics(strided, ids, grid, impl="triton"), kept_statistics(strided, keep, grid), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


def assert_statistics(pixels: Tensor, keep: Tensor, grid: Grid) -> None:
    truth = kept_statistics(pixels.double(), keep, grid, impl="torch")
    eager = kept_statistics(pixels, keep, grid, impl="torch")
    found = kept_statistics(pixels, keep, grid, impl="triton")
    terms = 2 * keep.shape[1] * grid.patch**2
    for ours, theirs, exact in zip(found, eager, truth, strict=True):
        assert ours.dtype == torch.float32
        assert_near_truth(ours, theirs, exact, torch.float32, terms=terms)


@pytest.mark.parametrize(("grid", "dtype"), sweep(), ids=label)
def test_statistics(grid: Grid, dtype: torch.dtype) -> None:
    for channels, kept in zip((3, 1, 4, 3), counts(grid), strict=False):
        assert_statistics(colours(grid, channels, dtype, kept), some_ids(grid, 2, kept, generator(kept)), grid)


@pytest.mark.parametrize("offset", [0.0, 1e3, -1e4])
def test_statistics_under_a_common_offset(offset: float) -> None:
    grid = Grid(64, 96, 16)  # 24 patches: six blocks of 1024 pixels, the last half full at 22
    pixels = torch.randn(2, 3, 64, 96, generator=generator(3)).to(DEVICE) + offset
    for kept in (1, 9, 22, 24) if DEVICE == "cuda" else (9, 22):
        assert_statistics(pixels, some_ids(grid, 2, kept, generator(kept)), grid)


def test_statistics_see_nothing_but_the_kept_patches() -> None:
    grid = Grid(8, 12, 4)
    keep = torch.tensor([[1, 3, 4], [0, 2, 5]], device=DEVICE)
    mask = patch_mask(keep, grid)[:, None]
    pixels = torch.where(mask, colours(grid, 3, torch.float32, 0), float("nan"))
    mean, std = kept_statistics(pixels, keep, grid, impl="triton")
    kept = torch.stack([one[:, m[0]] for one, m in zip(pixels.double(), mask, strict=True)])
    torch.testing.assert_close(mean, kept.mean(2).float())
    torch.testing.assert_close(std, kept.std(2, correction=0).float())


def test_statistics_of_one_colour() -> None:
    grid = Grid(48, 32, 16)
    grey, keep = torch.full((1, 2, 48, 32), 0.3, device=DEVICE), some_ids(grid, 1, 5, generator(0))
    mean, std = kept_statistics(grey, keep, grid, impl="triton")
    assert torch.equal(mean, grey[:, :, 0, 0])
    assert torch.equal(std, torch.zeros_like(std))


def test_what_does_not_fit() -> None:
    grid = Grid(8, 12, 4)
    keep, pixels = torch.zeros(2, 1, dtype=torch.int64, device=DEVICE), colours(grid, 3, torch.float32, 0)
    with pytest.raises(ValueError, match=r"fill of shape \(2, 1, 1\): must broadcast to \(2, 3, 8, 12\)"):
        composite(pixels, keep, grid, pixels[0, :2, :1, :1])
    with pytest.raises(ValueError, match="keep is float32"):
        patch_mask(keep.float(), grid)
    with pytest.raises(ValueError, match=r"pixels of shape .*H=16"):
        kept_statistics(pixels, keep, Grid(16, 12, 4))
    with pytest.raises(ValueError, match="kept_statistics: impl='triton' cannot run: float64"):
        kept_statistics(pixels.double(), keep, grid, impl="triton")
    with pytest.raises(ValueError, match="has no gradient"):
        composite(pixels.requires_grad_(), keep, grid, pixels[0], impl="triton")
