"""`open_dataset`: ``KIND:PATH`` to real images."""

from pathlib import Path

from smi_fast.datasets.cifar10 import CLASSES, load_cifar10
from smi_fast.datasets.folder import FolderImages
from smi_fast.datasets.real_images import RealImages, TensorImages

KINDS = ("cifar10", "imagenet", "folder")
IMAGENET_CLASSES = 1000


def open_dataset(spec: str, train: bool = False) -> RealImages:
    """Open a dataset.

    Args:
        spec: ``cifar10:PATH`` (either form of `load_cifar10`); ``imagenet:PATH``, with ``train/`` and ``val/`` in it,
            each with a folder a class, named by WordNet id; ``folder:PATH``, a folder a class or none, for both splits.
        train: the split.

    Raises:
        ValueError: another form of ``spec``, or damaged data.
        FileNotFoundError: there is no such dataset; the message says how to get it.
    """
    kind, colon, path = spec.partition(":")
    if kind not in KINDS or not colon or not path:
        raise ValueError(f"dataset {spec!r}: must be KIND:PATH, where KIND is one of {', '.join(KINDS)}")
    root = Path(path).expanduser()
    if kind == "cifar10":
        return TensorImages(spec, *load_cifar10(root, train), CLASSES)
    if kind == "folder":
        return FolderImages(spec, root)
    return _imagenet(spec, root / ("train" if train else "val"))


def _imagenet(spec: str, root: Path) -> FolderImages:
    if not root.is_dir():
        raise FileNotFoundError(
            f"dataset {spec!r}: {str(root)!r} is no folder; ImageNet-1k (ILSVRC2012) is available from image-net.org "
            "after registration, and is to lie there with a folder a class, named by WordNet id"
        )
    images = FolderImages(spec, root)
    if images.num_classes != IMAGENET_CLASSES:
        raise ValueError(
            f"dataset {spec!r}: {str(root)!r} has {images.num_classes or 0} class folders, must be {IMAGENET_CLASSES}"
        )
    return images
