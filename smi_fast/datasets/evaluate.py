"""Accuracy on real images."""

from collections.abc import Callable

import torch
from torch import Tensor

from smi_fast.datasets.real_images import RealImages
from smi_fast.model.spec import TakesImages


@torch.no_grad()
def top1(
    run: Callable[[Tensor], Tensor],
    images: RealImages,
    model: TakesImages,
    *,
    batch_size: int = 250,
    limit: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> float:
    """The share of images that a model classifies right.

    Args:
        run: ``[b, 3, H, W]`` pixels, as `RealImages.batches` gives them, to logits ``[b, classes]``, on any device.
        images: with labels.
        model: whose size and colours the images get.
        batch_size: images at a time.
        limit: only so many, spread evenly over the set; None for all.
        progress: told how many images are done.

    Raises:
        ValueError: the images have no labels, or ``limit`` is below 1.
    """
    if images.labels is None:
        raise ValueError(f"dataset {images.name!r}: has no labels; accuracy needs a folder a class")
    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit}: must be at least 1")
    size = len(images)
    chosen = None if limit is None or limit >= size else [i * size // limit for i in range(limit)]
    hits = done = 0
    for pixels, labels in images.batches(model, batch_size, chosen):
        hits += int((run(pixels).argmax(1).cpu() == labels).sum())
        done += len(labels)
        if progress is not None:
            progress(done)
    return hits / done
