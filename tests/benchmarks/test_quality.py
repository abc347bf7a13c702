"""What `benchmarks.quality` says of its rows, and that what it compiles is the quantized model."""

import argparse
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import quality_tables
from benchmarks.common import write_csv
from benchmarks.fused_quantized import FusedViT, check
from benchmarks.quality_plot import plot, points
from benchmarks.quality_quantize import read
from benchmarks.quality_students import backbone, make_student
from benchmarks.quality_tables import quantize_table, reach_table, spread, transfer_table
from smi_fast.model import load_model
from smi_fast.model.sparse_vit import SparseViT
from smi_fast.quantize import Calibration, QuantConfig, QuantizedViT, quantize

SETTING = {"teacher": "demo", "data": "cifar10", "iterations": 200, "device_name": "CPU", "torch": "2", "commit": "c"}


def transfer_row(student: str, kind: str, seed: int, images: int, top1: float) -> dict[str, Any]:
    seconds = {"inversion_s": images * 0.5 if kind in ("dense", "sparse") else 0.0, "training_s": 2.0}
    what = {"student": student, "kind": kind, "seed": seed, "images": images, "top1": top1, "same_kind": 0.5}
    return what | seconds | SETTING | {"test_images": 100}


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, str]]:
    """Dense images reach 0.5 with 32 of them, sparse ones come close enough with 16, noise never."""
    accuracy = {"gaussian": (0.1, 0.1), "dense": (0.4, 0.5), "sparse": (0.49, 0.6)}
    made = [
        transfer_row("probe", kind, seed, images, top1 + 0.02 * seed - 0.01)
        for kind, both in accuracy.items()
        for images, top1 in zip((16, 32), both, strict=True)
        for seed in (0, 1)
    ]
    made.append(transfer_row("scratch", "dense", 0, 32, 0.2))
    found = [{name: str(value) for name, value in row.items()} for row in made]
    monkeypatch.setattr(quality_tables, "rows_of", lambda _: found)
    return found


@pytest.fixture
def quantized(model: SparseViT) -> Callable[..., QuantizedViT]:
    def make(seed: int, scheme: str = "psaq", bits: int = 4) -> QuantizedViT:
        noise = Calibration.gaussian(model.grid, 4, seed)
        return quantize(model, noise, QuantConfig(bits, 8, scheme))

    return make


def test_the_table_of_students(rows: list[dict[str, str]]) -> None:
    text = transfer_table()
    assert "| probe | dense | 40.00 +- 1.41 (2) | 50.00 +- 1.41 (2) | 50 | 0.50 |" in text
    assert "| probe | gaussian | 10.00 +- 1.41 (2) | 10.00 +- 1.41 (2) | 50 |  |" in text
    assert "| scratch | dense |  | 20.00 (1) | 50 | 0.50 |" in text


def test_what_it_takes_to_match_dense_images(rows: list[dict[str, str]]) -> None:
    text = reach_table()
    assert "| probe | 48.59 | gaussian | not reached |  |  |" in text
    assert "| probe | 48.59 | dense | 32 | 200 | 18 |" in text
    assert "| probe | 48.59 | sparse | 16 | 200 | 10 |" in text
    assert "scratch" not in text, "one number of images is no curve"


def test_the_table_of_quantized_models(monkeypatch: pytest.MonkeyPatch) -> None:
    full = {"scheme": "fp32", "weights": "32", "calibration": "none", "seed": "0", "top1": "0.84", "images": "100"}
    made = [full | {"scheme": "psaq", "weights": "4", "calibration": "real", "top1": top1} for top1 in ("0.8", "0.82")]
    monkeypatch.setattr(quality_tables, "rows_of", lambda _: [row | SETTING for row in (full, *made)])
    text = quantize_table()
    assert "In float32: 84.00 (1)." in text
    assert "| psaq | W4/A8 |  |  |  | 81.00 +- 1.41 (2) |" in text


def test_a_spread_needs_two() -> None:
    assert (spread([]), spread([0.5])) == ("", "50.00 (1)")


def test_curves(rows: list[dict[str, str]], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    first, last = points([row for row in rows if (row["student"], row["kind"]) == ("probe", "dense")])
    assert (first.images, first.seconds, last.images, last.seconds) == (16, 10.0, 32, 18.0)
    assert (last.top1, last.deviation) == pytest.approx((0.5, 0.02 / 2**0.5))
    plot(rows, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_rows_of_another_setting_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    write_csv([{"top1": 0.5, "images": 200}], path)
    assert read(path, {"images": 200}) == [{"top1": "0.5", "images": "200"}]
    for setting, told in (({"images": 100}, "images 200, this run has 100"), ({"teacher": "demo"}, "teacher None")):
        with pytest.raises(SystemExit, match=told):
            read(path, setting)


@torch.no_grad()
def test_written_out_fake_quantization_is_that_of_torch(quantized: Callable[..., QuantizedViT], pixels: Tensor) -> None:
    fused = FusedViT(quantized(0))
    fused.run = fused._forward
    for other in (quantized(0), quantized(1, bits=8), quantized(2, "paper")):
        fused.load(other)
        assert torch.equal(fused(pixels), other(pixels)), "eager, the same bits"
        assert check(fused, other, pixels) == float("inf")
    with pytest.raises(AssertionError, match="compiled logits have"):
        check(fused, quantized(0), pixels)


@torch.no_grad()
def test_students(tmp_path: Path) -> None:
    teacher = load_model("demo")
    source: Any = SimpleNamespace(teacher=teacher)
    args = argparse.Namespace(student="demo", student_size=None, student_checkpoint=tmp_path / "none.safetensors")
    pixels = torch.randn(2, 3, 32, 32)
    own = make_student("own", args, source, 0).vit.eval()
    own.head.load_state_dict({"weight": teacher.heads[0].weight, "bias": teacher.heads[0].bias})
    assert (own(pixels) - teacher(pixels)[0]).abs().max() < 1e-4, "the teacher's weights, but for the head"
    for name, alike in (("own", True), ("scratch", False)):
        first, second = (make_student(name, args, source, seed) for seed in (0, 1))
        assert (backbone(first) == backbone(second)) is alike
        assert not torch.equal(first.vit.head.weight, second.vit.head.weight), "a new head a replicate"
    with pytest.raises(FileNotFoundError, match=r"none\.safetensors"):
        make_student("probe", args, source, 0)
    args.student, args.student_checkpoint = "vit_tiny_patch16_224", None
    with pytest.raises(ConnectionError, match="pretrained weights could not be fetched"):
        make_student("probe", args, source, 0)
