"""``adam_update``: all that follows the input gradient, in one pass over the updated patches.

At each pixel of an updated patch, with ``g`` the sum of

    the gradient of the window that covers it (see ``patch_gather.py``), or 0 where no kept window does,
    the weighted gradient of total variation (see ``total_variation.py``), and
    the gradient of other terms of the loss, where there are any,

one step of Adam with the clamp to colours that exist:

    m <- b1 m + (1 - b1) g          v <- b2 v + (1 - b2) g^2
    x <- clamp(x - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps), low, high)

Rates and bias corrections arrive as a device tensor: a host number would freeze into a captured graph.

**Two canvases.** Total variation at a pixel reads neighbours that other programs update, so the step reads one canvas
and writes another; the two change roles after each step. The alternative, a gradient of total variation taken in the
gather and kept until the update, costs 8 more bytes per value (written and read once in float32). Pixels of stopped
patches are never written: both canvases must hold the same ones when a stage begins. The moments are updated in place.

Bytes per value, for a float32 canvas and moments and a compute dtype of ``s`` bytes: reads canvas 4, moments 8, window
gradient ``s``; writes canvas 4, moments 8: ``24 + s``. With the gather (``4 + s``) an iteration moves ``28 + 2 s``
bytes per value outside the ViT. The least possible is ``24 + 2 s``: the update could also write the next iteration's
windows, which would save the gather 4 bytes of reading. The two stay separate because that is about 0.2% of a step, by
count and not by measurement (DeiT-Base, B = 128, K = 46: 18 MB, next to 2 TFLOP).
"""

from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
from torch import Tensor

from smi_fast.kernels.common.check import BOOL, EXACT, FLOATS, IDS, check, expected_moves
from smi_fast.kernels.common.configs import best
from smi_fast.kernels.common.dispatch import Impl, choose, tl, triton, why_not_triton
from smi_fast.kernels.common.grid import Grid, Moves
from smi_fast.kernels.common.launch import Config, Launch
from smi_fast.kernels.patch_cells import put_patches_
from smi_fast.kernels.patch_ungather import covering_offset, own_pixels, patch_ungather, shift_remainder
from smi_fast.kernels.total_variation import (
    Halo,
    TVNorm,
    check_norm,
    halo_of,
    inverse_lengths,
    take_halo,
    tv_of_halo,
    tv_terms,
)


@dataclass(frozen=True)
class AdamConstants:
    """What stays the same from step to step: decay rates, epsilon, and the channel limits ``[3, 1, 1]``."""

    beta1: float
    beta2: float
    eps: float
    low: Tensor
    high: Tensor


@dataclass(frozen=True)
class Updated:
    """The patches that are updated, with their optimiser state; A per image."""

    canvas: Tensor  # [B, 3, H, W], read
    out: Tensor  # [B, 3, H, W], written at the updated patches; may be the canvas itself for plain torch
    exp_avg: Tensor  # [B, A, 3, P, P] first moment, updated in place
    exp_avg_sq: Tensor  # [B, A, 3, P, P] second moment, updated in place
    ids: Tensor  # [B, A] int64, ascending
    slots: Tensor  # [B, L] int32, `slot_of_patch` of the ids
    halo: Halo | None = None  # `halo_of` the ids, if known already; only plain torch uses it


@dataclass(frozen=True)
class LossGradient:
    """The gradient of the loss, total variation apart."""

    windows: Tensor  # [B, K, 3 * P * P], at the windows of the kept patches
    slots: Tensor  # [B, L] int32, `slot_of_patch` of the kept ids
    moves: Moves  # as the windows were gathered
    healthy: Tensor  # [B] bool; an image that is not healthy keeps its pixels and moments
    patches: Tensor | None = None  # [B, A, 3, P, P], at the pixels themselves


@dataclass(frozen=True)
class TVTerm:
    """A total variation term of the loss."""

    weight: float
    norm: TVNorm


def adam_step(
    pixels: Tensor, moments: tuple[Tensor, Tensor], gradient: Tensor, rates: Tensor, healthy: Tensor, c: AdamConstants
) -> tuple[Tensor, Tensor, Tensor]:
    """Pixels and moments ``[B, A, 3, P, P]`` after one step, in plain torch; new tensors."""
    lr, correction1, correction2 = rates.unbind()
    exp_avg = c.beta1 * moments[0] + (1 - c.beta1) * gradient
    exp_avg_sq = c.beta2 * moments[1] + (1 - c.beta2) * gradient.square()
    step = lr * (exp_avg / correction1) / ((exp_avg_sq / correction2).sqrt() + c.eps)
    moved = (pixels - step).clamp(c.low, c.high)
    healthy = healthy[:, None, None, None, None]
    return (
        torch.where(healthy, moved, pixels),
        torch.where(healthy, exp_avg, moments[0]),
        torch.where(healthy, exp_avg_sq, moments[1]),
    )


