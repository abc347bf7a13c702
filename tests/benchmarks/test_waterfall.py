"""The waterfall's rows, and what is said of quality."""

import itertools
from dataclasses import fields, replace
from typing import Any

import pytest
import torch

from benchmarks import techniques
from benchmarks.equal_quality import VARIANTS, invert, judge, verdicts
from benchmarks.techniques import WATERFALL, Bench, Technique, full_batches
from smi_fast.config import PAPER_STOPS, InversionConfig
from smi_fast.model import load_model
from smi_fast.schedule import plan_stages
from tests.conftest import build_vit

ROWS = {row.name: row for row in WATERFALL}
CPU_ROWS = [row for row in WATERFALL if row.why_not(torch.device("cpu")) is None]
STAGES = plan_stages(12, ((2, 0.3), (4, 0.4)), 6)


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Benches of the tiny model, run eager."""
    monkeypatch.setattr(techniques, "build_vit", lambda model, device: build_vit().float())
    monkeypatch.setenv(techniques.KERNELS_VARIABLE, "auto")  # a bench sets it for its process

    def make(row: Technique) -> Bench:
        return Bench(replace(row, compiled=False), "tiny", 2, "cpu", STAGES)

    return make


def test_each_row_adds_one_technique() -> None:
    assert len(ROWS) == len(WATERFALL)
    ours = [row for row in WATERFALL if row.system == "ours"]
    for before, after in itertools.pairwise(ours):
        changed = {f.name for f in fields(Technique) if getattr(before, f.name) != getattr(after, f.name)}
        assert len(changed - {"name", "needs"}) == 1, after.name


def test_rows_that_a_cpu_cannot_have() -> None:
    left_out = {row.name: row.why_not(torch.device("cpu")) for row in WATERFALL if row not in CPU_ROWS}
    assert set(left_out) == {"+ Triton kernels", "+ CUDA graphs", "+ attention choice", "+ fp8"}
    assert left_out["+ CUDA graphs"] == "needs a GPU"


def test_full_batches() -> None:
    assert full_batches(8, plan_stages(196, PAPER_STOPS, 4000)) == (8, 8, 16, 16, 32)


@pytest.mark.parametrize("row", CPU_ROWS, ids=lambda row: row.name)
def test_rows_compute_the_same_gradient(bench: Any, row: Technique) -> None:
    found = bench(row)
    assert 0 < found.check() < 0.05
    for stage in range(len(STAGES)):
        assert found.milliseconds(stage, 2) > 0
    assert found.flops(0) > found.flops(2) / found.batches[2]


def test_a_wrong_row_is_caught(bench: Any) -> None:
    found = bench(ROWS["+ CLS-only last block"])
    with torch.no_grad():
        found.model.blocks[0].fc2.weight.mul_(1.5)
    with pytest.raises(AssertionError, match=r"relative error .* of the gradient, limit"):
        found.check()


@pytest.mark.parametrize("name", ["published loop", "+ kept-first patchify"])
def test_quality_is_that_of_the_teacher(bench: Any, name: str) -> None:
    found = bench(ROWS[name]).quality(8)
    assert 0 < found["final_loss"] < 5
    assert 0 <= found["teacher_top1"] <= 1


def test_judging_images() -> None:
    teacher = load_model("demo")
    config = InversionConfig(iterations=8, stops=((1, 0.3), (2, 0.3), (4, 0.3), (6, 0.3)))
    one, other = (invert(variant, teacher, config, 10) for variant in VARIANTS[:2])
    same, seed = judge(one, teacher, one), judge(other, teacher, one)
    assert same["overlap"] == 1
    assert seed["overlap"] < 0.9
    assert same["top1"] == pytest.approx(one.top1)


def test_verdicts() -> None:
    def row(name: str, loss: float, top1: float, overlap: float) -> dict[str, Any]:
        return {"row": name, "loss": loss, "top1": top1, "overlap": overlap, "images": 20}

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
