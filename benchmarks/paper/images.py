"""The images that `quantize` and `transfer` compare: inverted ones, noise, and real ones; and what both are told."""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.harness.arguments import Parser, inversion_length, positive
from benchmarks.harness.engine import PAPER_STOPS, invert, short_stops
from smi_fast.config import InversionConfig
from smi_fast.datasets import RealImages, open_dataset, random_indices
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

    An inverted image depends on its seed and id alone, so the replicates are disjoint parts of one set, which is made
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

    def recipe(self, kind: str) -> InversionConfig | None:
        """What the images of a kind rest on, None where they are not inverted."""
        stops = {"dense": (), "sparse": PAPER_STOPS if self.iterations >= 1000 else short_stops(self.iterations)}
        return InversionConfig(iterations=self.iterations, stops=stops[kind]) if kind in stops else None

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
        """The whole set of "dense" or "sparse" images, and the seconds it took without compilation."""
        name = f"{self.teacher.info.name}-{kind}-{self.count}-{self.iterations}"
        path, notes = self.folder / f"{name}.safetensors", self.folder / f"{name}.json"
        if not (path.exists() and notes.exists()):
            print(f"inverting {self.count} {kind} images, {self.iterations} iterations", flush=True)
            config = self.recipe(kind)
            assert config is not None, kind
            # of all classes in turn, in bf16 and compiled
            model = load_model(self.teacher.info.name, dtype=torch.bfloat16, device=self.teacher.device)
            labels = [i % model.shape.num_classes for i in range(self.count)]
            images, seconds = invert(model, config, labels, batch_size=BATCH)
            images.save(path, overwrite=True)
            write_json(notes, {"seconds": seconds, "top1": images.top1}, overwrite=True)
        return SparseImages.load(path), json.loads(notes.read_text())["seconds"]


def test_name(test: RealImages) -> str:
    """The kind of dataset, without the folder of whoever ran this."""
    return test.name.partition(":")[0]


def add_arguments(parser: Parser, seeds: int) -> None:
    """What an experiment on these images is told; ``seeds``: replicates, unless it is told another number."""
    parser.add_argument("--teacher", default="demo")
    parser.add_argument("--data", required=True, help="cifar10:PATH or imagenet:PATH")
    parser.add_argument("--images", type=positive, default=384, help="inverted images of each kind")
    parser.add_argument("--iterations", type=inversion_length, default=200)
    parser.add_argument("--seeds", type=positive, default=seeds, help=f"replicates [default: {seeds}]")
    parser.share("device")
    parser.add_argument("--work", type=Path, default=Path("runs/quality"), help="keeps the inverted images")
    parser.share("out")


def open_source(args: argparse.Namespace) -> tuple[Source, RealImages]:
    """The images to compare, and those to judge with.

    Raises:
        SystemExit: teacher and data have different classes.
    """
    test, train = open_dataset(args.data), open_dataset(args.data, train=True)
    teacher = load_model(args.teacher, device=torch.device(args.device))
    if test.num_classes != teacher.shape.num_classes:
        raise SystemExit(f"--data {args.data}: {test.num_classes} classes, {args.teacher} knows others")
    return Source(teacher, train, args.work, args.images, args.iterations), test
