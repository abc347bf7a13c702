"""What `quantize` and `transfer` say of their rows, and what they still have to measure."""

import argparse
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.experiment import Row
from benchmarks.harness.results import read
from benchmarks.paper import quantize as calibrations
from benchmarks.paper import transfer
from benchmarks.paper.images import Source
from benchmarks.paper.quantize import quantize_table
from benchmarks.paper.replicates import mean_and_deviation, plot, points
from benchmarks.paper.students import backbone, make_student
from benchmarks.paper.transfer import reach_table, transfer_table
from smi_fast.model import load_model

SETTING = {"teacher": "demo", "data": "cifar10", "iterations": 200, "device_name": "CPU", "torch": "2", "commit": "c"}


def transfer_row(student: str, kind: str, seed: int, images: int, top1: float) -> dict[str, Any]:
    seconds = {"inversion_s": images * 0.5 if kind in ("dense", "sparse") else 0.0, "training_s": 2.0}
    what = {"student": student, "kind": kind, "seed": seed, "images": images, "top1": top1, "same_kind": 0.5}
    return what | seconds | SETTING | {"test_images": 100}


@pytest.fixture
def rows() -> list[Row]:
    """Dense images reach 0.5 with 32 of them, sparse ones come close enough with 16, noise never."""
    accuracy = {"gaussian": (0.1, 0.1), "dense": (0.4, 0.5), "sparse": (0.49, 0.6)}
    made = [
        transfer_row("probe", kind, seed, images, top1 + 0.02 * seed - 0.01)
        for kind, both in accuracy.items()
        for images, top1 in zip((16, 32), both, strict=True)
        for seed in (0, 1)
    ]
    made.append(transfer_row("scratch", "dense", 0, 32, 0.2))
    return [{name: str(value) for name, value in row.items()} for row in made]


def test_the_table_of_students(rows: list[Row]) -> None:
    text = transfer_table(rows)
    assert "| probe | dense | 40.00 +- 1.41 (2) | 50.00 +- 1.41 (2) | 50 | 0.50 |" in text
    assert "| probe | gaussian | 10.00 +- 1.41 (2) | 10.00 +- 1.41 (2) | 50 |  |" in text
    assert "| scratch | dense |  | 20.00 (1) | 50 | 0.50 |" in text


def test_what_it_takes_to_match_dense_images(rows: list[Row]) -> None:
    text = reach_table(rows)
    assert "| probe | 48.59 | gaussian | not reached |  |  |" in text
    assert "| probe | 48.59 | dense | 32 | 200 | 18 |" in text
    assert "| probe | 48.59 | sparse | 16 | 200 | 10 |" in text
    assert "scratch" not in text, "one number of images is no curve"


def test_the_table_of_quantized_models() -> None:
    full = {"scheme": "fp32", "weights": "32", "calibration": "none", "seed": "0", "top1": "0.84", "images": "100"}
    made = [full | {"scheme": "psaq", "weights": "4", "calibration": "real", "top1": top1} for top1 in ("0.8", "0.82")]
    text = quantize_table([{k: str(v) for k, v in (row | SETTING).items()} for row in (full, *made)])
    assert "In float32: 84.00 (1)." in text
    assert "| psaq | W4/A8 |  |  |  | 81.00 +- 1.41 (2) |" in text


def test_a_spread_needs_two() -> None:
    assert (mean_and_deviation([]), mean_and_deviation([0.5])) == ("", "50.00 (1)")


def test_curves(rows: list[Row], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    first, last = points([row for row in rows if (row["student"], row["kind"]) == ("probe", "dense")])
    assert (first.images, first.seconds, last.images, last.seconds) == (16, 10.0, 32, 18.0)
    assert (last.top1, last.deviation) == pytest.approx((0.5, 0.02 / 2**0.5))
    plot(rows, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_what_an_image_rests_on() -> None:
    source = Source(None, None, Path(), 8, 200)  # type: ignore[arg-type]
    dense, sparse = source.recipe("dense"), source.recipe("sparse")
    assert dense is not None
    assert sparse is not None
    assert (dense.iterations, len(dense.strategy.stops), len(sparse.strategy.stops)) == (200, 0, 4)
    assert source.recipe("real, pruned") is None


def test_what_is_wanted() -> None:
    args = argparse.Namespace(seeds=2, only=None, students=["probe", "scratch"], sizes=[16, 32])
    assert len(calibrations.wanted(args)) == 1 + 4 * 2 * 4
    args.only = ["psaq:4", "fp32:32"]
    assert {row["scheme"] for row in calibrations.wanted(args)} == {"psaq", "fp32"}
    assert len(calibrations.wanted(args)) == 1 + 2 * 4
    assert len(transfer.wanted(args)) == 5 * 2 * (2 + 1)  # kinds, seeds, sizes


def test_a_run_goes_on_with_the_rows_that_are_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source: Any = SimpleNamespace(teacher=load_model("demo"), iterations=200, recipe=lambda kind: None)
    monkeypatch.setattr(calibrations, "open_source", lambda args: (source, SimpleNamespace(name="fake:x")))
    asked: list[tuple[Any, ...]] = []

    def quantized(self: Any, *what: Any) -> dict[str, Any]:
        asked.append(what)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return {"top1": 0.5, "compiled_sqnr_db": 33.0}

    monkeypatch.setattr(calibrations.Judge, "quantized", quantized)
    words = ["--data", "fake:x", "--limit", "9", "--only", "psaq:8", "--seeds", "1", "--out", str(tmp_path / "q.csv")]
    with pytest.raises(KeyboardInterrupt):
        calibrations.main(words)
    assert [row["calibration"] for row in read(tmp_path / "q.csv")] == ["gaussian", "dense"]
    calibrations.main(words)
    assert [what[2] for what in asked] == ["gaussian", "dense", "sparse", "sparse", "real"]
    assert [row["calibration"] for row in read(tmp_path / "q.csv")] == ["gaussian", "dense", "sparse", "real"]
    words[3] = "8"
    with pytest.raises(SystemExit, match="holds rows of images 9, this run has 8"):
        calibrations.main(words)


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
