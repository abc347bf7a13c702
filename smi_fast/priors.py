"""Priors: terms of the loss that do not look at the label.

A prior is a small class with a ``name``, a ``weight`` and a call that maps a `View` of the current step to one value
an image. It may use anything in the view; gradients flow through ``view.windows``, ``view.patches`` and what the model
computed from the windows (``view.output``). The engine adds ``weight * value`` to the loss of the image. To add a
prior, write such a class and hand an instance to ``Inverter(priors=...)``: the engine stays as it is.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from smi_fast.config import InversionConfig
from smi_fast.kernels.common.grid import Grid
from smi_fast.kernels.total_variation import TVNorm, total_variation
from smi_fast.model.sparse_vit import ViTOutput


@dataclass(frozen=True)
class View:
    """What a prior may look at in one step; A is the number of updated patches (K where stopping is real)."""

    canvas: Tensor  # [B, 3, H, W], a constant
    patches: Tensor  # [B, A, 3, P, P], the updated patches of the canvas; a leaf
    updated: Tensor  # [B, A] int64, their ids
    windows: Tensor  # [B, K, 3 * P * P], kept patches as the model sees them, jittered and flipped; a leaf
    cells: Tensor  # [B, K] int64, the grid cells they land on
    labels: Tensor  # [B] int64
    output: ViTOutput  # logits, CLS scores, block features
    iteration: Tensor  # [] int64, counted from 0
    grid: Grid


class Prior(Protocol):
    """See the module's docstring."""

    @property
    def name(self) -> str:
        """For reports."""
        ...

    @property
    def weight(self) -> float:
        """What the value is multiplied by; at least 0."""
        ...

    def __call__(self, view: View) -> Tensor:
        """``[B]``, differentiable."""
        ...


class _TotalVariation(torch.autograd.Function):
    """Value and gradient come from one pass; the backward only scales the gradient."""

    @staticmethod
    def forward(ctx: Any, patches: Tensor, canvas: Tensor, updated: Tensor, grid: Grid, norm: TVNorm) -> Tensor:
        value, gradient = total_variation(canvas, updated, grid, norm)
        ctx.save_for_backward(gradient)
        return value

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grads[0][:, None, None, None, None], None, None, None, None


@dataclass(frozen=True)
class TotalVariation:
    """Total variation of the updated patches in one of three norms, see ``kernels/total_variation.py``.

    Under ``batch`` the values only make sense as a sum with equal weights, which is what the engine takes.
    """

    weight: float
    norm: TVNorm = "pixel"
    name: str = "tv"

    def __call__(self, view: View) -> Tensor:
        """``[B]``."""
        value: Tensor = _TotalVariation.apply(view.patches, view.canvas, view.updated, view.grid, self.norm)
        return value


@dataclass(frozen=True)
class L2:
    """The 2-norm of an image's updated pixels, ``||x_b||_2``; its gradient at 0 is taken as 0."""

    weight: float
    name: str = "l2"

    def __call__(self, view: View) -> Tensor:
        """``[B]``."""
        return torch.linalg.vector_norm(view.patches.flatten(1), dim=1)


def priors_of(config: InversionConfig) -> tuple[Prior, ...]:
    """The priors a configuration names, those of weight 0 left out."""
    priors: list[Prior] = []
    if config.resolved_tv_weight > 0:
        priors.append(TotalVariation(config.resolved_tv_weight, config.resolved_tv_norm))
    if config.l2_weight > 0:
        priors.append(L2(config.l2_weight))
    return tuple(priors)
