"""The waterfall's rows: each computes what the others do."""

import itertools
from dataclasses import fields, replace
from typing import Any

import pytest
import torch

from benchmarks.harness.engine import paper_stages, stages_of
from benchmarks.systems import techniques
from benchmarks.systems.techniques import WATERFALL, Bench, Technique, full_batches
from smi_fast.kernels.common.dispatch import read_switch
from tests.conftest import build_vit

ROWS = {row.name: row for row in WATERFALL}
CPU_ROWS = [row for row in WATERFALL if row.why_not(torch.device("cpu")) is None]
STAGES = stages_of(12, ((2, 0.3), (4, 0.4)), 6)


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
    kernels = {"+ Triton kernels", "+ tile attention", "+ a step's notes in two launches", "+ norms with their sums"}
    assert set(left_out) == kernels | {"+ GELU in the products", "+ CUDA graphs", "+ attention choice", "+ fp8"}
    assert left_out["+ CUDA graphs"] == "needs a GPU"


def test_full_batches() -> None:
    assert full_batches(8, paper_stages(196)) == (8, 8, 16, 16, 32)


@pytest.mark.parametrize("row", CPU_ROWS, ids=lambda row: row.name)
def test_rows_compute_the_same_gradient(bench: Any, row: Technique) -> None:
    found = bench(row)
    assert 0 < found.check() < 0.05
    for stage in range(len(STAGES)):
        assert found.seconds(stage, 2) > 0
    flops = found.flops()
    assert flops[0] > flops[2] / found.batches[2]
    assert found.facts() == {"batches": found.batches, "flops": flops, "error": found.error, "seconds_compile": 0}


def test_a_wrong_row_is_caught(bench: Any) -> None:
    found = bench(ROWS["+ CLS-only last block"])
    with torch.no_grad():
        found.model.blocks[0].fc2.weight.mul_(1.5)
    with pytest.raises(AssertionError, match=r"relative error .* of the gradient, limit"):
        found.check()


@pytest.mark.parametrize("name", ["published loop", "+ kept-first patchify"])
def test_quality_is_that_of_the_teacher(bench: Any, name: str) -> None:
    # as float32: in bf16, a processor without units for it takes half a minute
    found = bench(replace(ROWS[name], dtype="fp32")).quality(8)
    assert 0 < found["final_loss"] < 5
    assert 0 <= found["teacher_top1"] <= 1


def test_the_rows_of_kernels_leave_out_ever_fewer_ops() -> None:
    texts = [technique.kernels for technique in WATERFALL if technique.needs == "cuda"]
    left_out = [read_switch(text)[1] for text in texts]
    assert all(later <= earlier for earlier, later in itertools.pairwise(left_out))
    assert left_out[0]
    assert not left_out[-1]
