"""Random numbers of each image, which depend on its seed and id alone; and PyTorch's switch for determinism.

Streams come from Philox, a counter-based generator: (seed, image id) is the key, and the purpose (start or jitter)
sits in the counter, so that neither stream depends on how much of the other was drawn. All numbers of an image are
drawn on the host before its first step, while the device works on the images before; the step reads them from a table.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from smi_fast.config import InversionConfig
from smi_fast.kernels.common.grid import Grid

START, JITTER = 0, 1


class Draws(NamedTuple):
    """All random numbers of a group of images, on the host."""

    canvas: Tensor  # [B, 3, H, W] float32, the start
    jitter: Tensor  # [B, iterations, 3] int64, (dy, dx, flip) of each iteration


def draw(config: InversionConfig, image_ids: Sequence[int], grid: Grid, pinned: bool = False) -> Draws:
    """Draw the numbers of some images.

    Args:
        config: the recipe.
        image_ids: B of them.
        grid: of the images.
        pinned: in pinned memory, from which a GPU copies without making the host wait.

    Raises:
        ValueError: an id outside 0..2**63-1.
    """
    draws = Draws(start_canvas(config.seed, image_ids, grid), jitter_table(config, image_ids, grid))
    return Draws(*(tensor.pin_memory() for tensor in draws)) if pinned else draws


def image_stream(seed: int, image_id: int, purpose: int) -> np.random.Generator:
    """The generator of one image for one purpose; raises ``ValueError`` on an id outside 0..2**63-1."""
    if not 0 <= image_id < 2**63:
        raise ValueError(f"image_ids: {image_id!r}: must be an integer in 0..2**63-1")
    counter = np.array([0, 0, 0, purpose], dtype=np.uint64)
    key = np.array([seed, image_id], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(counter=counter, key=key))


def start_canvas(seed: int, image_ids: Sequence[int], grid: Grid) -> Tensor:
    """``[B, 3, H, W]`` float32, N(0, 1)."""
    canvas = np.empty((len(image_ids), 3, grid.height, grid.width), np.float32)
    for row, image_id in zip(canvas, image_ids, strict=True):
        image_stream(seed, image_id, START).standard_normal(dtype=np.float32, out=row)
    return torch.from_numpy(canvas)


def jitter_table(config: InversionConfig, image_ids: Sequence[int], grid: Grid) -> Tensor:
    """``[B, iterations, 3]`` int64: per image and iteration ``(dy, dx, flip)``.

    Shifts are uniform on ``-m..m`` with ``m = int(side * jitter)``; flips are fair coins. The iterations that the
    strategy wants still hold zeros.
    """
    limits = np.array([int(grid.height * config.jitter), int(grid.width * config.jitter), 0])
    high = limits + np.array([1, 1, 2 if config.flip else 1])
    shape = (config.iterations, 3)
    draws = [image_stream(config.seed, i, JITTER).integers(-limits, high, shape) for i in image_ids]
    table = np.stack(draws)
    table[:, sorted(config.strategy.still_iterations(config.iterations))] = 0
    return torch.from_numpy(table)


@contextlib.contextmanager
def deterministic_algorithms(wanted: bool) -> Iterator[None]:
    """Turn PyTorch's switch on for a while; it is one switch for the whole process.

    PyTorch would then fill all memory that it hands out with NaN, one kernel for each tensor. Our ops write every value
    that they return, so this is left out.
    """
    memory: Any = torch.utils.deterministic
    before, fills = torch.are_deterministic_algorithms_enabled(), memory.fill_uninitialized_memory
    torch.use_deterministic_algorithms(before or wanted)
    memory.fill_uninitialized_memory = fills and not wanted
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        memory.fill_uninitialized_memory = fills
