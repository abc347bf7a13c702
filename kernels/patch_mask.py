"""``patch_mask``: kept patch ids as pixels: a mask, a composite over a fill, and statistics.

    mask[b, y, x] = 1 where the patch that holds pixel (y, x) is in keep[b]
    composite     = pixels where mask, else fill
    mean[b, c]    = mean of pixels[b, c] over the pixels of the kept patches; std[b, c] likewise, of the population

Each is one pass: the composite reads pixels where they are kept and the fill where they are not, and writes each value
once; the statistics read only the kept pixels. To find whether a pixel is kept, a program reads the patch's entry of
`slot_of_patch`, which is in the cache.

A program of the statistics gives the mean ``u_i`` of its ``n_i`` pixels, what rounding left over of it (the mean of
what is apart from ``u_i``), and ``s_i``, the sum of squares about it. They are combined as in Chan, Golub and LeVeque
(1983), with the means taken from that of the first program, so that nothing is lost to a large common offset:

    u = sum_i n_i u_i / n        n std^2 = sum_i s_i + sum_i n_i (u_i - u)^2
"""

import torch
from torch import Tensor

from smi_fast.kernels.common.check import FLOATS, check
from smi_fast.kernels.common.configs import best
from smi_fast.kernels.common.dispatch import Impl, choose, tl, triton, why_not_triton
from smi_fast.kernels.common.grid import Grid, slot_of_patch
from smi_fast.kernels.common.launch import Arguments, Config, Launch

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
COLOURS = (*FLOATS, torch.uint8)


def patch_mask_reference(keep: Tensor, grid: Grid) -> Tensor:
    """Plain torch; shapes as in `patch_mask`."""
    kept = torch.zeros(keep.shape[0], grid.patches, dtype=torch.bool, device=keep.device)
    kept = kept.scatter(1, keep.long(), torch.ones_like(keep, dtype=torch.bool))
    kept = kept.reshape(-1, grid.rows, 1, grid.columns, 1)
    return kept.expand(-1, -1, grid.patch, -1, grid.patch).reshape(-1, grid.height, grid.width)


def composite_reference(pixels: Tensor, keep: Tensor, grid: Grid, fill: Tensor) -> Tensor:
    """Plain torch; shapes as in `composite`."""
    return torch.where(patch_mask_reference(keep, grid)[:, None], pixels, fill.to(pixels.dtype))


