"""``patch_mask``: kept patch ids as pixels: a mask, a composite over a fill colour, and single patches.

    mask[b, y, x] = 1 where the patch that holds pixel (y, x) is in keep[b]

``take_patches`` and ``put_patches`` move whole, undisplaced patches between a canvas and ``[B, A, 3, P, P]``.
"""

import torch
from torch import Tensor

from smi_fast.kernels.grid import Grid


def patch_mask_reference(keep: Tensor, grid: Grid) -> Tensor:
    """Plain torch; shapes as in `patch_mask`."""
    kept = torch.zeros(keep.shape[0], grid.patches, dtype=torch.bool, device=keep.device)
    kept = kept.scatter(1, keep.long(), torch.ones_like(keep, dtype=torch.bool))
    kept = kept.reshape(-1, grid.rows, 1, grid.columns, 1)
    return kept.expand(-1, -1, grid.patch, -1, grid.patch).reshape(-1, grid.height, grid.width)


def patch_mask(keep: Tensor, grid: Grid) -> Tensor:
    """``[B, H, W]`` bool, true on the pixels of the kept patches (``keep``: ``[B, K]`` ids)."""
    return patch_mask_reference(keep, grid)


def composite(pixels: Tensor, keep: Tensor, grid: Grid, fill: Tensor) -> Tensor:
    """The kept patches over a fill.

    Args:
        pixels: ``[B, C, H, W]``.
        keep: ``[B, K]`` patch ids.
        fill: broadcasts to ``pixels``: ``[C, 1, 1]`` for a colour, ``[B, C, H, W]`` for other images.

    Returns:
        ``[B, C, H, W]``, in the dtype of ``pixels``.
    """
    return torch.where(patch_mask(keep, grid)[:, None], pixels, fill.to(pixels.dtype))


def _cells(canvas: Tensor, grid: Grid) -> Tensor:
    """The canvas as ``[B, rows, columns, 3, P, P]``, a view where it is contiguous."""
    cells = canvas.reshape(canvas.shape[0], 3, grid.rows, grid.patch, grid.columns, grid.patch)
    return cells.permute(0, 2, 4, 1, 3, 5)


def _patch_index(ids: Tensor, grid: Grid) -> tuple[Tensor, Tensor, Tensor]:
    images = torch.arange(ids.shape[0], device=ids.device)[:, None].expand_as(ids)
    return images, ids // grid.columns, ids % grid.columns


def take_patches_reference(canvas: Tensor, ids: Tensor, grid: Grid) -> Tensor:
    """Plain torch; shapes as in `take_patches`."""
    return _cells(canvas, grid)[_patch_index(ids, grid)].contiguous()


def put_patches_reference(canvas: Tensor, ids: Tensor, patches: Tensor, grid: Grid) -> Tensor:
    """Plain torch; shapes as in `put_patches`."""
    filled = canvas.clone(memory_format=torch.contiguous_format)
    _cells(filled, grid)[_patch_index(ids, grid)] = patches
    return filled


# custom ops for the same reason as patch_gather: inductor's own code works out each index at every pixel
@torch.library.custom_op("smi_fast::take_patches", mutates_args=())
def _take(canvas: Tensor, ids: Tensor, patch: int) -> Tensor:
    return take_patches_reference(canvas, ids, Grid(canvas.shape[2], canvas.shape[3], patch))


@_take.register_fake
def _(canvas: Tensor, ids: Tensor, patch: int) -> Tensor:
    return canvas.new_empty(*ids.shape, 3, patch, patch)


@torch.library.custom_op("smi_fast::put_patches", mutates_args=())
def _put(canvas: Tensor, ids: Tensor, patches: Tensor) -> Tensor:
    return put_patches_reference(canvas, ids, patches, Grid(canvas.shape[2], canvas.shape[3], patches.shape[-1]))


@_put.register_fake
def _(canvas: Tensor, ids: Tensor, patches: Tensor) -> Tensor:
    return torch.empty_like(canvas, memory_format=torch.contiguous_format)


def take_patches(canvas: Tensor, ids: Tensor, grid: Grid) -> Tensor:
    """``[B, A, 3, P, P]``: the patches ``ids`` (``[B, A]``) of a ``[B, 3, H, W]`` canvas; not differentiable."""
    patches: Tensor = _take(canvas, ids, grid.patch)
    return patches


def put_patches(canvas: Tensor, ids: Tensor, patches: Tensor, grid: Grid) -> Tensor:
    """A copy of the canvas with ``patches`` (``[B, A, 3, P, P]``) at ``ids``; the inverse of `take_patches`."""
    filled: Tensor = _put(canvas, ids, patches)
    return filled
