"""The 2-norm of an image."""

from dataclasses import dataclass

import torch
from torch import Tensor

from smi_fast.checks import check_rules, not_negative
from smi_fast.method.view import View
from smi_fast.plugins import register


@register("prior", "l2")
@dataclass(frozen=True)
class L2:
    """The 2-norm of an image's updated pixels, ``||x_b||_2`` (DeepInversion, Yin et al. 2020); its gradient at 0 is 0.

    Raises:
        ValueError: a weight that is negative or not finite.
    """

    weight: float = 1e-2

    def __post_init__(self) -> None:
        check_rules(self, {"weight": not_negative(self.weight)})

    def __call__(self, view: View) -> Tensor:
        """``[B]``."""
        return torch.linalg.vector_norm(view.patches.flatten(1), dim=1)
