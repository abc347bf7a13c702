"""Every public op refuses every tensor of the wrong rank, dtype or device, and an empty batch, and names it."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from smi_fast.kernels.adam_update import AdamConstants, LossGradient, TVTerm, Updated, adam_update
from smi_fast.kernels.add_layer_norm import add_layer_norm
from smi_fast.kernels.cls_attention import cls_attention
from smi_fast.kernels.common.grid import Grid, Moves, slot_of_patch
from smi_fast.kernels.mlp import mlp
from smi_fast.kernels.patch_cells import put_patches_, take_patches
from smi_fast.kernels.patch_gather import patch_gather
from smi_fast.kernels.patch_mask import composite, kept_statistics, patch_mask
from smi_fast.kernels.patch_ungather import patch_scatter, patch_ungather
from smi_fast.kernels.select_patches import remap, select_patches
from smi_fast.kernels.step_record import Column, Record, first_failure, record_step
from smi_fast.kernels.tile_attention import packed_tile_attention, tile_attention
from smi_fast.kernels.total_variation import total_variation
from smi_fast.model.sparse_vit import SparseViT

GRID = Grid(8, 12, 4)
CANVAS, KEEP = torch.zeros(2, 3, 8, 12), torch.tensor([[0, 3], [1, 2]])
SLOTS, PATCHES = slot_of_patch(KEEP, 6), torch.zeros(2, 2, 3, 4, 4)
SHIFT, FLIP, WINDOWS = torch.zeros(2, 2, dtype=torch.int64), torch.zeros(2, dtype=torch.bool), torch.zeros(2, 2, 48)
QUERY, KEY = torch.zeros(2, 3, 1, 8), torch.zeros(2, 3, 5, 8)
LIMIT, RATES, SCORES = torch.ones(3, 1, 1), torch.ones(3), torch.zeros(2, 5)
FAILED = torch.tensor([-1, 4])


@dataclass(frozen=True)
class Op:
    """An op as a function of its tensors alone."""

    call: Callable[..., Any]
    tensors: dict[str, Tensor]


def moved(tensors: dict[str, Tensor]) -> dict[str, Any]:
    """The same arguments, shift and flip as `Moves`."""
    rest = {name: tensor for name, tensor in tensors.items() if name not in ("shift", "flip")}
    return {**rest, "moves": Moves(tensors["shift"], tensors["flip"])}


def update(
    canvas: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, ids: Tensor, rates: Tensor, low: Tensor,
    **of_loss: Tensor,
) -> Any:  # fmt: skip
    target = Updated(canvas, CANVAS.clone(), exp_avg, exp_avg_sq, ids, SLOTS)
    gradient = LossGradient(slots=SLOTS, **moved(of_loss))  # type: ignore[arg-type]
    constants = AdamConstants(0.5, 0.99, 1e-8, low, LIMIT)
    return adam_update(target, gradient, rates, constants, TVTerm(0.1, "pixel"))


OPS = {
    "patch_gather": Op(
        lambda **t: patch_gather(**moved(t), patch=4, dtype=torch.float32),
        {"canvas": CANVAS, "keep": KEEP, "shift": SHIFT, "flip": FLIP},
    ),
    "patch_ungather": Op(
        lambda **t: patch_ungather(**moved(t), grid=GRID),
        {"gradient": WINDOWS, "slots": SLOTS, "ids": KEEP, "shift": SHIFT, "flip": FLIP},
    ),
    "patch_scatter": Op(
        lambda **t: patch_scatter(**moved(t), grid=GRID),
        {"gradient": WINDOWS, "slots": SLOTS, "shift": SHIFT, "flip": FLIP},
    ),
    "total_variation": Op(
        lambda **t: total_variation(**t, grid=GRID, norm="pixel"), {"canvas": CANVAS, "updated": KEEP}
    ),
    "adam_update": Op(
        update,
        {
            "canvas": CANVAS, "exp_avg": PATCHES, "exp_avg_sq": PATCHES.clone(), "ids": KEEP, "windows": WINDOWS,
            "shift": SHIFT, "flip": FLIP, "patches": PATCHES.clone(), "rates": RATES, "healthy": ~FLIP, "low": -LIMIT,
        },
    ),
    "cls_attention": Op(lambda **t: cls_attention(**t, prefix=1), {"query": QUERY, "key": KEY, "value": KEY}),
    "tile_attention": Op(tile_attention, {"query": KEY, "key": KEY.clone(), "value": KEY.clone()}),
    "packed_tile_attention": Op(packed_tile_attention, {"packed": torch.zeros(2, 5, 3, 2, 8)}),
    "add_layer_norm": Op(
        lambda **t: add_layer_norm(**t, eps=1e-6),
        {"x": KEY, "branch": KEY.clone(), "weight": torch.ones(8), "bias": torch.zeros(8)},
    ),
    "mlp": Op(
        mlp,
        {
            "x": KEY, "weight1": torch.zeros(6, 8), "bias1": torch.zeros(6), "weight2": torch.zeros(4, 6),
            "bias2": torch.zeros(4),
        },
    ),
    "select_patches": Op(lambda **t: select_patches(**t, count=2), {"scores": SCORES}),
    "remap": Op(remap, {"state": PATCHES, "slots": torch.tensor([[0], [1]])}),
    "patch_mask": Op(lambda **t: patch_mask(**t, grid=GRID), {"keep": KEEP}),
    "composite": Op(lambda **t: composite(**t, grid=GRID, fill=torch.zeros(3, 1, 1)), {"pixels": CANVAS, "keep": KEEP}),
    "kept_statistics": Op(lambda **t: kept_statistics(**t, grid=GRID), {"pixels": CANVAS, "keep": KEEP}),
    "first_failure": Op(first_failure, {
        "failed_at": FAILED, "iteration": FAILED[:1], "losses": SCORES, "windows": WINDOWS, "patches": PATCHES,
    }),
    "record_step": Op(
        lambda failed_at, losses, scores, iteration, value: record_step(
            Record(failed_at, losses, scores), iteration, Record(FAILED, SCORES, SCORES), Column(0, value, 1.0)
        ),
        {
            "failed_at": FAILED.clone(), "losses": SCORES.clone(), "scores": SCORES.clone(),
            "iteration": FAILED[:1].clone(), "value": SCORES[:, 0],
        },
    ),
    "take_patches": Op(lambda **t: take_patches(**t, grid=GRID), {"canvas": CANVAS, "ids": KEEP}),
    "put_patches_": Op(lambda **t: put_patches_(**t), {"canvas": CANVAS, "ids": KEEP, "patches": PATCHES}),
}  # fmt: skip
SPOILED: dict[str, Callable[[Tensor], Tensor]] = {
    "rank": lambda tensor: tensor[None, None, None, None],
    "dtype": lambda tensor: torch.zeros(tensor.shape, dtype=torch.complex64),
    "device": lambda tensor: tensor.to("meta"),
    "empty": lambda tensor: tensor[:0],
}
# one tensor alone is on one device; mlp takes any rank; remap takes any rank from 2 on, and any dtype
FINE = {("select_patches", "scores", "device"), ("patch_mask", "keep", "device")}
FINE |= {("mlp", "x", "rank")}
FINE |= {("packed_tile_attention", "packed", "device")}
FINE |= {("remap", "state", "rank"), ("remap", "state", "dtype")}
ALL = [row for op in OPS for name in OPS[op].tensors for how in SPOILED if (row := (op, name, how)) not in FINE]


@pytest.mark.parametrize("op", OPS)
def test_good_input_is_taken(op: str) -> None:
    OPS[op].call(**OPS[op].tensors)


@pytest.mark.parametrize(("op", "name", "how"), ALL, ids=["-".join(row) for row in ALL])
def test_bad_input_is_refused(op: str, name: str, how: str) -> None:
    tensors = OPS[op].tensors | {name: SPOILED[how](OPS[op].tensors[name])}
    with pytest.raises(ValueError, match=rf"{op}: ") as refusal:
        OPS[op].call(**tensors)
    text = str(refusal.value)
    if how in ("rank", "dtype"):  # else another tensor may be named, which does not fit to this one
        assert re.search(rf"\b{name}\b", text), text


@pytest.mark.parametrize(("keep", "message"), [([[0, 12]], r"keep\[0, 1\]=12"), ([[3, 3]], "ids must ascend")])
def test_the_model_refuses_ids_that_are_none_of_its_patches(
    make_model: Callable[..., SparseViT], keep: list[list[int]], message: str
) -> None:
    model = make_model()
    with pytest.raises(ValueError, match=message):
        model(torch.zeros(1, 3, 24, 32, dtype=torch.float64), torch.tensor(keep))


@pytest.mark.parametrize("index", [-1, 2])
def test_a_late_column_is_one_of_those_that_are_there(index: int) -> None:
    record = Record(FAILED.clone(), torch.zeros(2, 2), SCORES.clone())
    with pytest.raises(ValueError, match=rf"record_step: late.number={index}: must lie in 0..1"):
        record_step(record, FAILED[:1].clone(), record, Column(index, SCORES[:, 0], 1.0))
