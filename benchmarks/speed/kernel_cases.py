"""What `kernels` runs: per op its inputs, its plain reference, its kernel, and the bytes it must move."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.systems.attention import torch_attention
from smi_fast.kernels.adam_update import (
    AdamConstants,
    LossGradient,
    TVTerm,
    Updated,
    adam_step,
    adam_update,
)
from smi_fast.kernels.cls_attention import cls_attention, cls_attention_reference
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
from smi_fast.kernels.tile_attention import packed_tile_attention, parts_of, tile_attention, unsupported
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


def heads(draw: torch.Generator, s: Shape) -> tuple[Tensor, Tensor, Tensor]:
    """Query of CLS, and keys and values as views of one projection, as the model makes them."""
    tokens = s.kept + 1
    both = randn(draw, s, s.batch, tokens, 2, s.heads, 64, dtype=s.dtype)
    key, value = both.permute(2, 0, 3, 1, 4).unbind(0)
    return randn(draw, s, s.batch, s.heads, 1, 64, dtype=s.dtype), key, value


def attention_and_row(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """PyTorch's attention, and the softmax row beside it: what one would write without the op."""
    row = (query.float() * 64**-0.5) @ key.float().transpose(-2, -1)
    return torch_attention(query, key, value), row.softmax(-1)[:, :, 0, 1:].mean(1)


def with_backward(function: Function) -> Function:
    """Output, score and the gradients of all three inputs, for a cotangent that comes last."""

    def run(query: Tensor, key: Tensor, value: Tensor, cotangent: Tensor) -> tuple[Tensor, ...]:
        leaves = [tensor.detach().requires_grad_() for tensor in (query, key, value)]
        with torch.enable_grad():
            out, score = function(*leaves)
            return out.detach(), score.detach(), *torch.autograd.grad(out, leaves, cotangent)

    return run


def attention_ops(s: Shape) -> list[Op]:
    """Forward; forward and backward; and both with PyTorch's attention as the reference."""
    keys_and_values = 2 * s.batch * s.heads * (s.kept + 1) * 64 * s.dtype.itemsize

    def kernel(query: Tensor, key: Tensor, value: Tensor) -> Any:
        return cls_attention(query, key, value, 1, impl="triton")

    def plain(query: Tensor, key: Tensor, value: Tensor) -> Any:
        return cls_attention_reference(query, key, value, 1)

    def draw_both(draw: torch.Generator) -> tuple[Tensor, ...]:
        query, key, value = heads(draw, s)
        return query, key, value, randn(draw, s, *query.shape, dtype=s.dtype)

    tolerance = 1e-5 if s.dtype == torch.float32 else 2e-2
    rows = []
    for name, reference in (("cls_attention", plain), ("cls_attention (over SDPA and a row)", attention_and_row)):
        rows.append(Op(name, keys_and_values, lambda draw: heads(draw, s), reference, kernel, tolerance))
        title, both = f"{name}, with backward", 3 * keys_and_values
        rows.append(Op(title, both, draw_both, reference, with_backward(kernel), tolerance, with_backward))
    return rows


def with_gradient(function: Function) -> Function:
    """Output, and the gradient of the one input, for a cotangent that comes last."""

    def run(packed: Tensor, cotangent: Tensor) -> tuple[Tensor, ...]:
        leaf = packed.detach().requires_grad_()
        with torch.enable_grad():
            out = function(leaf)
            return out.detach(), *torch.autograd.grad(out, leaf, cotangent)

    return run


def of_parts_by_torch(packed: Tensor) -> Tensor:
    """PyTorch's own, of the parts of a projection."""
    return torch_attention(*parts_of(packed))


def tile_ops(s: Shape) -> list[Op]:
    """Self-attention on a whole projection beside PyTorch's: forward; and both ways, with one gradient or three.

    None where a tile does not fit into the device's shared memory: float32 beyond 128 tokens.
    """
    if unsupported(*[torch.empty(1, 1, s.kept + 1, 64, dtype=s.dtype, device=s.device)] * 3):
        return []
    inner = s.batch * (s.kept + 1) * s.heads * 64  # values of each of the three parts

    def packed(draw: torch.Generator) -> tuple[Tensor, ...]:
        return (randn(draw, s, s.batch, s.kept + 1, 3, s.heads, 64, dtype=s.dtype),)

    def draw_both(draw: torch.Generator) -> tuple[Tensor, ...]:
        cotangent = randn(draw, s, s.batch, s.kept + 1, s.heads, 64, dtype=s.dtype)
        return *packed(draw), cotangent.transpose(1, 2)

    def whole(packed: Tensor) -> Tensor:
        return packed_tile_attention(packed, impl="triton")

    def of_parts(packed: Tensor) -> Tensor:
        return tile_attention(*parts_of(packed), impl="triton")

    tolerance = 1e-5 if s.dtype == torch.float32 else 2e-2
    moved = 4 * inner * s.dtype.itemsize
    rows = [Op("tile_attention (over SDPA)", moved, packed, of_parts_by_torch, whole, tolerance)]
    for title, kernel in (("with backward", whole), ("three gradients, with backward", of_parts)):
        name, least = f"tile_attention (over SDPA), {title}", 11 * inner * s.dtype.itemsize
        rows.append(Op(name, least, draw_both, of_parts_by_torch, with_gradient(kernel), tolerance, with_gradient))
    return rows


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


def all_ops(shape: Shape) -> list[Op]:
    """Every op at a shape."""
    single = (gather_op, ungather_op, scatter_op, variation_op, update_op, select_op, composite_op)
    return [build(shape) for build in single] + attention_ops(shape) + tile_ops(shape)
