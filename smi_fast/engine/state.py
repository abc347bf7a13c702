"""`State`: the tensors of some images in one stage. It alone knows where pixels are read and written."""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from smi_fast.config import InversionConfig
from smi_fast.engine.randomness import Draws
from smi_fast.kernels.adam_update import Updated
from smi_fast.kernels.common.dispatch import choose
from smi_fast.kernels.common.grid import Grid, slot_of_patch
from smi_fast.kernels.select_patches import remap
from smi_fast.kernels.total_variation import Halo, halo_of
from smi_fast.method.view import StopView
from smi_fast.model.sparse_vit import SparseViT
from smi_fast.plugins import Strategy

# of a field of `State`
CHANGES = {"changes": True}  # each image has a row of it, and steps change it
IS_SHARED = {"shared": True}  # it is the same for all images


@dataclass
class State:
    """Static buffers of a stage.

    A is the number of updated patches: K where stopped patches are left alone, else L. Where the Triton kernels run
    there is a second canvas: each step reads one and writes the updated patches of the other, and `turn` exchanges
    them. Between steps both hold the same pixels everywhere else.
    """

    canvas: Tensor = field(metadata=CHANGES)  # [B, 3, H, W]
    exp_avg: Tensor = field(metadata=CHANGES)  # [B, A, 3, P, P], Adam's first moment
    exp_avg_sq: Tensor = field(metadata=CHANGES)  # [B, A, 3, P, P], its second moment
    iteration: Tensor = field(metadata=IS_SHARED)  # [1] int64, counted from 0
    failed_at: Tensor = field(metadata=CHANGES)  # [B] int64, -1 or the iteration whose step was not finite
    losses: Tensor = field(metadata=CHANGES)  # [B, 1 + priors] cross-entropy and weighted priors of the last step
    scores: Tensor = field(metadata=CHANGES)  # [B, K] CLS scores of the last step

    keep: Tensor  # [B, K] int64, ascending
    updated: Tensor  # [B, A] int64, ascending
    labels: Tensor  # [B] int64
    slots: Tensor  # [B, L] int32, position of each patch in keep, or -1
    updated_slots: Tensor  # [B, L] int32, the same of updated
    halo_index: Tensor  # `Halo` of updated; empty where the Triton kernels run
    halo_share: Tensor
    jitter: Tensor  # [B, iterations, 3] int64
    rates: Tensor = field(metadata=IS_SHARED)  # [iterations, 3]: learning rate, 1 - b1^t, 1 - b2^t

    spare: Tensor | None = None  # [B, 3, H, W]
    turned: bool = False  # have the canvases changed places an odd number of times?

    @property
    def grid(self) -> Grid:
        """The patch grid of the images."""
        return Grid(self.canvas.shape[2], self.canvas.shape[3], self.exp_avg.shape[-1])

    def tensors(self) -> list[Tensor]:
        """All tensors but the spare canvas, in the order of the fields."""
        return [getattr(self, name) for name in TENSORS]

    def clone(self) -> "State":
        """A copy that shares no memory."""
        return self._map(lambda name, value: value.clone())

    def alias(self) -> "State":
        """Another state on the same memory."""
        return copy.copy(self)

    def rows(self, start: int, count: int) -> "State":
        """A copy of ``count`` images from ``start`` on."""
        return self._map(lambda name, value: (value if name in SHARED else value[start : start + count]).clone())

    def load_rows(self, source: "State", start: int) -> None:
        """Take over the images of ``source`` from ``start`` on, as many as this holds; the memory stays its own."""
        if self.turned:  # a capture expects the canvases in their first places
            self.turn()
        count = len(self.canvas)
        for name in (*TENSORS, "spare"):
            value, place = getattr(source, name), getattr(self, name)
            if place is not None:
                place.copy_(value if name in SHARED else value[start : start + count])

    def store_rows(self, target: "State", start: int) -> None:
        """Put what steps have changed into ``target``, from its image ``start`` on."""
        count = len(self.canvas)
        for name in CHANGING:
            getattr(target, name)[start : start + count].copy_(getattr(self, name))
        if target.spare is not None:  # both canvases are the same but for updated pixels, which are rewritten
            target.spare[start : start + count].copy_(self.canvas)

    def target(self) -> Updated:
        """What `adam_update` works on: it reads the canvas, and writes the spare one where there is one."""
        if self.spare is None:
            halo, out = Halo(self.halo_index, self.halo_share), self.canvas
        else:
            halo, out = None, self.spare
        return Updated(self.canvas, out, self.exp_avg, self.exp_avg_sq, self.updated, self.updated_slots, halo)

    def turn(self) -> None:
        """Exchange the canvases, after a step has written the spare one."""
        assert self.spare is not None
        self.canvas, self.spare, self.turned = self.spare, self.canvas, not self.turned

    def stopped(self, strategy: Strategy, count: int, iteration: int) -> "State":
        """The state of the next stage, which keeps ``count`` patches of each image; ``iteration`` are done.

        Where stopped patches are left alone, their optimiser state is dropped and their pixels stay as they are.
        """
        slots = strategy.select(StopView(self.scores, self.keep, self.grid, iteration), count)
        keep = remap(self.keep, slots)
        values = vars(self) | {"turned": False}
        kept_slots = slot_of_patch(keep, self.slots.shape[1])
        values |= {"keep": keep, "slots": kept_slots, "scores": remap(self.scores, slots)}
        if self.spare is not None:  # what stops now must be the same in both
            values["spare"] = self.canvas.clone()
        if strategy.stop_updates:
            values |= {"updated": keep.clone(), "updated_slots": kept_slots.clone()}
            values |= {name: remap(getattr(self, name), slots) for name in ("exp_avg", "exp_avg_sq")}
            values |= _halo_fields(keep, self.grid, self.canvas.dtype, self.spare is not None)
        return State(**values)

    def _map(self, change: Any) -> "State":
        twin = self.alias()
        for name in (*TENSORS, "spare"):
            value = getattr(self, name)
            setattr(twin, name, None if value is None else change(name, value))
        return twin


