"""One step of the inversion: gather, forward, loss, input gradient, Adam, clamp.

The step is a function of tensors of static shape: no host value enters it, and it writes its results into the buffers
of the state. It has two halves. Where the Triton kernels run, the second is a single launch that works in place and
stays outside the compiled graph; elsewhere both halves are traced and compiled as one graph, once for each bucket.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from smi_fast.config import InversionConfig
from smi_fast.engine.state import State, uses_kernels
from smi_fast.kernels.adam_update import AdamConstants, LossGradient, TVTerm, Updated, adam_update
from smi_fast.kernels.grid import target_cells
from smi_fast.kernels.patch_cells import take_patches
from smi_fast.kernels.patch_gather import patch_gather
from smi_fast.model.sparse_vit import SparseViT
from smi_fast.priors import Prior, TotalVariation, View


class Differentiated(NamedTuple):
    """What the first half of a step hands to the second."""

    of_windows: Tensor  # [B, K, 3 * P * P] gradient of the loss at the windows
    of_patches: Tensor | None  # [B, A, 3, P, P] and at the pixels, from priors that look at them
    shift: Tensor  # [B, 2] int64
    flip: Tensor  # [B] bool
    rates: Tensor  # [3]
    healthy: Tensor  # [B] bool


@dataclass(frozen=True)
class Step:
    """Gather, forward and gradient; then the update. Call it with a `State`, which it changes in place."""

    differentiate: Callable[[State], Differentiated]
    update: Callable[[State, Differentiated], None]
    in_place: bool  # the update is one kernel launch, outside any compiled graph

    def __call__(self, state: State) -> None:
        """One iteration."""
        self.update(state, self.differentiate(state))


class Terms(NamedTuple):
    """The priors, apart from a total variation that the update takes care of."""

    priors: tuple[tuple[int, Prior], ...]  # with their columns in ``State.losses``
    tv: TVTerm | None
    tv_column: int


def pixel_limits(model: SparseViT) -> tuple[Tensor, Tensor]:
    """Normalised values of black and white, ``[3, 1, 1]`` each, on the model's device."""
    dtype = torch.promote_types(model.dtype, torch.float32)
    mean = torch.tensor(model.info.mean, dtype=torch.float64).view(3, 1, 1)
    std = torch.tensor(model.info.std, dtype=torch.float64).view(3, 1, 1)
    return (-mean / std).to(model.device, dtype), ((1 - mean) / std).to(model.device, dtype)


def split_terms(priors: Sequence[Prior], in_place: bool) -> Terms:
    """Hand total variation to the update, where that is a kernel and the prior is there once."""
    columns = tuple(enumerate(priors, start=1))
    found = [(column, prior) for column, prior in columns if type(prior) is TotalVariation]
    if not in_place or len(found) != 1:
        return Terms(columns, None, -1)
    column, prior = found[0]
    others = tuple(pair for pair in columns if pair[0] != column)
    return Terms(others, TVTerm(prior.weight, prior.norm), column)


def build_step(model: SparseViT, config: InversionConfig, priors: Sequence[Prior]) -> Step:
    """The step of a model under a configuration."""
    constants = AdamConstants(*config.betas, config.eps, *pixel_limits(model))
    in_place = uses_kernels(model)
    terms = split_terms(priors, in_place)

    def differentiate(state: State) -> Differentiated:
        row = state.jitter.index_select(0, state.iteration)[0]  # [B, 3]
        shift, flip = row[:, :2].contiguous(), row[:, 2] == 1
        windows = patch_gather(state.canvas, state.keep, shift, flip, model.grid.patch, model.dtype)
        patches = take_patches(state.canvas, state.updated, model.grid)
        cells = target_cells(state.keep, shift, flip, model.grid)
        losses, scores, of_windows, of_patches = _gradients(model, config, terms, state, (windows, patches, cells))

        finite = losses.isfinite().all(1) & of_windows.isfinite().flatten(1).all(1)
        if of_patches is not None:
            finite = finite & of_patches.isfinite().flatten(1).all(1)
        failed_at = torch.where((state.failed_at < 0) & ~finite, state.iteration, state.failed_at)
        rates = state.rates.index_select(0, state.iteration)[0]
        state.failed_at.copy_(failed_at)
        state.losses.copy_(losses)
        state.scores.copy_(scores)
        state.iteration.add_(1)
        return Differentiated(of_windows, of_patches, shift, flip, rates, failed_at < 0)

    def update(state: State, found: Differentiated) -> None:
        out = state.canvas if state.spare is None else state.spare
        target = Updated(state.canvas, out, state.first, state.second, state.updated, state.updated_slots)
        gradient = LossGradient(found.of_windows, state.slots, found.shift, found.flip, found.of_patches)
        value = adam_update(target, gradient, found.rates, found.healthy, constants, terms.tv)
        if terms.tv is not None and value is not None:
            state.losses[:, terms.tv_column] = terms.tv.weight * value
        if state.spare is not None:
            state.canvas, state.spare = state.spare, state.canvas

    return Step(differentiate, update, in_place)


def _gradients(
    model: SparseViT,
    config: InversionConfig,
    terms: Terms,
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
        total = cross_entropy.mean() if config.rules.mean_loss else cross_entropy.sum()
        columns = [cross_entropy, *state.losses.unbind(1)[1:]]  # the update's own term stays as it was
        for column, prior in terms.priors:
            columns[column] = prior.weight * prior(view)
            total = total + columns[column].sum()
        of_windows, of_patches = torch.autograd.grad(total, (windows, patches), allow_unused=True)
    losses = torch.stack(columns, 1).detach()
    return losses.to(state.losses.dtype), output.cls_scores.detach(), of_windows, of_patches
