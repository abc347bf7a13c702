"""Images that lie in folders: one folder a class, or all in one."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import timm
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from smi_fast.datasets.real_images import RealImages
from smi_fast.model.spec import TakesImages

SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm"))
FEW = 500  # images that are read without worker processes
MOST_WORKERS = 8


class FolderImages(RealImages):
    """Pictures under ``root``: in subfolders, which are the classes in the order of their names; or without classes.

    A picture is resized so that its shorter side is the model's over the crop share that timm names for the model (all
    of it where timm knows none), and cropped at the centre, as timm evaluates.

    Raises:
        FileNotFoundError: no such folder, or no picture in it.
    """

    def __init__(self, name: str, root: Path) -> None:
        if not root.is_dir():
            raise FileNotFoundError(f"{name!r}: {str(root)!r} is no folder")
        folders = sorted(path for path in root.iterdir() if path.is_dir() and _pictures(path))
        self.name, self.paths = name, _pictures(root)
        self.labels: Tensor | None = None
        self.num_classes: int | None = None
        self.class_names: tuple[str, ...] | None = None
        if folders:
            found = [(path, label) for label, folder in enumerate(folders) for path in _pictures(folder)]
            self.paths = [path for path, _ in found]
            self.labels = torch.tensor([label for _, label in found])
            self.class_names, self.num_classes = tuple(folder.name for folder in folders), len(folders)
        if not self.paths:
            raise FileNotFoundError(f"{name!r}: {str(root)!r} holds no picture ({', '.join(sorted(SUFFIXES))})")

    def __len__(self) -> int:
        return len(self.paths)

    def batches(
        self, model: TakesImages, batch_size: int, indices: Sequence[int] | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """As `RealImages.batches`.

        Raises:
            ValueError: a picture that cannot be read, by its path.
        """
        rows = range(len(self)) if indices is None else indices
        pictures = _Pictures([self.paths[i] for i in rows], model)
        workers = 0 if len(rows) <= FEW else min(MOST_WORKERS, os.cpu_count() or 1)
        start = 0
        for pixels in DataLoader(pictures, batch_size, num_workers=workers):
            part = torch.tensor(rows[start : start + len(pixels)])
            yield pixels, torch.full((len(pixels),), -1) if self.labels is None else self.labels[part]
            start += len(pixels)


class _Pictures(Dataset[Tensor]):
    """Reads and transforms; its instances go to worker processes."""

    def __init__(self, paths: list[Path], model: TakesImages) -> None:
        self.paths, info, grid = paths, model.info, model.grid
        share, interpolation = _evaluation(info.name)
        short = max(grid.height, grid.width) / share
        self.transform = v2.Compose(
            [
                v2.Resize(int(short), interpolation),
                v2.CenterCrop((grid.height, grid.width)),
                v2.ToImage(),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(list(info.mean), list(info.std)),
            ]
        )

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        path = self.paths[index]
        try:
            with Image.open(path) as picture:
                return self.transform(picture.convert("RGB")).as_subclass(Tensor)
        except (UnidentifiedImageError, OSError) as error:
            raise ValueError(f"picture {str(path)!r} cannot be read: {error}") from error


def _evaluation(name: str) -> tuple[float, v2.InterpolationMode]:
    """The crop share and the interpolation that timm evaluates a model with."""
    found = timm.get_pretrained_cfg(name, allow_unregistered=True) if timm.is_model(name) else None
    if found is None:
        return 1.0, v2.InterpolationMode.BICUBIC
    kinds = {"bilinear": v2.InterpolationMode.BILINEAR, "bicubic": v2.InterpolationMode.BICUBIC}
    return found.crop_pct, kinds.get(found.interpolation, v2.InterpolationMode.BICUBIC)


def _pictures(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
