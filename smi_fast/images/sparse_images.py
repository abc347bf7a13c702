"""`SparseImages`: inverted images with their kept patches, labels and provenance, in memory and on disk."""

import io
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from PIL import Image
from torch import Tensor

from smi_fast.kernels.common.grid import Grid
from smi_fast.kernels.patch_mask import composite, patch_mask
from smi_fast.storage.files import check_tensor, load_tensors, save_tensors, write_atomically

FORMAT = "smi_fast.images/1"
TENSORS = ("pixels", "keep", "labels", "image_ids", "confidence", "predicted", "failed_at")

Dropped = Literal["alpha", "black", "keep"]
RGB = tuple[float, float, float]


def to_uint8(pixels: Tensor, mean: RGB, std: RGB) -> Tensor:
    """De-normalise: ``round(255 * (pixels * std + mean))``, clamped to 0..255; a NaN becomes 0.

    Args:
        pixels: ``[..., 3, H, W]`` float, in normalised colour space.
        mean: of that space, RGB in 0..1.
        std: likewise.

    Returns:
        ``[..., 3, H, W]`` uint8.
    """
    scale, shift = (torch.tensor(c, dtype=pixels.dtype, device=pixels.device)[:, None, None] for c in (std, mean))
    return ((pixels * scale + shift) * 255).nan_to_num(nan=0.0).round().clamp(0, 255).to(torch.uint8)


@dataclass(frozen=True)
class Provenance:
    """Where images come from: enough to make them again, and to read their colours and labels.

    Raises:
        ValueError: ``mean`` or ``std`` is not of three numbers, a ``std`` or the patch is not positive, or ``config``
            cannot be written as JSON.
    """

    config: dict[str, Any]  # InversionConfig.to_dict(), as JSON gives it back: lists for tuples
    model_name: str
    model_sha256: str  # of the weights, before any conversion
    mean: RGB  # of the normalised colour space, RGB in 0..1
    std: RGB
    patch: int  # P, pixels
    class_names: tuple[str, ...] | None  # by label
    seed: int
    versions: dict[str, str]  # of the libraries, by name

    def __post_init__(self) -> None:
        try:
            object.__setattr__(self, "config", json.loads(json.dumps(self.config)))
        except TypeError as error:
            raise ValueError(f"config={self.config!r}: must be JSON-able: {error}") from error
        for name in ("mean", "std"):
            value = tuple(getattr(self, name))
            if len(value) != 3:
                raise ValueError(f"{name}={value}: must be three numbers, RGB")
            object.__setattr__(self, name, value)
        if self.class_names is not None:
            object.__setattr__(self, "class_names", tuple(self.class_names))
        if not all(s > 0 for s in self.std):
            raise ValueError(f"std={self.std}: must be positive")
        if self.patch < 1:
            raise ValueError(f"patch={self.patch}: must be at least 1")

    def label_name(self, label: int) -> str:
        """The name of a class, or its number where the names are not known."""
        return str(label) if self.class_names is None else self.class_names[label]


