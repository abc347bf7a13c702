"""The training of a student: what it learns, what it may not be given, and that nothing is lost when it is killed."""

import csv
import errno
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors import SafetensorError
from torch import Tensor

from smi_fast.distill import Alternating, DistillConfig, ImageSet, RunFolder, Student, Trainer, build_student
from smi_fast.distill.curves import CurveRow, read_curve, write_curve
from smi_fast.distill.pool import draw
from smi_fast.images import SparseImages, files
from smi_fast.model.from_timm import from_timm
from tests.conftest import build_vit
from tests.distill_run import GRID, SMALLER, STUDENT, TEACHER, alternating, config, image_set, invert, trainer
from tests.fakes import make_images

ROOT = Path(__file__).parent.parent


pytestmark = pytest.mark.usefixtures("one_thread")


def weights(run: Trainer) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in run.student.vit.state_dict().items()}


def assert_same(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert list(left) == list(right)
    for name, tensor in left.items():
        assert torch.equal(tensor, right[name]), name


@pytest.fixture(scope="module")
def whole(one_thread: None) -> tuple[dict[str, Tensor], tuple[Any, ...]]:
    """An alternating training that nobody disturbs."""
    run = trainer()
    curve = run.run().curve
    return weights(run), tuple((row.step, row.images, row.loss, row.accuracy) for row in curve)


# --- what is computed ---


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("mode", ["probe", "finetune"])
def test_steps_are_those_of_a_plain_loop(mode: str, cache: bool) -> None:
    images, options = image_set(), {"steps": 5, "cache": cache, "lr_schedule": "cosine", "weight_decay": 0.1}
    run = trainer(images, mode=mode, **options)
    c, pair = run.config, run.pair
    vit = build_vit(**SMALLER)
    student = Student(vit, STUDENT)
    trained = list(vit.head.parameters() if mode == "probe" else vit.parameters())
    moments = [torch.zeros_like(parameter) for parameter in trained]
    for step in range(5):
        positions, flips = draw(c.seed, step, 10, c.batch_size, True)
        pixels, keep = images.pixels[positions], images.keep[positions]  # type: ignore[index]
        columns = torch.where(flips[:, None], 3 - keep % 4, keep % 4)
        keep = (keep // 4 * 4 + columns).sort(1).values
        pixels = torch.where(flips[:, None, None, None], pixels.flip(3), pixels)
        goal = (pair.teacher(pixels, keep)[0] / 20).softmax(1)
        shown = pair.shown(ImageSet(pixels, keep))
        ours = (student.logits(shown, keep) / 20).log_softmax(1)
        loss = 400 * (goal * (goal.log() - ours)).sum(1).mean()
        for parameter, moment, gradient in zip(trained, moments, torch.autograd.grad(loss, trained), strict=True):
            moment.mul_(0.9).add_(gradient + 0.1 * parameter.detach())
            parameter.data -= c.lr_at(step) * moment
    run.run()
    assert run.pool.logits is None or cache
    for name, tensor in vit.state_dict().items():
        torch.testing.assert_close(run.student.vit.state_dict()[name], tensor, rtol=1e-4, atol=1e-6)
    assert torch.equal(run.student.vit.blocks[0].mlp.fc1.weight, build_vit(**SMALLER).blocks[0].mlp.fc1.weight) == (
        mode == "probe"
    )


def test_a_student_learns_what_its_teacher_says() -> None:
    run = trainer(image_set(12), steps=150, optimizer="adamw", lr=3e-3, flip=False)
    curve = run.run().curve
    assert curve[-1].loss < 0.05 * curve[0].loss
    everything = run.pair.teacher_logits(image_set(12)), run.pair.student_logits(image_set(12))
    assert float((everything[0].argmax(1) == everything[1].argmax(1)).double().mean()) == 1


def test_real_images_are_seen_whole() -> None:
    run = trainer(image_set(6, kept=None), steps=2, cache=False)
    run.run()
    assert next(iter(run.pool.take(torch.tensor([0, 1]), torch.zeros(2).bool()))).images.keep is None


def test_the_pool_grows_by_rounds_of_balanced_labels(whole: tuple[Any, Any]) -> None:
    asked: list[tuple[list[int], list[int]]] = []

    def recorded(labels: list[int], ids: list[int]) -> SparseImages:
        asked.append((labels, ids))
        return invert(labels, ids)

    run = trainer(Alternating(recorded, images_per_round=6, steps_per_round=7), steps=20)
    result = run.run()
    assert [ids for _, ids in asked] == [list(range(6)), list(range(6, 12)), list(range(12, 18))]
    assert [label for labels, _ in asked for label in labels] == [i % 5 for i in range(18)]
    assert result.images == 18
    assert [row.images for row in result.curve] == [12, 18, 18]  # after 9, 18 and 20 steps
    assert len(run.pool) == 15


def test_no_image_is_cached_that_would_be_seen_once() -> None:
    assert not trainer(image_set(100), steps=2).cached
    assert trainer(image_set(100), steps=25).cached
    assert not trainer(image_set(100), steps=24).cached
    assert trainer(image_set(100), steps=24, flip=False).cached


# --- files ---


@pytest.fixture(scope="module")
def timm_student(one_thread: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Student]:
    out = tmp_path_factory.mktemp("timm") / "run"
    teacher = from_timm(build_vit(img_size=32, patch_size=16), TEACHER)
    student = build_student("vit_tiny_patch16_224", 5, img_size=32)
    images = ImageSet(torch.randn(6, 3, 32, 32), torch.tensor([[0, 2]] * 6))
    settings = DistillConfig(steps=2, batch_size=2, eval_every=1, mode="probe")
    accuracies = iter([0.5, 0.25])
    Trainer(
        teacher, student, settings, images, evaluate=lambda _: next(accuracies), folder=RunFolder(out, tensorboard=True)
    ).run()
    return out, student


def test_students_load_into_timm(timm_student: tuple[Path, Student]) -> None:
    out, student = timm_student
    pixels = torch.randn(2, 3, 32, 32)
    logits = []
    for name in ("student-last.safetensors", "student-best.safetensors"):
        loaded = timm.create_model("vit_tiny_patch16_224", num_classes=5, img_size=32, checkpoint_path=str(out / name))
        logits.append(loaded.eval()(pixels))
    torch.testing.assert_close(logits[0], student.vit.eval()(pixels))
    assert not torch.equal(logits[0], logits[1])  # the best one was that of step 1


def test_curves_as_csv_and_for_tensorboard(timm_student: tuple[Path, Student]) -> None:
    out, _ = timm_student
    with (out / "curve.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["step", "images", "seconds", "loss", "accuracy"]
    assert [(row["step"], row["images"], row["accuracy"]) for row in rows] == [("1", "6", "0.5"), ("2", "6", "0.25")]
    (events,) = (out / "tensorboard").iterdir()
    assert b"accuracy" in events.read_bytes()


def test_what_was_written_after_the_checkpoint_is_cut_off(tmp_path: Path) -> None:
    rows = [CurveRow(step, 10, step / 3, 0.1 * step, None if step == 1 else 0.5) for step in (1, 2, 3)]
    write_curve(tmp_path / "curve.csv", rows)
    assert read_curve(tmp_path / "curve.csv", 2) == rows[:2]
    assert read_curve(tmp_path / "missing.csv", 0) == []
    with pytest.raises(ValueError, match="has 3 rows, the checkpoint was made after 4"):
        read_curve(tmp_path / "curve.csv", 4)
    with pytest.raises(ValueError, match="cannot be read as a curve"):
        read_curve(tmp_path / "missing.csv", 1)


def test_tensorboard_that_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("smi_fast.distill.folder.has_tensorboard", lambda: False)
    with pytest.raises(ValueError, match=r"tensorboard=True: .* pip install 'smi-fast\[tensorboard\]'"):
        RunFolder(tmp_path, tensorboard=True)


def fail_after(monkeypatch: pytest.MonkeyPatch, count: int, error: BaseException) -> None:
    """The ``count``-th file that is written from now on fails half-way."""
    written, real = [0], files.os.fsync

    def fsync(descriptor: int) -> None:
        written[0] += 1
        if written[0] == count:
            raise error
        real(descriptor)

    monkeypatch.setattr(files.os, "fsync", fsync)


@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, "No space left on device"), SafetensorError("I/O error: No space left on device (28)")],
    ids=["python", "safetensors"],
)
def test_full_disk_leaves_the_file_before_and_a_resume_ends_the_same(
    error: Exception, tmp_path: Path, whole: tuple[Any, Any]
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        fail_after(patch, 41, error)
        with pytest.raises(OSError, match=r"No space left on device.*the file that was there is whole") as caught:
            trainer(folder=RunFolder(tmp_path)).run()
    assert caught.value.errno == errno.ENOSPC
    assert not list(tmp_path.rglob(".*.tmp"))
    run = trainer(folder=RunFolder(tmp_path, resume=True))
    assert run.run().steps == 40
    assert_same(weights(run), whole[0])


# --- killed, and resumed ---


class Killed(BaseException):
    """Not even an ``except Exception`` holds it."""


def check_resumed(run: Trainer, result: Any, whole: tuple[Any, Any]) -> None:
    assert_same(weights(run), whole[0])
    assert tuple((row.step, row.images, row.loss, row.accuracy) for row in result.curve) == whole[1]


@pytest.mark.parametrize("options", [{}, {"mode": "probe"}, {"optimizer": "adamw", "cache": False}], ids=str)
def test_killed_again_and_again_ends_with_the_same_student(options: dict[str, Any], tmp_path: Path) -> None:
    undisturbed = trainer(**options)
    curve = undisturbed.run().curve
    wanted = weights(undisturbed), tuple((row.step, row.images, row.loss, row.accuracy) for row in curve)
    kills = random.Random(str(options))
    for attempt in range(30):
        with pytest.MonkeyPatch.context() as patch:
            # a kill between any two of the system calls that make a file durable
            fail_after(patch, kills.randrange(6, 40), Killed())
            run = trainer(folder=RunFolder(tmp_path, resume=attempt > 0), **options)
            try:
                result = run.run()
                break
            except Killed:
                continue
    assert attempt > 1
    check_resumed(run, result, wanted)
    assert (tmp_path / "curve.csv").read_text().count("\n") == 1 + len(curve)
    seconds = [row.seconds for row in result.curve]
    assert seconds == sorted(seconds)


def test_a_killed_process_leaves_what_it_takes(tmp_path: Path, whole: tuple[Any, Any]) -> None:
    out = tmp_path / "run"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-m", "tests.distill_run", str(out)], cwd=ROOT, env=environment)
    try:
        until = time.monotonic() + 120
        while not (out / "curve.csv").exists() and process.poll() is None and time.monotonic() < until:
            time.sleep(0.01)
        time.sleep(random.random() * 0.5)
        process.send_signal(signal.SIGKILL)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == -signal.SIGKILL
    run = trainer(folder=RunFolder(out, resume=True))
    result = run.run()
    check_resumed(run, result, whole)


def test_a_kill_in_the_first_inversion_can_be_resumed(tmp_path: Path) -> None:
    def killed(labels: list[int], ids: list[int]) -> SparseImages:
        raise Killed

    source = Alternating(killed, images_per_round=6, steps_per_round=7)
    with pytest.raises(Killed):
        trainer(source, folder=RunFolder(tmp_path)).run()
    assert trainer(folder=RunFolder(tmp_path, resume=True), steps=40).run().steps == 40


def test_stop_and_interrupt_leave_a_checkpoint(tmp_path: Path, whole: tuple[Any, Any]) -> None:
    stop = threading.Event()
    stop.set()
    result = trainer(folder=RunFolder(tmp_path)).run(stop)
    assert (result.steps, result.interrupted) == (0, True)

    def interrupted(labels: list[int], ids: list[int]) -> SparseImages:
        if ids[0] == 12:
            raise KeyboardInterrupt
        return invert(labels, ids)

    source = Alternating(interrupted, images_per_round=6, steps_per_round=7)
    result = trainer(source, folder=RunFolder(tmp_path, resume=True)).run()
    assert (result.steps, result.interrupted) == (14, True)
    run = trainer(folder=RunFolder(tmp_path, resume=True))
    check_resumed(run, run.run(), whole)
    again = trainer(folder=RunFolder(tmp_path, resume=True))  # of a run that is done
    check_resumed(again, again.run(), whole)


# --- what is refused ---


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": 0.02}, "resume=True: lr=0.02, but .* was made with 0.01"),
        ({"steps": 41}, "resume=True: steps=41"),
        ({"mode": "probe"}, "resume=True: mode='probe'"),
        ({"source": image_set()}, "resume=True: source="),
        ({"source": alternating(identity={"iterations": 5})}, "resume=True: source=.*iterations"),
    ],
    ids=["lr", "steps", "mode", "images", "identity"],
)
def test_a_changed_training_is_not_resumed(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    stop = threading.Event()
    stop.set()
    trainer(folder=RunFolder(tmp_path)).run(stop)
    before = (tmp_path / "checkpoint.safetensors").read_bytes()
    with pytest.raises(ValueError, match=message):
        trainer(folder=RunFolder(tmp_path, resume=True), **options).run()
    assert (tmp_path / "checkpoint.safetensors").read_bytes() == before


def test_folders(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no checkpoint in out="):
        RunFolder(tmp_path, resume=True)
    with pytest.raises(ValueError, match="exclude each other"):
        RunFolder(tmp_path, resume=True, overwrite=True)
    (tmp_path / "mine.txt").write_text("kept")
    with pytest.raises(FileExistsError, match="is not empty"):
        RunFolder(tmp_path)
    with pytest.raises(NotADirectoryError, match="is a file"):
        RunFolder(tmp_path / "mine.txt")
    folder = RunFolder(tmp_path, overwrite=True)
    trainer(folder=folder, steps=2).run()
    assert (tmp_path / "rounds" / "000000.safetensors").exists()
    RunFolder(tmp_path, overwrite=True).begin({})
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
    (tmp_path / "checkpoint.safetensors").write_bytes(b"half")
    with pytest.raises(ValueError, match=r"not a whole smi_fast\.distill/1 file"):
        RunFolder(tmp_path, resume=True).begin({})


def with_rows(images: SparseImages, **values: int) -> SparseImages:
    for name, value in values.items():
        getattr(images, name)[:] = value
    return images


@pytest.mark.parametrize(
    ("teacher", "student", "images", "message"),
    [
        ({}, {"num_classes": 4}, image_set(), "student='student' has 4 classes, teacher='teacher' 5"),
        ({}, {"patch_size": 2}, image_set(), "teacher has 3 x 4 patches .* student 6 x 8"),
        ({"img_size": (32, 32)}, {"img_size": (16, 16)}, image_set(), "images are .24, 32. pixels: teacher="),
        ({}, {}, ImageSet(torch.zeros(1, 3, 24, 32), torch.tensor([[3, 2]])), "ids must ascend"),
        ({}, {}, make_images(), r"images are made for Grid\(height=16"),
        ({}, {}, with_rows(make_images(4, GRID, names=None), labels=5), "images have the label 5: .* has 0..4"),
        ({}, {}, with_rows(make_images(4, GRID), failed_at=3), "all 4 failed"),
        ({}, {}, make_images(4, GRID)[:0], "images is empty"),
    ],
    ids=["classes", "grid", "pixels", "keep", "images", "labels", "failed", "empty"],
)
def test_what_does_not_fit_is_refused(teacher: Any, student: Any, images: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Trainer(
            from_timm(build_vit(**teacher), TEACHER),
            Student(build_vit(**(SMALLER | student)), STUDENT),
            config(),
            images,
        )


def test_a_loss_that_is_not_finite_ends_the_training() -> None:
    with pytest.raises(ValueError, match=r"lr=1e\+30: the loss is (nan|inf) after step"):
        trainer(image_set(), lr=1e30).run()


@pytest.mark.parametrize("name", ["images_per_round", "steps_per_round"])
def test_rounds_that_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}=0: must be"):
        alternating(**{name: 0})
