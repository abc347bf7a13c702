"""What `kernels` runs outside the ViT: per op its inputs, plain reference, kernel, and the bytes it must move."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from smi_fast.kernels.adam_update import (
    AdamConstants,
    LossGradient,
    TVTerm,
    Updated,
    adam_step,
    adam_update,
)
from smi_fast.kernels.common.grid import Grid, Moves, slot_of_patch
from smi_fast.kernels.patch_cells import put_patches_reference, take_patches_reference
from smi_fast.kernels.patch_gather import patch_gather, patch_gather_reference
from smi_fast.kernels.patch_mask import composite, patch_mask_reference
from smi_fast.kernels.patch_ungather import (
    patch_scatter,
    patch_scatter_reference,
    patch_ungather,
    patch_ungather_reference,
)
from smi_fast.kernels.select_patches import select_patches, select_patches_reference
from smi_fast.kernels.total_variation import halo_of, take_halo_reference, total_variation, tv_of_halo

Function = Callable[..., Any]


@dataclass(frozen=True)
class Shape:
    """One row's shape; ``heads`` of width 64 belong to a model that takes such images."""

    grid: Grid
    batch: int
    kept: int
    dtype: torch.dtype
    heads: int
    device: str

    @property
    def values(self) -> int:
        """Numbers in the kept patches of the batch."""
        return self.batch * self.kept * self.grid.patch_values


@dataclass(frozen=True)
class Op:
    """One op at one shape."""

    name: str
    least_bytes: int  # each input that is needed read once, each output written once
    draw: Callable[[torch.Generator], tuple[Any, ...]]  # fresh arguments
    reference: Function  # plain torch without custom ops, so that a compiler sees all of it
    kernel: Function
    tolerance: float  # relative, of the kernel against the reference; 0 for index ops
    wrap: Callable[[Function], Function] = lambda function: function  # around the reference, once it is compiled
    flops: int = 0  # of matrix products; 0 where bytes alone count


