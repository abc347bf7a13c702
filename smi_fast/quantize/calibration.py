"""Calibration sets: the images whose activations say how far a quantized range has to reach."""

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from smi_fast import checks
from smi_fast.images import SparseImages
from smi_fast.kernels.common.check import check_ids
from smi_fast.kernels.common.grid import Grid
from smi_fast.model import SparseViT

DEFAULT_COUNT = 32  # images, as published
BATCH = 32  # images to a forward


@dataclass(frozen=True, eq=False)
class Calibration:
    """Images in batches, each with the patches of it that the model is to see.

    Raises:
        ValueError: no image at all.
    """

    name: str  # for reports: where the images come from
    batches: tuple[tuple[Tensor, Tensor | None], ...]  # pixels [b, 3, H, W] float32, normalised; keep [b, K] or None

    def __post_init__(self) -> None:
        if len(self) == 0:
            raise ValueError(f"calibration set {self.name!r} is empty: give at least one image")

    def __len__(self) -> int:
        return sum(len(pixels) for pixels, _ in self.batches)

    @staticmethod
    def from_pixels(pixels: Tensor, keep: Tensor | None = None, name: str = "pixels") -> "Calibration":
        """Of images in memory.

        Args:
            pixels: ``[n, 3, H, W]`` float32, in the normalised colours of the model.
            keep: ``[n, K]`` int64, ascending patch ids; None for all patches.
            name: for reports.

        Raises:
            ValueError: another shape or dtype, or no image.
        """
        if pixels.ndim != 4 or pixels.shape[1] != 3 or pixels.dtype != torch.float32:
            raise ValueError(f"pixels is {list(pixels.shape)} {pixels.dtype}: must be [n, 3, H, W] torch.float32")
        if keep is not None and (keep.ndim != 2 or len(keep) != len(pixels) or keep.dtype != torch.int64):
            raise ValueError(f"keep is {list(keep.shape)} {keep.dtype}: must be [{len(pixels)}, K] torch.int64")
        rows = [slice(start, start + BATCH) for start in range(0, len(pixels), BATCH)]
        return Calibration(name, tuple((pixels[row], None if keep is None else keep[row]) for row in rows))

    @staticmethod
    def gaussian(grid: Grid, count: int = DEFAULT_COUNT, seed: int = 0) -> "Calibration":
        """Noise, N(0, 1) in normalised colours, all patches: the comparison of the paper.

        Raises:
            ValueError: ``count`` is below 1.
        """
        checks.check("count", count, checks.count(count))
        draw = torch.Generator().manual_seed(seed)
        pixels = torch.randn(count, 3, grid.height, grid.width, generator=draw)
        return Calibration.from_pixels(pixels, name=f"gaussian, {count} images, seed {seed}")

    @staticmethod
    def from_images(
        images: SparseImages, model: SparseViT, count: int = DEFAULT_COUNT, seed: int = 0, name: str = "images"
    ) -> "Calibration":
        """Of synthetic images, kept patches only; those that a NaN stopped are left out.

        Warns where the images were made for other weights than those of ``model``: they serve, but not as well.

        Args:
            images: dense or sparse.
            model: that is to be calibrated.
            count: of images, chosen by ``seed``.
            seed: same seed, same images.
            name: for reports.

        Raises:
            ValueError: no image that was finished, fewer of them than ``count``, or images of another resolution,
                patch side or colour normalisation than the model's.
        """
        checks.check("count", count, checks.count(count))
        _check_fits(images, model)
        whole = (images.failed_at < 0).nonzero().flatten()
        if len(whole) < count:
            failed = len(images) - len(whole)
            raise ValueError(f"count={count}: there are {len(whole)} images that were finished, and {failed} failed")
        draw = torch.Generator().manual_seed(seed)
        chosen = whole[torch.randperm(len(whole), generator=draw)[:count].sort().values]
        sparsity = f"{images.sparsity:.0%} of the patches dropped"
        name = f"{name}, {count} of {len(whole)} images, {sparsity}, seed {seed}"
        return Calibration.from_pixels(images.pixels[chosen], images.keep[chosen], name)

    def check(self, model: SparseViT) -> None:
        """Refuse images that are not of the model's size.

        Raises:
            ValueError: naming both sizes, or a patch id that the model does not have.
        """
        size = [3, model.grid.height, model.grid.width]
        for pixels, keep in self.batches:
            if list(pixels.shape[1:]) != size:
                found = list(pixels.shape[1:])
                raise ValueError(f"calibration set {self.name!r} is of {found}: {model.info.name} takes {size}")
            if keep is not None:
                check_ids("keep", keep, model.grid.patches)


def _check_fits(images: SparseImages, model: SparseViT) -> None:
    origin, info = images.provenance, model.info
    if images.grid != model.grid:
        raise ValueError(f"images of {images.grid}: must be of {model.grid}, as {info.name} takes them")
    if (origin.mean, origin.std) != (info.mean, info.std):
        raise ValueError(
            f"images normalised with mean={origin.mean}, std={origin.std}: {info.name} has mean={info.mean}, "
            f"std={info.std}"
        )
    if origin.model_sha256 != info.sha256:
        warnings.warn(
            f"the images were made for {origin.model_name!r} with other weights than those of {info.name!r}",
            stacklevel=3,
        )
