"""The images that `benchmarks.quality` compares: inverted ones, noise, and real ones."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from smi_fast.config import PAPER_STOPS, InversionConfig
from smi_fast.datasets import RealImages, random_indices
from smi_fast.engine import Inverter
from smi_fast.images import SparseImages
from smi_fast.model import SparseViT, load_model
from smi_fast.storage.files import write_json

KINDS = ("gaussian", "dense", "sparse", "real", "real, pruned")
BATCH = 64


@dataclass(frozen=True)
class Images:
    """What one replicate is calibrated or trained with."""

    pixels: Tensor  # [n, 3, H, W] float32, in the teacher's colours
    keep: Tensor | None  # [n, K]
    seconds: float  # it took to make them


@dataclass(frozen=True)
class Source:
    """Gives the images of a kind.

    An inverted image hangs on its seed and id alone, so the replicates are disjoint parts of one set, which is made
    once and kept in ``folder``. Replicates of real images are drawn anew, and may share a few.
    """

    teacher: SparseViT  # in float32
    data: RealImages  # the training split
    folder: Path
    count: int  # inverted images of each kind
    iterations: int

    def take(self, kind: str, replicate: int, count: int) -> Images:
        """``count`` images of a replicate.

        Raises:
            ValueError: the inverted set is too small for it.
        """
        if kind == "gaussian":
            grid, draw = self.teacher.grid, torch.Generator().manual_seed(replicate)
            return Images(torch.randn(count, 3, grid.height, grid.width, generator=draw), None, 0.0)
        if kind.startswith("real"):
            return self._real(replicate, count, kind == "real, pruned")
        whole, seconds = self.inverted(kind)
        rows = slice(replicate * count, (replicate + 1) * count)
        if rows.stop > len(whole):
            raise ValueError(f"--images {len(whole)}: must be at least {rows.stop} for these replicates")
        part = whole[rows]
        return Images(part.pixels, part.keep if kind == "sparse" else None, seconds / len(whole) * count)

    def _real(self, replicate: int, count: int, pruned: bool) -> Images:
        indices = random_indices(len(self.data), count, replicate)
        batches = self.data.batches(self.teacher, BATCH, indices)
        pixels = torch.cat([pixels for pixels, _ in batches])
        return Images(pixels, self._kept(pixels) if pruned else None, 0.0)

    @torch.no_grad()
    def _kept(self, pixels: Tensor) -> Tensor:
        """As many patches as sparse images keep, those that CLS attends to most."""
        kept = self.inverted("sparse")[0].keep.shape[1]
        scores = torch.cat([self.teacher(part)[1] for part in pixels.split(BATCH)])
        return scores.topk(kept, 1).indices.sort(1).values

    def inverted(self, kind: str) -> tuple[SparseImages, float]:
        """The whole set of "dense" or "sparse" images, and the seconds it took."""
        name = f"{self.teacher.info.name}-{kind}-{self.count}-{self.iterations}"
        path, notes = self.folder / f"{name}.safetensors", self.folder / f"{name}.json"
        if not (path.exists() and notes.exists()):
            print(f"inverting {self.count} {kind} images, {self.iterations} iterations", flush=True)
            images, seconds = invert(self.teacher, kind, self.count, self.iterations)
            images.save(path, overwrite=True)
            write_json(notes, {"seconds": seconds, "top1": images.top1}, overwrite=True)
        return SparseImages.load(path), json.loads(notes.read_text())["seconds"]


def test_name(test: RealImages) -> str:
    """The kind of dataset, without the folder of whoever ran this."""
    return test.name.partition(":")[0]


def stops_for(iterations: int) -> tuple[tuple[int, float], ...]:
    """The paper's stops, or those of a short run, at 1, 2, 4 and 6 eighths of it."""
    if iterations >= 1000:
        return PAPER_STOPS
    return tuple((iterations * eighths // 8, 0.3) for eighths in (1, 2, 4, 6))


def invert(teacher: SparseViT, kind: str, count: int, iterations: int) -> tuple[SparseImages, float]:
    """Images of all classes in turn, in bf16 and compiled, and the seconds without compilation."""
    model = load_model(teacher.info.name, dtype=torch.bfloat16, device=teacher.device)
    config = InversionConfig(iterations=iterations, stops=stops_for(iterations) if kind == "sparse" else ())
    inverter = Inverter(model, config, batch_size=BATCH)
    images = inverter([i % model.shape.num_classes for i in range(count)])
    return images, inverter.stats.seconds_run
