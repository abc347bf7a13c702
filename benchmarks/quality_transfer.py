"""Accuracy of students by the images they learned from, as in Table 4, Table 5 and Figure 4 of the paper."""

import argparse
from typing import Any

import torch

from benchmarks.common import about, write_csv
from benchmarks.quality_images import KINDS, Images, Source, test_name
from benchmarks.quality_quantize import read
from benchmarks.quality_students import Judge, judge, make_student, share
from smi_fast.datasets import RealImages
from smi_fast.distill import DistillConfig, ImageSet, Pair, Student, Trainer

# lr 0.1 of the paper, times T^2, is too large for features that LayerNorm leaves this long: accuracy stays at chance
PROBE: dict[str, Any] = {"mode": "probe", "lr": 1e-3, "steps": 1000}
SCRATCH: dict[str, Any] = {"mode": "finetune", "optimizer": "adamw", "lr": 1e-3, "weight_decay": 0.05}
SCRATCH |= {"lr_schedule": "cosine", "steps": 150}
HELD_OUT = 64  # images of the same kind that the student has not seen


def run(args: argparse.Namespace, source: Source, test: RealImages) -> None:
    """All rows that the CSV does not have yet."""
    setting = {"teacher": source.teacher.info.name, "data": test_name(test)}
    setting |= {"test_images": len(test), "iterations": source.iterations}
    rows = read(args.out, setting)
    known = {key(row) for row in rows}
    judges: dict[str, Judge] = {}
    for row in wanted(args):
        if key(row) in known:
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
        rows.append(row | setting | about(args.device))
        print(rows[-1], flush=True)
        write_csv(rows, args.out)


def wanted(args: argparse.Namespace) -> list[dict[str, Any]]:
    """What each row is about; a ViT from scratch is trained on the largest size alone."""
    return [
        {"student": name, "kind": kind, "seed": seed, "images": count}
        for name in args.students
        for seed in range(args.seeds)
        for count in (args.sizes[-1:] if name == "scratch" else args.sizes)
        for kind in KINDS
    ]


def key(row: dict[str, Any]) -> tuple[str, ...]:
    """What a row is about."""
    return tuple(str(row[name]) for name in ("student", "kind", "seed", "images"))


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
