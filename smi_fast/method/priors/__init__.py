"""Priors: terms of the loss that do not look at the label. One file each; importing this registers all of them."""

from smi_fast.method.priors.l2 import L2
from smi_fast.method.priors.total_variation import TotalVariation

__all__ = ["L2", "TotalVariation"]
