"""Do the fast paths make the same images? Each against plain float32, beside what a change of seed does.

    python -m benchmarks.equal_quality --device cpu

Every row inverts the bundled teacher. Loss and top-1 are the float32 teacher's on the kept patches; *overlap* is the
share of kept patches that a row has in common with the first row, image by image. A path is as good as the first row if
it moves top-1 and loss no further than another seed does, and keeps at least as many of the same patches.
"""

import argparse
import copy
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.common import RESULTS, about, device_argument, positive, write_csv
from smi_fast.config import InversionConfig
from smi_fast.engine import Inverter
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
    """Images of all classes in turn."""
    model = variant.prepare(copy.deepcopy(teacher))
    labels = [index % teacher.shape.num_classes for index in range(images)]
    batches = variant.batches if variant.batches and images % 20 == 0 else images
    config = replace(config, seed=variant.seed)
    return Inverter(model, config, batch_size=batches, impl=variant.impl, cuda_graphs=variant.graphs)(labels)  # type: ignore[arg-type]


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


def verdicts(rows: list[dict[str, Any]]) -> list[bool]:
    """By row: no further from the first than another seed is, in loss, top-1 and overlap."""
    first = rows[0]
    seeds = [row for row in rows if "seed" in row["row"]]
    most = {name: max(abs(row[name] - first[name]) for row in seeds) for name in ("loss", "top1")}
    least = min(row["overlap"] for row in seeds)
    # worse is what counts; one image more or less is the resolution of top-1
    return [
        row["loss"] - first["loss"] <= most["loss"]
        and first["top1"] - row["top1"] <= max(most["top1"], 1 / row["images"])
        and row["overlap"] >= least
        for row in rows
    ]


def main() -> None:
    """Parse, invert, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=device_argument, default="cpu")
    parser.add_argument("--images", type=positive, default=20)
    parser.add_argument("--iterations", type=positive, default=400)
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args()
    if args.iterations < 8:
        parser.error(f"--iterations {args.iterations}: must be at least 8, the schedule has four stops")
    stops = tuple((args.iterations * share // 8, 0.3) for share in (1, 2, 4, 6))
    config, teacher = InversionConfig(iterations=args.iterations, stops=stops), load_model("demo", device=args.device)
    rows: list[dict[str, Any]] = []
    first: SparseImages | None = None
    for variant in VARIANTS:
        if variant.cuda and args.device == "cpu":
            continue
        begin = time.perf_counter()
        images = invert(variant, teacher, config, args.images)
        first = images if first is None else first
        seconds = time.perf_counter() - begin
        rows.append({"row": variant.name, "images": args.images, "iterations": args.iterations})
        rows[-1] |= judge(images, teacher, first) | {"seconds": round(seconds, 1), **about(args.device)}
        print(rows[-1], flush=True)
    for row, holds in zip(rows, verdicts(rows), strict=True):
        row["within_seeds"] = holds
        print(
            f"{row['row']:28s} top-1 {row['top1']:.3f}  loss {row['loss']:.4f}  overlap {row['overlap']:.3f}  {holds}"
        )
    write_csv(rows, args.out or RESULTS / f"equal-quality-{args.device}.csv")


if __name__ == "__main__":
    main()
