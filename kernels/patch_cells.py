"""``take_patches`` and ``put_patches_``: whole, undisplaced patches of a canvas, as ``[B, A, 3, P, P]`` and back.

    patches[b, a, ch, i, j] = canvas[b, ch, r P + i, c P + j]        (r, c): the grid cell of ids[b, a]

They have no kernels: the engine's step on CUDA reads and writes patches inside ``adam_update``. Taking is a custom op
for the same reason as ``patch_gather``: inductor's own code computes each index at every pixel. Putting works in place
and stays outside compiled graphs: as a functional op it cost two copies of the whole canvas.
"""

import torch
from torch import Tensor

from smi_fast.kernels.common.check import FLOATS, IDS, Expected, check
from smi_fast.kernels.common.grid import Grid


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


def put_patches_reference(canvas: Tensor, ids: Tensor, patches: Tensor, grid: Grid) -> None:
    """Plain torch, in place; shapes as in `put_patches_`."""
    _cells(canvas, grid)[_patch_index(ids, grid)] = patches


@torch.library.custom_op("smi_fast::take_patches", mutates_args=())
def _take(canvas: Tensor, ids: Tensor, patch: int) -> Tensor:
    return take_patches_reference(canvas, ids, Grid(canvas.shape[2], canvas.shape[3], patch))


@_take.register_fake
def _(canvas: Tensor, ids: Tensor, patch: int) -> Tensor:
    return canvas.new_empty(*ids.shape, 3, patch, patch)


def take_patches(canvas: Tensor, ids: Tensor, grid: Grid) -> Tensor:
    """Whole patches of a canvas; not differentiable.

    Args:
        canvas: ``[B, 3, H, W]``, floating point.
        ids: ``[B, A]`` int64 patch ids.

    Returns:
        ``[B, A, 3, P, P]``.

    Raises:
        ValueError: a shape, dtype or device that does not fit.
    """
    check("take_patches", _expected(canvas, ids), H=grid.height, W=grid.width)
    patches: Tensor = _take(canvas, ids, grid.patch)
    return patches


def put_patches_(canvas: Tensor, ids: Tensor, patches: Tensor) -> None:
    """Write whole patches into a canvas; the inverse of `take_patches`.

    Args:
        canvas: ``[B, 3, H, W]``, floating point, contiguous; changed in place.
        ids: ``[B, A]`` int64 patch ids.
        patches: ``[B, A, 3, P, P]``, in the dtype of the canvas.

    Raises:
        ValueError: a shape, dtype, device or memory layout that does not fit.
    """
    expected = _expected(canvas, ids) | {"patches": (patches, "B A 3 P P", (canvas.dtype,))}
    sizes = check("put_patches_", expected)
    grid = Grid(sizes["H"], sizes["W"], sizes["P"])
    if not canvas.is_contiguous():
        raise ValueError(f"put_patches_: canvas has strides {canvas.stride()}: must be contiguous")
    put_patches_reference(canvas, ids, patches, grid)


def _expected(canvas: Tensor, ids: Tensor) -> dict[str, Expected]:
    return {"canvas": (canvas, "B 3 H W", FLOATS), "ids": (ids, "B A", IDS)}
