"""The pool that a student is trained on: images with their kept patches, a bound, and batches drawn without a state.

What step ``s`` draws is a function of (seed, s) and of the number of images in the pool alone: it comes from a Philox
generator whose key is the pair. So a training that is resumed at any step draws what it would have drawn.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from smi_fast.kernels.common.grid import Grid


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Images for a pool, in the teacher's normalised colours.

    Raises:
        ValueError: a tensor of another shape or dtype, or no image.
    """

    pixels: Tensor  # [n, 3, H, W] float32
    keep: Tensor | None = None  # [n, K] int64 ascending patch ids; None: all patches, as real images have

    def __post_init__(self) -> None:
        pixels, keep = self.pixels, self.keep
        if pixels.ndim != 4 or pixels.shape[1] != 3 or pixels.dtype != torch.float32:
            raise ValueError(f"pixels is {list(pixels.shape)} {pixels.dtype}: must be [n, 3, H, W] torch.float32")
        if not len(pixels):
            raise ValueError(f"pixels is {list(pixels.shape)}: the pool must have at least one image")
        if keep is not None and (keep.ndim != 2 or len(keep) != len(pixels) or keep.dtype != torch.int64):
            raise ValueError(f"keep is {list(keep.shape)} {keep.dtype}: must be [{len(pixels)}, K] torch.int64")

    def __len__(self) -> int:
        return len(self.pixels)

    def rows(self, index: Tensor | slice) -> "ImageSet":
        """Some of the images, by position."""
        return ImageSet(self.pixels[index], None if self.keep is None else self.keep[index])


class Known(NamedTuple):
    """What frozen models say of each image, as it is and mirrored (V = 2; V = 1 without flips)."""

    logits: Tensor  # [n, V, C], the teacher's
    features: Tensor | None  # [n, V, D], the student's before its head, where its backbone is frozen


class Batch(NamedTuple):
    """Images of one batch that have the same number of kept patches; ``rows`` are their places in the batch."""

    rows: Tensor
    images: ImageSet


def mirror(images: ImageSet, flip: Tensor, grid: Grid) -> ImageSet:
    """Mirror some images left to right, and the ids of their kept patches with them.

    Args:
        images: ``[n, 3, H, W]`` and ``[n, K]``.
        flip: ``[n]`` bool.
        grid: of the images.
    """
    pixels = torch.where(flip[:, None, None, None], images.pixels.flip(3), images.pixels)
    if images.keep is None:
        return ImageSet(pixels)
    columns = grid.columns
    mirrored = images.keep + columns - 1 - 2 * (images.keep % columns)
    return ImageSet(pixels, torch.where(flip[:, None], mirrored.sort(1).values, images.keep))


def draw(seed: int, step: int, images: int, batch_size: int, flip: bool) -> tuple[Tensor, Tensor]:
    """What a step trains on.

    Images are drawn without repetition, or with it where there are fewer than a batch takes.

    Returns:
        positions ``[B]`` int64 in ``0..images-1``, and whether each image is mirrored ``[B]`` bool.
    """
    generator = np.random.Generator(np.random.Philox(key=np.array([seed, step], dtype=np.uint64)))
    positions = generator.choice(images, batch_size, replace=images < batch_size)
    flips = generator.integers(0, 2 if flip else 1, batch_size).astype(bool)
    return torch.from_numpy(positions.astype(np.int64)), torch.from_numpy(flips)


class Pool:
    """At most ``bound`` images; the oldest leave first. Sets may differ in the number of patches they keep."""

    def __init__(self, bound: int | None, grid: Grid) -> None:
        self.bound, self.grid = bound, grid
        self.parts: list[tuple[ImageSet, Known | None]] = []
        self.logits: Tensor | None = None  # [n, V, C] of all images, oldest first
        self.features: Tensor | None = None

    def __len__(self) -> int:
        return sum(len(images) for images, _ in self.parts)

    def add(self, images: ImageSet, known: Known | None) -> None:
        """Add images, with what is known of them or None (for all sets of a pool alike)."""
        self.parts.append((images, known))
        surplus = 0 if self.bound is None else max(len(self) - self.bound, 0)
        while surplus:
            images, known = self.parts.pop(0)
            leave = min(surplus, len(images))
            surplus -= leave
            if leave < len(images):
                # a copy, so that the memory of those that leave is given back
                rest = torch.arange(leave, len(images))
                self.parts.insert(0, (images.rows(rest), None if known is None else _known_rows(known, leave)))
        kept = [known for _, known in self.parts if known is not None]
        if kept:
            self.logits = torch.cat([known.logits for known in kept])
            features = [known.features for known in kept if known.features is not None]
            self.features = torch.cat(features) if features else None

    def take(self, positions: Tensor, flips: Tensor) -> Iterator[Batch]:
        """The images at some positions, mirrored as told, as one batch for each number of kept patches."""
        groups: dict[int | None, list[Batch]] = {}
        start = 0
        for images, _ in self.parts:
            rows = ((positions >= start) & (positions < start + len(images))).nonzero()[:, 0]
            if len(rows):
                chosen = images.rows(positions[rows] - start)
                kept = None if chosen.keep is None else chosen.keep.shape[1]
                groups.setdefault(kept, []).append(Batch(rows, chosen))
            start += len(images)
        for kept, batches in groups.items():
            rows = torch.cat([batch.rows for batch in batches])
            pixels = torch.cat([batch.images.pixels for batch in batches])
            keeps = [batch.images.keep for batch in batches if batch.images.keep is not None]
            joined = ImageSet(pixels, None if kept is None else torch.cat(keeps))
            yield Batch(rows, mirror(joined, flips[rows], self.grid))


def _known_rows(known: Known, start: int) -> Known:
    return Known(known.logits[start:].clone(), None if known.features is None else known.features[start:].clone())
