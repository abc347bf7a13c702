"""``select_patches``: which kept patches go on after a stop.

The ``count`` patches of the highest score survive; equal scores are settled for the lower patch id; the survivors
keep their ascending order. Whatever belongs to a patch (ids, optimiser state) is remapped with the returned slots.
"""

import torch
from torch import Tensor


def select_patches_reference(scores: Tensor, count: int) -> Tensor:
    """Plain torch; shapes as in `select_patches`."""
    # a stable sort leaves equal scores in slot order, and slots are in id order
    order = torch.sort(scores, dim=1, descending=True, stable=True).indices
    return order[:, :count].sort(dim=1).values


def select_patches(scores: Tensor, count: int) -> Tensor:
    """The slots of the surviving patches.

    Args:
        scores: ``[B, K]`` float32, of kept patches in ascending order of their ids.
        count: how many survive, ``1 <= count <= K``.

    Returns:
        ``[B, count]`` int64, ascending in each row: positions in the ``K`` of before.

    Raises:
        ValueError: ``count`` out of range.
    """
    if not 1 <= count <= scores.shape[1]:
        raise ValueError(f"count={count}: must lie in 1..{scores.shape[1]}, the patches that are kept")
    return select_patches_reference(scores, count)


def remap(state: Tensor, slots: Tensor) -> Tensor:
    """Rows ``slots`` (``[B, C]``) of a per-patch tensor ``[B, K, ...]``: ``[B, C, ...]``."""
    index = slots.reshape(*slots.shape, *([1] * (state.ndim - 2))).expand(-1, -1, *state.shape[2:])
    return state.gather(1, index)
