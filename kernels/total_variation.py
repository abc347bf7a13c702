"""``total_variation``: value per image and gradient on the updated patches, in one pass over them and a halo.

For each of four directions ``d`` (right, down, down-right, down-left) and each pair of neighbours ``(p, p + d)`` of
which at least one is an updated pixel, with ``D = x_p - x_{p+d}`` a vector of 3 channels:

    pixel:  sum_d sum_pairs ||D||_2                     (Eq. 2 of the paper)
    image:  sum_d sqrt(sum_pairs ||D||^2)               four Frobenius norms per image
    batch:  sum_d sqrt(sum_images sum_pairs ||D||^2)    four Frobenius norms over the batch (the published code)

A stopped neighbour counts as a constant (Eq. 1 read literally); a pair of two stopped pixels does not count; there is
no wrap-around. The gradient at an updated pixel is that of the plain total variation there, with norms over the pairs
that count. Under ``batch`` an image's value is its share, ``sum_d S_bd / sqrt(sum_b S_bd)``, so that the values of the
images add up to the norm. Where a norm is 0 its gradient is taken as 0.

Bytes: reads each updated pixel and a one-pixel halo once (its eight neighbours are in the cache) and writes each
gradient once: 8 bytes per value in float32. ``image`` and ``batch`` read the pixels once more beforehand, for the sums.
In the engine's step on CUDA the gradient is taken inside ``adam_update``, and is never written.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, cast, get_args

import torch
from torch import Tensor

from smi_fast.kernels.common.check import EXACT, IDS, check
from smi_fast.kernels.common.configs import best
from smi_fast.kernels.common.dispatch import Impl, choose, tl, triton, why_not_triton
from smi_fast.kernels.common.grid import Grid, slot_of_patch
from smi_fast.kernels.common.launch import Arguments, Config, Launch
from smi_fast.kernels.patch_ungather import own_pixels

TVNorm = Literal["pixel", "image", "batch"]
DIRECTIONS = ((0, 1), (1, 0), (1, 1), (1, -1))


@dataclass(frozen=True)
class Halo:
    """Patches with a rim of one pixel: where they lie, and how their pairs count. It depends only on the ids."""

    index: Tensor  # [B, A * (P+2)^2] int64 into H * W, a pixel outside the image clamped to its edge
    # [B, A, P+2, P+2], the share of a pair with that pixel that an updated pixel counts: 1/2 where the other is updated
    # too and counts the rest, 1 where it is a constant, 0 outside the image
    share: Tensor


def halo_of(updated: Tensor, grid: Grid, dtype: torch.dtype) -> Halo:
    """The halo of the patches ``updated``, ``[B, A]``; shares in ``dtype``."""
    rim = torch.arange(-1, grid.patch + 1, device=updated.device)
    y = (updated // grid.columns * grid.patch)[:, :, None] + rim  # [B, A, P+2]
    x = (updated % grid.columns * grid.patch)[:, :, None] + rim
    near_y, near_x = y.clamp(0, grid.height - 1), x.clamp(0, grid.width - 1)
    inside = (y == near_y)[..., :, None] & (x == near_x)[..., None, :]
    index = near_y[..., :, None] * grid.width + near_x[..., None, :]
    patch = (near_y // grid.patch * grid.columns)[..., :, None] + (near_x // grid.patch)[..., None, :]
    moving = slot_of_patch(updated, grid.patches).gather(1, patch.flatten(1)).reshape(patch.shape) >= 0
    return Halo(index.flatten(1), (1 - 0.5 * moving.to(dtype)) * inside)


def take_halo_reference(canvas: Tensor, index: Tensor, patch: int) -> Tensor:
    """``[B, A, 3, P+2, P+2]``, from the index of a `Halo`."""
    halo = canvas.flatten(2).gather(2, index[:, None].expand(-1, 3, -1))
    return halo.unflatten(2, (-1, patch + 2, patch + 2)).transpose(1, 2).contiguous()


@torch.library.custom_op("smi_fast::take_halo", mutates_args=())
def _take_halo(canvas: Tensor, index: Tensor, patch: int) -> Tensor:
    return take_halo_reference(canvas, index, patch)


@_take_halo.register_fake
def _(canvas: Tensor, index: Tensor, patch: int) -> Tensor:
    count = index.shape[1] // (patch + 2) ** 2
    return canvas.new_empty(len(canvas), count, 3, patch + 2, patch + 2)


def take_halo(canvas: Tensor, halo: Halo) -> Tensor:
    """The pixels of a halo, ``[B, A, 3, P+2, P+2]``; a custom op for the same reason as ``patch_gather``."""
    pixels: Tensor = _take_halo(canvas, halo.index, halo.share.shape[-1] - 2)
    return pixels


def total_variation_reference(canvas: Tensor, updated: Tensor, grid: Grid, norm: TVNorm) -> tuple[Tensor, Tensor]:
    """Plain torch; shapes as in `total_variation`."""
    halo = halo_of(updated, grid, canvas.dtype)
    return tv_of_halo(take_halo(canvas, halo), halo.share, norm)


def tv_of_halo(halo: Tensor, share: Tensor, norm: TVNorm) -> tuple[Tensor, Tensor]:
    """Value and gradient from a halo's pixels and shares; only pointwise operations and sums.

    Each updated pixel looks at its eight neighbours, so that inductor makes one vectorised loop of it: on two Zen 4
    cores 0.2 ms (8 images, 46 patches of 16), where pairs that are shared between two pixels took 2.9 ms.
    """
    channels = [halo.new_zeros(())] * 3  # of the gradient; separate, so that a length is computed once for all three
    if norm == "pixel":
        value = halo.new_zeros(())
        for _, differences, counted in neighbours(halo, share):
            length = square(differences).sqrt()
            value = value + length * counted
            inverse = torch.where(length * counted > 0, 1 / length, 0.0)
            channels = [c + inverse * d for c, d in zip(channels, differences, strict=True)]
        return value.sum((1, 2, 3)), torch.stack(channels, 2)
    sums = [halo.new_zeros(()) for _ in DIRECTIONS]
    for direction, differences, counted in neighbours(halo, share):
        sums[direction] = sums[direction] + square(differences) * counted
    total = torch.stack([s.sum((1, 2, 3)) for s in sums])  # [4, B]
    length = (total.sum(1, keepdim=True).expand_as(total) if norm == "batch" else total).sqrt()
    inverse = torch.where(length > 0, 1 / length, 0.0)
    for direction, differences, counted in neighbours(halo, share):
        weight = inverse[direction][:, None, None, None] * (counted > 0)
        channels = [c + weight * d for c, d in zip(channels, differences, strict=True)]
    return (total * inverse).sum(0), torch.stack(channels, 2)


def neighbours(halo: Tensor, share: Tensor) -> Iterator[tuple[int, list[Tensor], Tensor]]:
    """Of the pixels of a patch: a direction, the difference to that neighbour by channel, and the share that counts."""
    channels, inner = halo.unbind(2), slice(1, -1)
    side = halo.shape[-1] - 2
    for index, (dy, dx) in enumerate(DIRECTIONS):
        for sign in (1, -1):
            top, left = 1 + sign * dy, 1 + sign * dx
            there = (..., slice(top, top + side), slice(left, left + side))
            yield index, [x[..., inner, inner] - x[there] for x in channels], share[there]


def square(differences: list[Tensor]) -> Tensor:
    """Squared 2-norm over the channels."""
    red, green, blue = differences
    return red * red + green * green + blue * blue


@triton.jit
def difference(image, y, x, x0, x1, x2, DY: tl.constexpr, DX: tl.constexpr, H: tl.constexpr, W: tl.constexpr):
    """A pixel less its neighbour at ``(DY, DX)``, by channel, and the squared length; 0 where there is none."""
    step = DY * W + DX
    if DY < 0:
        step = tl.where(y + DY < 0, 0, step)
    if DY > 0:
        step = tl.where(y + DY >= H, 0, step)
    if DX < 0:
        step = tl.where(x + DX < 0, 0, step)
    if DX > 0:
        step = tl.where(x + DX >= W, 0, step)
    at = image + y * W + x + step  # off the edge a pixel is its own neighbour
    d0 = x0 - tl.load(at)
    d1 = x1 - tl.load(at + H * W)
    d2 = x2 - tl.load(at + 2 * H * W)
    return d0, d1, d2, d0 * d0 + d1 * d1 + d2 * d2


@triton.jit
def moves(moving, y, x, H: tl.constexpr, W: tl.constexpr, P: tl.constexpr):
    """Is the pixel in the image and in an updated patch? ``moving``: the image's row of slots."""
    there = (y >= 0) & (y < H) & (x >= 0) & (x < W)
    return tl.load(moving + (y // P) * (W // P) + x // P, mask=there, other=-1) >= 0


@triton.jit
def pair_terms(
    image, moving, inverse, y, x, x0, x1, x2, inside,
    DY: tl.constexpr, DX: tl.constexpr, DIRECTION: tl.constexpr, PIXEL: tl.constexpr,
    H: tl.constexpr, W: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """Gradient (3 channels) and value of the two pairs of a direction that a pixel is part of.

    The value is a length under ``pixel`` and a square under the other norms. A pair is counted at its first end; at
    its second only where the first is stopped.
    """
    a0, a1, a2, ahead = difference(image, y, x, x0, x1, x2, DY, DX, H, W)
    b0, b1, b2, behind = difference(image, y, x, x0, x1, x2, -DY, -DX, H, W)
    alone = moves(moving, y - DY, x - DX, H, W, P) == 0
    if PIXEL:
        over_ahead = tl.where(ahead > 0, tl.rsqrt(ahead), 0.0)
        over_behind = tl.where(behind > 0, tl.rsqrt(behind), 0.0)
        value = ahead * over_ahead + tl.where(alone, behind * over_behind, 0.0)
    else:
        over_ahead = tl.load(inverse + DIRECTION)
        over_behind = over_ahead
        value = ahead + tl.where(alone, behind, 0.0)
    g0 = a0 * over_ahead + b0 * over_behind
    g1 = a1 * over_ahead + b1 * over_behind
    g2 = a2 * over_ahead + b2 * over_behind
    return g0, g1, g2, tl.where(inside, value, 0.0)


@triton.jit
def tv_terms(
    image, moving, inverse, y, x, x0, x1, x2, inside,
    PIXEL: tl.constexpr, H: tl.constexpr, W: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """Gradient at each pixel (3 channels) and its four values, one a direction, in the order of ``DIRECTIONS``."""
    g0, g1, g2, v0 = pair_terms(image, moving, inverse, y, x, x0, x1, x2, inside, 0, 1, 0, PIXEL, H, W, P)
    h0, h1, h2, v1 = pair_terms(image, moving, inverse, y, x, x0, x1, x2, inside, 1, 0, 1, PIXEL, H, W, P)
    i0, i1, i2, v2 = pair_terms(image, moving, inverse, y, x, x0, x1, x2, inside, 1, 1, 2, PIXEL, H, W, P)
    j0, j1, j2, v3 = pair_terms(image, moving, inverse, y, x, x0, x1, x2, inside, 1, -1, 3, PIXEL, H, W, P)
    return g0 + h0 + i0 + j0, g1 + h1 + i1 + j1, g2 + h2 + i2 + j2, v0, v1, v2, v3


@triton.jit(do_not_specialize=["count"])
def tv_kernel(
    canvas,  # [B, 3, H, W]
    updated,  # [B, A] int64
    moving,  # [B, L] int32
    inverse,  # [B, 4]: 1 / length of each direction, not read under PIXEL or SUMS
    values,  # [B, blocks, 4]
    gradient,  # [B, A, 3, P, P], not written under SUMS
    count,
    SUMS: tl.constexpr,  # only the squares, for the norms
    PIXEL: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    P: tl.constexpr,
    BLOCK: tl.constexpr,
):
    image = tl.program_id(1).to(tl.int64)
    linear, y, x, inside = own_pixels(updated, image, count, WIDTH, P, BLOCK)
    pixels = canvas + image * (3 * HEIGHT * WIDTH)
    at = pixels + y * WIDTH + x
    x0 = tl.load(at, mask=inside, other=0.0)
    x1 = tl.load(at + HEIGHT * WIDTH, mask=inside, other=0.0)
    x2 = tl.load(at + 2 * HEIGHT * WIDTH, mask=inside, other=0.0)
    g0, g1, g2, v0, v1, v2, v3 = tv_terms(
        pixels, moving + image * (HEIGHT // P * (WIDTH // P)), inverse + 4 * image,
        y, x, x0, x1, x2, inside, PIXEL, HEIGHT, WIDTH, P,
    )  # fmt: skip
    total = values + (image * tl.num_programs(0) + tl.program_id(0)) * 4
    tl.store(total, tl.sum(v0, 0))
    tl.store(total + 1, tl.sum(v1, 0))
    tl.store(total + 2, tl.sum(v2, 0))
    tl.store(total + 3, tl.sum(v3, 0))
    if not SUMS:
        target = gradient + image * count * (3 * P * P) + linear
        tl.store(target, g0, mask=inside)
        tl.store(target + P * P, g1, mask=inside)
        tl.store(target + 2 * P * P, g2, mask=inside)


def tv_launch(
    tensors: dict[str, Tensor], grid: Grid, pixel: bool, sums: bool = False, config: Config | None = None
) -> tuple[Launch, Tensor]:
    """Launch of `tv_kernel`, and the ``values`` it fills; ``tensors``: its other tensors, by argument name."""
    batch, count = tensors["updated"].shape
    config = config or best("total_variation", grid.patch, lambda c: tv_launch(tensors, grid, pixel, sums, c)[0])
    blocks = triton.cdiv(count * grid.patch**2, config.block)
    values = tensors["canvas"].new_empty(batch, blocks, 4)
    sides = {"HEIGHT": grid.height, "WIDTH": grid.width, "P": grid.patch, "BLOCK": config.block}
    arguments: Arguments = {**tensors, "values": values, "count": count}
    launch = Launch(tv_kernel, (blocks, batch), arguments, {"SUMS": sums, "PIXEL": pixel, **sides}, config.warps)
    return launch, values


def inverse_lengths(canvas: Tensor, updated: Tensor, moving: Tensor, grid: Grid, norm: TVNorm) -> tuple[Tensor, Tensor]:
    """For ``image`` and ``batch``, by a pass over the squares: value ``[B]``, ``[B, 4]`` inverses."""
    tensors = {"canvas": canvas, "updated": updated, "moving": moving, "inverse": canvas, "gradient": canvas}
    launch, squares = tv_launch(tensors, grid, pixel=False, sums=True)
    launch.run()
    total = squares.sum(1)  # [B, 4]
    length = (total.sum(0, keepdim=True).expand_as(total) if norm == "batch" else total).sqrt()
    inverse = torch.where(length > 0, 1 / length, 0.0)
    return (total * inverse).sum(1), inverse


@torch.library.custom_op("smi_fast::total_variation", mutates_args=())
def _tv_op(canvas: Tensor, updated: Tensor, patch: int, norm: str) -> tuple[Tensor, Tensor]:
    """The kernels; on a machine without, the reference."""
    grid = Grid(canvas.shape[2], canvas.shape[3], patch)
    named = cast(TVNorm, norm)
    if why_not_triton(canvas):
        return total_variation_reference(canvas, updated, grid, named)
    canvas, updated = canvas.contiguous(), updated.contiguous()
    moving = slot_of_patch(updated, grid.patches)
    gradient = canvas.new_empty(*updated.shape, 3, patch, patch)
    value, inverse = None, canvas
    if named != "pixel":
        value, inverse = inverse_lengths(canvas, updated, moving, grid, named)
    tensors = {"canvas": canvas, "updated": updated, "moving": moving, "inverse": inverse, "gradient": gradient}
    launch, lengths = tv_launch(tensors, grid, pixel=named == "pixel")
    launch.run()
    return (lengths.sum((1, 2)) if value is None else value), gradient


@_tv_op.register_fake
def _(canvas: Tensor, updated: Tensor, patch: int, norm: str) -> tuple[Tensor, Tensor]:
    return canvas.new_empty(canvas.shape[0]), canvas.new_empty(*updated.shape, 3, patch, patch)


def total_variation(
    canvas: Tensor, updated: Tensor, grid: Grid, norm: TVNorm, *, impl: Impl | None = None
) -> tuple[Tensor, Tensor]:
    """Total variation of the updated patches and its gradient.

    Args:
        canvas: ``[B, 3, H, W]`` float32 (or float64, plain torch only).
        updated: ``[B, A]`` int64 patch ids, ascending in each row.
        norm: ``"pixel"``, ``"image"`` or ``"batch"``.
        impl: see ``dispatch.py``.

    Returns:
        value: ``[B]``; gradient: ``[B, A, 3, P, P]``, of the sum of the values; both in the canvas's dtype.

    Raises:
        ValueError: an unknown norm; a shape, dtype, device or ``impl`` that does not fit.
    """
    check_norm("total_variation", norm)
    expected = {"canvas": (canvas, "B 3 H W", EXACT), "updated": (updated, "B A", IDS)}
    check("total_variation", expected, H=grid.height, W=grid.width)
    double = "float64 has no kernel" if canvas.dtype == torch.float64 else None
    if choose("total_variation", impl, canvas, double) == "torch":
        return total_variation_reference(canvas, updated, grid, norm)
    value, gradient = _tv_op(canvas, updated, grid.patch, norm)
    return value, gradient


def check_norm(op: str, norm: str) -> None:
    """Raises ``ValueError`` where there is no such norm."""
    if norm not in get_args(TVNorm):
        raise ValueError(f"{op}: norm={norm!r}: must be 'pixel', 'image' or 'batch'")
