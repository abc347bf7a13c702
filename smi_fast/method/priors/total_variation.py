"""Total variation of the updated patches."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, get_args

import torch
from torch import Tensor

from smi_fast.checks import check_rules, not_negative, one_of
from smi_fast.kernels.adam_update import TVTerm
from smi_fast.kernels.common.grid import Grid
from smi_fast.kernels.total_variation import TVNorm, total_variation
from smi_fast.method.view import View
from smi_fast.plugins import register

# Measured on the demo teacher, see "Prior weights" in docs/decisions.md. "batch" is the published weight.
WEIGHTS: Mapping[str, float] = MappingProxyType({"pixel": 1e-4, "image": 1e-3, "batch": 1e-4})


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


@register("prior", "total_variation")
@dataclass(frozen=True)
class TotalVariation:
    """Differences of neighbouring pixels in four directions, see ``kernels/total_variation.py`` for the three norms.

    ``pixel`` is Eq. 2 of the paper. ``batch``, the published code's, is one norm over the whole batch, so it couples
    the images of a batch; its values only make sense as a sum with equal weights, which is what the loss takes.

    Raises:
        ValueError: a negative weight, or an unknown norm.
    """

    weight: float | None = None  # None takes the measured default of the norm
    norm: TVNorm = "pixel"

    def __post_init__(self) -> None:
        check_rules(self, {"norm": one_of(self.norm, get_args(TVNorm))})
        if self.weight is None:
            object.__setattr__(self, "weight", WEIGHTS[self.norm])
        check_rules(self, {"weight": not_negative(self.weight)})

    @property
    def couples_batch(self) -> bool:
        """Does the value of one image depend on its batch-mates?"""
        return self.norm == "batch"

    def update_term(self) -> TVTerm:
        """The same term, for the pixel update to compute."""
        assert self.weight is not None
        return TVTerm(self.weight, self.norm)

    def __call__(self, view: View) -> Tensor:
        """``[B]``."""
        value: Tensor = _TotalVariation.apply(view.patches, view.canvas, view.updated, view.grid, self.norm)
        return value
