"""A teacher's images as a student takes them: another resolution, another patch side, other colour statistics.

Where patches were dropped, a plain resize would mix their pixels into the patches beside them. So the resize is a
normalised convolution (Knutsson and Westin, 1993), with the kept pixels as mask ``m``:

    out = resize(m * x) / resize(m)

which is a weighted mean of kept pixels alone. Every pixel of a kept patch has some, since the patch itself is resized
onto the same cell of the student's grid. A mean is not changed by another zero point or unit, so the colours are
converted afterwards:

    y = (out * teacher's std + teacher's mean - student's mean) / student's std
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from smi_fast.kernels.common.grid import Grid
from smi_fast.kernels.patch_mask import patch_mask
from smi_fast.model.spec import TakesImages


def check_grids(teacher: Grid, student: Grid) -> None:
    """Raises ``ValueError`` where a patch of the one is not a patch of the other."""
    if (teacher.rows, teacher.columns) != (student.rows, student.columns):
        raise ValueError(
            f"teacher has {teacher.rows} x {teacher.columns} patches ({teacher.height} x {teacher.width} pixels, patch "
            f"{teacher.patch}), student {student.rows} x {student.columns} ({student.height} x {student.width}, patch "
            f"{student.patch}): must be the same grid; choose the student's image size to match"
        )


def for_student(pixels: Tensor, keep: Tensor | None, teacher: TakesImages, student: TakesImages) -> Tensor:
    """See the top of the file.

    Args:
        pixels: ``[B, 3, H, W]`` float, in the teacher's normalised colours.
        keep: ``[B, K]`` int64 patch ids, or None where all patches count.
        teacher, student: whose colour statistics and patch grids count.

    Returns:
        ``[B, 3, H', W']`` in the student's normalised colours; what lies outside kept patches means nothing.

    Raises:
        ValueError: the grids have other numbers of rows or columns.
    """
    from_info, from_grid, to_info, to_grid = teacher.info, teacher.grid, student.info, student.grid
    check_grids(from_grid, to_grid)
    if from_grid != to_grid:
        pixels = _resize(pixels, keep, from_grid, to_grid)
    if (from_info.mean, from_info.std) == (to_info.mean, to_info.std):
        return pixels
    mean, std, to_mean, to_std = (
        torch.tensor(c, dtype=pixels.dtype, device=pixels.device)[:, None, None]
        for c in (from_info.mean, from_info.std, to_info.mean, to_info.std)
    )
    return pixels * (std / to_std) + (mean - to_mean) / to_std


def _resize(pixels: Tensor, keep: Tensor | None, grid: Grid, to: Grid) -> Tensor:
    if keep is None:
        return _bilinear(pixels, to)
    mask = patch_mask(keep, grid)[:, None]
    # dropped pixels are taken out, not multiplied by 0: one may be infinite
    total = _bilinear(torch.where(mask, pixels, 0.0), to)
    weight = _bilinear(mask.to(pixels.dtype), to)
    # far from all kept pixels both are 0, and so is the result
    return total / torch.where(weight > 0, weight, 1.0)


def _bilinear(x: Tensor, to: Grid) -> Tensor:
    shrinks = to.height < x.shape[2] or to.width < x.shape[3]
    return F.interpolate(x, (to.height, to.width), mode="bilinear", align_corners=False, antialias=shrinks)
