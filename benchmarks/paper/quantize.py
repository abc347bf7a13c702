"""Top-1 of quantized models by what they were calibrated on, as in Table 3 of the paper.

    python -m benchmarks run quantize --data cifar10:package

With ``--teacher deit_base_patch16_224 --data imagenet:PATH --iterations 4000`` this is Table 3 itself. Inverted images
are kept in ``--work`` and shared with `transfer`; a run that was cut off goes on with the rows that its CSV lacks.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.experiment import Row, experiment, table
from benchmarks.harness.arguments import Parser, positive
from benchmarks.harness.results import RESULTS, Results
from benchmarks.harness.tables import markdown
from benchmarks.paper.images import Source, add_arguments, open_source, test_name
from benchmarks.paper.replicates import mean_and_deviation, measured_with
from benchmarks.systems.fused_quantized import FusedViT, check
from smi_fast.datasets import RealImages, top1
from smi_fast.quantize import Calibration, QuantConfig, quantize

KINDS = ("gaussian", "dense", "sparse", "real")
SETTINGS = (("psaq", 4), ("psaq", 8), ("paper", 8), ("paper", 4))
ACT_BITS = 8
CALIBRATION = 32  # images
BATCH = 100  # divides the test sets of CIFAR-10 and ImageNet: one compilation


@dataclass
class Judge:
    """Top-1 of models on the same images; a quantized one is compiled at its first use."""

    source: Source
    test: RealImages
    limit: int | None
    fused: FusedViT | None = None

    @torch.no_grad()
    def float32(self) -> dict[str, Any]:
        """Of the model as it is."""
        teacher = self.source.teacher
        return self._top1(lambda pixels: teacher(pixels)[0]) | {"compiled_sqnr_db": ""}

    @torch.no_grad()
    def quantized(self, scheme: str, bits: int, kind: str, replicate: int) -> dict[str, Any]:
        """Of the model calibrated with a replicate's images, and how close the compiled logits are to eager ones."""
        teacher = self.source.teacher
        images = self.source.take(kind, replicate, CALIBRATION)
        calibration = Calibration.from_pixels(images.pixels.to(teacher.device), _on(images.keep, teacher.device), kind)
        model = quantize(teacher, calibration, QuantConfig(bits, ACT_BITS, scheme))
        self.fused = self.fused or FusedViT(model)
        self.fused.load(model)
        pixels, _ = next(self.test.batches(teacher, BATCH))
        close = check(self.fused, model, pixels.to(teacher.device))
        return self._top1(self.fused) | {"compiled_sqnr_db": round(close, 1)}

    def _top1(self, forward: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, Any]:
        teacher = self.source.teacher
        found = top1(
            lambda pixels: forward(pixels.to(teacher.device)),
            self.test,
            teacher,
            batch_size=BATCH,
            limit=self.limit,
        )
        return {"top1": round(found, 5)}


def _on(keep: torch.Tensor | None, device: torch.device) -> torch.Tensor | None:
    return None if keep is None else keep.to(device)


def wanted(args: argparse.Namespace) -> list[dict[str, Any]]:
    """What each row is about."""
    full = [{"scheme": "fp32", "weights": 32, "calibration": "none", "seed": 0}]
    rows = full + [
        {"scheme": scheme, "weights": bits, "calibration": kind, "seed": seed}
        for scheme, bits in SETTINGS
        for seed in range(args.seeds)
        for kind in KINDS
    ]
    return [row for row in rows if not args.only or f"{row['scheme']}:{row['weights']}" in args.only]


@experiment("quantize", "top-1 of quantized models by what they were calibrated on (paper: Table 3)")
def main(arguments: Sequence[str]) -> None:
    """All rows that the CSV does not have yet; one is written as soon as it is known."""
    parser = Parser("quantize", __doc__)
    add_arguments(parser, seeds=5)
    parser.add_argument("--limit", type=positive, help="test images [default: all]")
    parser.add_argument("--only", nargs="*", help="such as psaq:4 fp32:32 [default: all]")
    args = parser.parse(arguments)
    source, test = open_source(args)
    setting: dict[str, Any] = {"teacher": source.teacher.info.name, "data": test_name(test)}
    setting |= {"images": args.limit or len(test), "iterations": source.iterations}
    results = Results(args.out or RESULTS / f"quality-quantize-{args.teacher}.csv", "quantize", args.device)
    results.resume(setting)
    judge = Judge(source, test, args.limit)
    for row in wanted(args):
        if results.has(row):
            continue
        full, kind = row["scheme"] == "fp32", row["calibration"]
        row |= judge.float32() if full else judge.quantized(row["scheme"], row["weights"], kind, row["seed"])
        results.append(row | setting, source.recipe(kind))
        print(row, flush=True)


@table("quantized models", "quality-quantize-demo.csv")
def quantize_table(rows: list[Row]) -> str:
    """Top-1 by scheme and bits, a column a calibration set."""
    full = [float(row["top1"]) for row in rows if row["scheme"] == "fp32"]
    lines = []
    for scheme, bits in dict.fromkeys((row["scheme"], row["weights"]) for row in rows if row["scheme"] != "fp32"):
        mine = [row for row in rows if (row["scheme"], row["weights"]) == (scheme, bits)]
        found = [[float(row["top1"]) for row in mine if row["calibration"] == kind] for kind in KINDS]
        lines.append([scheme, f"W{bits}/A{ACT_BITS}", *map(mean_and_deviation, found)])
    about = f"{measured_with(rows[0], rows[0]['images'])} In float32: {mean_and_deviation(full)}."
    return markdown(about, ["scheme", "bits", *KINDS], lines)
