"""Real images, for evaluation and comparison: CIFAR-10, ImageNet, folders."""

from smi_fast.datasets.evaluate import top1
from smi_fast.datasets.open import open_dataset
from smi_fast.datasets.real_images import RealImages, random_indices

__all__ = ["RealImages", "open_dataset", "random_indices", "top1"]
