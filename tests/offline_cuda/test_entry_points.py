"""The other ways onto a device: a consumer's own work, two inverters at once, fp8, tuning, rounds of a distillation."""

import threading
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from typer.testing import CliRunner

from smi_fast import Inverter, SparseImages
from smi_fast.cli import app
from smi_fast.distill.pair import Pair
from smi_fast.distill.pool import ImageSet
from smi_fast.engine.timing import StageTimer
from smi_fast.model.fp8 import to_fp8
from smi_fast.quantize.execute import to_low_bit
from smi_fast.tuning.measure import tune
from tests.offline_cuda.checks import faults_of_run
from tests.offline_cuda.recorder import Recorder
from tests.offline_cuda.scenarios import CONFIG, any_values, demo_model, invert

pytestmark = pytest.mark.offline_cuda
SHORT = ["--iterations", "20", "--stop", "10:0.3", "--impl", "eager", "--quiet"]


def test_a_consumer_attends_in_float32_meanwhile(recorder: Recorder) -> None:
    inverter = Inverter(demo_model(), CONFIG, batch_size=4, impl="eager")
    seen = 0
    with any_values():
        for images in inverter.stream([0] * 12):
            leaf = torch.randn(2, 3, 17, 64, device="cuda", requires_grad=True)
            F.scaled_dot_product_attention(leaf, leaf, leaf).sum().backward()
            seen += len(images)
    assert seen == 12
    assert [row.name for row in recorder.rows() if row.kind == "WARN"] == []


def test_inverters_side_by_side(recorder: Recorder) -> None:
    """Two on one device and one on another, each in a thread; captures of the same device wait for each other."""
    models = [demo_model("cuda:0"), demo_model("cuda:0"), demo_model("cuda:1")]
    errors: list[BaseException] = []

    def run(index: int) -> None:
        try:
            Inverter(models[index], CONFIG, batch_size=4, impl="eager")([0] * 8)
        except BaseException as error:
            errors.append(error)

    with any_values():
        threads = [threading.Thread(target=run, args=(index,)) for index in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert errors == []
    assert [row.name for row in recorder.rows() if row.kind == "WARN"] == []


@pytest.mark.parametrize("device", ["cuda:0", "cuda:1"])
def test_fp8(recorder: Recorder, device: str) -> None:
    ran = invert(recorder, to_fp8(demo_model(device)), batch=4, impl="eager")
    assert faults_of_run(ran.rows, int(device[-1])) == []
    assert any(row.kind == "PRODUCT" and "type 28" in row.name for row in ran.rows), "no product of 8 bits"


def test_tuning(recorder: Recorder) -> None:
    model = demo_model("cuda:1")
    found = tune(StageTimer(model, CONFIG, "eager"), most=16, rounds=1)
    assert len(found.batches) == 3
    rows = recorder.rows()
    assert [row.name for row in rows if row.kind == "WARN"] == []
    assert {row.device for row in rows if row.is_work} == {1}


@pytest.mark.parametrize("mode", ["finetune", "probe"])
def test_rounds_of_a_distillation(
    recorder: Recorder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    def all_of(self: Pair, images: SparseImages) -> ImageSet:
        return ImageSet(images.pixels, images.keep)

    monkeypatch.setattr(Pair, "usable", all_of)  # no image is finite here
    rounds = ["--rounds", "2", "--images-per-round", "4", "--steps-per-round", "3", "--batch-size", "2"]
    command = ["distill", "--student", "demo", "--mode", mode, *rounds, *SHORT, "--device", "cuda:1"]
    with any_values(), torch.backends.cudnn.flags(enabled=False):  # it has no stand-in
        done = CliRunner().invoke(app, [*command, "--out", str(tmp_path / "out")])
    assert done.exit_code == 0, done.exception
    rows = recorder.rows()
    assert [row.name for row in rows if row.kind == "WARN"] == []
    assert {row.device for row in rows if row.is_work} == {1}


def test_fp8_execution_of_a_quantized_model(recorder: Recorder) -> None:
    model = demo_model(dtype=torch.float32)
    low = to_low_bit(model, "fp8")
    with torch.no_grad(), any_values():
        logits = low(torch.zeros(4, 3, 32, 32, device="cuda"))
    assert logits.shape == (4, 10)
    assert any(row.kind == "PRODUCT" and "type 28" in row.name for row in recorder.rows())


def test_a_run_of_the_command_line(recorder: Recorder, tmp_path: Path) -> None:
    with any_values():
        command = ["invert", "--model", "demo", "--labels", "3,5", *SHORT, "--device", "cuda:1", "--dtype", "fp8"]
        done = CliRunner().invoke(app, [*command, "--out", str(tmp_path / "out")])
    assert done.exit_code == 0, done.exception
    assert (tmp_path / "out" / "images.safetensors").exists()
    assert {row.device for row in recorder.rows() if row.is_work} == {1}
