"""Per-image random streams: an image depends on its seed and id alone, not on its batch-mates.

Streams come from Philox, a counter-based generator: (seed, image id) is the key, and the purpose (start or jitter)
sits in the counter, so that neither stream depends on how much of the other was drawn. All numbers are drawn on the
host before the first step; the step reads them from a device table.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from smi_fast.config import InversionConfig
from smi_fast.kernels.common.grid import Grid

START, JITTER = 0, 1


def image_stream(seed: int, image_id: int, purpose: int) -> np.random.Generator:
    """The generator of one image for one purpose; raises ``ValueError`` on an id outside 0..2**63-1."""
    if not 0 <= image_id < 2**63:
        raise ValueError(f"image_ids: {image_id!r}: must be an integer in 0..2**63-1")
    counter = np.array([0, 0, 0, purpose], dtype=np.uint64)
    key = np.array([seed, image_id], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(counter=counter, key=key))


def start_canvas(seed: int, image_ids: Sequence[int], grid: Grid) -> Tensor:
    """``[B, 3, H, W]`` float32, N(0, 1)."""
    shape = (3, grid.height, grid.width)
    images = [image_stream(seed, i, START).standard_normal(shape, dtype=np.float32) for i in image_ids]
    return torch.from_numpy(np.stack(images))


def still_iterations(config: InversionConfig) -> set[int]:
    """Iterations (from 0) that run without jitter and flip.

    As in the published code, the scores a stop reads come from an iteration that sees the canvas as it lies. The
    published code also runs the first iteration after a stop that way, and so does the ``reference`` preset.
    """
    still = {iteration - 1 for iteration, _ in config.stops}
    if not config.rules.stop_updates:
        still |= {iteration for iteration, _ in config.stops}
    return still


def jitter_table(config: InversionConfig, image_ids: Sequence[int], grid: Grid) -> Tensor:
    """``[B, iterations, 3]`` int64: per image and iteration ``(dy, dx, flip)``.

    Shifts are uniform on ``-m..m`` with ``m = int(side * jitter)``; flips are fair coins.
    """
    limits = np.array([int(grid.height * config.jitter), int(grid.width * config.jitter), 0])
    high = limits + np.array([1, 1, 2 if config.flip else 1])
    shape = (config.iterations, 3)
    draws = [image_stream(config.seed, i, JITTER).integers(-limits, high, shape) for i in image_ids]
    table = np.stack(draws)
    table[:, sorted(still_iterations(config))] = 0
    return torch.from_numpy(table)