class AdamValues(NamedTuple):
    """What one step changes; all ``[B, A, 3, P, P]`` except ``tv``."""

    pixels: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    tv: Tensor | None  # [B], the value of total variation before the step


def adam_values(
    target: Updated, gradient: LossGradient, rates: Tensor, constants: AdamConstants, tv: TVTerm | None
) -> AdamValues:
    """Plain torch, nothing is written; arguments as in `adam_update`."""
    grid = Grid(target.canvas.shape[2], target.canvas.shape[3], target.exp_avg.shape[-1])
    at_pixels = patch_ungather(gradient.windows, gradient.slots, target.ids, gradient.moves, grid, impl="torch")
    if gradient.patches is not None:
        at_pixels = at_pixels + gradient.patches
    halo = target.halo or halo_of(target.ids, grid, target.canvas.dtype)
    rimmed, value = take_halo(target.canvas, halo), None
    if tv is not None:
        value, of_tv = tv_of_halo(rimmed, halo.share, tv.norm)
        at_pixels = at_pixels + tv.weight * of_tv
    pixels, moments = rimmed[..., 1:-1, 1:-1], (target.exp_avg, target.exp_avg_sq)
    return AdamValues(*adam_step(pixels, moments, at_pixels, rates, gradient.healthy, constants), value)


def adam_update_reference(
    target: Updated, gradient: LossGradient, rates: Tensor, constants: AdamConstants, tv: TVTerm | None
) -> Tensor | None:
    """Plain torch; arguments as in `adam_update`."""
    values = adam_values(target, gradient, rates, constants, tv)
    put_patches_(target.out, target.ids, values.pixels)
    target.exp_avg.copy_(values.exp_avg)
    target.exp_avg_sq.copy_(values.exp_avg_sq)
    return values.tv


@triton.jit
def adam_channel(
    x, g, exp_avg, exp_avg_sq, lr, correction1, correction2, low, high,
    BETA1: tl.constexpr, BETA2: tl.constexpr, EPS: tl.constexpr,
):  # fmt: skip
    """One channel's step: pixels and both moments."""
    m = BETA1 * exp_avg + (1 - BETA1) * g
    v = BETA2 * exp_avg_sq + (1 - BETA2) * (g * g)
    step = lr * tl.div_rn(m, correction1) / (tl.sqrt_rn(tl.div_rn(v, correction2)) + EPS)
    return tl.minimum(tl.maximum(x - step, low), high), m, v


