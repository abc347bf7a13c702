"""``smi-fast distill`` as a user meets it."""

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from smi_fast import SparseImages
from smi_fast.cli.distill import evaluator
from smi_fast.distill import DistillConfig, Student, build_student
from smi_fast.kernels.common.grid import Grid
from tests.cli.test_cli import run

SMALL = ["--batch-size", "4", "--eval-every", "2", "--device", "cpu", "--quiet", "--no-tensorboard"]
ROUNDS = ["--images-per-round", "2", "--steps-per-round", "2", "--iterations", "3", "--dense", "--impl", "eager"]

pytestmark = pytest.mark.usefixtures("one_thread")


class Real:
    """Six real images, whose labels are the classes that a student's features say."""

    name, num_classes = "real", 10
    pixels = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(0))

    def __init__(self, labels: Tensor | None) -> None:
        self.labels, self.passes = labels, 0

    def __len__(self) -> int:
        return 6

    def batches(
        self, model: Student, batch_size: int, indices: Sequence[int] | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        assert model.grid == Grid(32, 32, 4)
        assert self.labels is not None
        self.passes += 1
        rows = torch.tensor(range(6) if indices is None else indices)
        for part in rows.split(4):
            yield self.pixels[part], self.labels[part]


@pytest.fixture
def real(monkeypatch: pytest.MonkeyPatch) -> Real:
    """In place of a data set."""
    images = Real(torch.arange(6))
    module = sys.modules["smi_fast.cli.distill"]
    monkeypatch.setattr(module, "open_dataset", lambda spec: images)
    monkeypatch.setattr(module, "random_indices", lambda n, count, seed: list(range(n))[-count:])
    return images


def test_alternating_stopped_and_resumed(real: Real, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    command = ["distill", "--out", str(out), "--rounds", "3", *ROUNDS, *SMALL, "--evaluate", "real"]
    run(*command)
    assert "6 steps on 6 images" in capsys.readouterr().out
    names = {path.name for path in out.iterdir()}
    students = {"student-last.safetensors", "student-best.safetensors"}
    assert names == {"checkpoint.safetensors", "curve.csv", "report.json", "rounds"} | students
    assert len(SparseImages.load(out / "rounds" / "000002.safetensors")) == 2
    report = json.loads((out / "report.json").read_text())
    assert (report["steps"], report["regime"], report["evaluated_on"]) == (6, "alternating", "real")
    assert real.passes == 1  # the backbone is frozen
    before = (out / "student-last.safetensors").read_bytes()
    run(*command, "--resume")
    assert (out / "student-last.safetensors").read_bytes() == before
    run(*command, code=2)
    assert "is not empty" in capsys.readouterr().err
    run(*command, "--resume", "--lr", "0.2", code=2)
    assert "lr=0.2, but" in capsys.readouterr().err


@pytest.fixture(scope="module")
def saved(one_thread: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("images") / "run"
    run("invert", "--iterations", "3", "--dense", "--impl", "eager", "--quiet", "--labels", "1,2", "--out", str(out))
    return out


def test_offline_from_a_run(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--steps", "2", "--mode", "finetune", "--optimizer", "adamw", "--lr", "1e-3"]
    run("distill", "--out", str(tmp_path / "run"), "--images", str(saved), *options, *SMALL)
    assert "2 steps on 2 images" in capsys.readouterr().out
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert (report["regime"], report["accuracy"], report["fingerprint"]["optimizer"]) == ("offline", None, "adamw")


def test_evaluation_is_top_1(real: Real) -> None:
    student = build_student("demo", 10)
    with torch.no_grad():
        real.labels = student.vit.eval()(real.pixels).argmax(1)
        real.labels[5] = (real.labels[5] + 1) % 10
        for mode, passes in (("probe", 1), ("finetune", 3)):
            judge = evaluator("real", student, DistillConfig(steps=1, mode=mode), None)  # type: ignore[arg-type]
            assert [judge(student.vit), judge(student.vit)] == [pytest.approx(5 / 6)] * 2
            assert real.passes == passes
        assert evaluator("real", student, DistillConfig(steps=1), 2)(student.vit) == 0.5


def test_images_without_labels_or_of_other_classes(real: Real) -> None:
    student = build_student("demo", 4)
    with pytest.raises(ValueError, match=r"--evaluate 'real': has 10 classes, teacher and student have 4"):
        evaluator("real", student, DistillConfig(steps=1), None)
    real.labels = None
    with pytest.raises(ValueError, match="have no labels"):
        evaluator("real", student, DistillConfig(steps=1), None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--student", "vit_tinny"], "name='vit_tinny': neither"),
        (["--student-image-size", "64"], "teacher has 8 x 8 patches"),
        (["--student-image-size", "30"], "img_size=30"),
        (["--mode", "both"], "--mode 'both'"),
        (["--rounds", "0"], "--rounds 0: must be an integer of at least 1"),
        (["--limit", "0"], "--limit 0"),
        (["--temperature", "0"], "--temperature 0.0"),
        (["--stop", "3:0.1"], "--dense and --stop exclude"),
        (["--images", "missing.safetensors"], "missing.safetensors"),
        (["--resume"], "--resume: there is no checkpoint"),
        (["--resume", "--overwrite"], "exclude each other"),
        (["--student-checkpoint", "missing.pth"], "missing.pth"),
    ],
    ids=lambda value: value[0] + " " + value[-1] if isinstance(value, list) else "",
)
def test_bad_input(arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    run("distill", "--out", str(out), *ROUNDS, *SMALL, *arguments, code=2)
    assert message in capsys.readouterr().err
    assert not out.exists()
