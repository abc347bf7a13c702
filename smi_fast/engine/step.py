"""One step of the inversion: gather, forward, loss, input gradient, Adam, clamp.

The step is a function of tensors of static shape: no host value enters it, and it writes its results into the buffers
of the state. The same function runs eagerly and is traced and compiled, once for each bucket.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from smi_fast.config import InversionConfig
from smi_fast.engine.state import State
from smi_fast.kernels.adam_update import AdamConstants, adam_update
from smi_fast.kernels.grid import slot_of_patch, target_cells
from smi_fast.kernels.patch_gather import patch_gather, patch_ungather
from smi_fast.kernels.patch_mask import put_patches, take_patches
from smi_fast.model.sparse_vit import SparseViT
from smi_fast.priors import Prior, View

Step = Callable[[State], None]


def pixel_limits(model: SparseViT) -> tuple[Tensor, Tensor]:
    """Normalised values of black and white, ``[3, 1, 1]`` each, on the model's device."""
    dtype = torch.promote_types(model.dtype, torch.float32)
    mean = torch.tensor(model.info.mean, dtype=torch.float64).view(3, 1, 1)
    std = torch.tensor(model.info.std, dtype=torch.float64).view(3, 1, 1)
    return (-mean / std).to(model.device, dtype), ((1 - mean) / std).to(model.device, dtype)


def build_step(model: SparseViT, config: InversionConfig, priors: Sequence[Prior]) -> Step:
    """The step of a model under a configuration, as a function of a `State` that it updates in place."""
    grid = model.grid
    constants = AdamConstants(*config.betas, config.eps, *pixel_limits(model))

    def step(state: State) -> None:
        row = state.jitter.index_select(0, state.iteration)[0]  # [B, 3]
        shift, flip = row[:, :2], row[:, 2] == 1
        windows = patch_gather(state.canvas, state.keep, shift, flip, grid.patch, model.dtype)
        patches = take_patches(state.canvas, state.updated, grid)
        cells = target_cells(state.keep, shift, flip, grid)

        losses, scores, of_windows, of_patches = _gradients(model, config, priors, state, (windows, patches, cells))
        slots = slot_of_patch(state.keep, grid.patches)
        gradient = patch_ungather(of_windows, slots, state.updated, shift, flip, grid)
        if of_patches is not None:
            gradient = gradient + of_patches

        finite = losses.isfinite().all(1) & gradient.isfinite().flatten(1).all(1)
        failed_at = torch.where((state.failed_at < 0) & ~finite, state.iteration, state.failed_at)
        rates = state.rates.index_select(0, state.iteration)[0]
        moved, first, second = adam_update(
            patches, (state.first, state.second), gradient, rates, failed_at < 0, constants
        )
        state.canvas.copy_(put_patches(state.canvas, state.updated, moved, grid))
        state.first.copy_(first)
        state.second.copy_(second)
        state.failed_at.copy_(failed_at)
        state.losses.copy_(losses)
        state.scores.copy_(scores)
        state.iteration.add_(1)

    return step


def _gradients(
    model: SparseViT,
    config: InversionConfig,
    priors: Sequence[Prior],
    state: State,
    inputs: tuple[Tensor, Tensor, Tensor],
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Losses ``[B, 1 + priors]``, CLS scores, and the loss's gradients at windows and updated patches."""
    windows, patches, cells = inputs
    with torch.enable_grad():
        windows, patches = windows.detach().requires_grad_(), patches.detach().requires_grad_()
        output = model.forward_patches(windows, cells)
        view = View(
            canvas=state.canvas,
            patches=patches,
            updated=state.updated,
            windows=windows,
            cells=cells,
            labels=state.labels,
            output=output,
            iteration=state.iteration[0],
            grid=model.grid,
        )
        cross_entropy = F.cross_entropy(output.logits, state.labels, reduction="none")
        values = [prior.weight * prior(view) for prior in priors]
        total = cross_entropy.mean() if config.rules.mean_loss else cross_entropy.sum()
        for value in values:
            total = total + value.sum()
        of_windows, of_patches = torch.autograd.grad(total, (windows, patches), allow_unused=True)
    losses = torch.stack([cross_entropy, *values], 1).detach()
    return losses.to(state.losses.dtype), output.cls_scores.detach(), of_windows, of_patches
