"""The tensors of one batch in one stage."""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from smi_fast.config import InversionConfig
from smi_fast.engine.streams import jitter_table, start_canvas
from smi_fast.kernels.common.dispatch import choose
from smi_fast.kernels.common.grid import Grid, slot_of_patch
from smi_fast.kernels.select_patches import remap, select_patches
from smi_fast.kernels.total_variation import halo_of
from smi_fast.model.sparse_vit import SparseViT


@dataclass
class State:
    """Static buffers of a stage. The step reads all of them and writes those of the first group in place.

    A is the number of updated patches: K under ``paper``, L under ``reference``. Where the Triton kernels run there is
    a second canvas: each step writes the updated patches of the spare one, and the two change places. Between steps
    both hold the same pixels everywhere else.
    """

    canvas: Tensor  # [B, 3, H, W]
    first: Tensor  # [B, A, 3, P, P] first moment
    second: Tensor  # [B, A, 3, P, P] second moment
    iteration: Tensor  # [1] int64, counted from 0
    failed_at: Tensor  # [B] int64, -1 or the iteration whose step was not finite
    losses: Tensor  # [B, 1 + priors] cross-entropy and weighted priors of the last step
    scores: Tensor  # [B, K] CLS scores of the last step

    keep: Tensor  # [B, K] int64, ascending
    updated: Tensor  # [B, A] int64, ascending
    labels: Tensor  # [B] int64
    slots: Tensor  # [B, L] int32, position of each patch in keep, or -1
    updated_slots: Tensor  # [B, L] int32, the same of updated
    halo_index: Tensor  # `Halo` of updated; empty where the Triton kernels run
    halo_share: Tensor
    jitter: Tensor  # [B, iterations, 3] int64
    rates: Tensor  # [iterations, 3]: learning rate, 1 - b1^t, 1 - b2^t

    spare: Tensor | None = None  # [B, 3, H, W]

    def tensors(self) -> list[Tensor]:
        """All tensors but the spare canvas, in the order of the fields."""
        return [getattr(self, field.name) for field in fields(self)[:-1]]

    def clone(self) -> "State":
        """A copy that shares no memory."""
        twin = copy.copy(self)
        for name, value in vars(self).items():
            setattr(twin, name, None if value is None else value.clone())
        return twin


def halo_fields(updated: Tensor, grid: Grid, dtype: torch.dtype, kernels: bool) -> dict[str, Tensor]:
    """The `Halo` of the updated patches, as fields of a state; kernels work it out as they go."""
    halo = halo_of(updated[:, :0] if kernels else updated, grid, dtype)
    return {"halo_index": halo.index, "halo_share": halo.share}


def uses_kernels(model: SparseViT) -> bool:
    """Does the update of this model's images run as a Triton kernel?"""
    double = "float64 has no kernel" if model.dtype == torch.float64 else None
    return choose("adam_update", None, model.patch_embed.weight, double) == "triton"


def learning_rates(config: InversionConfig) -> list[float]:
    """Learning rate of each iteration; ``cosine`` falls from ``lr`` to 0 after the last one."""
    if config.lr_schedule == "constant":
        return [config.lr] * config.iterations
    return [config.lr * 0.5 * (1 + math.cos(math.pi * t / config.iterations)) for t in range(config.iterations)]


def rate_table(config: InversionConfig) -> Tensor:
    """``[iterations, 3]`` float64, worked out on the host so that no power is rounded in float32."""
    beta1, beta2 = config.betas
    rows = [(lr, 1 - beta1 ** (t + 1), 1 - beta2 ** (t + 1)) for t, lr in enumerate(learning_rates(config))]
    return torch.tensor(rows, dtype=torch.float64)


def new_state(
    model: SparseViT, config: InversionConfig, labels: Sequence[int], image_ids: Sequence[int], priors: int
) -> State:
    """The state before the first step; ``priors`` is how many there are."""
    grid, device = model.grid, model.device
    dtype = torch.promote_types(model.dtype, torch.float32)
    batch = len(labels)
    everything = torch.arange(grid.patches, device=device).repeat(batch, 1)
    moment = torch.zeros(batch, grid.patches, 3, grid.patch, grid.patch, dtype=dtype, device=device)
    canvas = start_canvas(config.seed, image_ids, grid).to(device, dtype)
    kernels = uses_kernels(model)
    return State(
        canvas=canvas,
        first=moment,
        second=moment.clone(),
        iteration=torch.zeros(1, dtype=torch.int64, device=device),
        failed_at=torch.full((batch,), -1, dtype=torch.int64, device=device),
        losses=torch.zeros(batch, 1 + priors, dtype=dtype, device=device),
        scores=torch.zeros(batch, grid.patches, dtype=dtype, device=device),
        keep=everything,
        updated=everything.clone(),
        slots=slot_of_patch(everything, grid.patches),
        updated_slots=slot_of_patch(everything, grid.patches),
        **halo_fields(everything, grid, dtype, kernels),
        labels=torch.tensor(labels, dtype=torch.int64, device=device),
        jitter=jitter_table(config, image_ids, grid).to(device),
        rates=rate_table(config).to(device, dtype),
        spare=canvas.clone() if kernels else None,
    )


def stop_patches(state: State, count: int, stop_updates: bool) -> State:
    """The state of the next stage: the ``count`` patches of the highest scores go on.

    Under ``stop_updates`` the optimiser state of the others is dropped too, and their pixels stay as they are.
    """
    slots = select_patches(state.scores, count)
    keep = remap(state.keep, slots)
    values = {field.name: getattr(state, field.name) for field in fields(state)}
    kept_slots = slot_of_patch(keep, state.slots.shape[1])
    values |= {"keep": keep, "slots": kept_slots, "scores": remap(state.scores, slots)}
    if state.spare is not None:  # what stops now must be the same in both
        values["spare"] = state.canvas.clone()
    if stop_updates:
        values |= {"updated": keep.clone(), "updated_slots": kept_slots.clone()}
        values |= {"first": remap(state.first, slots), "second": remap(state.second, slots)}
        grid = Grid(state.canvas.shape[2], state.canvas.shape[3], state.first.shape[-1])
        values |= halo_fields(keep, grid, state.canvas.dtype, state.spare is not None)
    return State(**values)
