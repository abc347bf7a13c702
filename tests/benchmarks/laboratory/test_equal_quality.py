"""What is said of the quality of the fast paths."""

from benchmarks.experiment import Row
from benchmarks.harness.engine import short_stops
from benchmarks.laboratory.equal_quality import VARIANTS, invert, judge, quality_table, verdicts
from smi_fast.config import InversionConfig
from smi_fast.model import load_model


def test_judging_images() -> None:
    teacher = load_model("demo")
    config = InversionConfig(iterations=8, stops=short_stops(8))
    one, other = (invert(variant, teacher, config, 10) for variant in VARIANTS[:2])
    same, seed = judge(one, teacher, one), judge(other, teacher, one)
    assert same["overlap"] == 1
    assert seed["overlap"] < 0.9
    assert abs(same["top1"] - one.top1) < 1e-6


def row(name: str, loss: float, top1: float, overlap: float) -> Row:
    figures = {"loss": loss, "top1": top1, "overlap": overlap, "images": 20, "iterations": 8}
    return {"row": name, "device_name": "CPU", "torch": "2", "commit": "c"} | {k: str(v) for k, v in figures.items()}


def test_verdicts() -> None:
    rows = [
        row("float32", 0.2, 1.0, 1.0),
        row("float32, seed 1", 0.25, 0.9, 0.4),
        row("float32, seed 2", 0.1, 1.0, 0.3),
    ]
    tried = [
        row("good", 0.28, 0.95, 0.35),
        row("loss", 0.31, 1.0, 0.5),
        row("top", 0.2, 0.85, 0.5),
        row("o", 0.2, 1, 0.2),
    ]
    assert verdicts(rows + tried) == [True, True, True, True, False, False, False]
    lines = quality_table(rows + tried).splitlines()
    assert "| good | 0.95 | 0.28 | 0.35 | yes |" in lines
    assert "| o | 1 | 0.2 | 0.2 | no |" in lines
