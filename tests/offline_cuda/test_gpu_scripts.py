"""What ``benchmarks/gpu.sh`` starts, with tiny limits: each comes to its end and writes its rows.

Numbers are zeros, so what compares results before it times anything is left out; and workers live in this process.
"""

import csv
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from benchmarks.experiment import EXPERIMENTS, load_all
from benchmarks.harness.engine import FixedStep
from benchmarks.laboratory import equal_quality
from benchmarks.speed import engine, kernels, waterfall
from benchmarks.systems.fixed import System
from benchmarks.systems.techniques import Bench
from tests.offline_cuda.recorder import Recorder
from tests.offline_cuda.scenarios import any_values

pytestmark = pytest.mark.offline_cuda
SCRIPT = (Path(__file__).parents[2] / "benchmarks" / "gpu.sh").read_text()
TINY = "--device cuda --model deit_tiny_patch16_224 --batch 2"
WORDS = {
    "kernels": "--batches 2 --rounds 1 --seconds 1 --compiled 0 --only patch_gather",
    "engine": f"{TINY} --stages sparse --rounds 1 --steps 1",
    "waterfall": f"{TINY} --rounds 1 --steps 2 --quality-iterations 8",
    "scaling": "--device cuda --impl eager --axes batch --seconds 2",
    "equal-quality": "--device cuda --images 2 --iterations 8",
}
# of the waterfall, those that compile nothing
ROWS = {"waterfall": ("--rows", "tuned eager", "+ CLS-only last block")}
NEED_MORE = ("profile",)  # CUPTI, which is not there


class Here:
    """A `Worker` without a process."""

    def __init__(self, name: str, threads: int, build: Callable[..., Any], *arguments: Any) -> None:
        self.seconds_setup, self._thing = 0.0, build(*arguments)

    def ready(self) -> "Here":
        return self

    def ask(self, method: str, *arguments: Any) -> None:
        self._answer = getattr(self._thing, method)(*arguments)

    def answer(self) -> Any:
        return self._answer

    def call(self, method: str, *arguments: Any) -> Any:
        self.ask(method, *arguments)
        return self._answer

    def close(self) -> None:
        del self._thing


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No comparison of values, no processes, nothing compiled, and no cuDNN, which is not there."""
    monkeypatch.setattr(torch.backends.cudnn, "enabled", False)
    monkeypatch.setattr(FixedStep, "check", lambda self: self)
    monkeypatch.setattr(Bench, "check", lambda self: 0.0)
    monkeypatch.setattr(engine, "check_agreement", lambda *_: None)
    monkeypatch.setattr(engine, "SYSTEMS", (System("published", "fp32"), System("eager", "bf16")))
    monkeypatch.setattr(engine, "report", lambda *_: None)  # it names the compiled one
    eager = tuple(variant for variant in equal_quality.VARIANTS if variant.impl == "eager")
    monkeypatch.setattr(equal_quality, "VARIANTS", eager)
    for module in (kernels, waterfall):
        monkeypatch.setattr(module, "copy_bandwidth", lambda _: 1e12)  # copies are real, and large
    for module in (engine, waterfall):
        monkeypatch.setattr(module, "Worker", Here)
    with mock.patch.dict(os.environ):  # which a worker has for itself
        yield


def test_all_experiments_of_the_script_are_here() -> None:
    assert set(re.findall(r"-m benchmarks run ([\w-]+)", SCRIPT)) == {*WORDS, *NEED_MORE}


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("name", WORDS)
def test_an_experiment(recorder: Recorder, name: str, tmp_path: Path) -> None:
    load_all()
    out = tmp_path / "rows.csv"
    with any_values():
        EXPERIMENTS[name].main([*WORDS[name].split(), *ROWS.get(name, ()), "--out", str(out)])
    with out.open() as file:
        assert list(csv.DictReader(file))
    assert [row.name for row in recorder.rows() if row.kind == "COMPLAINT"] == []
