"""The patch grid of an image, and where a jittered, flipped patch comes from and goes to.

Everything here is index arithmetic on device tensors of static shape. A patch id counts the grid row-major from 0.

An image that is shifted by ``(dy, dx)`` pixels (``torch.roll``: content wraps around) and then perhaps mirrored is
cut into patches. The shift is split into whole patches and a remainder in ``[-P/2, P/2)``:

    dy = sy * P + ry

The kept patch at grid cell ``(r, c)`` then lands on cell ``(r + sy, c + sx)`` (mod the grid; columns mirrored under a
flip), and shows the window of the canvas that is displaced from its own place by ``(-ry, -rx)``, wrapping around.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class Grid:
    """An image of ``height`` x ``width`` pixels in patches of ``patch`` x ``patch``.

    Raises:
        ValueError: a side is not a positive multiple of the patch.
    """

    height: int
    width: int
    patch: int

    def __post_init__(self) -> None:
        for name, side in (("height", self.height), ("width", self.width)):
            if self.patch < 1 or side < self.patch or side % self.patch:
                raise ValueError(f"{name}={side}: must be a positive multiple of the patch side, {self.patch}")

    @property
    def rows(self) -> int:
        """Patches in a column of the image."""
        return self.height // self.patch

    @property
    def columns(self) -> int:
        """Patches in a row of the image."""
        return self.width // self.patch

    @property
    def patches(self) -> int:
        """``L``, all patches."""
        return self.rows * self.columns

    @property
    def patch_values(self) -> int:
        """``3 * P * P``, the numbers in a patch."""
        return 3 * self.patch * self.patch


class Moves(NamedTuple):
    """How each image of a batch is jittered: a shift, then perhaps a flip."""

    shift: Tensor  # [B, 2] int64, (dy, dx) in pixels, any sign and size
    flip: Tensor  # [B] bool, mirrored left to right after the shift

    def contiguous(self) -> "Moves":
        """The same moves in dense memory, as kernels read them."""
        return Moves(self.shift.contiguous(), self.flip.contiguous())


def split_shift(shift: Tensor, patch: int) -> tuple[Tensor, Tensor]:
    """Whole patches and the remainder in ``[-P/2, P/2)`` of a shift in pixels; any shape, integer dtype."""
    whole = torch.div(2 * shift + patch, 2 * patch, rounding_mode="floor")
    return whole, shift - whole * patch


def target_cells(keep: Tensor, shift: Tensor, flip: Tensor, grid: Grid) -> Tensor:
    """The grid cell each kept patch lands on.

    Args:
        keep: ``[B, K]`` int64 patch ids.
        shift: ``[B, 2]`` int64, ``(dy, dx)`` in pixels.
        flip: ``[B]`` bool, mirror left to right after the shift.

    Returns:
        ``[B, K]`` int64, the ids of the cells.
    """
    whole, _ = split_shift(shift, grid.patch)
    rows = (keep // grid.columns + whole[:, :1]) % grid.rows
    columns = (keep % grid.columns + whole[:, 1:]) % grid.columns
    columns = torch.where(flip[:, None], grid.columns - 1 - columns, columns)
    return rows * grid.columns + columns


def slot_of_patch(keep: Tensor, patches: int) -> Tensor:
    """The inverse of ``keep``: ``[B, L]`` int32, the position of each patch id in its row of ``keep``, or -1."""
    slots = torch.full((keep.shape[0], patches), -1, dtype=torch.int32, device=keep.device)
    positions = torch.arange(keep.shape[1], dtype=torch.int32, device=keep.device).expand_as(keep)
    return slots.scatter(1, keep, positions)
