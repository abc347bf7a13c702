"""``total_variation``: value per image and gradient on the updated patches, in one pass over them and a halo.

For each of four directions ``d`` (right, down, down-right, down-left) and each pair of neighbours ``(p, p + d)`` of
which at least one is an updated pixel, with ``D = x_p - x_{p+d}`` a vector of 3 channels:

    pixel:  sum_d sum_pairs ||D||_2                     (Eq. 2 of the paper)
    image:  sum_d sqrt(sum_pairs ||D||^2)               four Frobenius norms an image
    batch:  sum_d sqrt(sum_images sum_pairs ||D||^2)    four Frobenius norms over the batch (the published code)

A stopped neighbour counts as a constant (Eq. 1 read literally); a pair of two stopped pixels does not count; there is
no wrap-around. The gradient at an updated pixel is that of the plain total variation there, with norms over the pairs
that count. Under ``batch`` an image's value is its share, ``sum_d S_bd / sqrt(sum_b S_bd)``, so that the values of the
images add up to the norm. Where a norm is 0 its gradient is taken as 0.

Bytes: reads each updated pixel and a one-pixel halo once, writes each gradient once.
"""

from typing import Literal

import torch
from torch import Tensor

from smi_fast.kernels.grid import Grid, slot_of_patch

TVNorm = Literal["pixel", "image", "batch"]
DIRECTIONS = ((0, 1), (1, 0), (1, 1), (1, -1))


def patch_halo_reference(canvas: Tensor, updated: Tensor, grid: Grid) -> tuple[Tensor, Tensor, Tensor]:
    """The patches with a one-pixel rim: ``[B, A, 3, P+2, P+2]``, a pixel outside the image clamped to its edge.

    Also two masks ``[B, A, 1, P+2, P+2]``: is the pixel in the image, and is it one of the updated pixels?
    """
    batch, side = canvas.shape[0], grid.patch + 2
    rim = torch.arange(-1, grid.patch + 1, device=canvas.device)
    y = (updated // grid.columns * grid.patch)[:, :, None] + rim  # [B, A, P+2]
    x = (updated % grid.columns * grid.patch)[:, :, None] + rim
    near_y, near_x = y.clamp(0, grid.height - 1), x.clamp(0, grid.width - 1)
    inside = (y == near_y)[..., :, None] & (x == near_x)[..., None, :]
    index = near_y[..., :, None] * grid.width + near_x[..., None, :]
    halo = canvas.reshape(batch, 3, -1).gather(2, index.reshape(batch, 1, -1).expand(-1, 3, -1))
    patch = (near_y // grid.patch * grid.columns)[..., :, None] + (near_x // grid.patch)[..., None, :]
    moving = slot_of_patch(updated, grid.patches).gather(1, patch.reshape(batch, -1)).reshape(patch.shape) >= 0
    halo = halo.reshape(batch, 3, -1, side, side).transpose(1, 2).contiguous()
    return halo, inside[:, :, None], (moving & inside)[:, :, None]


@torch.library.custom_op("smi_fast::patch_halo", mutates_args=())
def _halo_op(canvas: Tensor, updated: Tensor, patch: int) -> tuple[Tensor, Tensor, Tensor]:
    return patch_halo_reference(canvas, updated, Grid(canvas.shape[2], canvas.shape[3], patch))


@_halo_op.register_fake
def _(canvas: Tensor, updated: Tensor, patch: int) -> tuple[Tensor, Tensor, Tensor]:
    mask = canvas.new_empty(*updated.shape, 1, patch + 2, patch + 2, dtype=torch.bool)
    return canvas.new_empty(*updated.shape, 3, patch + 2, patch + 2), mask, torch.empty_like(mask)


def total_variation_reference(canvas: Tensor, updated: Tensor, grid: Grid, norm: TVNorm) -> tuple[Tensor, Tensor]:
    """Plain torch; shapes as in `total_variation`."""
    # a custom op, so that a compiler does not work out each index at every pixel, see patch_gather.py
    halo, inside, moving = _halo_op(canvas, updated, grid.patch)
    side = grid.patch
    rim = torch.arange(side + 2, device=canvas.device)
    middle = (rim > 0) & (rim <= side)
    in_patch = middle[:, None] & middle  # [P+2, P+2], false on the rim
    value, gradient = canvas.new_zeros(canvas.shape[0]), torch.zeros_like(halo[..., 1:-1, 1:-1])
    for dy, dx in DIRECTIONS:
        # the region of first ends p of all pairs (p, p + d) with an end in the patch: the patch, and its shift by -d
        top, left = 1 - dy, 1 - max(dx, 0)
        rows, columns = side + dy, side + abs(dx)
        first = (..., slice(top, top + rows), slice(left, left + columns))
        second = (..., slice(top + dy, top + dy + rows), slice(left + dx, left + dx + columns))
        pair = torch.where(inside[first] & inside[second], halo[first] - halo[second], 0.0)
        squares = pair.square().sum(2, keepdim=True)  # [B, A, 1, rows, columns]
        # a pair whose first end lies in another updated patch is counted there
        counted = in_patch[first] | (in_patch[second] & ~moving[first])
        if norm == "pixel":
            length = squares.sqrt()
            value = value + (length * counted).sum((1, 2, 3, 4))
            unit = pair * torch.where(length > 0, 1 / length, 0.0)
        else:
            total = (squares * counted).sum((1, 2, 3, 4))
            length = (total.sum().expand_as(total) if norm == "batch" else total).sqrt()
            inverse = torch.where(length > 0, 1 / length, 0.0)
            value = value + total * inverse
            unit = pair * inverse[:, None, None, None, None]
        as_first = unit[..., dy : dy + side, max(dx, 0) : max(dx, 0) + side]
        as_second = unit[..., :side, max(-dx, 0) : max(-dx, 0) + side]
        gradient = gradient + as_first - as_second
    return value, gradient


def total_variation(canvas: Tensor, updated: Tensor, grid: Grid, norm: TVNorm) -> tuple[Tensor, Tensor]:
    """Total variation of the updated patches and its gradient.

    Args:
        canvas: ``[B, 3, H, W]`` float32 (or float64).
        updated: ``[B, A]`` int64 patch ids, ascending in each row.
        norm: ``"pixel"``, ``"image"`` or ``"batch"``.

    Returns:
        value: ``[B]``; gradient: ``[B, A, 3, P, P]``, of the sum of the values; both in the canvas's dtype.
    """
    return total_variation_reference(canvas, updated, grid, norm)