def kept_statistics_reference(pixels: Tensor, keep: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Plain torch, in two passes; shapes as in `kept_statistics`."""
    pixels = pixels.to(torch.promote_types(pixels.dtype, torch.float32))
    mask = patch_mask_reference(keep, grid)[:, None]
    count = keep.shape[1] * grid.patch**2
    mean = torch.where(mask, pixels, 0.0).sum((2, 3), keepdim=True) / count
    squares = torch.where(mask, pixels - mean, 0.0).square().sum((2, 3)) / count
    return mean[:, :, 0, 0], squares.sqrt()


@triton.jit
def is_kept(slots, pixel, inside, WIDTH: tl.constexpr, P: tl.constexpr, RUN: tl.constexpr):
    """Is the patch that holds a pixel kept? ``slots``: the image's row of `slot_of_patch`."""
    patch = pixel // WIDTH // P * (WIDTH // P) + pixel % WIDTH // P
    # the compiler cannot see that a run of pixels has one answer; it loads and stores a run at once
    return tl.max_constancy(tl.load(slots + patch, mask=inside, other=-1) >= 0, RUN)


@triton.jit
def mask_kernel(
    slots,  # [B, L] int32
    mask,  # [B, H, W] bool
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    P: tl.constexpr,
    RUN: tl.constexpr,  # pixels beside each other that lie in one patch, a power of two
    BLOCK: tl.constexpr,
):
    image = tl.program_id(1).to(tl.int64)
    pixel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = pixel < HEIGHT * WIDTH
    kept = is_kept(slots + image * (HEIGHT // P * (WIDTH // P)), pixel, inside, WIDTH, P, RUN)
    tl.store(mask + image * (HEIGHT * WIDTH) + pixel, kept, mask=inside)


@triton.jit
def composite_kernel(
    pixels,  # [B, C, H, W]
    slots,  # [B, L] int32
    fill,  # expanded to [B, C, H, W]
    out,  # [B, C, H, W]
    fill_b,
    fill_c,
    fill_y,
    FILL_X: tl.constexpr,  # strides of the fill: 0 along x for a colour, 1 for an image
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    P: tl.constexpr,
    RUN: tl.constexpr,  # pixels beside each other that lie in one patch, a power of two
    BLOCK: tl.constexpr,
):
    channel, channels = tl.program_id(1), tl.num_programs(1)
    image = tl.program_id(2).to(tl.int64)
    pixel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = pixel < HEIGHT * WIDTH
    kept = is_kept(slots + image * (HEIGHT // P * (WIDTH // P)), pixel, inside, WIDTH, P, RUN)
    plane = (image * channels + channel) * (HEIGHT * WIDTH)
    behind = fill + image * fill_b + channel * fill_c + pixel // WIDTH * fill_y + pixel % WIDTH * FILL_X
    shown = tl.load(pixels + plane + pixel, mask=inside & kept, other=0)
    hidden = tl.load(behind, mask=inside & (kept == 0), other=0)
    tl.store(out + plane + pixel, tl.where(kept, shown, hidden), mask=inside)


@triton.jit(do_not_specialize=["kept"])
def statistics_kernel(
    pixels,  # [B, C, H, W]
    keep,  # [B, K] int64
    partial,  # [B, C, blocks, 3]: mean, what rounding left over of it, sum of squares about both
    kept,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    P: tl.constexpr,
    RUN: tl.constexpr,  # pixels beside each other that lie in one patch, a power of two
    BLOCK: tl.constexpr,
):
    block, blocks = tl.program_id(0), tl.num_programs(0)
    channel, channels = tl.program_id(1), tl.num_programs(1)
    image = tl.program_id(2).to(tl.int64)
    pixel = block * BLOCK + tl.arange(0, BLOCK)  # of the kept patches
    inside = pixel < kept * (P * P)
    patch = tl.load(keep + image * kept + pixel // (P * P), mask=inside, other=0).to(tl.int32)
    y = patch // (WIDTH // P) * P + pixel % (P * P) // P
    x = patch % (WIDTH // P) * P + pixel % P
    plane = image * channels + channel
    pixels += plane * (HEIGHT * WIDTH)
    offset = tl.max_contiguous(tl.multiple_of(y * WIDTH + x, RUN), RUN)
    value = tl.load(pixels + offset, mask=inside, other=0.0).to(tl.float32)
    count = tl.minimum(BLOCK, kept * (P * P) - block * BLOCK)
    mean = tl.sum(value, 0) / count
    apart = tl.where(inside, value - mean, 0.0)
    rest = tl.sum(apart, 0) / count
    target = partial + (plane * blocks + block) * 3
    tl.store(target, mean)
    tl.store(target + 1, rest)
    tl.store(target + 2, tl.sum(apart * apart, 0) - count * rest * rest)


def sides_of(grid: Grid, config: Config) -> dict[str, int]:
    """Constants of the three kernels."""
    run = min(16, grid.patch & -grid.patch)
    return {"HEIGHT": grid.height, "WIDTH": grid.width, "P": grid.patch, "RUN": run, "BLOCK": config.block}


def mask_launch(slots: Tensor, mask: Tensor, grid: Grid, config: Config | None = None) -> Launch:
    """Launch of the mask into ``mask``, ``[B, H, W]``; ``slots``: `slot_of_patch` of the kept ids."""
    config = config or best("patch_mask", grid.patch, lambda c: mask_launch(slots, mask, grid, c))
    blocks = triton.cdiv(grid.height * grid.width, config.block)
    arguments: Arguments = {"slots": slots, "mask": mask}
    return Launch(mask_kernel, (blocks, len(slots)), arguments, sides_of(grid, config), config.warps)


def composite_launch(
    pixels: Tensor, slots: Tensor, fill: Tensor, out: Tensor, grid: Grid, config: Config | None = None
) -> Launch:
    """Launch of the composite into ``out``; ``fill`` is expanded to the shape of ``pixels``, not copied."""
    places = (pixels, slots, fill, out, grid)
    config = config or best("composite", grid.patch, lambda c: composite_launch(*places, c))
    batch, channels = pixels.shape[:2]
    fill_b, fill_c, fill_y, fill_x = fill.stride()
    arguments: Arguments = {"pixels": pixels, "slots": slots, "fill": fill, "out": out}
    arguments |= {"fill_b": fill_b, "fill_c": fill_c, "fill_y": fill_y}
    launched = (triton.cdiv(grid.height * grid.width, config.block), channels, batch)
    return Launch(composite_kernel, launched, arguments, {"FILL_X": fill_x, **sides_of(grid, config)}, config.warps)


def statistics_launch(
    pixels: Tensor, keep: Tensor, grid: Grid, config: Config | None = None
) -> tuple[Launch, Tensor, Tensor]:
    """Launch of the statistics, the partial results it fills, and how many pixels each block has."""
    config = config or best("kept_statistics", grid.patch, lambda c: statistics_launch(pixels, keep, grid, c)[0])
    batch, channels = pixels.shape[:2]
    total = keep.shape[1] * grid.patch**2
    blocks = triton.cdiv(total, config.block)
    partial = pixels.new_empty(batch, channels, blocks, 3, dtype=torch.float32)
    counts = (total - config.block * torch.arange(blocks, device=pixels.device)).clamp(max=config.block)
    arguments: Arguments = {"pixels": pixels, "keep": keep, "partial": partial, "kept": keep.shape[1]}
    launch = Launch(statistics_kernel, (blocks, channels, batch), arguments, sides_of(grid, config), config.warps)
    return launch, partial, counts


def combined(partial: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation from those of blocks; see the equations above."""
    means, rest, squares = partial.unbind(-1)  # [B, C, blocks]
    share, first = counts / counts.sum(), means[..., :1]
    away = means - first + rest
    mean = (away * share).sum(-1, keepdim=True)
    between = ((away - mean).square() * share).sum(-1)
    return (first + mean)[..., 0], (squares.sum(-1) / counts.sum() + between).sqrt()


@torch.library.custom_op("smi_fast::patch_mask", mutates_args=())
def _mask(keep: Tensor, side: list[int]) -> Tensor:
    """The kernel; on a machine without, the reference."""
    grid = Grid(*side)
    if why_not_triton(keep):
        return patch_mask_reference(keep, grid)
    mask = keep.new_empty(len(keep), grid.height, grid.width, dtype=torch.bool)
    mask_launch(slot_of_patch(keep.long(), grid.patches), mask, grid).run()
    return mask


@_mask.register_fake
def _(keep: Tensor, side: list[int]) -> Tensor:
    return keep.new_empty(keep.shape[0], side[0], side[1], dtype=torch.bool)


@torch.library.custom_op("smi_fast::composite", mutates_args=())
def _composite(pixels: Tensor, keep: Tensor, fill: Tensor, patch: int) -> Tensor:
    """The kernel; on a machine without, the reference."""
    grid = Grid(pixels.shape[2], pixels.shape[3], patch)
    if why_not_triton(pixels):
        return composite_reference(pixels, keep, grid, fill).contiguous()
    out = torch.empty_like(pixels, memory_format=torch.contiguous_format)
    slots = slot_of_patch(keep.long(), grid.patches)
    composite_launch(pixels.contiguous(), slots, fill.to(pixels.dtype).expand_as(pixels), out, grid).run()
    return out


@_composite.register_fake
def _(pixels: Tensor, keep: Tensor, fill: Tensor, patch: int) -> Tensor:
    return torch.empty_like(pixels, memory_format=torch.contiguous_format)


@torch.library.custom_op("smi_fast::kept_statistics", mutates_args=())
def _statistics(pixels: Tensor, keep: Tensor, patch: int) -> tuple[Tensor, Tensor]:
    """The kernel; on a machine without, and in float64, the reference."""
    grid = Grid(pixels.shape[2], pixels.shape[3], patch)
    if why_not_triton(pixels) or pixels.dtype == torch.float64:
        mean, std = kept_statistics_reference(pixels, keep, grid)
        return mean.contiguous(), std
    launch, partial, counts = statistics_launch(pixels.contiguous(), keep.long().contiguous(), grid)
    launch.run()
    return combined(partial, counts)


@_statistics.register_fake
def _(pixels: Tensor, keep: Tensor, patch: int) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(pixels.dtype, torch.float32)
    mean = pixels.new_empty(pixels.shape[:2], dtype=dtype)
    return mean, torch.empty_like(mean)


def wants_gradient(*tensors: Tensor) -> str | None:
    """Why a kernel without a gradient cannot be used, None if none is wanted."""
    wanted = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    return "the kernel has no gradient" if wanted else None


def patch_mask(keep: Tensor, grid: Grid, *, impl: Impl | None = None) -> Tensor:
    """Which pixels are kept.

    Args:
        keep: ``[B, K]`` patch ids, of any integer dtype.
        impl: see ``dispatch.py``.

    Returns:
        ``[B, H, W]`` bool, true on the pixels of the kept patches.

    Raises:
        ValueError: a shape, dtype or ``impl`` that does not fit.
    """
    check("patch_mask", {"keep": (keep, "B K", INTEGERS)})
    if choose("patch_mask", impl, keep) == "torch":
        return patch_mask_reference(keep, grid)
    mask: Tensor = _mask(keep, [grid.height, grid.width, grid.patch])
    return mask


def composite(pixels: Tensor, keep: Tensor, grid: Grid, fill: Tensor, *, impl: Impl | None = None) -> Tensor:
    """The kept patches over a fill.

    Args:
        pixels: ``[B, C, H, W]``, floating point or uint8.
        keep: ``[B, K]`` patch ids, of any integer dtype.
        fill: broadcasts to ``pixels``: ``[C, 1, 1]`` for a colour, ``[B, C, H, W]`` for other images; cast to its
            dtype.
        impl: see ``dispatch.py``. The kernel has no gradient.

    Returns:
        ``[B, C, H, W]``, in the dtype of ``pixels``.

    Raises:
        ValueError: a shape, dtype, device or ``impl`` that does not fit.
    """
    expected = {"pixels": (pixels, "B C H W", COLOURS), "keep": (keep, "B K", INTEGERS)}
    check("composite", expected, H=grid.height, W=grid.width)
    sides = zip(reversed(fill.shape), reversed(pixels.shape), strict=False)
    if fill.ndim > 4 or any(side not in (1, whole) for side, whole in sides):
        raise ValueError(f"composite: fill of shape {tuple(fill.shape)}: must broadcast to {tuple(pixels.shape)}")
    if fill.device != pixels.device:
        raise ValueError(f"composite: fill is on {fill.device}, pixels on {pixels.device}: must be on one device")
    if choose("composite", impl, pixels, wants_gradient(pixels, fill)) == "torch":
        return composite_reference(pixels, keep, grid, fill)
    out: Tensor = _composite(pixels, keep, fill, grid.patch)
    return out


def kept_statistics(pixels: Tensor, keep: Tensor, grid: Grid, *, impl: Impl | None = None) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the kept pixels, by image and channel.

    Args:
        pixels: ``[B, C, H, W]``, floating point.
        keep: ``[B, K]`` patch ids, of any integer dtype, distinct in each row (not looked at).
        impl: see ``dispatch.py``. The kernel has no gradient.

    Returns:
        mean ``[B, C]`` and population standard deviation ``[B, C]``; float32 (float64 for float64).

    Raises:
        ValueError: a shape, dtype, device or ``impl`` that does not fit.
    """
    expected = {"pixels": (pixels, "B C H W", FLOATS), "keep": (keep, "B K", INTEGERS)}
    check("kept_statistics", expected, H=grid.height, W=grid.width)
    unsupported = "float64 has no kernel" if pixels.dtype == torch.float64 else wants_gradient(pixels)
    if choose("kept_statistics", impl, pixels, unsupported) == "torch":
        return kept_statistics_reference(pixels, keep, grid)
    mean, std = _statistics(pixels, keep, grid.patch)
    return mean, std
