"""Top-1 of quantized models by what they were calibrated on, as in Table 3 of the paper."""

import argparse
import csv
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import about, write_csv
from benchmarks.quality_images import Source
from smi_fast.datasets import RealImages, top1
from smi_fast.quantize import Calibration, QuantConfig, quantize

KINDS = ("gaussian", "dense", "sparse", "real")
SETTINGS = (("psaq", 4), ("psaq", 8), ("paper", 8), ("paper", 4))
ACT_BITS = 8
CALIBRATION = 32  # images
BATCH = 64
Key = tuple[str, ...]


def run(args: argparse.Namespace, source: Source, test: RealImages) -> None:
    """All rows that the CSV does not have yet; one is written as soon as it is known."""
    path = args.out
    rows = read(path)
    known = {key(row) for row in rows}
    for scheme, weight_bits in [("fp32", 32), *SETTINGS]:
        if args.only and f"{scheme}:{weight_bits}" not in args.only:
            continue
        for replicate in range(args.seeds if scheme != "fp32" else 1):
            for kind in KINDS if scheme != "fp32" else ("none",):
                row: dict[str, Any] = {"scheme": scheme, "weights": weight_bits, "calibration": kind, "seed": replicate}
                if key(row) in known:
                    continue
                accuracy = measure(source, test, scheme, weight_bits, kind, replicate, args.limit)
                row |= {"top1": round(accuracy, 5), "teacher": source.teacher.info.name, "data": test_name(test)}
                row |= {"images": args.limit or len(test), "iterations": source.iterations, **about(args.device)}
                rows.append(row)
                print(row, flush=True)
                write_csv(rows, path)


def test_name(test: RealImages) -> str:
    """The kind of dataset, without the folder of whoever ran this."""
    return test.name.partition(":")[0]


@torch.no_grad()
def measure(
    source: Source, test: RealImages, scheme: str, bits: int, kind: str, replicate: int, limit: int | None
) -> float:
    """Top-1 of the model in float32, or quantized."""
    teacher = source.teacher
    if scheme == "fp32":
        return top1(lambda x: teacher(x.to(teacher.device))[0], test, teacher.info, teacher.grid, limit=limit)
    images = source.take(kind, replicate, CALIBRATION)
    calibration = Calibration.from_pixels(images.pixels.to(teacher.device), _on(images.keep, teacher.device), kind)
    model = quantize(teacher, calibration, QuantConfig(bits, ACT_BITS, scheme))
    return top1(lambda x: model(x.to(teacher.device)), test, teacher.info, teacher.grid, batch_size=BATCH, limit=limit)


def _on(keep: torch.Tensor | None, device: torch.device) -> torch.Tensor | None:
    return None if keep is None else keep.to(device)


def key(row: dict[str, Any]) -> Key:
    """What a row is about."""
    return tuple(str(row[name]) for name in ("scheme", "weights", "calibration", "seed"))


def read(path: Path) -> list[dict[str, Any]]:
    """Rows of an earlier run."""
    if not path.exists():
        return []
    with path.open() as file:
        return list(csv.DictReader(file))
