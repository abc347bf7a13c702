"""A run that is cut off keeps in its CSV what it has measured, in every experiment."""

from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.experiment import EXPERIMENTS, Row, load_all
from benchmarks.harness.results import read
from benchmarks.laboratory import equal_quality
from benchmarks.paper import quantize, transfer
from benchmarks.paper.images import Images
from benchmarks.speed import engine, int8, kernels, model, scaling, waterfall

AFTER = 2  # so many things are measured before the end


class CutOff(Exception):
    """What ends a run here."""


def cut_off(function: Callable[..., Any], after: int = AFTER) -> Callable[..., Any]:
    """A function that works so many times."""
    calls: list[int] = []

    def run(*args: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) > after:
            raise CutOff
        return function(*args, **options)

    return run


def rows_of(name: str, arguments: Sequence[str], out: Path) -> list[Row]:
    """Run an experiment that is cut off; what its file holds."""
    load_all()
    with pytest.raises(CutOff):
        EXPERIMENTS[name].main([*arguments, "--out", str(out)])
    return read(out)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "rows.csv"


def test_engine(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(setting: Any, kept: int, *rest: Any) -> list[engine.Timed]:
        worker: Any = SimpleNamespace(seconds_setup=1.0)
        return [engine.Timed(system, kept, worker, 10, [0.5, 0.5]) for system in engine.SYSTEMS[:2]]

    monkeypatch.setattr(engine, "measure", cut_off(measure, 1))
    rows = rows_of("engine", [], out)
    assert [(row["system"], row["patches"]) for row in rows] == [("published", "46"), ("tuned", "46")]


def test_kernels(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "copy_bandwidth", lambda device: 1e10)
    measure = cut_off(lambda op, shape, *rest: kernels.row(op, shape, {"eager": [1.0, 1.0]}, 1e10))
    monkeypatch.setattr(kernels, "measure", measure)
    rows = rows_of("kernels", ["--device", "cpu", "--batches", "1"], out)
    assert [row["op"] for row in rows] == ["patch_gather", "patch_ungather"]


def test_scaling(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(bench: Any, axis: str, points: list[scaling.Point], until: float) -> list[scaling.Timed]:
        return [scaling.Timed(point, float(point.kept), 7, lambda: 0.0, [0.1, 0.1]) for point in points[:1]]

    monkeypatch.setattr(scaling.Bench, "measure", cut_off(measure))
    assert [row["axis"] for row in rows_of("scaling", [], out)] == list(scaling.AXES[:AFTER])


def test_model(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "rows_of", cut_off(lambda key, job, folder: [{"device": key}] * 2, 1))
    rows = rows_of("model", ["--device", "a100", "h100", "--model", "deit_tiny_patch16_224"], out)
    assert [row["device"] for row in rows] == ["a100", "a100"]


def test_int8(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int8, "measure", cut_off(lambda name, args: [{"model": name, "system": "fp32"}], 1))
    assert [row["model"] for row in rows_of("int8", [], out)] == ["demo"]


def test_equal_quality(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(equal_quality, "load_model", lambda name, device: None)
    monkeypatch.setattr(equal_quality, "invert", cut_off(lambda *rest: None))
    monkeypatch.setattr(equal_quality, "judge", lambda *rest: {"loss": 0.1, "top1": 1.0, "overlap": 1.0})
    rows = rows_of("equal-quality", [], out)
    assert [row["row"] for row in rows] == [variant.name for variant in equal_quality.VARIANTS[:AFTER]]


@pytest.fixture
def source(monkeypatch: pytest.MonkeyPatch) -> Any:
    """As much of the images as the rows of `quantize` and `transfer` ask for."""
    images = Images(torch.zeros(8, 3, 4, 4), None, 1.0)
    teacher = SimpleNamespace(info=SimpleNamespace(name="demo"))
    made = SimpleNamespace(teacher=teacher, iterations=9, recipe=lambda kind: None, take=lambda *rest: images)
    for module in (quantize, transfer):
        monkeypatch.setattr(module, "open_source", lambda args: (made, [0] * 4))
        monkeypatch.setattr(module, "test_name", lambda test: "cifar10")
    return made


@pytest.mark.usefixtures("source")
def test_quantize(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    score = cut_off(lambda *rest: {"top1": 0.5})
    judge = SimpleNamespace(float32=score, quantized=score)
    monkeypatch.setattr(quantize, "Judge", lambda *rest: judge)
    rows = rows_of("quantize", ["--data", "cifar10:package"], out)
    assert [(row["scheme"], row["calibration"]) for row in rows] == [("fp32", "none"), ("psaq", "gaussian")]


@pytest.mark.usefixtures("source")
def test_transfer(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "make_student", lambda *rest: None)
    monkeypatch.setattr(transfer, "judge", lambda *rest: None)
    monkeypatch.setattr(transfer, "train", cut_off(lambda *rest: {"top1": 0.5}))
    rows = rows_of("transfer", ["--data", "cifar10:package", "--seeds", "1"], out)
    assert [(row["kind"], row["images"]) for row in rows] == [("gaussian", "16"), ("dense", "16")]
    # the next run goes on from there
    monkeypatch.setattr(transfer, "train", cut_off(lambda *rest: {"top1": 0.6}))
    rows = rows_of("transfer", ["--data", "cifar10:package", "--seeds", "1"], out)
    assert [(row["kind"], row["top1"]) for row in rows][1:] == [("dense", "0.5"), ("sparse", "0.6"), ("real", "0.6")]


@pytest.fixture
def workers(monkeypatch: pytest.MonkeyPatch) -> type:
    """Workers of the waterfall that answer at once."""

    class Worker:
        """A row takes a millisecond for each patch; the published loop twice that."""

        seconds_setup = 1.0

        def __init__(self, name: str, threads: int, build: Any, *details: Any) -> None:
            self.name, self.stages = name, details[-1]

        def ready(self) -> "Worker":
            return self

        def call(self, method: str, *arguments: Any) -> Any:
            return getattr(self, method)(*arguments)

        def facts(self) -> dict[str, Any]:
            count = len(self.stages)
            return {"batches": (8,) * count, "flops": [10**9] * count, "error": 0.01, "seconds_compile": 2.0}

        def seconds(self, stage: int, steps: int) -> float:
            return float(1e-3 * self.stages[stage].kept * (1 + (self.name == "published loop")))

        def memory(self) -> int:
            return 2**30

        def ask(self, method: str, *arguments: Any) -> None:
            assert method == "quality"

        def answer(self) -> dict[str, float]:
            return {"final_loss": 0.1, "teacher_top1": 1.0}

        def close(self) -> None: ...

    monkeypatch.setattr(waterfall, "Worker", Worker)
    monkeypatch.setattr(waterfall, "measure_ceilings", lambda device: waterfall.Ceilings(1e12, 1e10))
    monkeypatch.setattr(waterfall, "matmul_rate", lambda device, dtype: 2e12)
    return Worker


ARGUMENTS = ["--rounds", "2", "--rows", "tuned eager", "+ compile"]
NAMES = ["published loop", "tuned eager", "+ compile"]


@pytest.mark.usefixtures("workers")
def test_waterfall_while_it_times(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waterfall, "take_turns", cut_off(waterfall.take_turns))
    rows = rows_of("waterfall", ARGUMENTS, out)
    assert [row["row"] for row in rows] == NAMES
    assert [(row["ms_4_p50"], row["ms_3_p50"], row["ms_2_p50"]) for row in rows][1] == ("46.0", "66.0", "")
    assert {row["seconds_an_image"] for row in rows} == {""}
    cells = waterfall.waterfall_table(rows).splitlines()[-3]
    assert cells.startswith("| + compile | not measured | not measured | not measured ")
    assert "46.0 (46.0 to 46.0)" in cells


def test_waterfall_while_it_inverts(out: Path, workers: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "answer", cut_off(workers.answer))
    rows = rows_of("waterfall", ARGUMENTS, out)
    assert [row["row"] for row in rows] == NAMES
    assert [row["teacher_top1"] for row in rows] == ["1.0", "1.0", ""]
    # of 4000 iterations at batch 8: 50 at 196 patches, 50 at 137, 100 at 95, 100 at 66, 3700 at 46
    seconds = 1e-3 * (50 * 196 + 50 * 137 + 100 * 95 + 100 * 66 + 3700 * 46) / 8
    assert [float(row["seconds_an_image"]) for row in rows] == pytest.approx([2 * seconds, seconds, seconds], abs=1e-4)
    assert [row["over_published"] for row in rows] == ["1.0", "2.0", "2.0"]
    assert {row["matmul_tflop_per_s"] for row in rows} == {"2.0"}, "the better of both ceilings"
    assert {row["peak_memory_mib"] for row in rows} == {"1024"}


@pytest.mark.usefixtures("workers")
def test_a_whole_waterfall_has_no_empty_cell(out: Path) -> None:
    EXPERIMENTS["waterfall"].main([*ARGUMENTS, "--out", str(out)])
    rows = read(out)
    ours = rows[-1]
    assert all(value for name, value in ours.items() if name != "triton"), ours
    assert "not measured" not in waterfall.waterfall_table(rows).replace("Not measured here", "")


def test_every_experiment_is_looked_at() -> None:
    """But for those that measure one thing, and one that makes no rows."""
    load_all()
    here = " ".join(name for name in globals() if name.startswith("test_"))
    missing = {name for name in EXPERIMENTS if f"test_{name.replace('-', '_')}" not in here}
    assert missing <= {"profile", "student-weights"}
