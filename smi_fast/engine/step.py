"""One step of the inversion: gather, forward, loss, input gradient, Adam, clamp.

The step is a function of tensors of static shape: no host value enters it, and it writes its results into the buffers
of the state. It has two halves. The first is traced and compiled as one graph, once for each bucket. The second writes
pixels in place and stays outside: where the Triton kernels run it is one launch, total variation, Adam and clamp; in
plain torch those are part of the first half, and the second only puts the patches into the canvas.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from smi_fast.config import InversionConfig
from smi_fast.engine.state import State, uses_kernels
from smi_fast.kernels.adam_update import AdamConstants, LossGradient, TVTerm, Updated, adam_update, adam_values
from smi_fast.kernels.common.grid import Moves, target_cells
from smi_fast.kernels.patch_cells import put_patches_, take_patches
from smi_fast.kernels.patch_gather import patch_gather
from smi_fast.kernels.total_variation import Halo
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
    """The two halves. Call it with a `State`, which it changes in place."""

    compute: Callable[[State], tuple[Tensor | None, ...]]  # to be compiled
    finish: Callable[[State, tuple[Tensor | None, ...]], None]  # in place on the canvas, outside any compiled graph

    def __call__(self, state: State) -> None:
        """One iteration."""
        self.finish(state, self.compute(state))


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


def split_terms(priors: Sequence[Prior]) -> Terms:
    """Hand total variation to the update, where the prior is there once."""
    columns = tuple(enumerate(priors, start=1))
    found = [(column, prior) for column, prior in columns if type(prior) is TotalVariation]
    if len(found) != 1:
        return Terms(columns, None, -1)
    column, prior = found[0]
    others = tuple(pair for pair in columns if pair[0] != column)
    return Terms(others, TVTerm(prior.weight, prior.norm), column)


def build_step(model: SparseViT, config: InversionConfig, priors: Sequence[Prior]) -> Step:
    """The step of a model under a configuration."""
    constants = AdamConstants(*config.betas, config.eps, *pixel_limits(model))
    terms = split_terms(priors)

    def differentiate(state: State) -> Differentiated:
        return _differentiate(model, config, terms, state)

    def compute_all(state: State) -> tuple[Tensor | None, ...]:
        found = differentiate(state)
        values = adam_values(*_update_arguments(state, found), constants, terms.tv)
        state.first.copy_(values.exp_avg)
        state.second.copy_(values.exp_avg_sq)
        _record(terms, state, values.tv)
        return (values.pixels,)

    def put_pixels(state: State, found: tuple[Tensor | None, ...]) -> None:
        (pixels,) = found
        assert pixels is not None
        put_patches_(state.canvas, state.updated, pixels)

    def update(state: State, found: tuple[Tensor | None, ...]) -> None:
        arguments = _update_arguments(state, Differentiated(*found))  # type: ignore[arg-type]  # in its own order
        _record(terms, state, adam_update(*arguments, constants, terms.tv))
        assert state.spare is not None
        state.canvas, state.spare = state.spare, state.canvas

    return Step(differentiate, update) if uses_kernels(model) else Step(compute_all, put_pixels)


def _update_arguments(state: State, found: Differentiated) -> tuple[Updated, LossGradient, Tensor]:
    """Of `adam_update`; where there is a spare canvas, the pixels go there."""
    out = state.canvas if state.spare is None else state.spare
    halo = Halo(state.halo_index, state.halo_share) if state.spare is None else None
    target = Updated(state.canvas, out, state.first, state.second, state.updated, state.updated_slots, halo)
    gradient = LossGradient(
        found.of_windows, state.slots, Moves(found.shift, found.flip), found.healthy, found.of_patches
    )
    return target, gradient, found.rates


def _record(terms: Terms, state: State, tv: Tensor | None) -> None:
    """Note the value of a total variation that the update took care of."""
    if terms.tv is not None and tv is not None:
        state.losses[:, terms.tv_column] = terms.tv.weight * tv


def _differentiate(model: SparseViT, config: InversionConfig, terms: Terms, state: State) -> Differentiated:
    """Gather, forward, gradient, and the check that all of it is finite."""
    row = state.jitter.index_select(1, state.iteration)[:, 0]  # [B, 3]
    shift, flip = row[:, :2].contiguous(), row[:, 2] == 1
    windows = patch_gather(state.canvas, state.keep, Moves(shift, flip), model.grid.patch, model.dtype)
    patches = take_patches(state.canvas, state.updated, model.grid)
    cells = target_cells(state.keep, shift, flip, model.grid)
    losses, scores, of_windows, of_patches = _gradients(model, config, terms, state, (windows, patches, cells))

    finite = losses.isfinite().all(1) & all_finite(of_windows)
    if of_patches is not None:
        finite = finite & all_finite(of_patches)
    failed_at = torch.where((state.failed_at < 0) & ~finite, state.iteration, state.failed_at)
    rates = state.rates.index_select(0, state.iteration)[0]
    state.failed_at.copy_(failed_at)
    state.losses.copy_(losses)
    state.scores.copy_(scores)
    state.iteration.add_(1)
    return Differentiated(of_windows, of_patches, shift, flip, rates, failed_at < 0)


def all_finite(gradient: Tensor) -> Tensor:
    """``[B]`` bool. The largest magnitude tells, NaN included; reducing booleans took six times as long on a CPU."""
    return gradient.abs().flatten(1).amax(1).isfinite()


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
