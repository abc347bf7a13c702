"""Train the kind of teacher that ships as ``demo``: a small DeiT-style ViT on CIFAR-10.

    python examples/train_teacher.py --data package/ --out teacher.safetensors

Recipe: Muon on the matrices of the blocks and AdamW on the rest, a learning rate that is warmed up, held, and
brought to zero linearly over the last ``--decay`` of the epochs; label smoothing 0.1; reflect-pad-4 crop and
flip; a share ``--drop-patches`` of the patches dropped in all but the last epochs, which halves their cost.
Prints the top-1 accuracy on the 10,000 test images. A checkpoint is written after each epoch, and
``--resume`` continues from it, with more epochs if asked.
"""

import argparse
import json
import os
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from timm.models.vision_transformer import VisionTransformer

from smi_fast.datasets.cifar10 import CLASSES, MEAN, STD, load_cifar10

BATCH = 256
Data = tuple[torch.Tensor, torch.Tensor]  # normalised pixels [n, 3, 32, 32] float32, labels [n] int64


def normalise(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 ``[n, 3, H, W]`` to float32 in CIFAR-10's normalised colour space."""
    mean, std = (torch.tensor(values, device=pixels.device).view(3, 1, 1) for values in (MEAN, STD))
    return (pixels.float() / 255 - mean) / std


def build_model(depth: int, width: int) -> VisionTransformer:
    """The demo geometry: 32 px, patch 4 (64 patches), heads of 64."""
    return VisionTransformer(
        img_size=32, patch_size=4, embed_dim=width, depth=depth, num_heads=width // 64, num_classes=len(CLASSES)
    )


def augment(pixels: torch.Tensor) -> torch.Tensor:
    """Reflect-pad-4 random crop and horizontal flip, per image; ``[B, 3, 32, 32]`` in and out."""
    batch, device = len(pixels), pixels.device
    padded = F.pad(pixels, (4, 4, 4, 4), mode="reflect")
    top, left = torch.randint(0, 9, (2, batch, 1), device=device)
    steps = torch.arange(32, device=device)
    flip = torch.rand(batch, 1, device=device) < 0.5
    rows = (top + steps)[:, None, :, None]
    columns = (left + torch.where(flip, 31 - steps, steps))[:, None, None, :]
    images = torch.arange(batch, device=device)[:, None, None, None]
    return padded[images, torch.arange(3, device=device)[:, None, None], rows, columns]


def build_optimizers(model: VisionTransformer, lr: float) -> list[torch.optim.Optimizer]:
    """Muon takes the blocks' weight matrices; AdamW takes embeddings, head, norms and biases."""
    matrices = [p for name, p in model.named_parameters() if name.startswith("blocks.") and p.ndim == 2]
    rest = [p for name, p in model.named_parameters() if not (name.startswith("blocks.") and p.ndim == 2)]
    return [
        torch.optim.Muon(matrices, lr=lr, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.99), weight_decay=0.0),
    ]


def lr_factor(progress: float, warm_up: float, decay: float) -> float:
    """Trapezoid over ``progress`` in [0, 1]: warm-up, plateau, linear to zero over the last ``decay``."""
    return min(1.0, progress / warm_up, (1 - progress) / decay)


@torch.no_grad()
def accuracy(model: VisionTransformer, pixels: torch.Tensor, labels: torch.Tensor) -> float:
    """Top-1 on normalised ``pixels``, in float32."""
    model.eval()
    hits = sum(int((model(p).argmax(1) == y).sum()) for p, y in zip(pixels.split(500), labels.split(500), strict=True))
    model.train()
    return hits / len(labels)


