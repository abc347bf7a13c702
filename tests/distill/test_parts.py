"""What a training is made of: the resize between two models, students on kept patches, the pool, the loss."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor

from smi_fast.distill.config import DistillConfig
from smi_fast.distill.loss import distillation_loss
from smi_fast.distill.pool import ImageSet, Known, Pool, draw, mirror
from smi_fast.distill.resize import for_student
from smi_fast.distill.student import Student, StudentWeights, build_student, probe_features
from smi_fast.kernels.common.grid import Grid
from smi_fast.kernels.patch_mask import patch_mask
from smi_fast.model.from_timm import from_timm
from smi_fast.model.spec import ModelInfo
from smi_fast.storage.files import save_tensors
from tests.conftest import build_vit
from tests.fakes import Takes

TEACHER = ModelInfo("teacher", "0" * 64, (0.5, 0.4, 0.3), (0.25, 0.2, 0.3))
STUDENT = ModelInfo("student", "1" * 64, (0.48, 0.45, 0.4), (0.23, 0.22, 0.21))
SMALL = Grid(24, 32, 8)
GRIDS = (Grid(42, 56, 14), Grid(9, 12, 3), Grid(24, 32, 8))

pytestmark = pytest.mark.usefixtures("one_thread")


def random_keep(images: int, kept: int, patches: int) -> Tensor:
    draws = torch.Generator().manual_seed(images + kept)
    return torch.stack([torch.randperm(patches, generator=draws)[:kept].sort().values for _ in range(images)])


# --- resize ---


@pytest.mark.parametrize("to", GRIDS, ids=str)
def test_dropped_pixels_reach_no_kept_one(to: Grid) -> None:
    pixels, keep = torch.randn(3, 3, 24, 32), random_keep(3, 5, SMALL.patches)
    dropped, kept = ~patch_mask(keep, SMALL)[:, None], patch_mask(keep, to)[:, None].expand(-1, 3, -1, -1)
    other = torch.where(dropped, torch.inf, pixels)
    results = [for_student(x, keep, Takes(TEACHER, SMALL), Takes(STUDENT, to)) for x in (pixels, other)]
    assert torch.equal(results[0][kept], results[1][kept])
    assert results[0][kept].isfinite().all()


@pytest.mark.parametrize("to", GRIDS, ids=str)
@pytest.mark.parametrize("named", [False, True])
def test_dense_images_are_resized_as_torch_does(to: Grid, named: bool) -> None:
    pixels = torch.randn(2, 3, 24, 32, dtype=torch.float64)
    keep = torch.arange(SMALL.patches).expand(2, -1) if named else None
    mean, std, to_mean, to_std = (
        torch.tensor(c, dtype=torch.float64)[:, None, None]
        for c in (TEACHER.mean, TEACHER.std, STUDENT.mean, STUDENT.std)
    )
    colours = F.interpolate(
        pixels * std + mean, (to.height, to.width), mode="bilinear", align_corners=False, antialias=to.height < 24
    )
    result = for_student(pixels, keep, Takes(TEACHER, SMALL), Takes(STUDENT, to))
    torch.testing.assert_close(result, (colours - to_mean) / to_std, rtol=0, atol=1e-12)


def test_a_constant_stays_one_wherever_patches_were_dropped() -> None:
    keep, to = random_keep(4, 3, SMALL.patches), GRIDS[0]
    result = for_student(torch.full((4, 3, 24, 32), 0.7), keep, Takes(TEACHER, SMALL), Takes(TEACHER, to))
    kept = result[patch_mask(keep, to)[:, None].expand(-1, 3, -1, -1)]
    torch.testing.assert_close(kept, torch.full_like(kept, 0.7), rtol=1e-6, atol=0)


def test_other_grids_are_refused() -> None:
    with pytest.raises(ValueError, match=r"teacher has 3 x 4 patches .* student 4 x 4 "):
        for_student(torch.zeros(1, 3, 24, 32), None, Takes(TEACHER, SMALL), Takes(STUDENT, Grid(32, 32, 8)))


# --- students ---


@pytest.mark.parametrize("options", [{}, {"reg_tokens": 2}, {"global_pool": "avg"}, {"no_embed_class": True}], ids=str)
def test_a_student_on_kept_patches_is_the_sparse_vit(options: dict[str, Any]) -> None:
    vit = build_vit(**options)
    ours, student = from_timm(vit, TEACHER), Student(vit, TEACHER)
    keep, results = random_keep(3, 5, 12), []
    for run in (ours, student.logits):
        pixels = torch.randn(3, 3, 24, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
        logits = run(pixels, keep)
        logits = logits[0] if isinstance(logits, tuple) else logits
        (gradient,) = torch.autograd.grad(logits.square().sum(), pixels)
        results.append((logits.detach(), gradient))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5 * float(other.abs().max()))
    dense = torch.randn(2, 3, 24, 32)
    assert torch.equal(student.vit(dense), student.logits(dense))
    assert torch.equal(student.vit.head(probe_features(student, [dense[:1], dense[1:]])), student.vit(dense))


def test_weight_gradients_are_those_of_the_kept_tokens_alone() -> None:
    student = Student(build_vit(), TEACHER)
    pixels, keep = torch.randn(2, 3, 24, 32), random_keep(2, 4, 12)
    gradients = []
    for fill in (0.0, 9.0):
        shown = torch.where(patch_mask(keep, SMALL)[:, None], pixels, fill)
        student.vit.zero_grad()
        student.logits(shown, keep).square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in student.vit.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_state_dict_has_no_trace_of_kept_patches() -> None:
    student = build_student("vit_tiny_patch16_224", 5, img_size=32)
    plain = timm.create_model("vit_tiny_patch16_224", num_classes=5, img_size=32)
    assert list(student.vit.state_dict()) == list(plain.state_dict())
    assert student.grid == Grid(32, 32, 16)


@pytest.fixture(scope="module")
def scratch(one_thread: None) -> Student:
    return build_student("demo", 10, weights=StudentWeights(seed=3))


def test_a_backbone_gets_a_new_head_and_keeps_its_weights(scratch: Student, tmp_path: Path) -> None:
    path = tmp_path / "backbone.safetensors"
    state = {name: tensor for name, tensor in scratch.vit.state_dict().items() if not name.startswith("head.")}
    save_tensors(path, "test/1", state, {}, overwrite=False)
    built = build_student("demo", 4, weights=StudentWeights(path, seed=5))
    assert built.vit.head.weight.shape == (4, 192)
    assert all(torch.equal(built.vit.state_dict()[name], tensor) for name, tensor in state.items())


def test_new_head_replaces_that_of_the_checkpoint(scratch: Student, tmp_path: Path) -> None:
    path = tmp_path / "whole.safetensors"
    save_tensors(path, "test/1", scratch.vit.state_dict(), {}, overwrite=False)
    heads = [build_student("demo", 10, weights=StudentWeights(path, new_head=new)).vit.head for new in (True, False)]
    assert [torch.equal(head.weight, scratch.vit.head.weight) for head in heads] == [False, True]
    with pytest.raises(ValueError, match=r"head.weight is \(10, 192\), the model's is \(4, 192\)"):
        build_student("demo", 4, weights=StudentWeights(path))


def test_weights_from_scratch_hang_on_the_seed(scratch: Student) -> None:
    again, other = (build_student("demo", 10, weights=StudentWeights(seed=seed)) for seed in (3, 4))
    assert again.info.sha256 == scratch.info.sha256 != other.info.sha256


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("vit_tinny", {}, "name='vit_tinny': neither"),
        ("resnet18", {}, "it is a ResNet"),
        ("deit_tiny_distilled_patch16_224", {}, "it has two heads"),
        ("demo", {"img_size": 30}, "img_size=30"),
        ("demo", {"weights": StudentWeights(pretrained=True)}, "pretrained=True and name='demo'"),
        ("demo", {"num_classes": 0}, "num_classes=0"),
    ],
)
def test_students_that_are_refused(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_student(name, **({"num_classes": 10} | options))


def test_one_source_of_weights() -> None:
    with pytest.raises(ValueError, match=r"pretrained=True and checkpoint='a\.pth': give one source"):
        StudentWeights("a.pth", pretrained=True)


# --- pool ---


def test_mirroring_moves_ids_with_their_pixels() -> None:
    grid, keep = Grid(4, 6, 2), torch.tensor([[0, 4, 5], [1, 2, 3]])
    pixels = torch.randn(2, 3, 4, 6)
    result = mirror(ImageSet(pixels, keep), torch.tensor([True, False]), grid)
    assert result.keep is not None
    assert result.keep.tolist() == [[2, 3, 4], [1, 2, 3]]
    assert torch.equal(result.pixels[0], pixels[0].flip(2))
    assert torch.equal(result.pixels[1], pixels[1])
    assert torch.equal(patch_mask(result.keep, grid)[0], patch_mask(keep, grid)[0].flip(1))


def test_draws_hang_on_seed_and_step_alone() -> None:
    positions, flips = draw(3, 17, 40, 32, True)
    again, _ = draw(3, 17, 40, 32, True)
    assert torch.equal(positions, again)
    assert len(set(positions.tolist())) == 32
    assert 0 < int(flips.sum()) < 32
    assert not torch.equal(positions, draw(3, 18, 40, 32, True)[0])
    assert not torch.equal(positions, draw(4, 17, 40, 32, True)[0])
    assert not draw(3, 17, 40, 32, False)[1].any()
    assert draw(0, 0, 3, 32, True)[0].max() == 2


def numbered(first: int, count: int, kept: int | None = None) -> tuple[ImageSet, Known]:
    values = torch.arange(first, first + count, dtype=torch.float32)
    pixels = values[:, None, None, None].expand(-1, 3, 4, 6).contiguous()
    keep = None if kept is None else torch.arange(kept).expand(count, -1)
    return ImageSet(pixels, keep), Known(values[:, None, None], None)


def test_the_oldest_leave_first() -> None:
    pool = Pool(7, Grid(4, 6, 2))
    for first in (0, 4, 8):
        pool.add(*numbered(first, 4, kept=2))
    assert len(pool) == 7
    assert pool.logits is not None
    assert pool.logits.flatten().tolist() == list(range(5, 12))
    pool.add(*numbered(12, 9, kept=2))
    assert pool.logits.flatten().tolist() == list(range(14, 21))


def test_batches_have_one_number_of_kept_patches_each() -> None:
    pool = Pool(None, Grid(4, 6, 2))
    for first, kept in ((0, 2), (4, 3), (8, 2), (12, None)):
        pool.add(*numbered(first, 4, kept))
    positions = torch.tensor([9, 0, 5, 13, 1])
    found = torch.full((5,), -1.0)
    shapes = []
    for rows, images in pool.take(positions, torch.zeros(5, dtype=torch.bool)):
        found[rows] = images.pixels[:, 0, 0, 0]
        shapes.append(None if images.keep is None else tuple(images.keep.shape))
    assert found.tolist() == positions.tolist()
    assert shapes == [(3, 2), (1, 3), None]


@pytest.mark.parametrize(
    ("pixels", "keep", "message"),
    [
        (torch.zeros(0, 3, 4, 4), None, "at least one image"),
        (torch.zeros(2, 3, 4, 4).double(), None, "float64: must be"),
        (torch.zeros(2, 3, 4, 4), torch.zeros(3, 1, dtype=torch.int64), r"keep is \[3, 1\]"),
    ],
)
def test_images_that_are_refused(pixels: Tensor, keep: Tensor | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ImageSet(pixels, keep)


# --- loss and configuration ---


def test_loss_is_eq_6() -> None:
    teacher, student = np.random.default_rng(0).normal(size=(2, 6, 5)) * 8
    p, q = (np.exp(x / 20) / np.exp(x / 20).sum(1, keepdims=True) for x in (teacher, student))
    wanted = (p * np.log(p / q)).sum(1).mean()
    logits = torch.from_numpy(teacher), torch.from_numpy(student)
    assert float(distillation_loss(*logits, 20, scale_by_t2=False)) == pytest.approx(wanted, rel=1e-10)
    assert float(distillation_loss(*logits, 20)) == pytest.approx(400 * wanted, rel=1e-10)


def test_defaults_are_the_papers() -> None:
    c = DistillConfig(steps=1)
    assert (c.temperature, c.lr, c.momentum, c.weight_decay, c.batch_size) == (20, 0.1, 0.9, 1e-4, 128)
    assert DistillConfig(steps=10, lr_schedule="cosine").lr_at(5) == pytest.approx(0.05)


@pytest.mark.parametrize(
    "wrong",
    [
        {"steps": 0},
        {"steps": True},
        {"mode": "both"},
        {"temperature": 0},
        {"lr": float("nan")},
        {"lr_schedule": "step"},
        {"momentum": 1},
        {"weight_decay": -1},
        {"optimizer": "lion"},
        {"batch_size": 0},
        {"pool": 0},
        {"seed": -1},
        {"eval_every": 0},
        {"checkpoint_every": 0},
        {"cache": "yes"},
    ],
    ids=str,
)
def test_configurations_that_are_refused(wrong: dict[str, Any]) -> None:
    (name,) = wrong
    with pytest.raises(ValueError, match=f"^{name}={wrong[name]!r}: must be"):
        DistillConfig(**({"steps": 1} | wrong))
