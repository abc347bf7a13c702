"""``smi-fast distill``: train a student on inverted images."""

import math
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, make_dataclass
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, ClassVar

import torch
import typer
from torch import Tensor, nn

from smi_fast.checks import check, count
from smi_fast.cli.command import command, options_of
from smi_fast.cli.distill_progress import TrainingBar
from smi_fast.cli.options import MachineOptions, Output
from smi_fast.cli.recipe import InversionOptions
from smi_fast.config import InversionConfig, help_text
from smi_fast.datasets import open_dataset, random_indices
from smi_fast.distill import (
    Alternating,
    DistillConfig,
    DistillResult,
    Pair,
    RunFolder,
    Student,
    StudentWeights,
    Trainer,
    build_student,
)
from smi_fast.distill.curves import has_tensorboard
from smi_fast.distill.folder import CHECKPOINT
from smi_fast.engine import Inverter
from smi_fast.images import SparseImages
from smi_fast.model import SparseViT, load_model
from smi_fast.storage.environment import device_name, peak_memory_bytes, versions
from smi_fast.storage.files import write_json
from smi_fast.storage.folder import IMAGES, REPORT, check_folder
from smi_fast.tuning.settings import Impl, Target, decide

EVALUATION_BATCH = 250
# of the training; how many steps there are follows from the rounds, where images are inverted on the way
TRAINING = [name for name in DistillConfig.__dataclass_fields__ if name not in ("steps", "checkpoint_every", "cache")]
_Training = make_dataclass("_Training", options_of(DistillConfig, TRAINING), frozen=True)


@dataclass(frozen=True)
class TrainingOptions(_Training):  # type: ignore[misc, valid-type]  # made from the fields of DistillConfig
    """All that `DistillConfig` has."""

    PANEL: ClassVar[str] = "Training"

    steps: int = field(default=1000, metadata=help_text("Optimiser steps, with --images."))
    rounds: int = field(default=10, metadata=help_text("Without --images: rounds of inversion and training."))
    images_per_round: int = field(default=128, metadata=help_text("Images that a round inverts."))
    steps_per_round: int = field(default=100, metadata=help_text("Optimiser steps that follow."))

    def config(self, alternating: bool) -> DistillConfig:
        """The configuration; raises ``ValueError`` where it breaks a rule."""
        for name in ("rounds", "images_per_round", "steps_per_round"):
            check(f"--{name.replace('_', '-')}", getattr(self, name), count(getattr(self, name)))
        steps = self.rounds * self.steps_per_round if alternating else self.steps
        return DistillConfig(steps=steps, **{name: getattr(self, name) for name in TRAINING})


@dataclass(frozen=True)
class ModelsOptions:
    """Teacher and student."""

    PANEL: ClassVar[str] = "Models"

    teacher: str = field(
        default="demo", metadata=help_text("'demo' (bundled), or the name of a timm Vision Transformer.")
    )
    teacher_checkpoint: Path | None = field(default=None, metadata=help_text("Weights for the teacher."))
    student: str = field(
        default="demo",
        metadata=help_text("'demo' (the bundled teacher's architecture, untrained), or a timm Vision Transformer."),
    )
    student_checkpoint: Path | None = field(default=None, metadata=help_text("Weights to start from; may lack a head."))
    student_pretrained: bool = field(
        default=False, metadata={"help": "Start from timm's pretrained weights.", "flags": ("--student-pretrained",)}
    )
    student_image_size: int | None = field(
        default=None,
        metadata=help_text("Side in pixels; must give the teacher's grid of patches. [default: the model's]"),
    )

    def load(self, dtype: torch.dtype, device: torch.device, config: DistillConfig) -> Pair:
        """Both models."""
        teacher = load_model(self.teacher, checkpoint=self.teacher_checkpoint, dtype=dtype, device=device)
        weights = StudentWeights(
            self.student_checkpoint, self.student_pretrained, new_head=config.mode == "probe", seed=config.seed
        )
        size, classes = self.student_image_size, teacher.shape.num_classes
        return Pair(teacher, build_student(self.student, classes, img_size=size, weights=weights, device=device))


@dataclass(frozen=True)
class EvaluationOptions:
    """How good the student is."""

    PANEL: ClassVar[str] = "Evaluation"

    evaluate: str | None = field(
        default=None,
        metadata=help_text("Real images to measure accuracy on: cifar10:PATH, imagenet:PATH, or folder:PATH."),
    )
    limit: int | None = field(
        default=None, metadata=help_text("Evaluate on so many, drawn by the seed. [default: all]")
    )
    tensorboard: bool | None = field(
        default=None, metadata=help_text("Write event files. [default: if TensorBoard is installed]")
    )


@dataclass(frozen=True)
class TrainingOutput(Output):
    """Results of a training, which may go on where it was interrupted."""

    resume: bool = field(
        default=False, metadata={"help": "Go on from the checkpoint in --out.", "flags": ("--resume",)}
    )

    def open(self, tensorboard: bool | None) -> RunFolder:
        """`RunFolder`, with the messages of the command line."""
        if self.resume and self.overwrite:
            raise ValueError("--resume and --overwrite exclude each other")
        if self.resume and not (self.out / CHECKPOINT).is_file():
            raise ValueError(f"--resume: there is no checkpoint in --out {str(self.out)!r}; start without --resume")
        check_folder(self.out, self.overwrite or self.resume)
        wanted = has_tensorboard() if tensorboard is None else tensorboard
        return RunFolder(self.out, resume=self.resume, overwrite=self.overwrite, tensorboard=wanted)


