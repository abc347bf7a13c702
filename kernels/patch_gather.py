"""``patch_gather``: kept, jittered, flipped windows of the canvas, as the patch embedding reads them.

    windows[b, k, (ch, i, j)] = canvas[b, ch, (r P + i - ry) mod H, (c P + j' - rx) mod W]

with ``(r, c)`` the grid cell of ``keep[b, k]``, ``(ry, rx)`` the remainder of the shift (see ``grid.py``) and
``j' = P - 1 - j`` under a flip, else ``j``.

Its transpose is in ``patch_ungather.py``.

Bytes: each kept pixel is read once and written once, ``4 + s`` bytes per value for a compute dtype of ``s`` bytes. That
is the minimum. Windows are displaced, so reads of the canvas are coalesced but not 16 bytes wide; writes of
the windows are.

It is a custom op, so that a compiler leaves it whole. On two Zen 4 cores (8 images of 224 px, 46 patches of 16)
inductor's own code for the gather took 7.9 ms, since it computes every 64-bit index, divisions included, at every
pixel; the reference takes 0.3 ms.
"""

from typing import Any

import torch
from torch import Tensor

from smi_fast.kernels.common.check import EXACT, FLOATS, IDS, check, expected_moves
from smi_fast.kernels.common.configs import best
from smi_fast.kernels.common.dispatch import Impl, choose, tl, triton
from smi_fast.kernels.common.grid import Grid, Moves, slot_of_patch, split_shift
from smi_fast.kernels.common.launch import Config, Launch
from smi_fast.kernels.patch_ungather import own_pixels, patch_scatter, shift_remainder, wrapped


def patch_gather_reference(canvas: Tensor, keep: Tensor, moves: Moves, patch: int, dtype: torch.dtype) -> Tensor:
    """Plain torch; shapes as in `patch_gather`."""
    batch, channels, height, width = canvas.shape
    grid = Grid(height, width, patch)
    _, remainder = split_shift(moves.shift, patch)
    steps = torch.arange(patch, device=canvas.device)
    across = torch.where(moves.flip[:, None], patch - 1 - steps, steps)  # [B, P]
    top = keep // grid.columns * patch - remainder[:, :1]  # [B, K]
    left = keep % grid.columns * patch - remainder[:, 1:]
    y = (top[:, :, None] + steps) % height  # [B, K, P]
    x = (left[:, :, None] + across[:, None, :]) % width
    index = y[..., :, None] * width + x[..., None, :]  # [B, K, P, P]
    index = index.reshape(batch, 1, -1).expand(-1, channels, -1)
    windows = canvas.reshape(batch, channels, -1).gather(2, index)
    windows = windows.reshape(batch, channels, keep.shape[1], patch * patch).transpose(1, 2)
    return windows.reshape(batch, keep.shape[1], -1).to(dtype)


@triton.jit(do_not_specialize=["kept"])
def gather_kernel(
    canvas,  # [B, 3, H, W]
    keep,  # [B, K] int64
    shift,  # [B, 2] int64
    flip,  # [B] bool
    windows,  # [B, K, 3, P, P]
    kept,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    P: tl.constexpr,
    BLOCK: tl.constexpr,
):
    image = tl.program_id(1).to(tl.int64)
    linear, y, x, inside = own_pixels(keep, image, kept, WIDTH, P, BLOCK)
    ry = shift_remainder(tl.load(shift + 2 * image), P)
    rx = shift_remainder(tl.load(shift + 2 * image + 1), P)
    mirrored = tl.where(tl.load(flip + image) != 0, x - x % P + (P - 1 - x % P), x)
    y, x = wrapped(y - ry, HEIGHT), wrapped(mirrored - rx, WIDTH)
    source = canvas + image * (3 * HEIGHT * WIDTH) + y * WIDTH + x
    target = windows + image * kept * (3 * P * P) + linear
    for channel in tl.static_range(3):
        value = tl.load(source + channel * (HEIGHT * WIDTH), mask=inside)
        tl.store(target + channel * (P * P), value.to(windows.dtype.element_ty), mask=inside)


