"""A small training, for the tests and for the process that one of them kills.

python -m tests.distill.distill_run OUT
"""

import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from smi_fast.distill import Alternating, DistillConfig, ImageSet, Pair, RunFolder, Student, Trainer
from smi_fast.images import SparseImages
from smi_fast.kernels.common.grid import Grid
from smi_fast.model.from_timm import from_timm
from smi_fast.model.spec import ModelInfo
from tests.conftest import build_vit
from tests.fakes import MEAN, STD, make_images

GRID = Grid(24, 32, 8)
TEACHER = ModelInfo("teacher", "0" * 64, MEAN, STD)
STUDENT = ModelInfo("student", "1" * 64, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
SMALLER: dict[str, Any] = {"img_size": (12, 16), "patch_size": 4, "embed_dim": 16}


def invert(labels: list[int], image_ids: list[int]) -> SparseImages:
    """Images that depend on their ids alone, as those of an `Inverter`; one of them failed."""
    images = make_images(image_ids[-1] + 1, GRID, names=None)[image_ids[0] :]
    images.labels[:] = torch.tensor(labels)
    images.image_ids[:] = torch.tensor(image_ids)
    return images


def evaluate(vit: nn.Module) -> float:
    """A number that any weight moves."""
    pixels = torch.randn(4, 3, 12, 16, generator=torch.Generator().manual_seed(1))
    return float(vit(pixels).double().sin().mean())


def config(**options: Any) -> DistillConfig:
    defaults: dict[str, Any] = {"steps": 40, "batch_size": 8, "eval_every": 9, "checkpoint_every": 4, "lr": 0.01}
    return DistillConfig(**(defaults | options))


def alternating(**options: Any) -> Alternating:
    return Alternating(invert, **({"images_per_round": 6, "steps_per_round": 7} | options))


def trainer(source: Any = None, folder: RunFolder | None = None, **options: Any) -> Trainer:
    """Over a pool that grows, whose bound cuts a round in two."""
    teacher, student = from_timm(build_vit(), TEACHER), Student(build_vit(**SMALLER), STUDENT)
    settings = config(**({"mode": "finetune", "pool": 15} | options))
    return Trainer(Pair(teacher, student), settings, source or alternating(), evaluate=evaluate, folder=folder)


def image_set(images: int = 10, kept: int | None = 5) -> ImageSet:
    whole = make_images(images, GRID, kept=kept or 5, names=None)
    return ImageSet(whole.pixels, None if kept is None else whole.keep)


if __name__ == "__main__":
    torch.set_num_threads(1)  # as the test has it
    run = trainer(folder=RunFolder(Path(sys.argv[1])))
    step = run._step

    def slowly() -> None:
        step()
        time.sleep(0.03)  # so that a kill falls into the training

    run._step = slowly  # type: ignore[method-assign]
    run.run()