def randn(draw: torch.Generator, shape: Shape, *sides: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """On the device, in a dtype."""
    return torch.randn(sides, generator=draw, device=shape.device).to(dtype)


def ids(draw: torch.Generator, shape: Shape) -> Tensor:
    """``[B, K]``, ascending."""
    order = torch.rand(shape.batch, shape.grid.patches, generator=draw, device=shape.device).argsort(1)
    return order[:, : shape.kept].sort(1).values


def moves(draw: torch.Generator, shape: Shape) -> Moves:
    """Shift of up to an eighth of the side, and flip."""
    far = shape.grid.height // 8
    shift = torch.randint(-far, far + 1, (shape.batch, 2), generator=draw, device=shape.device)
    return Moves(shift, torch.rand(shape.batch, generator=draw, device=shape.device) < 0.5)


def canvas(draw: torch.Generator, shape: Shape) -> Tensor:
    """``[B, 3, H, W]``."""
    return randn(draw, shape, shape.batch, 3, shape.grid.height, shape.grid.width)


def gather_op(s: Shape) -> Op:
    """Canvas to windows."""
    return Op(
        "patch_gather",
        s.values * (4 + s.dtype.itemsize),
        lambda draw: (canvas(draw, s), ids(draw, s), moves(draw, s)),
        lambda *args: patch_gather_reference(*args, s.grid.patch, s.dtype),
        lambda *args: patch_gather(*args, s.grid.patch, s.dtype, impl="triton"),
        0.0,
    )


def ungather_op(s: Shape) -> Op:
    """Gradient of windows to gradient of patches."""

    def draw_all(draw: torch.Generator) -> tuple[Any, ...]:
        keep = ids(draw, s)
        windows = randn(draw, s, s.batch, s.kept, s.grid.patch_values, dtype=s.dtype)
        return windows, slot_of_patch(keep, s.grid.patches), keep, moves(draw, s)

    return Op(
        "patch_ungather",
        s.values * (4 + s.dtype.itemsize),
        draw_all,
        lambda *args: patch_ungather_reference(*args, s.grid),
        lambda *args: patch_ungather(*args, s.grid, impl="triton"),
        0.0,
    )


def scatter_op(s: Shape) -> Op:
    """Gradient of windows to gradient of the canvas."""
    whole = s.batch * s.grid.patches * s.grid.patch_values

    def draw_all(draw: torch.Generator) -> tuple[Any, ...]:
        windows = randn(draw, s, s.batch, s.kept, s.grid.patch_values, dtype=s.dtype)
        return windows, slot_of_patch(ids(draw, s), s.grid.patches), moves(draw, s)

    return Op(
        "patch_scatter",
        s.values * s.dtype.itemsize + 4 * whole,
        draw_all,
        lambda *args: patch_scatter_reference(*args, s.grid),
        lambda *args: patch_scatter(*args, s.grid, impl="triton"),
        0.0,
    )


def variation_op(s: Shape) -> Op:
    """Pixel norm, value and gradient."""
    return Op(
        "total_variation",
        s.values * 8,
        lambda draw: (canvas(draw, s), ids(draw, s)),
        lambda x, keep: plain_variation(x, keep, s.grid),
        lambda x, keep: total_variation(x, keep, s.grid, "pixel", impl="triton"),
        1e-5,
    )


def plain_variation(x: Tensor, keep: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """`total_variation_reference` without custom ops."""
    halo = halo_of(keep, grid, x.dtype)
    return tv_of_halo(take_halo_reference(x, halo.index, grid.patch), halo.share, TERM.norm)


TERM = TVTerm(1e-4, "pixel")


def plain_update(target: Updated, gradient: LossGradient, rates: Tensor, c: AdamConstants) -> tuple[Tensor, ...]:
    """`adam_update_reference` out of references alone, and with results instead of writes."""
    grid = Grid(target.canvas.shape[2], target.canvas.shape[3], target.exp_avg.shape[-1])
    places = (gradient.slots, target.ids, gradient.moves)
    value, of_tv = plain_variation(target.canvas, target.ids, grid)
    at_pixels = patch_ungather_reference(gradient.windows, *places, grid) + TERM.weight * of_tv
    pixels = take_patches_reference(target.canvas, target.ids, grid)
    moments = (target.exp_avg, target.exp_avg_sq)
    moved, *moments = adam_step(pixels, moments, at_pixels, rates, gradient.healthy, c)
    out = target.canvas.clone()
    put_patches_reference(out, target.ids, moved, grid)
    return out, *moments, value


def update_op(s: Shape) -> Op:
    """Un-gather, total variation, Adam and clamp."""

    def draw_all(draw: torch.Generator) -> tuple[Any, ...]:
        keep, x = ids(draw, s), canvas(draw, s)
        slots = slot_of_patch(keep, s.grid.patches)
        patches = (s.batch, s.kept, 3, s.grid.patch, s.grid.patch)
        second = 0.5 + randn(draw, s, *patches).square()
        target = Updated(x, x.clone(), randn(draw, s, *patches), second, keep, slots)
        windows = randn(draw, s, s.batch, s.kept, s.grid.patch_values, dtype=s.dtype)
        limit = torch.full((3, 1, 1), 2.0, device=s.device)
        rates = torch.tensor([0.25, 0.9, 0.1], device=s.device)
        healthy = torch.ones(s.batch, dtype=torch.bool, device=s.device)
        gradient = LossGradient(windows, slots, moves(draw, s), healthy)
        return target, gradient, rates, AdamConstants(0.5, 0.99, 1e-8, -limit, limit)

    def kernel(target: Updated, *rest: Any) -> tuple[Tensor, ...]:
        value = adam_update(target, *rest, TERM, impl="triton")
        assert value is not None
        return target.out, target.exp_avg, target.exp_avg_sq, value

    return Op("adam_update", s.values * (24 + s.dtype.itemsize), draw_all, plain_update, kernel, 1e-5)


def select_op(s: Shape) -> Op:
    """The next stop's survivors."""
    count = max(1, int(s.kept * 0.7))
    return Op(
        "select_patches",
        s.batch * (4 * s.kept + 8 * count),
        lambda draw: (randn(draw, s, s.batch, s.kept).softmax(1),),
        lambda scores: select_patches_reference(scores, count),
        lambda scores: select_patches(scores, count, impl="triton"),
        0.0,
    )


def composite_op(s: Shape) -> Op:
    """Kept patches over black."""
    black = torch.zeros(3, 1, 1, device=s.device)
    whole = s.batch * s.grid.patches * s.grid.patch_values
    return Op(
        "patch_mask (composite)",
        4 * (s.values + whole),
        lambda draw: (canvas(draw, s), ids(draw, s)),
        lambda x, keep: torch.where(patch_mask_reference(keep, s.grid)[:, None], x, black),
        lambda x, keep: composite(x, keep, s.grid, black, impl="triton"),
        0.0,
    )


def patch_ops(shape: Shape) -> list[Op]:
    """Every op outside the ViT, at a shape."""
    single = (gather_op, ungather_op, scatter_op, variation_op, update_op, select_op, composite_op)
    return [build(shape) for build in single]