@dataclass(frozen=True, eq=False)
class SparseImages:
    """``n`` images, each with its own ``K`` kept patches; all tensors on one device.

    Raises:
        ValueError: a tensor of another shape or dtype, a side that is no multiple of the patch, patch ids outside
            ``0..L-1`` or not strictly ascending, a label that is negative or has no class name.
    """

    pixels: Tensor  # [n, 3, H, W] float32, normalised colour space
    keep: Tensor  # [n, K] int64, ascending patch ids
    labels: Tensor  # [n] int64, what each image was to become
    image_ids: Tensor  # [n] int64
    confidence: Tensor  # [n] float32, the teacher's softmax probability of the label, from the kept tokens
    predicted: Tensor  # [n] int64, the teacher's class
    failed_at: Tensor  # [n] int64, the iteration at which a NaN stopped the image, or -1
    provenance: Provenance

    def __post_init__(self) -> None:
        check_tensor("pixels", self.pixels, (None, 3, None, None), torch.float32)
        n = len(self)
        check_tensor("keep", self.keep, (n, None), torch.int64)
        check_tensor("confidence", self.confidence, (n,), torch.float32)
        for name in ("labels", "image_ids", "predicted", "failed_at"):
            check_tensor(name, getattr(self, name), (n,), torch.int64)
        _check_keep(self.keep, self.grid.patches)
        names = self.provenance.class_names
        known = self.labels >= 0 if names is None else (self.labels >= 0) & (self.labels < len(names))
        if not known.all():
            rule = "at least 0" if names is None else f"in 0..{len(names) - 1}, the classes that have a name"
            raise ValueError(f"labels={self.labels[~known].tolist()}: must be {rule}")

    def __len__(self) -> int:
        return self.pixels.shape[0]

    def __getitem__(self, index: int | slice | Tensor) -> "SparseImages":
        """Some of the images; one image for an int.

        Args:
            index: an int, a slice, a bool mask ``[n]`` or integer positions ``[m]``.

        Raises:
            IndexError: out of range.
            ValueError: an index tensor of another shape or dtype.
        """
        if isinstance(index, Tensor):
            if index.ndim != 1 or index.is_floating_point() or index.is_complex():
                raise ValueError(f"index is {list(index.shape)} {index.dtype}: must be [any] of bool or integers")
            rows: slice | Tensor = index if index.dtype == torch.bool else index.long()
        elif isinstance(index, slice):
            rows = index
        else:
            position = range(len(self))[index]
            rows = slice(position, position + 1)
        chosen: dict[str, Any] = {name: getattr(self, name)[rows] for name in TENSORS}
        return replace(self, **chosen)

    @property
    def grid(self) -> Grid:
        """The patch grid of every image."""
        return Grid(self.pixels.shape[2], self.pixels.shape[3], self.provenance.patch)

    @property
    def top1(self) -> float:
        """The share of the images that the teacher classifies as their label; NaN where there are none."""
        return (self.predicted == self.labels).double().mean().item()

    @property
    def sparsity(self) -> float:
        """The share of the patches that were dropped, ``1 - K / L``."""
        return 1 - self.keep.shape[1] / self.grid.patches

    @staticmethod
    def cat(parts: Sequence["SparseImages"]) -> "SparseImages":
        """The images of all parts, in order.

        Raises:
            ValueError: no parts, or parts of different provenance, image size or number of kept patches.
        """
        if not parts:
            raise ValueError("parts is empty: give at least one SparseImages")
        first = parts[0]
        for i, part in enumerate(parts):
            if part.provenance != first.provenance:
                raise ValueError(f"parts[{i}]: must have the provenance of parts[0]")
            for name in ("pixels", "keep"):
                shape, wanted = getattr(part, name).shape[1:], getattr(first, name).shape[1:]
                if shape != wanted:
                    raise ValueError(
                        f"parts[{i}].{name} is {list(shape)} per image: must be as parts[0], {list(wanted)}"
                    )
        joined: dict[str, Any] = {name: torch.cat([getattr(part, name) for part in parts]) for name in TENSORS}
        return replace(first, **joined)

    def to_uint8(self) -> Tensor:
        """``[n, 3, H, W]`` uint8, de-normalised, rounded to nearest and clamped; dropped patches as they are."""
        return to_uint8(self.pixels, self.provenance.mean, self.provenance.std)

    def save(self, path: str | Path, overwrite: bool = False) -> None:
        """Write one lossless safetensors file; a crash leaves the old file or none.

        Raises:
            FileExistsError: the file exists and ``overwrite`` is false.
        """
        tensors = {name: getattr(self, name) for name in TENSORS}
        save_tensors(path, FORMAT, tensors, {"provenance": asdict(self.provenance)}, overwrite)

    @staticmethod
    def load(path: str | Path) -> "SparseImages":
        """Read a file of `save`, to the CPU.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is truncated, not ours, or of another version.
        """
        return load_tensors(
            path,
            FORMAT,
            lambda tensors, metadata: SparseImages(**tensors, provenance=Provenance(**metadata["provenance"])),
        )

    def save_pngs(self, folder: str | Path, dropped: Dropped = "black", overwrite: bool = False) -> list[Path]:
        """Write one PNG per image, ``{image_id:06d}_{label name}.png``, for looking at.

        Args:
            folder: made if need be.
            dropped: "black": RGB, dropped patches black, which does not tell them from kept black pixels; "alpha":
                RGBA, alpha 0 on dropped patches and 255 elsewhere; "keep": RGB, dropped patches as they are.
            overwrite: write to a folder that holds something; a file of the same name is replaced, others stay.

        Returns:
            The paths, in the order of the images.

        Raises:
            FileExistsError: the folder holds something and ``overwrite`` is false.
            ValueError: ``dropped`` is none of the above, or two images have the same id.
        """
        if dropped not in get_args(Dropped):
            raise ValueError(f"dropped={dropped!r}: must be one of {get_args(Dropped)}")
        ids, labels = self.image_ids.tolist(), self.labels.tolist()
        if len(set(ids)) < len(ids):
            raise ValueError("image_ids: must differ from one another, since they name the files")
        folder = Path(folder)
        if folder.is_dir() and any(folder.iterdir()) and not overwrite:
            raise FileExistsError(f"folder={str(folder)!r} is not empty, and overwrite is False")
        stems = [_file_name(self.provenance.label_name(label), label) for label in labels]
        names = [f"{i:06d}_{stem}.png" for i, stem in zip(ids, stems, strict=True)]
        for i, name in enumerate(names):
            # one by one: all of them as 8-bit copies would double the memory of a large set
            write_atomically(folder / name, _png(self[i], dropped), overwrite)
        return [folder / name for name in names]


def _check_keep(keep: Tensor, patches: int) -> None:
    if not 1 <= keep.shape[1] <= patches:
        raise ValueError(f"keep has K={keep.shape[1]} ids per image: must be 1..{patches}, the patches of the image")
    outside = (keep < 0) | (keep >= patches)
    if outside.any():
        raise ValueError(f"keep has the id {keep[outside][0].item()}: ids must lie in 0..{patches - 1}")
    unsorted = (keep[:, 1:] <= keep[:, :-1]).any(dim=1)
    if unsorted.any():
        row = int(unsorted.int().argmax())
        raise ValueError(f"keep[{row}]={keep[row].tolist()}: ids must be strictly ascending")


def _file_name(name: str, label: int) -> str:
    # a class name may hold slashes and be longer than a file name can be
    return re.sub(r"[^\w.-]+", "_", name).strip("._")[:40] or str(label)


def _png(image: SparseImages, dropped: Dropped) -> bytes:
    pixels = image.to_uint8()
    if dropped == "black":
        pixels = composite(pixels, image.keep, image.grid, torch.zeros(3, 1, 1, device=pixels.device))
    if dropped == "alpha":
        alpha = patch_mask(image.keep, image.grid)[:, None].to(torch.uint8) * 255
        pixels = torch.cat([pixels, alpha], dim=1)
    file = io.BytesIO()
    Image.fromarray(pixels[0].permute(1, 2, 0).cpu().numpy()).save(file, format="PNG")
    return file.getvalue()
