"""Images that nobody inverted, for the tests of what becomes of images."""

from typing import Any, NamedTuple

import torch

from smi_fast.config import InversionConfig
from smi_fast.images import Process, Provenance, SparseImages, sparse_images
from smi_fast.kernels.common.grid import Grid
from smi_fast.model.spec import ModelInfo


class Takes(NamedTuple):
    """As much of a model as a data set looks at."""

    info: ModelInfo
    grid: Grid


MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
NAMES = ("ant", "bee, wasp/hornet", "cat")


def provenance(patch: int = 4, names: tuple[str, ...] | None = NAMES) -> Provenance:
    config = InversionConfig().to_dict()
    return Provenance(config, "tiny", "ab" * 32, MEAN, STD, patch, names, 7, {"torch": "2.11", "timm": "1.0"})


def make_images(n: int = 5, grid: Grid | None = None, kept: int = 5, names: tuple[str, ...] | None = NAMES) -> Any:
    grid = grid or Grid(16, 24, 4)
    draw = torch.Generator().manual_seed(n + kept)
    keep = [torch.randperm(grid.patches, generator=draw)[:kept].sort().values for _ in range(n)]
    return SparseImages(
        pixels=torch.randn(n, 3, grid.height, grid.width, generator=draw),
        keep=torch.stack(keep),
        labels=torch.arange(n) % 3,
        image_ids=torch.arange(n) + 10,
        confidence=torch.rand(n, generator=draw),
        predicted=torch.arange(n) % 2,
        failed_at=torch.where(torch.arange(n) == 1, 30, -1),
        provenance=provenance(grid.patch, names),
    )


def make_process(images: SparseImages, steps: tuple[int, ...] = (0, 50, 4000)) -> Process:
    draw = torch.Generator().manual_seed(0)
    kept = torch.rand(len(steps), len(images), images.grid.patches, generator=draw) < 0.5
    pixels = torch.randint(0, 256, (len(steps), *images.pixels.shape), generator=draw, dtype=torch.uint8)
    return Process(steps, pixels, kept, images.labels, images.image_ids, images.grid.patch)


def assert_same_bits(left: Any, right: Any, names: tuple[str, ...]) -> None:
    for name in names:
        a, b = getattr(left, name), getattr(right, name)
        assert (a.dtype, a.shape) == (b.dtype, b.shape), name
        assert a.contiguous().numpy().tobytes() == b.contiguous().numpy().tobytes(), name


def assert_same_images(left: SparseImages, right: SparseImages) -> None:
    assert left.provenance == right.provenance
    assert_same_bits(left, right, sparse_images.TENSORS)
