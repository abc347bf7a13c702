"""`patch_gather`, `patch_ungather` and the grid arithmetic, against rolled, mirrored and cut images; zero tolerance."""

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from smi_fast.kernels.common.grid import Grid, Moves, slot_of_patch, split_shift, target_cells
from smi_fast.kernels.patch_gather import patch_gather, patch_gather_reference
from smi_fast.kernels.patch_ungather import patch_ungather


@dataclass(frozen=True)
class Case:
    """Images of one grid, each with its own shift, flip and kept patches."""

    grid: Grid
    keep: Tensor  # [B, K]
    moves: Moves

    def canvas(self, dtype: torch.dtype = torch.float64) -> Tensor:
        """``[B, 3, H, W]``, every number different."""
        shape = (len(self.keep), 3, self.grid.height, self.grid.width)
        return torch.arange(1, 1 + torch.Size(shape).numel(), dtype=dtype).reshape(shape)


def subsets(patches: int, batch: int, kept: int, seed: int) -> Tensor:
    """``[batch, kept]`` different ids below ``patches``, ascending."""
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randperm(patches, generator=generator)[:kept].sort().values for _ in range(batch)]
    return torch.stack(rows)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Grids of 1..4 x 1..5 patches of side 1..8, shifts of up to three images."""
    patch, rows, columns = draw(st.integers(1, 8)), draw(st.integers(1, 4)), draw(st.integers(1, 5))
    grid = Grid(rows * patch, columns * patch, patch)
    batch = draw(st.integers(1, 3))
    kept = draw(st.integers(1, grid.patches))
    keep = subsets(grid.patches, batch, kept, draw(st.integers(0, 2**16)))
    shifts = [
        (draw(st.integers(-3 * grid.height, 3 * grid.height)), draw(st.integers(-3 * grid.width, 3 * grid.width)))
        for _ in range(batch)
    ]
    flips = [draw(st.booleans()) for _ in range(batch)]
    return Case(grid, keep, Moves(torch.tensor(shifts), torch.tensor(flips)))


def jittered(image: Tensor, shift: Tensor, flip: Tensor) -> Tensor:
    """One image ``[C, H, W]``, rolled by ``shift`` and then perhaps mirrored."""
    image = image.roll((int(shift[0]), int(shift[1])), (1, 2))
    return image.flip(2) if flip else image


def cut(image: Tensor, grid: Grid) -> list[Tensor]:
    """The patches of one image ``[C, H, W]``, in the order of their ids."""
    rows = image.split(grid.patch, 1)
    return [patch for row in rows for patch in row.split(grid.patch, 2)]


@settings(deadline=None, max_examples=150)
@given(cases())
def test_windows_are_the_crops_of_the_jittered_image(case: Case) -> None:
    canvas = case.canvas()
    windows = patch_gather(canvas, case.keep, case.moves, case.grid.patch, canvas.dtype)
    cells = target_cells(case.keep, *case.moves, case.grid)
    assert windows.shape == (*case.keep.shape, case.grid.patch_values)
    for b in range(len(canvas)):
        crops = cut(jittered(canvas[b], case.moves.shift[b], case.moves.flip[b]), case.grid)
        for k, cell in enumerate(cells[b].tolist()):
            assert torch.equal(windows[b, k], crops[cell].flatten())


@settings(deadline=None, max_examples=150)
@given(cases())
def test_target_cell_holds_most_of_the_patch(case: Case) -> None:
    grid = case.grid
    ids = torch.arange(grid.patches).reshape(1, grid.rows, grid.columns)
    ids = ids.repeat_interleave(grid.patch, 1).repeat_interleave(grid.patch, 2)  # [1, H, W]: the id of each pixel
    cells = target_cells(case.keep, *case.moves, grid)
    for b, row in enumerate(case.keep.tolist()):
        crops = cut(jittered(ids, case.moves.shift[b], case.moves.flip[b]), grid)
        assert len(set(cells[b].tolist())) == len(row)
        for k, patch in enumerate(row):
            counts = [int((crop == patch).sum()) for crop in crops]
            assert counts[int(cells[b, k])] == max(counts)


@pytest.mark.parametrize(
    ("shift", "whole", "remainder"), [(2, 1, -2), (1, 0, 1), (-2, 0, -2), (-3, -1, 1), (6, 2, -2), (-6, -1, -2)]
)
def test_half_a_patch_rounds_up(shift: int, whole: int, remainder: int) -> None:
    split = split_shift(torch.tensor([shift]), 4)
    assert [int(part) for part in split] == [whole, remainder]


def test_half_a_patch_moves_down_and_right_before_the_flip() -> None:
    keep, shift = torch.tensor([[5], [5]]), torch.tensor([[2, 2], [2, 2]])
    cells = target_cells(keep, shift, torch.tensor([False, True]), Grid(16, 16, 4))
    assert cells.tolist() == [[10], [9]]


@settings(deadline=None, max_examples=100)
@given(cases())
def test_windows_of_all_patches_cover_each_pixel_once(case: Case) -> None:
    grid, batch = case.grid, len(case.keep)
    everything = torch.arange(grid.patches).expand(batch, -1)
    canvas = case.canvas()
    windows = patch_gather(canvas, everything, case.moves, grid.patch, canvas.dtype)
    assert torch.equal(windows.reshape(batch, -1).sort(1).values, canvas.reshape(batch, -1))


@settings(deadline=None, max_examples=150)
@given(cases(), st.integers(0, 2**16))
def test_ungather_is_the_gradient_of_gather(case: Case, seed: int) -> None:
    grid, batch = case.grid, len(case.keep)
    canvas = case.canvas().requires_grad_()
    where = (case.keep, case.moves, grid.patch, canvas.dtype)
    windows = patch_gather_reference(canvas, *where)  # the op's own backward is patch_ungather
    cotangent = torch.randn(windows.shape, dtype=windows.dtype, generator=torch.Generator().manual_seed(seed))
    (whole,) = torch.autograd.grad(windows, canvas, cotangent)
    (of_op,) = torch.autograd.grad(patch_gather(canvas, *where), canvas, cotangent)
    assert torch.equal(of_op, whole)
    everything = torch.arange(grid.patches).expand(batch, -1)
    more = 1 + seed % grid.patches  # patches that are updated, kept or not
    for updated in (case.keep, everything, subsets(grid.patches, batch, more, seed)):
        found = patch_ungather(cotangent, slot_of_patch(case.keep, grid.patches), updated, case.moves, grid)
        assert found.dtype == torch.float64
        assert found.shape == (batch, updated.shape[1], 3, grid.patch, grid.patch)
        for b, row in enumerate(updated.tolist()):
            patches = cut(whole[b], grid)
            assert torch.equal(found[b], torch.stack([patches[i] for i in row]))


def test_a_stopped_neighbour_gets_and_gives_nothing() -> None:
    # one kept patch, displaced by one pixel: a row of its window lies on a stopped patch
    keep, moves, grid = torch.tensor([[0]]), Moves(torch.tensor([[-1, 0]]), torch.tensor([False])), Grid(8, 4, 4)
    ones = torch.ones(1, 1, grid.patch_values)
    slots = slot_of_patch(keep, grid.patches)
    own = patch_ungather(ones, slots, keep, moves, grid)
    below = patch_ungather(ones, slots, torch.tensor([[1]]), moves, grid)
    assert own[0, 0, 0].sum(1).tolist() == [0, 4, 4, 4]
    assert below[0, 0, 0].sum(1).tolist() == [4, 0, 0, 0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dtypes(dtype: torch.dtype) -> None:
    grid, keep = Grid(6, 9, 3), torch.tensor([[0, 2, 5]])
    moves = Moves(torch.tensor([[4, -7]]), torch.tensor([True]))
    canvas = torch.randn(1, 3, 6, 9, generator=torch.Generator().manual_seed(0))
    exact = patch_gather(canvas, keep, moves, 3, torch.float32)
    low = patch_gather(canvas, keep, moves, 3, dtype)
    assert low.dtype == dtype
    assert torch.equal(low, exact.to(dtype))
    slots = slot_of_patch(keep, grid.patches)
    back = patch_ungather(low, slots, keep, moves, grid)
    assert back.dtype == torch.float32
    assert torch.equal(back, patch_ungather(low.float(), slots, keep, moves, grid))


def test_slot_of_patch() -> None:
    assert slot_of_patch(torch.tensor([[1, 4], [0, 2]]), 5).tolist() == [[-1, 0, -1, -1, 1], [0, -1, 1, -1, -1]]


def test_grid_counts() -> None:
    grid = Grid(224, 160, 16)
    assert (grid.rows, grid.columns, grid.patches, grid.patch_values) == (14, 10, 140, 768)


@pytest.mark.parametrize(
    ("size", "message"),
    [((30, 32, 8), "height=30"), ((32, 30, 8), "width=30"), ((0, 8, 8), "height=0"), ((8, 8, 0), "patch side, 0")],
)
def test_grid_refuses_sides_that_are_no_multiple(size: tuple[int, int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Grid(*size)


def test_gather_refuses_an_image_that_is_no_multiple() -> None:
    still = torch.zeros(1, 2, dtype=torch.int64)
    with pytest.raises(ValueError, match="width=10"):
        patch_gather(torch.zeros(1, 3, 8, 10), torch.tensor([[0]]), Moves(still, still[:, 0].bool()), 4, torch.float32)
