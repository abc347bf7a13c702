"""The training of a student: what it learns, what it writes, and what it may not be given."""

import csv
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from smi_fast.distill import Alternating, DistillConfig, ImageSet, Pair, RunFolder, Student, Trainer, build_student
from smi_fast.distill.curves import CurveRow, read_curve, write_curve
from smi_fast.distill.pool import draw
from smi_fast.images import SparseImages
from smi_fast.model.from_timm import from_timm
from tests.conftest import build_vit
from tests.distill.distill_run import GRID, SMALLER, STUDENT, TEACHER, alternating, config, image_set, invert, trainer
from tests.fakes import make_images

ROOT = Path(__file__).parent.parent.parent


pytestmark = pytest.mark.usefixtures("one_thread")


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


def test_the_pool_grows_by_rounds_of_balanced_labels() -> None:
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
    accuracies, folder = iter([0.5, 0.25]), RunFolder(out, tensorboard=True)
    Trainer(Pair(teacher, student), settings, images, evaluate=lambda _: next(accuracies), folder=folder).run()
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


# --- what is refused ---


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
    vit, learner = from_timm(build_vit(**teacher), TEACHER), Student(build_vit(**(SMALLER | student)), STUDENT)
    with pytest.raises(ValueError, match=message):
        Trainer(Pair(vit, learner), config(), images)


def test_a_loss_that_is_not_finite_ends_the_training() -> None:
    with pytest.raises(ValueError, match=r"lr=1e\+30: the loss is (nan|inf) after step"):
        trainer(image_set(), lr=1e30).run()


@pytest.mark.parametrize("name", ["images_per_round", "steps_per_round"])
def test_rounds_that_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}=0: must be"):
        alternating(**{name: 0})
