"""A training that is killed, stopped or out of disk goes on where it was, and nothing is lost."""

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
import torch
from safetensors import SafetensorError
from torch import Tensor

from smi_fast.distill import Alternating, RunFolder, Trainer
from smi_fast.images import SparseImages
from smi_fast.storage import files
from tests.distill.distill_run import alternating, image_set, invert, trainer

ROOT = Path(__file__).parent.parent.parent


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
    process = subprocess.Popen([sys.executable, "-m", "tests.distill.distill_run", str(out)], cwd=ROOT, env=environment)
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
