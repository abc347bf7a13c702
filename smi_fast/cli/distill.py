"""``smi-fast distill``: train a student on inverted images."""

import math
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from torch import Tensor, nn

from smi_fast.cli import options as o
from smi_fast.cli.distill_progress import TrainingBar
from smi_fast.cli.invert import use_tuned
from smi_fast.config import InversionConfig
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
from smi_fast.engine.batches import even_batches
from smi_fast.images import SparseImages
from smi_fast.model import SparseViT, load_model
from smi_fast.storage.environment import device_name, peak_memory_bytes, versions
from smi_fast.storage.files import write_json
from smi_fast.storage.folder import IMAGES, REPORT, check_folder

EVALUATION_BATCH = 250


def distill(
    out: Annotated[Path, typer.Option(help="Folder for the results; must be new or empty, or see --resume.")],
    teacher: Annotated[str, typer.Option(help="'demo' (bundled), or the name of a timm Vision Transformer.")] = "demo",
    teacher_checkpoint: Annotated[Path | None, typer.Option(help="Weights for the teacher.")] = None,
    student: Annotated[
        str, typer.Option(help="'demo' (the bundled teacher's architecture, untrained), or a timm Vision Transformer.")
    ] = "demo",
    student_checkpoint: Annotated[Path | None, typer.Option(help="Weights to start from; may lack a head.")] = None,
    student_pretrained: Annotated[
        bool, typer.Option("--student-pretrained", help="Start from timm's pretrained weights.")
    ] = False,
    student_image_size: Annotated[
        int | None, typer.Option(help="Side in pixels; must give the teacher's grid of patches. [default: the model's]")
    ] = None,
    mode: Annotated[str, typer.Option(help="probe: a new head on a frozen backbone; finetune: all weights.")] = "probe",
    images: Annotated[
        Path | None, typer.Option(help="Saved images: a file, or a folder of `invert`. [default: invert on the way]")
    ] = None,
    steps: Annotated[int, typer.Option(help="Optimiser steps, with --images.")] = 1000,
    rounds: Annotated[int, typer.Option(help="Without --images: rounds of inversion and training.")] = 10,
    images_per_round: Annotated[int, typer.Option(help="Images that a round inverts.")] = 128,
    steps_per_round: Annotated[int, typer.Option(help="Optimiser steps that follow.")] = 100,
    pool: Annotated[int, typer.Option(help="Most images to train on at a time; the oldest leave.")] = 10_000,
    iterations: o.Iterations = 4000,
    stop: o.Stops = None,
    dense: o.Dense = False,
    impl: o.Impl = "compiled",
    dtype: o.DType = "auto",
    batch_size: Annotated[int, typer.Option(help="Images an optimiser step.")] = 128,
    lr: Annotated[float, typer.Option(help="Learning rate.")] = 0.1,
    lr_schedule: Annotated[str, typer.Option(help="constant or cosine.")] = "constant",
    optimizer: Annotated[str, typer.Option(help="sgd, or adamw (for a ViT from scratch, at a lower --lr).")] = "sgd",
    weight_decay: Annotated[float, typer.Option(help="Weight decay.")] = 1e-4,
    temperature: Annotated[float, typer.Option(help="Of both softmaxes.")] = 20.0,
    seed: Annotated[int, typer.Option(help="Of images, batches, and weights that start from scratch.")] = 0,
    evaluate: Annotated[str | None, typer.Option(help="Real images to measure accuracy on, such as PATH.")] = None,
    eval_every: Annotated[int, typer.Option(help="Steps between two rows of the curve.")] = 100,
    limit: Annotated[int | None, typer.Option(help="Evaluate on so many, drawn by the seed. [default: all]")] = None,
    device: o.Device = "auto",
    tensorboard: Annotated[bool | None, typer.Option(help="Write event files. [default: if installed]")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the checkpoint in --out.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Write into a folder that is not empty.")] = False,
    quiet: o.Quiet = False,
) -> None:
    """Train a student to answer as a teacher does, on inverted images and their kept patches alone."""
    _check_numbers(rounds=rounds, images_per_round=images_per_round, steps_per_round=steps_per_round, limit=limit)
    config = DistillConfig(
        steps=rounds * steps_per_round if images is None else steps,
        mode=mode,  # type: ignore[arg-type]
        temperature=temperature,
        optimizer=optimizer,  # type: ignore[arg-type]
        lr=lr,
        lr_schedule=lr_schedule,  # type: ignore[arg-type]
        weight_decay=weight_decay,
        batch_size=batch_size,
        pool=pool,
        seed=seed,
        eval_every=eval_every,
    )
    stops = o.parse_stops(stop, dense, iterations) if images is None else ()
    inversion = InversionConfig(iterations=iterations, stops=stops, seed=seed)
    o.check_impl(impl)
    folder = _open_folder(out, resume, overwrite, tensorboard)
    where = o.parse_device(device)
    saved = None if images is None else SparseImages.load(images / IMAGES if images.is_dir() else images)
    vit = load_model(teacher, checkpoint=teacher_checkpoint, dtype=o.parse_dtype(dtype, where), device=where)
    learner = build_student(
        student,
        vit.shape.num_classes,
        img_size=student_image_size,
        weights=StudentWeights(student_checkpoint, student_pretrained, new_head=mode == "probe", seed=seed),
        device=where,
    )
    console = Console(stderr=True, quiet=quiet)
    source: SparseImages | Alternating
    if saved is not None:
        source = saved
    else:
        inverter = _inverter(vit, inversion, images_per_round, impl, console)
        source = Alternating(inverter, images_per_round, steps_per_round, {"inversion": inversion.to_dict()})
    judge = None if evaluate is None else evaluator(evaluate, learner, config, limit)
    with TrainingBar(console, config.steps) as bar:
        trainer = Trainer(Pair(vit, learner), config, source, evaluate=judge, folder=folder, progress=bar)
        result = _run(trainer, bar)
    write_json(out / REPORT, _report(trainer, result, evaluate, images), overwrite=True)
    best = "" if result.best is None else f", best accuracy {result.best:.4f}"
    typer.echo(f"{result.steps} steps on {result.images} images in {result.seconds:.1f} s{best}: {out}")
    if result.interrupted:
        console.print("interrupted: --resume goes on from here")
        raise typer.Exit(130)


def _inverter(vit: SparseViT, config: InversionConfig, images: int, impl: str, console: Console) -> Inverter:
    batches, _ = use_tuned(vit, config, impl, console)
    return Inverter(vit, config, batch_size=even_batches(images, batches), impl=impl)  # type: ignore[arg-type]


def _check_numbers(**numbers: int | None) -> None:
    for name, value in numbers.items():
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} {value}: must be at least 1")


def _open_folder(out: Path, resume: bool, overwrite: bool, tensorboard: bool | None) -> RunFolder:
    """`RunFolder`, with the messages of the command line."""
    if resume and overwrite:
        raise ValueError("--resume and --overwrite exclude each other")
    if resume and not (out / CHECKPOINT).is_file():
        raise ValueError(f"--resume: there is no checkpoint in --out {str(out)!r}; start without --resume")
    check_folder(out, overwrite or resume)
    wanted = has_tensorboard() if tensorboard is None else tensorboard
    return RunFolder(out, resume=resume, overwrite=overwrite, tensorboard=wanted)


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
