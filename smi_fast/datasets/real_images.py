"""`RealImages`: a labelled set that gives itself in a model's size and colours."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from smi_fast.model.spec import TakesImages


class RealImages(ABC):
    """``n`` images of a dataset."""

    name: str  # as the user named it, such as "cifar10:data"
    labels: Tensor | None  # [n] int64, None where there are none
    num_classes: int | None
    class_names: tuple[str, ...] | None

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def batches(
        self, model: TakesImages, batch_size: int, indices: Sequence[int] | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Go through the images in order.

        Args:
            model: whose size and colours the images get.
            batch_size: images at a time; the last batch may be smaller.
            indices: which images; None for all.

        Yields:
            pixels ``[b, 3, H, W]`` float32 on the CPU, in the model's normalised colours, and labels ``[b]`` int64, -1
            where there are none.
        """


class TensorImages(RealImages):
    """Images that are in memory, ``pixels [n, 3, H, W]`` uint8; another size is made by bilinear interpolation."""

    def __init__(self, name: str, pixels: Tensor, labels: Tensor, class_names: tuple[str, ...]) -> None:
        self.name, self.pixels, self.labels = name, pixels, labels
        self.class_names, self.num_classes = class_names, len(class_names)

    def __len__(self) -> int:
        return len(self.pixels)

    def batches(
        self, model: TakesImages, batch_size: int, indices: Sequence[int] | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """As `RealImages.batches`."""
        assert self.labels is not None
        rows = torch.arange(len(self)) if indices is None else torch.tensor(list(indices), dtype=torch.int64)
        for part in rows.split(batch_size):
            yield normalised(self.pixels[part].float() / 255, model), self.labels[part]


def normalised(pixels: Tensor, model: TakesImages) -> Tensor:
    """``[b, 3, h, w]`` in 0..1 to ``[b, 3, H, W]`` in the model's colours; bilinear where the size is another."""
    info, grid = model.info, model.grid
    if pixels.shape[2:] != (grid.height, grid.width):
        shrinks = pixels.shape[2] > grid.height or pixels.shape[3] > grid.width
        pixels = F.interpolate(pixels, (grid.height, grid.width), mode="bilinear", antialias=shrinks)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (info.mean, info.std))
    return (pixels - mean) / std


def random_indices(size: int, count: int, seed: int) -> list[int]:
    """``count`` different indices below ``size``, ascending; the same seed gives the same.

    Raises:
        ValueError: there are not so many.
    """
    if not 1 <= count <= size:
        raise ValueError(f"count={count}: must be 1..{size}, the images of the dataset")
    chosen = np.random.Generator(np.random.Philox(key=seed)).choice(size, count, replace=False)
    return sorted(chosen.tolist())
