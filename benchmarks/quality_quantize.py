"""Top-1 of quantized models by what they were calibrated on, as in Table 3 of the paper."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import about, write_csv
from benchmarks.fused_quantized import FusedViT, check
from benchmarks.markdown import rows_of
from benchmarks.quality_images import Source, test_name
from smi_fast.datasets import RealImages, top1
from smi_fast.quantize import Calibration, QuantConfig, quantize

KINDS = ("gaussian", "dense", "sparse", "real")
SETTINGS = (("psaq", 4), ("psaq", 8), ("paper", 8), ("paper", 4))
ACT_BITS = 8
CALIBRATION = 32  # images
BATCH = 100  # divides the test sets of CIFAR-10 and ImageNet: one compilation
Key = tuple[str, ...]


def run(args: argparse.Namespace, source: Source, test: RealImages) -> None:
    """All rows that the CSV does not have yet; one is written as soon as it is known."""
    path, judge = args.out, Judge(source, test, args.limit)
    setting = {"teacher": source.teacher.info.name, "data": test_name(test)}
    setting |= {"images": args.limit or len(test), "iterations": source.iterations}
    rows = read(path, setting)
    known = {key(row) for row in rows}
    for scheme, weight_bits in [("fp32", 32), *SETTINGS]:
        if args.only and f"{scheme}:{weight_bits}" not in args.only:
            continue
        for replicate in range(args.seeds if scheme != "fp32" else 1):
            for kind in KINDS if scheme != "fp32" else ("none",):
                row: dict[str, Any] = {"scheme": scheme, "weights": weight_bits, "calibration": kind, "seed": replicate}
                if key(row) in known:
                    continue
                row |= judge.float32() if scheme == "fp32" else judge.quantized(scheme, weight_bits, kind, replicate)
                rows.append(row | setting | about(args.device))
                print(rows[-1], flush=True)
                write_csv(rows, path)


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


def key(row: dict[str, Any]) -> Key:
    """What a row is about."""
    return tuple(str(row[name]) for name in ("scheme", "weights", "calibration", "seed"))


def read(path: Path, setting: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of an earlier run.

    Raises:
        SystemExit: they were measured in another setting.
    """
    rows: list[dict[str, Any]] = [*rows_of(path.resolve())]
    for row in rows:
        for name, value in setting.items():
            other = row.get(name)
            if other != str(value):
                raise SystemExit(f"--out {path}: holds rows of {name} {other}, this run has {value}; name another")
    if rows:
        print(f"{len(rows)} rows are in {path} already, and are not measured again", flush=True)
    return rows
