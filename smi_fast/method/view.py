"""What a prior may look at in a step, and a strategy at a stop."""

from dataclasses import dataclass

from torch import Tensor

from smi_fast.kernels.common.grid import Grid
from smi_fast.model.sparse_vit import ViTOutput


@dataclass(frozen=True)
class View:
    """One step, as a prior sees it; A is the number of updated patches (K where stopped patches are not updated).

    Gradients flow through ``patches``, ``windows`` and ``output``; all else is constant. ``output.features`` and
    ``output.attention`` hold the blocks that the prior's ``needs`` name.
    """

    canvas: Tensor  # [B, 3, H, W]
    patches: Tensor  # [B, A, 3, P, P], the updated patches of the canvas; a leaf
    updated: Tensor  # [B, A] int64, their ids
    windows: Tensor  # [B, K, 3 * P * P], kept patches as the model sees them, jittered and flipped; a leaf
    cells: Tensor  # [B, K] int64, the grid cells they land on
    labels: Tensor  # [B] int64
    output: ViTOutput  # logits, CLS scores, features, attention
    iteration: Tensor  # [] int64, counted from 0
    grid: Grid


@dataclass(frozen=True)
class StopView:
    """The end of a stage, as a strategy sees it."""

    scores: Tensor  # [B, K] CLS scores of the stage's last iteration
    keep: Tensor  # [B, K] int64, the ids of the patches they belong to, ascending
    grid: Grid
    iteration: int  # of how many are done
