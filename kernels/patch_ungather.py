"""``patch_ungather`` and ``patch_scatter``: the transpose of ``patch_gather``, at single patches and as a canvas.

    patches[b, a, ch, i, j] = windows[b, k, (ch, i', j')], of the one window k that shows pixel (i, j) of patch a, or 0

``patch_scatter`` is the whole transpose, and the gather's backward: a canvas, 0 where no window lies.
``patch_ungather`` gives only the patches that are updated. The windows of one image are disjoint, so each pixel
is covered by at most one of them, and every pixel looks up its own: no atomics, and gradient that falls on a stopped
pixel is never written.

Bytes: ungather reads each kept pixel's gradient once and writes it once, ``s + 4`` bytes per value for a compute dtype
of ``s`` bytes; scatter writes the whole canvas. In the engine's step on CUDA no ungather runs of its own:
``adam_update`` reads the windows' gradient where it needs it.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from smi_fast.kernels.common.check import FLOATS, IDS, check, expected_moves
from smi_fast.kernels.common.configs import best
from smi_fast.kernels.common.dispatch import Impl, choose, tl, triton
from smi_fast.kernels.common.grid import Grid, Moves, split_shift
from smi_fast.kernels.common.launch import Config, Launch


def patch_ungather_reference(gradient: Tensor, slots: Tensor, ids: Tensor, moves: Moves, grid: Grid) -> Tensor:
    """Plain torch; shapes as in `patch_ungather`."""
    batch, patch = gradient.shape[0], grid.patch
    _, remainder = split_shift(moves.shift, patch)
    steps = torch.arange(patch, device=gradient.device)
    y = (ids // grid.columns * patch + remainder[:, :1])[:, :, None] + steps  # [B, A, P]
    x = (ids % grid.columns * patch + remainder[:, 1:])[:, :, None] + steps
    y, x = y % grid.height, x % grid.width
    cell = (y // patch * grid.columns)[..., :, None] + (x // patch)[..., None, :]  # [B, A, P, P]
    column = torch.where(moves.flip[:, None, None], patch - 1 - x % patch, x % patch)
    offset = (y % patch * patch)[..., :, None] + column[..., None, :]
    # a cell without a window reads zeros that are put behind the windows
    begin = torch.where(slots >= 0, slots, gradient.shape[1]).long() * (patch * patch)  # [B, L]
    source = begin.gather(1, cell.flatten(1)) + offset.flatten(1)  # [B, A * P * P]
    padded = F.pad(gradient.unflatten(2, (3, -1)).transpose(1, 2).flatten(2), (0, patch * patch))
    values = padded.gather(2, source[:, None].expand(-1, 3, -1))  # [B, 3, A * P * P]
    values = values.reshape(batch, 3, -1, patch, patch).transpose(1, 2)
    return values.to(torch.promote_types(values.dtype, torch.float32)).contiguous()


def patch_scatter_reference(gradient: Tensor, slots: Tensor, moves: Moves, grid: Grid) -> Tensor:
    """Plain torch; shapes as in `patch_scatter`."""
    everything = torch.arange(grid.patches, device=slots.device).repeat(len(slots), 1)
    patches = patch_ungather_reference(gradient, slots, everything, moves, grid)
    patches = patches.unflatten(1, (grid.rows, grid.columns)).permute(0, 3, 1, 4, 2, 5)
    return patches.reshape(len(slots), 3, grid.height, grid.width)


@triton.jit
def wrapped(position, SIDE: tl.constexpr):
    """A position in ``[-SIDE, 2 * SIDE)`` on a circle of ``SIDE``."""
    position = tl.where(position < 0, position + SIDE, position)
    return tl.where(position >= SIDE, position - SIDE, position)


@triton.jit
def shift_remainder(shift, P: tl.constexpr):
    """The part of a shift that is no whole patch, in ``[-P/2, P/2)``; right for either sign of ``%``."""
    positive = ((shift % P) + P) % P
    return tl.where(2 * positive >= P, positive - P, positive).to(tl.int32)


@triton.jit
def own_pixels(ids, image, count, WIDTH: tl.constexpr, P: tl.constexpr, BLOCK: tl.constexpr):
    """The pixels of a program: its block of all pixels of the image's ``count`` patches.

    Returns their place in ``[A, 3, P, P]`` (channel 0), ``y``, ``x``, and which of them there are.
    """
    pixel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = pixel < count * (P * P)
    if (P * P) % BLOCK == 0:  # the block lies in one patch: one id to load
        entry = tl.program_id(0) * BLOCK // (P * P)
        patch = tl.load(ids + image * count + entry).to(tl.int32)
    else:
        entry = pixel // (P * P)
        patch = tl.load(ids + image * count + entry, mask=inside, other=0).to(tl.int32)
    y = patch // (WIDTH // P) * P + pixel % (P * P) // P
    x = patch % (WIDTH // P) * P + pixel % P
    return entry * (2 * P * P) + pixel, y, x, inside


@triton.jit
def covering_offset(y, x, slots, ry, rx, flip, inside, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, P: tl.constexpr):
    """Where the window gradients of an image hold pixel ``(y, x)``, channel 0; negative if no kept window covers it."""
    y, x = wrapped(y + ry, HEIGHT), wrapped(x + rx, WIDTH)
    slot = tl.load(slots + (y // P) * (WIDTH // P) + x // P, mask=inside, other=-1)
    column = tl.where(flip, P - 1 - x % P, x % P)
    return tl.where(slot >= 0, slot * (3 * P * P) + (y % P) * P + column, -1)


@triton.jit(do_not_specialize=["kept", "count"])
def ungather_kernel(
    gradient,  # [B, K, 3, P, P]
    slots,  # [B, L] int32
    ids,  # [B, A] int64
    shift,  # [B, 2] int64
    flip,  # [B] bool
    patches,  # [B, A, 3, P, P]
    kept,
    count,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    P: tl.constexpr,
    BLOCK: tl.constexpr,
):
    image = tl.program_id(1).to(tl.int64)
    linear, y, x, inside = own_pixels(ids, image, count, WIDTH, P, BLOCK)
    ry = shift_remainder(tl.load(shift + 2 * image), P)
    rx = shift_remainder(tl.load(shift + 2 * image + 1), P)
    flipped = tl.load(flip + image) != 0
    row = slots + image * (HEIGHT // P * (WIDTH // P))
    offset = covering_offset(y, x, row, ry, rx, flipped, inside, HEIGHT, WIDTH, P)
    source = gradient + image * kept * (3 * P * P) + offset
    target = patches + image * count * (3 * P * P) + linear
    for channel in tl.static_range(3):
        value = tl.load(source + channel * (P * P), mask=inside & (offset >= 0), other=0.0)
        tl.store(target + channel * (P * P), value.to(tl.float32), mask=inside)


@triton.jit(do_not_specialize=["kept"])
def scatter_kernel(
    gradient,  # [B, K, 3, P, P]
    slots,  # [B, L] int32
    shift,  # [B, 2] int64
    flip,  # [B] bool
    canvas,  # [B, 3, H, W]
    kept,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    P: tl.constexpr,
    BLOCK: tl.constexpr,
):
    image = tl.program_id(1).to(tl.int64)
    pixel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = pixel < HEIGHT * WIDTH
    ry = shift_remainder(tl.load(shift + 2 * image), P)
    rx = shift_remainder(tl.load(shift + 2 * image + 1), P)
    flipped = tl.load(flip + image) != 0
    row = slots + image * (HEIGHT // P * (WIDTH // P))
    offset = covering_offset(pixel // WIDTH, pixel % WIDTH, row, ry, rx, flipped, inside, HEIGHT, WIDTH, P)
    source = gradient + image * kept * (3 * P * P) + offset
    target = canvas + image * (3 * HEIGHT * WIDTH) + pixel
    for channel in tl.static_range(3):
        value = tl.load(source + channel * (P * P), mask=inside & (offset >= 0), other=0.0)
        tl.store(target + channel * (HEIGHT * WIDTH), value.to(tl.float32), mask=inside)


def ungather_launch(
    gradient: Tensor, slots: Tensor, ids: Tensor, moves: Moves, grid: Grid, config: Config | None = None
) -> tuple[Launch, Tensor]:
    """Launch of the ungather, and the patches it fills, ``[B, A, 3, P, P]``."""
    batch, count = ids.shape
    places = (gradient, slots, ids, moves, grid)
    config = config or best("patch_ungather", grid.patch, lambda c: ungather_launch(*places, c)[0])
    patches = gradient.new_empty(batch, count, 3, grid.patch, grid.patch, dtype=torch.float32)
    tensors = {"gradient": gradient, "slots": slots, "ids": ids, **moves._asdict(), "patches": patches}
    launch = Launch(
        ungather_kernel,
        (triton.cdiv(count * grid.patch**2, config.block), batch),
        {**tensors, "kept": gradient.shape[1], "count": count},
        {"HEIGHT": grid.height, "WIDTH": grid.width, "P": grid.patch, "BLOCK": config.block},
        config.warps,
    )
    return launch, patches


def scatter_launch(
    gradient: Tensor, slots: Tensor, moves: Moves, grid: Grid, config: Config | None = None
) -> tuple[Launch, Tensor]:
    """Launch of the scatter, and the canvas it fills, ``[B, 3, H, W]``."""
    batch = len(slots)
    places = (gradient, slots, moves, grid)
    config = config or best("patch_scatter", grid.patch, lambda c: scatter_launch(*places, c)[0])
    canvas = gradient.new_empty(batch, 3, grid.height, grid.width, dtype=torch.float32)
    tensors = {"gradient": gradient, "slots": slots, **moves._asdict(), "canvas": canvas}
    launch = Launch(
        scatter_kernel,
        (triton.cdiv(grid.height * grid.width, config.block), batch),
        {**tensors, "kept": gradient.shape[1]},
        {"HEIGHT": grid.height, "WIDTH": grid.width, "P": grid.patch, "BLOCK": config.block},
        config.warps,
    )
    return launch, canvas


@torch.library.custom_op("smi_fast::patch_ungather", mutates_args=())
def _ungather(
    gradient: Tensor, slots: Tensor, ids: Tensor, shift: Tensor, flip: Tensor, side: list[int], impl: str
) -> Tensor:
    grid, moves = Grid(*side), Moves(shift, flip)
    if impl == "torch":
        return patch_ungather_reference(gradient, slots, ids, moves, grid)
    tensors = (gradient.contiguous(), slots.contiguous(), ids.contiguous())
    launch, patches = ungather_launch(*tensors, moves.contiguous(), grid)
    launch.run()
    return patches


@_ungather.register_fake
def _(gradient: Tensor, slots: Tensor, ids: Tensor, shift: Tensor, flip: Tensor, side: list[int], impl: str) -> Tensor:
    dtype = torch.promote_types(gradient.dtype, torch.float32)
    return gradient.new_empty(*ids.shape, 3, side[2], side[2], dtype=dtype)


@torch.library.custom_op("smi_fast::patch_scatter", mutates_args=())
def _scatter(gradient: Tensor, slots: Tensor, shift: Tensor, flip: Tensor, side: list[int], impl: str) -> Tensor:
    grid, moves = Grid(*side), Moves(shift, flip)
    if impl == "torch":
        return patch_scatter_reference(gradient, slots, moves, grid)
    launch, canvas = scatter_launch(gradient.contiguous(), slots.contiguous(), moves.contiguous(), grid)
    launch.run()
    return canvas


@_scatter.register_fake
def _(gradient: Tensor, slots: Tensor, shift: Tensor, flip: Tensor, side: list[int], impl: str) -> Tensor:
    dtype = torch.promote_types(gradient.dtype, torch.float32)
    return gradient.new_empty(slots.shape[0], 3, side[0], side[1], dtype=dtype)


def patch_ungather(
    gradient: Tensor, slots: Tensor, ids: Tensor, moves: Moves, grid: Grid, *, impl: Impl | None = None
) -> Tensor:
    """Bring the gradient of the windows back to the pixels of the updated patches.

    Args:
        gradient: ``[B, K, 3 * P * P]``, of the windows that ``patch_gather`` gave for the same keep and moves.
        slots: ``[B, L]`` int32, `slot_of_patch` of the kept ids.
        ids: ``[B, A]`` int64, the patches whose pixels are updated: the kept ones where stopping is real.
        moves: shift and flip of each image, as in `patch_gather`.
        impl: see ``dispatch.py``.

    Returns:
        ``[B, A, 3, P, P]`` float32 (float64 for a float64 gradient).

    Raises:
        ValueError: a shape, dtype, device or ``impl`` that does not fit.
    """
    expected = {
        "gradient": (gradient, "B K N", FLOATS),
        "slots": (slots, "B L", (torch.int32,)),
        "ids": (ids, "B A", IDS),
        **expected_moves(moves),
    }
    check("patch_ungather", expected, N=grid.patch_values, L=grid.patches)
    double = "float64 has no kernel" if gradient.dtype == torch.float64 else None
    chosen = choose("patch_ungather", impl, gradient, double)
    side = [grid.height, grid.width, grid.patch]
    patches: Tensor = _ungather(gradient, slots, ids, *moves, side, chosen)
    return patches


def patch_scatter(gradient: Tensor, slots: Tensor, moves: Moves, grid: Grid, *, impl: Impl | None = None) -> Tensor:
    """The transpose of `patch_gather`: the gradient of the windows as that of a canvas.

    Args:
        gradient, slots, moves: as in `patch_ungather`.
        impl: see ``dispatch.py``.

    Returns:
        ``[B, 3, H, W]`` float32 (float64 for a float64 gradient), 0 where no window lies.

    Raises:
        ValueError: a shape, dtype, device or ``impl`` that does not fit.
    """
    expected = {
        "gradient": (gradient, "B K N", FLOATS),
        "slots": (slots, "B L", (torch.int32,)),
        **expected_moves(moves),
    }
    check("patch_scatter", expected, N=grid.patch_values, L=grid.patches)
    double = "float64 has no kernel" if gradient.dtype == torch.float64 else None
    chosen = choose("patch_scatter", impl, gradient, double)
    canvas: Tensor = _scatter(gradient, slots, *moves, [grid.height, grid.width, grid.patch], chosen)
    return canvas
