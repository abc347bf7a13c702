"""Accuracy of students by the images they learned from, as in Table 4, Table 5 and Figure 4 of the paper.

    python -m benchmarks run student-weights --out runs/vit_small_patch14.safetensors
    python -m benchmarks run transfer --data cifar10:package --student-checkpoint runs/vit_small_patch14.safetensors

Inverted images are kept in ``--work`` and shared with `quantize`; a run that was cut off goes on with the rows that its
CSV lacks.
"""

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.experiment import Row, experiment, table
from benchmarks.harness.arguments import Parser, positive
from benchmarks.harness.results import RESULTS, Results
from benchmarks.harness.tables import markdown
from benchmarks.paper.images import KINDS, Images, Source, add_arguments, open_source, test_name
from benchmarks.paper.replicates import mean_and_deviation, measured_with, plot, points
from benchmarks.paper.students import STUDENTS, Judge, judge, make_student, share
from smi_fast.datasets import RealImages
from smi_fast.distill import DistillConfig, ImageSet, Student, Trainer
from smi_fast.distill.pair import Pair

# lr 0.1 of the paper, times T^2, is too large for features that LayerNorm leaves this long: accuracy stays at chance
PROBE: dict[str, Any] = {"mode": "probe", "lr": 1e-3, "steps": 1000}
SCRATCH: dict[str, Any] = {"mode": "finetune", "optimizer": "adamw", "lr": 1e-3, "weight_decay": 0.05}
SCRATCH |= {"lr_schedule": "cosine", "steps": 150}
HELD_OUT = 64  # images of the same kind that the student has not seen


@experiment("transfer", "top-1 of students by the images they learned from (paper: Tables 4 and 5, Figure 4)")
def main(arguments: Sequence[str]) -> None:
    """Parse, measure, draw."""
    parser = Parser("transfer", __doc__)
    add_arguments(parser, seeds=3)
    parser.add_argument("--sizes", type=positive, nargs="+", default=[16, 32, 64, 128], help="numbers of images")
    parser.add_argument("--students", nargs="+", default=list(STUDENTS), choices=STUDENTS)
    parser.add_argument("--student", default="vit_small_patch14_dinov2", help="timm name of the backbone")
    parser.add_argument("--student-checkpoint", type=Path, help="its weights [default: timm's]")
    parser.add_argument("--student-size", type=positive, default=112, help="side of its images; same grid of patches")
    parser.add_argument("--plot", type=Path, help="a picture of the curves; needs matplotlib")
    args = parser.parse(arguments)
    args.sizes = sorted(args.sizes)
    source, test = open_source(args)
    out = args.out or RESULTS / f"quality-transfer-{args.teacher}.csv"
    results = Results(out, "transfer", args.device)
    run(args, source, test, results)
    if args.plot:
        plot(results.rows, args.plot)
        print(f"drawn to {args.plot}")


def run(args: argparse.Namespace, source: Source, test: RealImages, results: Results) -> None:
    """All rows that the CSV does not have yet; one is written as soon as it is known."""
    setting: dict[str, Any] = {"teacher": source.teacher.info.name, "data": test_name(test)}
    setting |= {"test_images": len(test), "iterations": source.iterations}
    results.resume(setting)
    judges: dict[str, Judge] = {}
    for row in wanted(args):
        if results.has(row):
            continue
        name, seed = row["student"], row["seed"]
        student = make_student(name, args, source, seed)
        if name not in judges:
            judges[name] = judge(name, student, test, args)
        # replicates are as far apart as the largest size, so that sizes of one are nested
        images = first(source.take(row["kind"], seed, args.sizes[-1]), row["images"], args.sizes[-1])
        row |= train(name, source, student, images, judges[name], seed)
        row["same_kind"] = ""
        if args.seeds > 1:
            others = source.take(row["kind"], (seed + 1) % args.seeds, args.sizes[-1])
            row["same_kind"] = agreement(source, student, first(others, HELD_OUT, args.sizes[-1]))
        results.append(row | setting, source.recipe(row["kind"]))
        print(row, flush=True)


