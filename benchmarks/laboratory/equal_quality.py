"""Do the fast paths make the same images? Each against plain float32, beside what a change of seed does.

    python -m benchmarks run equal-quality --device cpu

Every row inverts the bundled teacher. Loss and top-1 are the float32 teacher's on the kept patches; *overlap* is the
share of kept patches that a row has in common with the first row, image by image. A path is as good as the first row if
it moves top-1 and loss no further than another seed does, and keeps at least as many of the same patches.
"""

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.experiment import Row, experiment, table
from benchmarks.harness import engine
from benchmarks.harness.arguments import Parser, inversion_length, positive
from benchmarks.harness.engine import short_stops
from benchmarks.harness.results import RESULTS, Results
from benchmarks.harness.tables import markdown, measured_on
from smi_fast.config import InversionConfig
from smi_fast.images import SparseImages
from smi_fast.model import load_model
from smi_fast.model.fold import fold
from smi_fast.model.fp8 import to_fp8
from smi_fast.model.sparse_vit import SparseViT

Prepare = Callable[[SparseViT], SparseViT]


@dataclass(frozen=True)
class Variant:
    """A row: how the teacher is prepared, and how the engine runs."""

    name: str
    prepare: Prepare
    seed: int = 0
    impl: str = "eager"
    batches: tuple[int, ...] | None = None  # of the five stages, in images; None: all at once
    cuda: bool = False  # needs a GPU
    graphs: bool = False


def fp32(model: SparseViT) -> SparseViT:
    """As it was loaded."""
    return model


def bf16(model: SparseViT) -> SparseViT:
    """Compute in bfloat16."""
    return model.with_dtype(torch.bfloat16)


def folded(model: SparseViT) -> SparseViT:
    """Norms and scale folded, then bfloat16."""
    return bf16(fold(model))


def fp8(model: SparseViT) -> SparseViT:
    """Linear layers in 8 bits; where there are no such units, PyTorch emulates them."""
    return to_fp8(bf16(model))


def tiled(model: SparseViT) -> SparseViT:
    """The one-tile attention at every stage, in bfloat16."""
    model = bf16(model)
    for kept in range(1, model.grid.patches + 1):
        model.choose_attention(kept + model.shape.prefix, "tile")
    return model


VARIANTS = (
    Variant("float32", fp32),
    *(Variant(f"float32, seed {seed}", fp32, seed) for seed in (1, 2, 3)),
    Variant("bf16", bf16),
    Variant("bf16, folded", folded),
    Variant("bf16, a batch a stage", bf16, batches=(5, 5, 10, 20, 20)),
    Variant("bf16, tile attention", tiled),
    Variant("bf16, compiled", bf16, impl="compiled"),
    Variant("bf16, compiled, CUDA graphs", bf16, impl="compiled", graphs=True, cuda=True),
    Variant("fp8", fp8),
)


def invert(variant: Variant, teacher: SparseViT, config: InversionConfig, images: int) -> SparseImages:
    """Images of all classes in turn, by the configuration with the variant's seed."""
    model = variant.prepare(copy.deepcopy(teacher))
    labels = [index % teacher.shape.num_classes for index in range(images)]
    batches = variant.batches if variant.batches and images % 20 == 0 else images
    how: dict[str, Any] = {"batch_size": batches, "impl": variant.impl, "cuda_graphs": variant.graphs}
    return engine.invert(model, replace(config, seed=variant.seed), labels, **how)[0]


@torch.no_grad()
def judge(images: SparseImages, teacher: SparseViT, first: SparseImages) -> dict[str, float]:
    """Loss, top-1 and overlap of a row."""
    logits, _ = teacher(images.pixels.to(teacher.device), images.keep.to(teacher.device))
    labels = images.labels.to(logits.device)
    masks = [torch.zeros(len(run), teacher.grid.patches).scatter(1, run.keep, 1.0) for run in (images, first)]
    overlap = (masks[0] * masks[1]).sum(1) / images.keep.shape[1]
    return {
        "loss": round(float(F.cross_entropy(logits, labels)), 4),
        "top1": round(float((logits.argmax(1) == labels).float().mean()), 3),
        "overlap": round(float(overlap.mean()), 3),
    }


def verdicts(rows: list[Row]) -> list[bool]:
    """By row: no further from the first than another seed is, in loss, top-1 and overlap."""
    figures = [{name: float(row[name]) for name in ("loss", "top1", "overlap", "images")} for row in rows]
    first = figures[0]
    seeds = [found for found, row in zip(figures, rows, strict=True) if "seed" in row["row"]]
    most = {name: max(abs(found[name] - first[name]) for found in seeds) for name in ("loss", "top1")}
    least = min(found["overlap"] for found in seeds)
    # worse is what counts; one image more or less is the resolution of top-1
    return [
        found["loss"] - first["loss"] <= most["loss"]
        and first["top1"] - found["top1"] <= max(most["top1"], 1 / found["images"])
        and found["overlap"] >= least
        for found in figures
    ]


@experiment("equal-quality", "whether the fast paths make the same images: loss, top-1, kept patches")
def main(arguments: Sequence[str]) -> None:
    """Parse, invert, write."""
    parser = Parser("equal-quality", __doc__)
    parser.share("device")
    parser.add_argument("--images", type=positive, default=20)
    parser.add_argument("--iterations", type=inversion_length, default=400)
    parser.share("out")
    args = parser.parse(arguments)
    config = InversionConfig(iterations=args.iterations, stops=short_stops(args.iterations))
    teacher = load_model("demo", device=args.device)
    results = Results(args.out or RESULTS / f"equal-quality-{args.device}.csv", "equal-quality", args.device)
    first: SparseImages | None = None
    for variant in VARIANTS:
        if variant.cuda and args.device == "cpu":
            continue
        begin = time.perf_counter()
        images = invert(variant, teacher, config, args.images)
        first = images if first is None else first
        seconds = time.perf_counter() - begin
        row = {"row": variant.name, "images": args.images, "iterations": args.iterations}
        row |= judge(images, teacher, first) | {"seconds": round(seconds, 1)}
        results.append(row, replace(config, seed=variant.seed))
        print(row, flush=True)
    for row, holds in zip(results.rows, verdicts(results.rows), strict=True):
        figures = f"top-1 {row['top1']}  loss {row['loss']}  overlap {row['overlap']}"
        print(f"{row['row']:28s} {figures}  {'within' if holds else 'beyond'} what a seed changes")


@table("quality on a GPU", "equal-quality-cuda.csv")
@table("quality on a CPU", "equal-quality-cpu.csv")
def quality_table(rows: list[Row]) -> str:
    """Whether a fast path moves an image further than another seed does."""
    first = rows[0]
    about = f"{first['images']} images of the bundled teacher, {first['iterations']} iterations, {measured_on(first)}."
    lines = [
        [row["row"], row["top1"], row["loss"], row["overlap"], "yes" if within else "no"]
        for row, within in zip(rows, verdicts(rows), strict=True)
    ]
    columns = ["path", "top-1", "loss", "overlap with the first row", "within what a seed changes"]
    return markdown(about, columns, lines)