@command
def distill(
    output: TrainingOutput,
    models: ModelsOptions,
    training: TrainingOptions,
    inversion: InversionOptions,
    evaluation: EvaluationOptions,
    machine: MachineOptions,
    images: Annotated[
        Path | None,
        typer.Option(help="Saved images: a file, or a folder of `invert`. [default: invert images on the way]"),
    ] = None,
) -> None:
    """Train a student to answer as a teacher does, on inverted images and their kept patches alone."""
    config = training.config(images is None)
    if evaluation.limit is not None:
        check("--limit", evaluation.limit, count(evaluation.limit))
    recipe = inversion.load(seed=config.seed).config if images is None else None
    if recipe is not None:
        # a round is stored and never made again in part; with coupled images even its batches would matter
        recipe.require_independent("distill without --images")
    dtype, device = machine.target()
    folder = output.open(evaluation.tensorboard)
    saved = None if images is None else SparseImages.load(images / IMAGES if images.is_dir() else images)
    pair = models.load(dtype, device, config)
    console = output.console()
    source: SparseImages | Alternating
    if recipe is not None:
        source = _alternating(pair.teacher, recipe, machine.chosen_impl, training, console.print)
    else:
        assert saved is not None
        source = saved
    judge = (
        None if evaluation.evaluate is None else evaluator(evaluation.evaluate, pair.student, config, evaluation.limit)
    )
    with TrainingBar(console, config.steps) as bar:
        trainer = Trainer(pair, config, source, evaluate=judge, folder=folder, progress=bar)
        result = _run(trainer, bar)
    write_json(output.out / REPORT, _report(trainer, result, evaluation.evaluate, images), overwrite=True)
    best = "" if result.best is None else f", best accuracy {result.best:.4f}"
    typer.echo(f"{result.steps} steps on {result.images} images in {result.seconds:.1f} s{best}: {output.out}")
    if result.interrupted:
        console.print("interrupted: --resume goes on from here")
        raise typer.Exit(130)


def _alternating(
    vit: SparseViT, recipe: InversionConfig, impl: Impl, training: TrainingOptions, say: Callable[..., None]
) -> Alternating:
    """Images that are inverted between rounds of training."""
    images: int = training.images_per_round
    settings = decide(Target.of(vit), recipe, impl=impl, images=images)
    for note in settings.notes:
        say(note, soft_wrap=True, highlight=False)
    settings.apply(vit)
    inverter = Inverter(vit, recipe, batch_size=settings.batches, impl=settings.impl)
    return Alternating(inverter, images, training.steps_per_round, {"inversion": recipe.to_dict()})


def evaluator(spec: str, student: Student, config: DistillConfig, limit: int | None) -> Callable[[nn.Module], float]:
    """Top-1 on whole real images; of a frozen backbone, the features are worked out once.

    Raises:
        ValueError: the images have no labels, or classes other than the student's.
    """
    real, classes = open_dataset(spec), student.vit.num_classes
    if real.labels is None:
        raise ValueError(f"--evaluate {spec!r}: the images have no labels")
    if real.num_classes not in (None, classes):
        raise ValueError(f"--evaluate {spec!r}: has {real.num_classes} classes, teacher and student have {classes}")
    chosen = None if limit is None or limit >= len(real) else random_indices(len(real), limit, config.seed)
    seen: list[tuple[Tensor, Tensor]] = []

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for pixels, labels in real.batches(student, EVALUATION_BATCH, chosen):
            yield pixels.to(student.device), labels.to(student.device)

    def evaluate(vit: nn.Module) -> float:
        frozen = config.mode == "probe"
        if frozen and not seen:
            seen.extend((student.features(pixels), labels) for pixels, labels in batches())
        run = student.vit.head if frozen else vit
        hits = [(run(x).argmax(1) == labels) for x, labels in (seen if frozen else batches())]
        return torch.cat(hits).double().mean().item()

    return evaluate


@contextmanager
def _asked_to_stop(bar: TrainingBar) -> Iterator[threading.Event]:
    """Ctrl-C lets the step in work end; anywhere else, and the second time, it interrupts."""
    asked = threading.Event()

    def handle(number: int, frame: FrameType | None) -> None:
        if asked.is_set() or not bar.training:
            raise KeyboardInterrupt
        asked.set()

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, before)


def _run(trainer: Trainer, bar: TrainingBar) -> DistillResult:
    if threading.current_thread() is not threading.main_thread():
        return trainer.run()  # no other thread is told of signals
    with _asked_to_stop(bar) as asked:
        return trainer.run(asked)


def _report(trainer: Trainer, result: DistillResult, spec: str | None, images: Path | None) -> dict[str, Any]:
    teacher: SparseViT = trainer.pair.teacher
    last = result.curve[-1] if result.curve else None
    return {
        "steps": result.steps,
        "images": result.images,
        "interrupted": result.interrupted,
        "seconds": result.seconds,
        "loss": None if last is None or not math.isfinite(last.loss) else last.loss,
        "accuracy": None if last is None else last.accuracy,
        "best_accuracy": result.best,
        "evaluated_on": spec,
        "regime": "alternating" if images is None else "offline",
        "cached": trainer.cached,
        "fingerprint": trainer.fingerprint,
        "dtype": teacher.precision,
        "device": device_name(teacher.device),
        "peak_memory_bytes": peak_memory_bytes(teacher.device),
        "teacher": {"name": teacher.info.name, "sha256": teacher.info.sha256},
        "student": {"name": trainer.student.info.name, "started_from_sha256": trainer.student.info.sha256},
        "versions": versions(),
    }