def gather_launch(
    canvas: Tensor, keep: Tensor, moves: Moves, patch: int, dtype: torch.dtype, config: Config | None = None
) -> tuple[Launch, Tensor]:
    """Launch of the gather, and the windows it fills, ``[B, K, 3 * P * P]``."""
    batch, kept = keep.shape
    places = (canvas, keep, moves, patch, dtype)
    config = config or best("patch_gather", patch, lambda c: gather_launch(*places, c)[0])
    windows = canvas.new_empty(batch, kept, 3 * patch * patch, dtype=dtype)
    launch = Launch(
        gather_kernel,
        (triton.cdiv(kept * patch * patch, config.block), batch),
        {"canvas": canvas, "keep": keep, **moves._asdict(), "windows": windows, "kept": kept},
        {"HEIGHT": canvas.shape[2], "WIDTH": canvas.shape[3], "P": patch, "BLOCK": config.block},
        config.warps,
    )
    return launch, windows


@torch.library.custom_op("smi_fast::patch_gather", mutates_args=())
def _gather(
    canvas: Tensor, keep: Tensor, shift: Tensor, flip: Tensor, patch: int, dtype: torch.dtype, impl: str
) -> Tensor:
    moves = Moves(shift, flip)
    if impl == "torch":
        return patch_gather_reference(canvas, keep, moves, patch, dtype)
    launch, windows = gather_launch(canvas.contiguous(), keep.contiguous(), moves.contiguous(), patch, dtype)
    launch.run()
    return windows


@_gather.register_fake
def _(canvas: Tensor, keep: Tensor, shift: Tensor, flip: Tensor, patch: int, dtype: torch.dtype, impl: str) -> Tensor:
    return canvas.new_empty(*keep.shape, 3 * patch * patch, dtype=dtype)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    canvas, keep, shift, flip, patch, _, impl = inputs
    ctx.save_for_backward(keep, shift, flip)
    ctx.grid, ctx.dtype, ctx.impl = Grid(canvas.shape[2], canvas.shape[3], patch), canvas.dtype, impl


def _gather_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None, None, None]:
    keep, shift, flip = ctx.saved_tensors
    grid: Grid = ctx.grid
    slots = slot_of_patch(keep, grid.patches)
    canvas = patch_scatter(gradient, slots, Moves(shift, flip), grid, impl=ctx.impl).to(ctx.dtype)
    return canvas, None, None, None, None, None, None


_gather.register_autograd(_gather_backward, setup_context=_save_for_backward)


def patch_gather(
    canvas: Tensor, keep: Tensor, moves: Moves, patch: int, dtype: torch.dtype, *, impl: Impl | None = None
) -> Tensor:
    """Gather the kept windows of a canvas, jittered and flipped.

    Args:
        canvas: ``[B, 3, H, W]`` float32 (or float64, plain torch only), normalised colours.
        keep: ``[B, K]`` int64 patch ids, ascending in each row (not looked at here: see `check_ids`).
        moves: shift and flip of each image.
        patch: ``P``, pixels.
        dtype: of the result.
        impl: see ``dispatch.py``.

    Returns:
        ``[B, K, 3 * P * P]``, ordered channel, row, column, as a patch embedding's convolution weight is;
        differentiable in ``canvas``.

    Raises:
        ValueError: ``H`` or ``W`` is not a multiple of ``patch``; a shape, dtype, device or ``impl`` that does not fit.
    """
    expected = {"canvas": (canvas, "B 3 H W", EXACT), "keep": (keep, "B K", IDS)}
    sizes = check("patch_gather", expected | expected_moves(moves))
    Grid(sizes["H"], sizes["W"], patch)  # refuses sides that do not fit
    if dtype not in FLOATS:
        raise ValueError(f"patch_gather: dtype={dtype}: must be float64, float32, bfloat16 or float16")
    double = torch.float64 in (canvas.dtype, dtype)
    chosen = choose("patch_gather", impl, canvas, "float64 has no kernel" if double else None)
    windows: Tensor = _gather(canvas, keep, *moves, patch, dtype, chosen)
    return windows
