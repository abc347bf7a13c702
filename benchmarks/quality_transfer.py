"""Accuracy of students by the images they learned from, as in Table 4, Table 5 and Figure 4 of the paper."""

import argparse
from collections.abc import Callable
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from benchmarks.common import about, write_csv
from benchmarks.quality_images import KINDS, Images, Source
from benchmarks.quality_quantize import read, test_name
from smi_fast.datasets import RealImages
from smi_fast.distill import DistillConfig, ImageSet, Student, Trainer, build_student, probe_features
from smi_fast.model.from_timm import weights_sha256
from smi_fast.model.spec import ModelInfo

# lr 0.1 of the paper, times T^2, is too large for features that LayerNorm leaves this long: accuracy stays at chance
PROBE = {"mode": "probe", "lr": 1e-3, "steps": 1000, "eval_every": 1000}
SCRATCH = {"mode": "finetune", "optimizer": "adamw", "lr": 1e-3, "weight_decay": 0.05, "lr_schedule": "cosine"}
SCRATCH_STEPS = 150
BATCH = 128


def run(args: argparse.Namespace, source: Source, test: RealImages) -> None:
    """All rows that the CSV does not have yet."""
    setting = {"teacher": source.teacher.info.name, "data": test_name(test)}
    setting |= {"test_images": len(test), "iterations": source.iterations}
    rows = read(args.out, setting)
    known = {key(row) for row in rows}
    evaluators: dict[str, Callable[[nn.Module], float]] = {}
    for name in args.students:
        sizes = args.sizes if name == "probe" else args.sizes[-1:]
        for replicate in range(args.seeds):
            for count in sizes:
                for kind in KINDS:
                    row: dict[str, Any] = {"student": name, "kind": kind, "seed": replicate, "images": count}
                    if key(row) in known:
                        continue
                    # replicates are as far apart as the largest size, so that sizes of one are nested
                    images = first(source.take(kind, replicate, args.sizes[-1]), count, args.sizes[-1])
                    student = make_student(name, args, source, replicate)
                    if name not in evaluators:
                        evaluators[name] = evaluator(name, student, test, args)
                    row |= train(name, source, student, images, evaluators[name], replicate)
                    rows.append(row | setting | about(args.device))
                    print(rows[-1], flush=True)
                    write_csv(rows, args.out)


def key(row: dict[str, Any]) -> tuple[str, ...]:
    """What a row is about."""
    return tuple(str(row[name]) for name in ("student", "kind", "seed", "images"))


def first(images: Images, count: int, of: int) -> Images:
    """The first ``count`` of ``of`` images."""
    keep = None if images.keep is None else images.keep[:count]
    return Images(images.pixels[:count], keep, images.seconds * count / of)


def make_student(name: str, args: argparse.Namespace, source: Source, seed: int) -> Student:
    """A new student: a head on a frozen backbone ("probe"), or a small ViT with random weights ("scratch")."""
    classes, device = source.teacher.shape.num_classes, source.teacher.device
    if name == "probe":
        size, file = args.student_size, args.student_checkpoint
        return build_student(
            args.student, classes, img_size=size, checkpoint=file, new_head=True, seed=seed, device=device
        )
    grid, info = source.teacher.grid, source.teacher.info
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        sizes = {"img_size": (grid.height, grid.width), "patch_size": grid.patch, "num_classes": classes}
        vit = VisionTransformer(**sizes, embed_dim=96, depth=4, num_heads=3).to(device)
    for block in vit.blocks:
        block.attn.fused_attn = device.type != "cpu"
    return Student(vit, ModelInfo("scratch", weights_sha256(vit), info.mean, info.std))


def evaluator(name: str, student: Student, test: RealImages, args: argparse.Namespace) -> Callable[[nn.Module], float]:
    """Top-1 on whole real images; what a frozen backbone says of them is worked out once, and kept in a file."""
    assert test.labels is not None
    labels, device = test.labels, student.device

    def batches() -> Any:
        return (pixels for pixels, _ in test.batches(student.info, student.grid, BATCH))

    if name != "probe":

        def dense(vit: nn.Module) -> float:
            found = torch.cat([vit(pixels.to(device)).argmax(1).cpu() for pixels in batches()])
            return float((found == labels).double().mean())

        return dense
    path = args.work / f"{test_name(test)}-{len(test)}-{backbone(student)}.safetensors"
    if not path.exists():
        print(f"features of {len(test)} test images", flush=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({"features": probe_features(student, batches()).cpu().contiguous()}, path)
    features: Tensor = load_file(path)["features"].to(device)
    return lambda vit: float((vit.head(features).argmax(1).cpu() == labels).double().mean())


def backbone(student: Student) -> str:
    """A name for the frozen weights, whatever the head is."""
    head, student.vit.head = student.vit.head, nn.Identity()
    name = weights_sha256(student.vit)[:12]
    student.vit.head = head
    return name


def train(
    name: str, source: Source, student: Student, images: Images, judge: Callable[[nn.Module], float], seed: int
) -> dict[str, Any]:
    """One student; its accuracy, and the seconds of inversion and training."""
    chosen: dict[str, Any] = PROBE if name == "probe" else SCRATCH
    steps = chosen.get("steps", SCRATCH_STEPS)
    config = DistillConfig(**{"steps": steps, "seed": seed, "eval_every": steps, **chosen})
    device = source.teacher.device
    pool = ImageSet(images.pixels.to(device), None if images.keep is None else images.keep.to(device))
    result = Trainer(source.teacher, student, config, pool, evaluate=judge).run()
    accuracy = result.curve[-1].accuracy
    assert accuracy is not None
    seconds = {"inversion_s": round(images.seconds, 1), "training_s": round(result.seconds, 1)}
    return {"top1": round(accuracy, 5), "steps": steps, **seconds}