TENSORS = tuple(part.name for part in fields(State) if part.name not in ("spare", "turned"))
CHANGING = tuple(part.name for part in fields(State) if "changes" in part.metadata)
SHARED = tuple(part.name for part in fields(State) if "shared" in part.metadata)


def _halo_fields(updated: Tensor, grid: Grid, dtype: torch.dtype, kernels: bool) -> dict[str, Any]:
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


def new_state(model: SparseViT, config: InversionConfig, labels: Sequence[int], draws: Draws) -> State:
    """The state before the first step, on the model's device.

    Args:
        model: its dtype, or float32 if that is wider, is that of pixels and moments.
        config: the recipe.
        labels: B class indices.
        draws: of B images, from `draw`.
    """
    grid, device = model.grid, model.device
    dtype = torch.promote_types(model.dtype, torch.float32)
    batch = len(labels)
    everything = torch.arange(grid.patches, device=device).repeat(batch, 1)
    moment = torch.zeros(batch, grid.patches, 3, grid.patch, grid.patch, dtype=dtype, device=device)
    canvas = draws.canvas.to(device, dtype, non_blocking=True, copy=True)
    kernels = uses_kernels(model)
    return State(
        canvas=canvas,
        exp_avg=moment,
        exp_avg_sq=moment.clone(),
        iteration=torch.zeros(1, dtype=torch.int64, device=device),
        failed_at=torch.full((batch,), -1, dtype=torch.int64, device=device),
        losses=torch.zeros(batch, 1 + len(config.priors), dtype=dtype, device=device),
        scores=torch.zeros(batch, grid.patches, dtype=dtype, device=device),
        keep=everything,
        updated=everything.clone(),
        slots=slot_of_patch(everything, grid.patches),
        updated_slots=slot_of_patch(everything, grid.patches),
        **_halo_fields(everything, grid, dtype, kernels),
        labels=torch.tensor(labels, dtype=torch.int64, device=device),
        jitter=draws.jitter.to(device, non_blocking=True),
        rates=rate_table(config).to(device, dtype),
        spare=canvas.clone() if kernels else None,
    )
