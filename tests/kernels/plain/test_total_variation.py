"""`total_variation` against autograd over pairs of whole-image slices; a stopped pixel is detached there."""

import math

import pytest
import torch
from torch import Tensor

from smi_fast.kernels.common.grid import Grid
from smi_fast.kernels.total_variation import TVNorm, total_variation

NORMS: tuple[TVNorm, ...] = ("pixel", "image", "batch")
# (height, width, patch): a single pixel, patches of one pixel, one patch, rows and columns of patches, non-square
SIZES = [(1, 1, 1), (3, 5, 1), (4, 4, 4), (2, 8, 2), (8, 2, 2), (6, 10, 2), (12, 8, 4), (16, 24, 8), (9, 6, 3)]
EPS64 = torch.finfo(torch.float64).eps


def draw(grid: Grid, kept: int, batch: int = 3, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A random canvas ``[B, 3, H, W]`` float64 and ``kept`` random patch ids an image, ascending."""
    generator = torch.Generator().manual_seed(seed)
    canvas = torch.randn(batch, 3, grid.height, grid.width, generator=generator, dtype=torch.float64)
    rows = [torch.randperm(grid.patches, generator=generator)[:kept].sort().values for _ in range(batch)]
    return canvas, torch.stack(rows)


def cut(image: Tensor, grid: Grid) -> list[Tensor]:
    """The patches of one image ``[C, H, W]``, in the order of their ids."""
    return [patch for row in image.split(grid.patch, 1) for patch in row.split(grid.patch, 2)]


def moving_pixels(updated: Tensor, grid: Grid) -> Tensor:
    """``[B, H, W]`` bool: does the pixel belong to an updated patch?"""
    moving = torch.zeros(len(updated), grid.height, grid.width, dtype=torch.bool)
    for b, row in enumerate(updated.tolist()):
        patches = cut(moving[b : b + 1], grid)  # views
        for i in row:
            patches[i].fill_(True)
    return moving


def pair_differences(x: Tensor, moving: Tensor) -> list[list[Tensor]]:
    """By direction and image: ``[pairs, 3]``, the differences of neighbours of which at least one moves."""
    right = (x[:, :, :, :-1], x[:, :, :, 1:], moving[:, :, :-1] | moving[:, :, 1:])
    down = (x[:, :, :-1], x[:, :, 1:], moving[:, :-1] | moving[:, 1:])
    falling = (x[:, :, :-1, :-1], x[:, :, 1:, 1:], moving[:, :-1, :-1] | moving[:, 1:, 1:])
    rising = (x[:, :, 1:, :-1], x[:, :, :-1, 1:], moving[:, 1:, :-1] | moving[:, :-1, 1:])
    return [
        [(first[b] - second[b])[:, counts[b]].T for b in range(len(x))]
        for first, second, counts in (right, down, falling, rising)
    ]


def expected(canvas: Tensor, updated: Tensor, grid: Grid, norm: TVNorm) -> tuple[Tensor, Tensor]:
    """Value ``[B]`` and gradient ``[B, A, 3, P, P]``."""
    moving = moving_pixels(updated, grid)
    leaf = canvas.clone().requires_grad_()
    pairs = pair_differences(torch.where(moving[:, None], leaf, leaf.detach()), moving)
    norms = [torch.linalg.vector_norm(torch.cat(d)) for d in pairs]  # over the batch
    values = []
    for b in range(len(canvas)):
        if norm == "pixel":
            terms = [torch.linalg.vector_norm(d[b], dim=1).sum() for d in pairs]
        elif norm == "image":
            terms = [torch.linalg.vector_norm(d[b]) for d in pairs]
        else:  # an image's share of the norm; 0 of 0 is 0
            terms = [d[b].square().sum() / n.clamp(min=1e-300) for d, n in zip(pairs, norms, strict=True)]
        values.append(torch.stack(terms).sum())
    total = torch.stack(norms if norm == "batch" else values).sum()
    (whole,) = torch.autograd.grad(total, leaf)
    gradients = [torch.stack([cut(whole[b], grid)[i] for i in row]) for b, row in enumerate(updated.tolist())]
    return torch.stack(values).detach(), torch.stack(gradients)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_value_and_gradient(size: tuple[int, int, int], norm: TVNorm) -> None:
    grid = Grid(*size)
    for kept in sorted({1, (grid.patches + 1) // 2, max(1, grid.patches - 1), grid.patches}):
        canvas, updated = draw(grid, kept, seed=kept)
        value, gradient = total_variation(canvas, updated, grid, norm)
        want_value, want_gradient = expected(canvas, updated, grid, norm)
        # sums of at most 4 * 3 * H * W numbers of the order of 1
        tolerance = 4 * EPS64 * 12 * grid.height * grid.width
        torch.testing.assert_close(value, want_value, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(gradient, want_gradient, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("norm", NORMS)
def test_gradient_is_the_slope_of_the_value(norm: TVNorm) -> None:
    grid = Grid(6, 9, 3)
    canvas, updated = draw(grid, 3, batch=2)
    _, gradient = total_variation(canvas, updated, grid, norm)
    step = 1e-6
    for b, slot, channel, y, x in [(0, 0, 0, 0, 0), (0, 1, 2, 2, 2), (0, 2, 1, 0, 2), (1, 0, 1, 1, 1), (1, 2, 2, 2, 0)]:
        row, column = divmod(int(updated[b, slot]), grid.columns)
        nudge = torch.zeros_like(canvas)
        nudge[b, channel, row * 3 + y, column * 3 + x] = step
        above, _ = total_variation(canvas + nudge, updated, grid, norm)
        below, _ = total_variation(canvas - nudge, updated, grid, norm)
        slope = float((above - below).sum()) / (2 * step)
        # a central difference is off by step^2, and by eps * value / step
        assert math.isclose(slope, float(gradient[b, slot, channel, y, x]), rel_tol=1e-6, abs_tol=1e-6)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("kept", [1, 3, 6])
def test_a_constant_image_has_none(norm: TVNorm, kept: int) -> None:
    grid = Grid(4, 6, 2)
    _, updated = draw(grid, kept, batch=2)
    value, gradient = total_variation(torch.full((2, 3, 4, 6), 0.3), updated, grid, norm)
    assert torch.equal(value, torch.zeros(2))
    assert torch.equal(gradient, torch.zeros(2, kept, 3, 2, 2))


def test_a_constant_image_beside_a_varied_one() -> None:
    grid = Grid(4, 6, 2)
    canvas, updated = draw(grid, 4, batch=2)
    canvas[0] = 0.3
    for norm in NORMS:
        value, gradient = total_variation(canvas, updated, grid, norm)
        assert value[0] == 0
        assert value[1] > 0
        assert torch.equal(gradient[0], torch.zeros_like(gradient[0]))
        assert torch.isfinite(gradient).all()


def test_values_by_hand() -> None:
    # two patches of one pixel, 3 and 4 apart in two channels: one pair to the right
    canvas = torch.tensor([[[0.0, 3.0]], [[0.0, 4.0]], [[1.0, 1.0]]])[None]
    grid = Grid(1, 2, 1)
    for updated in (torch.tensor([[0]]), torch.tensor([[0, 1]])):
        for norm in NORMS:
            value, gradient = total_variation(canvas, updated, grid, norm)
            assert value.tolist() == pytest.approx([5.0])
            assert gradient[0, 0].flatten().tolist() == pytest.approx([-0.6, -0.8, 0.0])


def test_shares_of_the_batch_norm_add_up() -> None:
    grid = Grid(8, 8, 4)
    canvas, _ = draw(grid, 1)
    everything = torch.arange(grid.patches).expand(len(canvas), -1)
    value, _ = total_variation(canvas, everything, grid, "batch")
    slices = [
        canvas[..., 1:] - canvas[..., :-1],
        canvas[..., 1:, :] - canvas[..., :-1, :],
        canvas[..., 1:, 1:] - canvas[..., :-1, :-1],
        canvas[..., 1:, :-1] - canvas[..., :-1, 1:],
    ]
    assert float(value.sum()) == pytest.approx(float(sum(d.norm() for d in slices)), rel=1e-12)


@pytest.mark.parametrize("norm", NORMS)
def test_float32(norm: TVNorm) -> None:
    grid = Grid(16, 24, 8)
    canvas, updated = draw(grid, 4)
    value, gradient = total_variation(canvas.float(), updated, grid, norm)
    assert value.dtype == gradient.dtype == torch.float32
    exact_value, exact_gradient = total_variation(canvas.float().double(), updated, grid, norm)
    torch.testing.assert_close(value.double(), exact_value, rtol=1e-5, atol=0)
    torch.testing.assert_close(gradient.double(), exact_gradient, rtol=1e-5, atol=1e-6)
