"""The students that `transfer` trains, and their top-1 on whole real images."""

import argparse
from collections.abc import Callable, Iterator
from importlib import resources
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from benchmarks.paper.images import Source, test_name
from smi_fast.datasets import RealImages
from smi_fast.distill import Student, StudentWeights, build_student, probe_features
from smi_fast.model.from_timm import weights_sha256
from smi_fast.model.spec import ModelInfo

# "probe": a head on a frozen generic backbone; "own": on the teacher's; "scratch": a small ViT with random weights
STUDENTS = ("probe", "own", "scratch")
BATCH = 128
Judge = Callable[[nn.Module], float]


def make_student(name: str, args: argparse.Namespace, source: Source, seed: int) -> Student:
    """A new student, one of `STUDENTS`; all that starts from scratch depends on the seed."""
    teacher = source.teacher
    classes, device, info = teacher.shape.num_classes, teacher.device, teacher.info
    if name == "probe":
        file: Path | None = args.student_checkpoint
        weights = StudentWeights(file, pretrained=file is None, new_head=True, seed=seed)
        return build_student(args.student, classes, img_size=args.student_size, weights=weights, device=device)
    if name == "own":
        with resources.as_file(resources.files("smi_fast.model") / "assets" / "demo.safetensors") as demo:
            own = Path(demo) if info.name == "demo" else None
            weights = StudentWeights(own, pretrained=own is None, new_head=True, seed=seed)
            return build_student(info.name, classes, weights=weights, device=device)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        grid = teacher.grid
        sizes = {"img_size": (grid.height, grid.width), "patch_size": grid.patch, "num_classes": classes}
        vit = VisionTransformer(**sizes, embed_dim=96, depth=4, num_heads=3).to(device)
    for block in vit.blocks:
        block.attn.fused_attn = device.type != "cpu"
    return Student(vit, ModelInfo("scratch", weights_sha256(vit), info.mean, info.std))


def judge(name: str, student: Student, test: RealImages, args: argparse.Namespace) -> Judge:
    """Top-1 on ``test``; what a frozen backbone says of the images is worked out once, and kept in a file."""
    assert test.labels is not None
    labels, device = test.labels, student.device

    def batches() -> Iterator[Tensor]:
        return (pixels for pixels, _ in test.batches(student, BATCH))

    if name == "scratch":

        def dense(vit: nn.Module) -> float:
            with torch.no_grad():
                found = torch.cat([vit(pixels.to(device)).argmax(1).cpu() for pixels in batches()])
            return share(found == labels)

        return dense
    path = args.work / f"{test_name(test)}-{len(test)}-{backbone(student)}.safetensors"
    if not path.exists():
        print(f"features of {len(test)} test images", flush=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({"features": probe_features(student, batches()).cpu().contiguous()}, path)
    features: Tensor = load_file(path)["features"].to(device)
    return lambda vit: share(vit.head(features).argmax(1).cpu() == labels)


def share(hits: Tensor) -> float:
    """Of what is true."""
    return float(hits.double().mean())


def backbone(student: Student) -> str:
    """A name for the frozen weights, whatever the head is."""
    head, student.vit.head = student.vit.head, nn.Identity()
    name = weights_sha256(student.vit)[:12]
    student.vit.head = head
    return name
