"""`Process`: snapshots of a few images while they are inverted."""

import itertools
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from smi_fast.kernels.common.grid import Grid
from smi_fast.storage.files import check_tensor, load_tensors, save_tensors

FORMAT = "smi_fast.process/1"
TENSORS = ("pixels", "kept", "labels", "image_ids")


@dataclass(frozen=True, eq=False)
class Process:
    """``m`` images at ``S`` iterations; all tensors on one device.

    Raises:
        ValueError: no image or no iteration, iterations that do not ascend, a tensor of another shape or dtype, or a
            side that is no multiple of the patch.
    """

    iterations: tuple[int, ...]  # of the S snapshots, ascending; 0 is the start
    pixels: Tensor  # [S, m, 3, H, W] uint8, de-normalised
    kept: Tensor  # [S, m, L] bool, the patches that were still inverted at that iteration
    labels: Tensor  # [m] int64
    image_ids: Tensor  # [m] int64
    patch: int  # P, pixels

    def __post_init__(self) -> None:
        object.__setattr__(self, "iterations", tuple(self.iterations))
        steps = self.iterations
        if not steps or steps[0] < 0 or any(b <= a for a, b in itertools.pairwise(steps)):
            raise ValueError(f"iterations={steps}: must be one or more, not negative, strictly ascending")
        check_tensor("pixels", self.pixels, (len(steps), None, 3, None, None), torch.uint8)
        images = len(self)
        if not images:
            raise ValueError(f"pixels is {list(self.pixels.shape)}: must hold at least one image")
        check_tensor("kept", self.kept, (len(steps), images, self.grid.patches), torch.bool)
        check_tensor("labels", self.labels, (images,), torch.int64)
        check_tensor("image_ids", self.image_ids, (images,), torch.int64)

    def __len__(self) -> int:
        return self.pixels.shape[1]

    @property
    def grid(self) -> Grid:
        """The patch grid of every image."""
        return Grid(self.pixels.shape[3], self.pixels.shape[4], self.patch)

    def black_out(self) -> Tensor:
        """``[S, m, 3, H, W]`` uint8: the snapshots with every stopped patch black."""
        grid = self.grid
        cells = self.kept.reshape(*self.kept.shape[:2], grid.rows, grid.columns)
        mask = cells.repeat_interleave(grid.patch, dim=2).repeat_interleave(grid.patch, dim=3)
        return self.pixels * mask[:, :, None]

    def save(self, path: str | Path, overwrite: bool = False) -> None:
        """Write one safetensors file; a crash leaves the old file or none.

        Raises:
            FileExistsError: the file exists and ``overwrite`` is false.
        """
        tensors = {name: getattr(self, name) for name in TENSORS}
        save_tensors(path, FORMAT, tensors, {"iterations": self.iterations, "patch": self.patch}, overwrite)

    @staticmethod
    def load(path: str | Path) -> "Process":
        """Read a file of `save`, to the CPU.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is truncated, not ours, or of another version.
        """
        return load_tensors(path, FORMAT, lambda tensors, metadata: Process(**{**tensors, **metadata}))