def wanted(args: argparse.Namespace) -> list[dict[str, Any]]:
    """What each row is about; a ViT from scratch is trained on the largest size alone."""
    return [
        {"student": name, "kind": kind, "seed": seed, "images": count}
        for name in args.students
        for seed in range(args.seeds)
        for count in (args.sizes[-1:] if name == "scratch" else args.sizes)
        for kind in KINDS
    ]


def first(images: Images, count: int, of: int) -> Images:
    """The first ``count`` of ``of`` images."""
    keep = None if images.keep is None else images.keep[:count]
    return Images(images.pixels[:count], keep, images.seconds * count / of)


def train(name: str, source: Source, student: Student, images: Images, top1: Judge, seed: int) -> dict[str, Any]:
    """One student; its accuracy, and the seconds of inversion and training."""
    chosen = SCRATCH if name == "scratch" else PROBE
    config = DistillConfig(**chosen, seed=seed, eval_every=chosen["steps"])
    result = Trainer(Pair(source.teacher, student), config, pool_of(source, images), evaluate=top1).run()
    accuracy = result.curve[-1].accuracy
    assert accuracy is not None
    seconds = {"inversion_s": round(images.seconds, 1), "training_s": round(result.seconds, 1)}
    return {"top1": round(accuracy, 5), "steps": result.steps, **seconds}


@torch.no_grad()
def agreement(source: Source, student: Student, images: Images) -> float:
    """The share of images to which student and teacher give the same class, both seeing kept patches alone."""
    pair, pool = Pair(source.teacher, student), pool_of(source, images)
    student.vit.eval()
    return round(share(pair.student_logits(pool).argmax(1) == pair.teacher_logits(pool).argmax(1)), 5)


def pool_of(source: Source, images: Images) -> ImageSet:
    """The images on the teacher's device."""
    device = source.teacher.device
    return ImageSet(images.pixels.to(device), None if images.keep is None else images.keep.to(device))


@table("students", "quality-transfer-demo.csv")
def transfer_table(rows: list[Row]) -> str:
    """Top-1 of students by what they learned from, a column a number of images."""
    sizes = sorted({int(row["images"]) for row in rows})
    columns = ["student", "images", *(f"{size} images" for size in sizes), "same kind", "s per image to invert"]
    lines = []
    for student, kind in groups(rows):
        mine = [row for row in rows if (row["student"], row["kind"]) == (student, kind)]
        found = [[float(row["top1"]) for row in mine if int(row["images"]) == size] for size in sizes]
        agreed = [float(row["same_kind"]) for row in mine if int(row["images"]) == sizes[-1] and row["same_kind"]]
        each = statistics.median(float(row["inversion_s"]) / int(row["images"]) for row in mine)
        agreed_cell = f"{statistics.mean(agreed) * 100:.0f}" if agreed else ""
        cells = [student, kind, *map(mean_and_deviation, found)]
        lines.append([*cells, agreed_cell, f"{each:.2f}" if each else ""])
    return markdown(measured_with(rows[0], rows[0]["test_images"]), columns, lines)


def groups(rows: list[Row]) -> list[tuple[str, str]]:
    """Students and kinds of images, in the order they were measured."""
    return [*dict.fromkeys((row["student"], row["kind"]) for row in rows)]


@table("images to match dense ones", "quality-transfer-demo.csv")
def reach_table(rows: list[Row]) -> str:
    """As Table 5 of the paper: what each kind of images takes to be as good as the most dense ones."""
    lines = []
    for student, kind in groups(rows):
        curves = {
            name: points([row for row in rows if (row["student"], row["kind"]) == (student, name)])
            for name in ("dense", kind)
        }
        if len(curves[kind]) < 2:
            continue
        aim = curves["dense"][-1].top1 - curves["dense"][-1].deviation
        there = next((point for point in curves[kind] if point.top1 >= aim), None)
        iterations = "" if kind not in ("dense", "sparse") else rows[0]["iterations"]
        cells = [str(there.images), iterations, f"{there.seconds:.0f}"] if there else ["not reached", "", ""]
        lines.append([student, f"{aim * 100:.2f}", kind, *cells])
    about = (
        "The fewest images of each kind that reach, replicates averaged, the top-1 of the most dense images less one "
        "standard deviation."
    )
    columns = ["student", "top-1 to reach", "kind", "images", "iterations each", "seconds to invert and train"]
    return markdown(about, columns, lines)
