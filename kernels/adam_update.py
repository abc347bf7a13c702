"""``adam_update``: one Adam step on the updated patches, then the clamp to colours that exist.

    m <- b1 m + (1 - b1) g          v <- b2 v + (1 - b2) g^2
    x <- clamp(x - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps), low, high)

Rates and bias corrections arrive as a device tensor: a host number would freeze into a captured graph.
Bytes: x, m and v are read and written once each, g is read once: 28 bytes a value in float32.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class AdamConstants:
    """What does not change from step to step: decay rates, epsilon, and the channel limits ``[3, 1, 1]``."""

    beta1: float
    beta2: float
    eps: float
    low: Tensor
    high: Tensor


def adam_update_reference(
    pixels: Tensor, moments: tuple[Tensor, Tensor], gradient: Tensor, rates: Tensor, healthy: Tensor, c: AdamConstants
) -> tuple[Tensor, Tensor, Tensor]:
    """Plain torch; shapes as in `adam_update`."""
    lr, correction1, correction2 = rates.unbind()
    first = c.beta1 * moments[0] + (1 - c.beta1) * gradient
    second = c.beta2 * moments[1] + (1 - c.beta2) * gradient.square()
    step = lr * (first / correction1) / ((second / correction2).sqrt() + c.eps)
    moved = (pixels - step).clamp(c.low, c.high)
    healthy = healthy[:, None, None, None, None]
    return (
        torch.where(healthy, moved, pixels),
        torch.where(healthy, first, moments[0]),
        torch.where(healthy, second, moments[1]),
    )


def adam_update(
    pixels: Tensor, moments: tuple[Tensor, Tensor], gradient: Tensor, rates: Tensor, healthy: Tensor, c: AdamConstants
) -> tuple[Tensor, Tensor, Tensor]:
    """One step of Adam with clamp.

    Args:
        pixels: ``[B, A, 3, P, P]`` float32.
        moments: first and second moment, each like ``pixels``.
        gradient: like ``pixels``.
        rates: ``[3]``: learning rate, ``1 - b1^t``, ``1 - b2^t``.
        healthy: ``[B]`` bool; an image that is not healthy is left as it is.

    Returns:
        pixels, first moment, second moment after the step; new tensors.
    """
    return adam_update_reference(pixels, moments, gradient, rates, healthy, c)
