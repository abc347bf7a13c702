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


def _halo(canvas: Tensor, updated: Tensor, grid: Grid) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Patches with a one-pixel rim ``[B, A, 3, P+2, P+2]``, and the coordinates ``[B, A, P+2]`` of their rows, columns.

    Also ``[B, A, P+2, P+2]`` bool: is that pixel updated? Pixels outside the image are clamped to its edge.
    """
    batch, side = canvas.shape[0], grid.patch + 2
    rim = torch.arange(-1, grid.patch + 1, device=canvas.device)
    y = (updated // grid.columns * grid.patch)[:, :, None] + rim
    x = (updated % grid.columns * grid.patch)[:, :, None] + rim
    inside_y, inside_x = y.clamp(0, grid.height - 1), x.clamp(0, grid.width - 1)
    index = inside_y[..., :, None] * grid.width + inside_x[..., None, :]
    halo = canvas.reshape(batch, 3, -1).gather(2, index.reshape(batch, 1, -1).expand(-1, 3, -1))
    halo = halo.reshape(batch, 3, -1, side, side).transpose(1, 2)
    patch = (inside_y // grid.patch * grid.columns)[..., :, None] + (inside_x // grid.patch)[..., None, :]
    slots = slot_of_patch(updated, grid.patches)
    moving = slots.gather(1, patch.reshape(batch, -1)).reshape(patch.shape) >= 0
    return halo, y, x, moving


def total_variation_reference(canvas: Tensor, updated: Tensor, grid: Grid, norm: TVNorm) -> tuple[Tensor, Tensor]:
    """Plain torch; shapes as in `total_variation`."""
    halo, y, x, moving = _halo(canvas, updated, grid)
    side = grid.patch
    centre = halo[..., 1:-1, 1:-1]
    value = canvas.new_zeros(canvas.shape[0])
    gradient = torch.zeros_like(centre)
    for dy, dx in DIRECTIONS:
        squares = canvas.new_zeros(canvas.shape[0])
        differences = []
        for sign in (1, -1):
            oy, ox = 1 + sign * dy, 1 + sign * dx
            valid_y = (y[..., oy : oy + side] >= 0) & (y[..., oy : oy + side] < grid.height)
            valid_x = (x[..., ox : ox + side] >= 0) & (x[..., ox : ox + side] < grid.width)
            valid = valid_y[..., :, None] & valid_x[..., None, :]  # [B, A, P, P]
            neighbour = halo[..., oy : oy + side, ox : ox + side]
            difference = torch.where(valid[:, :, None], centre - neighbour, 0.0)
            # a pair of two updated pixels is seen from both ends: count it from the first
            counted = 1.0 if sign == 1 else (~moving[..., oy : oy + side, ox : ox + side]).to(canvas.dtype)
            lengths = difference.square().sum(2)  # [B, A, P, P]
            if norm == "pixel":
                lengths = lengths.sqrt()
                difference = difference * torch.where(lengths > 0, 1 / lengths, 0.0)[:, :, None]
            squares = squares + (lengths * counted).sum((1, 2, 3))
            differences.append(difference)
        both = differences[0] + differences[1]
        if norm == "pixel":
            value, gradient = value + squares, gradient + both
        else:
            total = (squares.sum().expand_as(squares) if norm == "batch" else squares).sqrt()
            inverse = torch.where(total > 0, 1 / total, 0.0)
            value = value + squares * inverse
            gradient = gradient + both * inverse[:, None, None, None, None]
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
