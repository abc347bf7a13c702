"""One step of the inversion: gather, forward, loss, input gradient, Adam, clamp.

The step is a function of tensors of static shape; no host value enters it. It has two halves. The first reads a state,
returns what it found and writes nothing; it is traced and compiled as one graph, once for each bucket. The second
writes that into the state and stays outside. Where the Triton kernels run, total variation, Adam and clamp are one
launch of the second half; in plain torch they are part of the first, and the second only stores them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from smi_fast.config import InversionConfig
from smi_fast.engine.state import State, uses_kernels
from smi_fast.kernels.adam_update import AdamConstants, LossGradient, adam_update, adam_values
from smi_fast.kernels.common.grid import Moves, target_cells
from smi_fast.kernels.patch_cells import put_patches_, take_patches
from smi_fast.kernels.patch_gather import patch_gather
from smi_fast.kernels.step_record import Record, first_failure, record_step
from smi_fast.method.objective import Objective
from smi_fast.method.view import View
from smi_fast.model.sparse_vit import SparseViT

Found = tuple[Tensor | None, ...]


class Differentiated(NamedTuple):
    """The gradient of a step, and what is recorded of it."""

    of_windows: Tensor  # [B, K, 3 * P * P] gradient of the loss at the windows
    of_patches: Tensor | None  # [B, A, 3, P, P] and at the pixels, from priors that look at them
    shift: Tensor  # [B, 2] int64
    flip: Tensor  # [B] bool
    rates: Tensor  # [3]
    failed_at: Tensor  # [B] int64
    losses: Tensor  # [B, 1 + priors]
    scores: Tensor  # [B, K]

    def gradient(self, state: State) -> LossGradient:
        """As `adam_update` takes it."""
        moves = Moves(self.shift, self.flip)
        return LossGradient(self.of_windows, state.slots, moves, self.failed_at < 0, self.of_patches)


class Stepped(NamedTuple):
    """A whole step in plain torch."""

    pixels: Tensor  # [B, A, 3, P, P]
    exp_avg: Tensor
    exp_avg_sq: Tensor
    tv: Tensor | None  # [B], not weighted
    failed_at: Tensor
    losses: Tensor
    scores: Tensor


@dataclass(frozen=True)
class Step:
    """The two halves. Call it with a `State`, which it changes in place."""

    compute: Callable[[State], Found]  # to be compiled; writes nothing
    finish: Callable[[State, Found], None]  # in place, outside any compiled graph

    def __call__(self, state: State) -> None:
        """One iteration."""
        self.finish(state, self.compute(state))


def pixel_limits(model: SparseViT) -> tuple[Tensor, Tensor]:
    """Normalised values of black and white, ``[3, 1, 1]`` each, on the model's device."""
    dtype = torch.promote_types(model.dtype, torch.float32)
    mean = torch.tensor(model.info.mean, dtype=torch.float64).view(3, 1, 1)
    std = torch.tensor(model.info.std, dtype=torch.float64).view(3, 1, 1)
    return (-mean / std).to(model.device, dtype), ((1 - mean) / std).to(model.device, dtype)


def build_step(model: SparseViT, config: InversionConfig) -> Step:
    """The step of a model under a recipe.

    Raises:
        ValueError: a prior needs a block that the model does not have.
    """
    constants = AdamConstants(*config.betas, config.eps, *pixel_limits(model))
    objective = Objective.of(config, model.shape.depth)

    def differentiate(state: State) -> Differentiated:
        return _differentiate(model, objective, state)

    def compute_all(state: State) -> Stepped:
        found = differentiate(state)
        values = adam_values(state.target(), found.gradient(state), found.rates, constants, objective.term)
        return Stepped(*values, found.failed_at, found.losses, found.scores)

    def record(state: State, new: Differentiated | Stepped, value: Tensor | None) -> None:
        target = Record(state.failed_at, state.losses, state.scores)
        record_step(target, state.iteration, Record(new.failed_at, new.losses, new.scores), objective.late(value))

    def store(state: State, found: Found) -> None:
        new = Stepped(*found)  # type: ignore[arg-type]  # in its own order
        put_patches_(state.canvas, state.updated, new.pixels)
        state.exp_avg.copy_(new.exp_avg)
        state.exp_avg_sq.copy_(new.exp_avg_sq)
        record(state, new, new.tv)

    def update(state: State, found: Found) -> None:
        new = Differentiated(*found)  # type: ignore[arg-type]  # in its own order
        value = adam_update(state.target(), new.gradient(state), new.rates, constants, objective.term)
        record(state, new, value)
        state.turn()

    return Step(differentiate, update) if uses_kernels(model) else Step(compute_all, store)


def _differentiate(model: SparseViT, objective: Objective, state: State) -> Differentiated:
    """Gather, forward, gradient, and the check that all of it is finite."""
    row = state.jitter.index_select(1, state.iteration)[:, 0]  # [B, 3]
    moves = Moves(row[:, :2].contiguous(), row[:, 2] == 1)
    windows = patch_gather(state.canvas, state.keep, moves, model.grid.patch, model.dtype)
    patches = take_patches(state.canvas, state.updated, model.grid)
    with torch.enable_grad():
        windows, patches = windows.detach().requires_grad_(), patches.detach().requires_grad_()
        cells = target_cells(state.keep, *moves, model.grid)
        output = model.forward_patches(windows, cells, objective.needs)
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
        total, losses = objective(view)
        of_windows, of_patches = torch.autograd.grad(total, (windows, patches), allow_unused=True)

    losses = losses.to(state.losses.dtype)
    failed_at = first_failure(state.failed_at, state.iteration, losses, of_windows, of_patches)
    rates = state.rates.index_select(0, state.iteration)[0]
    scores = output.cls_scores.detach()
    return Differentiated(of_windows, of_patches, moves.shift, moves.flip, rates, failed_at, losses, scores)
