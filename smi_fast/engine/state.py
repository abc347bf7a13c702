"""The tensors of one batch in one stage."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from smi_fast.config import InversionConfig
from smi_fast.engine.streams import jitter_table, start_canvas
from smi_fast.kernels.select_patches import remap, select_patches
from smi_fast.model.sparse_vit import SparseViT


@dataclass
class State:
    """Static buffers of a stage. The step reads all of them and writes those of the first group in place.

    A is the number of updated patches: K under ``paper``, L under ``reference``.
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
    jitter: Tensor  # [iterations, B, 3] int64
    rates: Tensor  # [iterations, 3]: learning rate, 1 - b1^t, 1 - b2^t

    def tensors(self) -> list[Tensor]:
        """All tensors, in the order of the fields."""
        return [getattr(self, field.name) for field in fields(self)]

    def clone(self) -> "State":
        """A copy that shares no memory."""
        return State(*(tensor.clone() for tensor in self.tensors()))


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
    return State(
        canvas=start_canvas(config.seed, image_ids, grid).to(device, dtype),
        first=moment,
        second=moment.clone(),
        iteration=torch.zeros(1, dtype=torch.int64, device=device),
        failed_at=torch.full((batch,), -1, dtype=torch.int64, device=device),
        losses=torch.zeros(batch, 1 + priors, dtype=dtype, device=device),
        scores=torch.zeros(batch, grid.patches, dtype=dtype, device=device),
        keep=everything,
        updated=everything.clone(),
        labels=torch.tensor(labels, dtype=torch.int64, device=device),
        jitter=jitter_table(config, image_ids, grid).to(device),
        rates=rate_table(config).to(device, dtype),
    )


def stop_patches(state: State, count: int, stop_updates: bool) -> State:
    """The state of the next stage: the ``count`` patches of the highest scores go on.

    Under ``stop_updates`` the optimiser state of the others is dropped too, and their pixels stay as they are.
    """
    slots = select_patches(state.scores, count)
    keep = remap(state.keep, slots)
    values = {field.name: getattr(state, field.name) for field in fields(state)}
    values |= {"keep": keep, "scores": remap(state.scores, slots)}
    if stop_updates:
        values |= {"updated": keep.clone(), "first": remap(state.first, slots), "second": remap(state.second, slots)}
    return State(**values)