def train_epoch(model, run, optimizers, data: Data, epoch: int, args: argparse.Namespace) -> float:
    """One pass over the training set with ``run``, the model or its compiled form; returns the mean loss."""
    pixels, labels = data
    order = torch.randperm(len(pixels), device=pixels.device)
    batches = order[: len(order) // BATCH * BATCH].split(BATCH)
    model.patch_drop.prob = args.drop_patches if epoch < round(args.epochs * (1 - args.whole)) else 0.0
    total = torch.zeros((), device=pixels.device)
    for i, index in enumerate(batches):
        factor = lr_factor((epoch + (i + 1) / len(batches)) / args.epochs, 0.5 / args.epochs, args.decay)
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = args.lr * factor
        with torch.autocast(pixels.device.type, torch.bfloat16):
            loss = F.cross_entropy(run(augment(pixels[index])), labels[index], label_smoothing=0.1)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        total += loss.detach()
    return float(total) / len(batches)


def save_teacher(model: VisionTransformer, path: Path, card: dict) -> None:
    """fp16 safetensors under timm's names, with the card beside it as JSON."""
    weights = {name: tensor.detach().half().cpu().contiguous() for name, tensor in model.state_dict().items()}
    save_file(weights, path)
    path.with_suffix(".json").write_text(json.dumps(card, indent=2) + "\n")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="torchvision root, or the npm tarball's package/")
    parser.add_argument("--out", type=Path, default=Path("teacher.safetensors"))
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--depth", type=int, default=6)
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--decay", type=float, default=0.4, help="share of the epochs over which the rate falls")
    parser.add_argument("--drop-patches", type=float, default=0.5)
    parser.add_argument("--whole", type=float, default=0.15, help="share of epochs, the last ones, on all patches")
    parser.add_argument("--init", type=Path, help="start from these weights (.safetensors)")
    parser.add_argument("--resume", type=Path, help="continue from a checkpoint that this script wrote")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def load_data(root: Path, train: bool, device: str) -> Data:
    """One split of CIFAR-10 on a device."""
    pixels, labels = load_cifar10(root, train=train)
    return normalise(pixels.to(device)), labels.to(device)


def start(args: argparse.Namespace) -> VisionTransformer:
    """The model before its first epoch, on the device, in training mode."""
    model = build_model(args.depth, args.width)
    model.patch_drop = timm_patch_dropout(args.drop_patches)
    if args.init:
        model.load_state_dict({k: v.float() for k, v in load_file(args.init).items()})
    if args.device == "cpu":
        for block in model.blocks:  # with the CPU flash kernel a step took 1.15 s, without 0.71 s
            block.attn.fused_attn = False
    return model.to(args.device).train()


def resume(path: Path, model, optimizers) -> tuple[int, float]:
    """Load a checkpoint of `save_checkpoint`; returns the epochs done and the seconds they took."""
    state = torch.load(path, weights_only=True)
    model.load_state_dict(state["model"])
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    return state["epoch"], state["seconds"]


def save_checkpoint(path: Path, model, optimizers, epoch: int, seconds: float) -> None:
    """Write what `resume` reads, through a temporary file."""
    state = {
        "model": model.state_dict(), "optimizers": [o.state_dict() for o in optimizers],
        "epoch": epoch, "seconds": seconds,
    }  # fmt: skip
    partial = path.with_suffix(".ckpt.tmp")
    torch.save(state, partial)
    os.replace(partial, path.with_suffix(".ckpt"))


def main() -> None:
    args = parse_args()
    torch.manual_seed(args.seed)
    train = load_data(args.data, True, args.device)
    test = load_data(args.data, False, args.device)
    model = start(args)
    optimizers = build_optimizers(model, args.lr)
    first, seconds = resume(args.resume, model, optimizers) if args.resume else (0, 0.0)
    run = torch.compile(model, dynamic=False) if args.compile else model

    for epoch in range(first, args.epochs):
        begin = time.perf_counter()
        loss = train_epoch(model, run, optimizers, train, epoch, args)
        seconds += time.perf_counter() - begin
        save_checkpoint(args.out, model, optimizers, epoch + 1, seconds)
        shown = accuracy(model, test[0][:2000], test[1][:2000])
        done = f"epoch {epoch + 1}/{args.epochs}"
        print(f"{done}  loss {loss:.4f}  top-1 on 2000 {shown:.4f}  {seconds:.0f} s", flush=True)

    top1 = accuracy(model, *test)
    print(f"top-1 on the 10,000 test images: {top1:.4f}")
    save_teacher(model, args.out, {
        "architecture": {"img_size": 32, "patch_size": 4, "embed_dim": args.width, "depth": args.depth,
                         "num_heads": args.width // 64, "num_classes": len(CLASSES)},
        "mean": MEAN, "std": STD, "class_names": CLASSES, "top1": top1,
        "recipe": {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items() if k not in ("data", "out")},
        "seconds": round(seconds), "device": args.device,
    })  # fmt: skip


def timm_patch_dropout(rate: float):
    """timm's PatchDropout, which keeps the CLS token and is idle in ``eval``."""
    from timm.layers import PatchDropout

    return PatchDropout(rate, num_prefix_tokens=1)


if __name__ == "__main__":
    main()