@triton.jit(do_not_specialize=["kept", "count"])
def adam_kernel(
    canvas, out,  # [B, 3, H, W]
    exp_avg, exp_avg_sq,  # [B, A, 3, P, P]
    ids, moving,  # [B, A] int64, [B, L] int32
    gradient,  # [B, K, 3, P, P]
    slots, shift, flip,  # [B, L] int32, [B, 2] int64, [B] bool
    extra,  # [B, A, 3, P, P], not read without EXTRA
    rates, healthy, low, high,  # [3], [B] bool, [3], [3]
    inverse,  # [B, 4] 1 / length of each direction, read under the norms that need it
    values,  # [B, blocks], written with TV
    weight, kept, count,
    BETA1: tl.constexpr, BETA2: tl.constexpr, EPS: tl.constexpr,
    TV: tl.constexpr, PIXEL: tl.constexpr, EXTRA: tl.constexpr,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, P: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    image = tl.program_id(1).to(tl.int64)
    place, y, x, inside = own_pixels(ids, image, count, WIDTH, P, BLOCK)
    plane = HEIGHT * WIDTH
    pixels = canvas + image * (3 * plane)
    at = y * WIDTH + x
    x0 = tl.load(pixels + at, mask=inside, other=0.0)
    x1 = tl.load(pixels + plane + at, mask=inside, other=0.0)
    x2 = tl.load(pixels + 2 * plane + at, mask=inside, other=0.0)

    ry = shift_remainder(tl.load(shift + 2 * image), P)
    rx = shift_remainder(tl.load(shift + 2 * image + 1), P)
    cells = image * (HEIGHT // P * (WIDTH // P))
    flipped = tl.load(flip + image) != 0
    offset = covering_offset(y, x, slots + cells, ry, rx, flipped, inside, HEIGHT, WIDTH, P)
    window = gradient + image * kept * (3 * P * P) + offset
    covered = inside & (offset >= 0)
    g0 = tl.load(window, mask=covered, other=0.0).to(tl.float32)
    g1 = tl.load(window + P * P, mask=covered, other=0.0).to(tl.float32)
    g2 = tl.load(window + 2 * P * P, mask=covered, other=0.0).to(tl.float32)

    linear = image * count * (3 * P * P) + place
    if EXTRA:
        g0 += tl.load(extra + linear, mask=inside, other=0.0)
        g1 += tl.load(extra + linear + P * P, mask=inside, other=0.0)
        g2 += tl.load(extra + linear + 2 * P * P, mask=inside, other=0.0)
    if TV:
        h0, h1, h2, v0, v1, v2, v3 = tv_terms(
            pixels, moving + cells, inverse + 4 * image, y, x, x0, x1, x2, inside, PIXEL, HEIGHT, WIDTH, P
        )
        g0, g1, g2 = g0 + weight * h0, g1 + weight * h1, g2 + weight * h2
        if PIXEL:
            tl.store(values + image * tl.num_programs(0) + tl.program_id(0), tl.sum(v0 + v1 + v2 + v3, 0))

    lr, c1, c2 = tl.load(rates), tl.load(rates + 1), tl.load(rates + 2)
    good = tl.load(healthy + image) != 0
    target = out + image * (3 * plane) + at
    for channel in tl.static_range(3):
        if channel == 0:
            old, g = x0, g0
        elif channel == 1:
            old, g = x1, g1
        else:
            old, g = x2, g2
        here = linear + channel * (P * P)
        m = tl.load(exp_avg + here, mask=inside, other=0.0)
        v = tl.load(exp_avg_sq + here, mask=inside, other=0.0)
        lowest, highest = tl.load(low + channel), tl.load(high + channel)
        new, m1, v1 = adam_channel(old, g, m, v, lr, c1, c2, lowest, highest, BETA1, BETA2, EPS)
        tl.store(target + channel * plane, tl.where(good, new, old), mask=inside)
        tl.store(exp_avg + here, tl.where(good, m1, m), mask=inside)
        tl.store(exp_avg_sq + here, tl.where(good, v1, v), mask=inside)


class MeasuredTV(NamedTuple):
    """A total variation term as the kernel takes it."""

    term: TVTerm
    inverse: Tensor | None = None  # [B, 4], 1 / length of each direction; None under `pixel`, which needs none


def adam_launch(
    target: Updated,
    gradient: LossGradient,
    rates: Tensor,
    c: AdamConstants,
    tv: MeasuredTV | None,
    config: Config | None = None,
) -> tuple[Launch, Tensor]:
    """Launch of the update, and the ``[B, blocks]`` lengths it fills under ``pixel``."""
    height, width = target.canvas.shape[2:]
    batch, count, _, patch, _ = target.exp_avg.shape
    where = (target, gradient, rates, c, tv)
    config = config or best("adam_update", patch, lambda tried: adam_launch(*where, tried)[0])
    blocks = triton.cdiv(count * patch * patch, config.block)
    values = target.canvas.new_empty(batch, blocks)
    term, inverse = tv or MeasuredTV(TVTerm(0.0, "image"))
    launch = Launch(
        adam_kernel,
        (blocks, batch),
        {
            "canvas": target.canvas, "out": target.out, "exp_avg": target.exp_avg, "exp_avg_sq": target.exp_avg_sq,
            "ids": target.ids, "moving": target.slots,
            "gradient": gradient.windows, "slots": gradient.slots, **gradient.moves._asdict(),
            "extra": target.exp_avg if gradient.patches is None else gradient.patches,
            "rates": rates, "healthy": gradient.healthy, "low": c.low, "high": c.high,
            "inverse": values if inverse is None else inverse, "values": values,
            "weight": term.weight, "kept": gradient.windows.shape[1], "count": count,
        },
        {
            "BETA1": c.beta1, "BETA2": c.beta2, "EPS": c.eps,
            "TV": tv is not None, "PIXEL": term.norm == "pixel",
            "EXTRA": gradient.patches is not None,
            "HEIGHT": height, "WIDTH": width, "P": patch, "BLOCK": config.block,
        },
        config.warps,
    )  # fmt: skip
    return launch, values


@torch.library.custom_op("smi_fast::adam_update", mutates_args=("out", "exp_avg", "exp_avg_sq"))
def _adam_op(
    canvas: Tensor,
    out: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    ids: Tensor,
    moving: Tensor,
    gradient: Tensor,
    slots: Tensor,
    shift: Tensor,
    flip: Tensor,
    healthy: Tensor,
    extra: Tensor | None,
    rates: Tensor,
    low: Tensor,
    high: Tensor,
    betas_eps: list[float],
    weight: float,
    norm: str,
) -> Tensor:
    """The kernel; on a machine without, the reference. ``norm`` is "" for no total variation."""
    target = Updated(canvas, out, exp_avg, exp_avg_sq, ids, moving)
    of_loss = LossGradient(gradient.contiguous(), slots, Moves(shift, flip).contiguous(), healthy, extra)
    beta1, beta2, eps = betas_eps
    c = AdamConstants(beta1, beta2, eps, low, high)
    tv = TVTerm(weight, cast(TVNorm, norm)) if norm else None
    if why_not_triton(canvas):
        value = adam_update_reference(target, of_loss, rates, c, tv)
        return canvas.new_zeros(len(canvas)) if value is None else value
    value, inverse = canvas.new_zeros(0), None
    if tv and tv.norm != "pixel":
        grid = Grid(canvas.shape[2], canvas.shape[3], exp_avg.shape[-1])
        value, inverse = inverse_lengths(canvas, ids, moving, grid, tv.norm)
    launch, lengths = adam_launch(target, of_loss, rates, c, MeasuredTV(tv, inverse) if tv else None)
    launch.run()
    if tv is None:
        return canvas.new_zeros(len(canvas))
    return lengths.sum(1) if tv.norm == "pixel" else value


@_adam_op.register_fake
def _(canvas: Tensor, *_: object) -> Tensor:
    return canvas.new_empty(canvas.shape[0])


def adam_update(
    target: Updated,
    gradient: LossGradient,
    rates: Tensor,
    constants: AdamConstants,
    tv: TVTerm | None = None,
    *,
    impl: Impl | None = None,
) -> Tensor | None:
    """One step of Adam with total variation and clamp; writes ``target.out`` and the moments.

    Args:
        target: what is updated. float32 (or float64, plain torch only).
        gradient: of the rest of the loss; ``windows`` in any floating dtype, ``patches`` like the moments.
        rates: ``[3]`` like the canvas: learning rate, ``1 - b1^t``, ``1 - b2^t``.
        constants: of Adam and the clamp.
        tv: total variation of the updated patches on ``target.canvas``, or None.
        impl: see ``dispatch.py``. For the kernel all tensors of ``target`` and ``gradient.patches`` are contiguous,
            and ``target.out`` is no view of ``target.canvas``.

    Returns:
        the total variation of each image before the step, not weighted, ``[B]``; None without one.

    Raises:
        ValueError: a shape, dtype, device, norm or ``impl`` that does not fit.
    """
    kind = (target.canvas.dtype,)
    state = {name: (getattr(target, name), "B A 3 P P", kind) for name in ("exp_avg", "exp_avg_sq")}
    expected = {
        "canvas": (target.canvas, "B 3 H W", EXACT),
        "out": (target.out, "B 3 H W", kind),
        **state,
        "ids": (target.ids, "B A", IDS),
        "slots of the ids": (target.slots, "B L", (torch.int32,)),
        "gradient.windows": (gradient.windows, "B K N", FLOATS),
        "gradient.slots": (gradient.slots, "B L", (torch.int32,)),
        **expected_moves(gradient.moves, "gradient.moves"),
        "gradient.healthy": (gradient.healthy, "B", BOOL),
        "rates": (rates, "3", kind),
        "constants.low": (constants.low, "3 1 1", kind),
        "constants.high": (constants.high, "3 1 1", kind),
    }
    if gradient.patches is not None:
        expected["gradient.patches"] = (gradient.patches, "B A 3 P P", kind)
    sizes = check("adam_update", expected)
    grid = Grid(sizes["H"], sizes["W"], sizes["P"])
    if (sizes["L"], sizes["N"]) != (grid.patches, grid.patch_values):
        check("adam_update", expected, L=grid.patches, N=grid.patch_values)  # says which
    if tv is not None:
        check_norm("adam_update", tv.norm)
    if choose("adam_update", impl, target.canvas, _unsupported(target, gradient)) == "torch":
        return adam_update_reference(target, gradient, rates, constants, tv)
    tensors = (target.canvas, target.out, target.exp_avg, target.exp_avg_sq, target.ids, target.slots)
    of_loss = (gradient.windows, gradient.slots, *gradient.moves, gradient.healthy, gradient.patches)
    numbers = [constants.beta1, constants.beta2, constants.eps]
    limits = (constants.low, constants.high)
    term = (tv.weight, tv.norm) if tv else (0.0, "")
    value: Tensor = _adam_op(*tensors, *of_loss, rates, *limits, numbers, *term)
    return value if tv else None


def _unsupported(target: Updated, gradient: LossGradient) -> str | None:
    """Why the kernel cannot run on such tensors."""
    if torch.float64 in (target.canvas.dtype, gradient.windows.dtype):
        return "float64 has no kernel"
    if target.out is target.canvas:
        return "out is the canvas itself, whose pixels other programs still read"
    written = {"canvas": target.canvas, "out": target.out}
    written |= {"exp_avg": target.exp_avg, "exp_avg_sq": target.exp_avg_sq}
    read = {"ids": target.ids, "slots": target.slots, "gradient.slots": gradient.slots}
    if gradient.patches is not None:
        read["gradient.patches"] = gradient.patches
    for name, tensor in (written | read).items():
        if not tensor.is_contiguous():
            return f"{name} is not contiguous"
    return None
