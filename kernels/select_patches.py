"""``select_patches``: which kept patches go on after a stop; ``remap``: what belongs to them.

The ``count`` patches of the highest score survive; equal scores are settled for the lower patch id; the survivors
keep their ascending order. A score of NaN counts as the highest, as in ``torch.sort``. Whatever belongs to a patch
(ids, optimiser state) is remapped with the returned slots.

    rank[k] = #{j: s_j > s_k, or s_j = s_k and j < k}        slots = [k for k in 0..K-1 if rank[k] < count]
    remap(x, slots)[b, c] = x[b, slots[b, c]]

Selection runs once a stop on a few hundred numbers, so it is one launch of one program per image. Scores become
integers of the same order. The threshold, the count-th largest of them, is found bit by bit, from the highest, with
one count over the image a bit; what is above it survives, and of what is equal to it as many as there is room for, in
order. That needs no comparison of all with all, however many patches there are.

Bytes of ``remap``: each row that goes on is read once and written once, 16 bytes at a time where its length allows.
"""

import torch
from torch import Tensor

from smi_fast.kernels.common.check import EXACT, IDS, check
from smi_fast.kernels.common.configs import best
from smi_fast.kernels.common.dispatch import Impl, choose, tl, triton, why_not_triton
from smi_fast.kernels.common.launch import Arguments, Config, Launch

MOST_PATCHES = 4096
# what a kernel can copy: anything of 8 to 64 bits
COPIED = (
    *(torch.float64, torch.float32, torch.bfloat16, torch.float16),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
)


def select_patches_reference(scores: Tensor, count: int) -> Tensor:
    """Plain torch; shapes as in `select_patches`."""
    # a stable sort leaves equal scores in slot order, and slots are in id order
    order = torch.sort(scores, dim=1, descending=True, stable=True).indices
    return order[:, :count].sort(dim=1).values


def remap_reference(state: Tensor, slots: Tensor) -> Tensor:
    """Plain torch; shapes as in `remap`."""
    index = slots.reshape(*slots.shape, *([1] * (state.ndim - 2))).expand(-1, -1, *state.shape[2:])
    return state.gather(1, index)


@triton.jit
def ordered(score):
    """float32 as int32 of the same order; both zeros are equal, and so are all NaN, above infinity."""
    bits = tl.where(score == 0, 0.0, score).to(tl.int32, bitcast=True)
    key = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return tl.where(score != score, 0x7FFFFFFF, key)


@triton.jit
def how_many(flags):
    """Number of true flags."""
    return tl.sum(flags.to(tl.int32), 0)


@triton.jit(do_not_specialize=["patches", "count"])
def select_kernel(
    scores,  # [B, K] float32
    slots,  # [B, count] int64
    patches,
    count,
    BLOCK: tl.constexpr,
):
    image = tl.program_id(0).to(tl.int64)
    slot = tl.arange(0, BLOCK)
    inside = slot < patches
    key = ordered(tl.load(scores + image * patches + slot, mask=inside, other=0.0))

    # the largest threshold that at least `count` keys reach: the sign first, then a bit at a time
    threshold = tl.where(how_many(inside & (key >= 0)) >= count, 0, -2147483648)
    for bit in tl.static_range(31):
        higher = threshold | (1 << (30 - bit))
        threshold = tl.where(how_many(inside & (key >= higher)) >= count, higher, threshold)

    above, equal = inside & (key > threshold), inside & (key == threshold)
    room = count - how_many(above)
    survives = above | (equal & (tl.cumsum(equal.to(tl.int32), 0) <= room))
    position = tl.cumsum(survives.to(tl.int32), 0) - 1
    tl.store(slots + image * count + position, slot.to(tl.int64), mask=survives)


@triton.jit(do_not_specialize=["patches", "count"])
def remap_kernel(
    state,  # [B, K, length]
    slots,  # [B, C] int64
    out,  # [B, C, length]
    patches,
    count,
    length,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    image = tl.program_id(2).to(tl.int64)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    slot = tl.load(slots + image * count + row, mask=row < count, other=0).to(tl.int32)
    inside = (row < count)[:, None] & (column < length)[None, :]
    value = tl.load(state + image * patches * length + slot[:, None] * length + column[None, :], mask=inside)
    tl.store(out + image * count * length + row[:, None] * length + column[None, :], value, mask=inside)


def select_launch(scores: Tensor, slots: Tensor, config: Config | None = None) -> Launch:
    """Launch of the selection into ``slots``, ``[B, count]``."""
    batch, patches = scores.shape
    block = triton.next_power_of_2(patches)
    config = config or best("select_patches", block, lambda c: select_launch(scores, slots, c))
    arguments: Arguments = {"scores": scores, "slots": slots, "patches": patches, "count": slots.shape[1]}
    return Launch(select_kernel, (batch,), arguments, {"BLOCK": block}, config.warps)


def remap_launch(state: Tensor, slots: Tensor, out: Tensor, config: Config | None = None) -> Launch:
    """Launch of the copy into ``out``, ``[B, C, ...]``."""
    batch, patches = state.shape[:2]
    count, length = slots.shape[1], state[0, 0].numel()
    config = config or best("remap", length, lambda c: remap_launch(state, slots, out, c))
    columns = min(256, config.block, triton.next_power_of_2(length))
    rows = config.block // columns
    arguments: Arguments = {"state": state, "slots": slots, "out": out}
    arguments |= {"patches": patches, "count": count, "length": length}
    grid = (triton.cdiv(length, columns), triton.cdiv(count, rows), batch)
    return Launch(remap_kernel, grid, arguments, {"ROWS": rows, "BLOCK": columns}, config.warps)


@torch.library.custom_op("smi_fast::select_patches", mutates_args=())
def _select(scores: Tensor, count: int) -> Tensor:
    """The kernel; on a machine without, the reference."""
    if why_not_triton(scores):
        return select_patches_reference(scores, count)
    slots = scores.new_empty(scores.shape[0], count, dtype=torch.int64)
    select_launch(scores.contiguous(), slots).run()
    return slots


@_select.register_fake
def _(scores: Tensor, count: int) -> Tensor:
    return scores.new_empty(scores.shape[0], count, dtype=torch.int64)


@torch.library.custom_op("smi_fast::remap", mutates_args=())
def _remap(state: Tensor, slots: Tensor) -> Tensor:
    """The kernel; on a machine without, the reference."""
    if why_not_triton(state):
        return remap_reference(state, slots)
    out = state.new_empty(*slots.shape, *state.shape[2:])
    remap_launch(state.contiguous(), slots.contiguous(), out).run()
    return out


@_remap.register_fake
def _(state: Tensor, slots: Tensor) -> Tensor:
    return state.new_empty(*slots.shape, *state.shape[2:])


def select_patches(scores: Tensor, count: int, *, impl: Impl | None = None) -> Tensor:
    """The slots of the surviving patches.

    Args:
        scores: ``[B, K]`` float32 (or float64, plain torch only), of kept patches in ascending order of their ids.
        count: how many survive, ``1 <= count <= K``.
        impl: see ``dispatch.py``. The kernel takes up to 4096 patches.

    Returns:
        ``[B, count]`` int64, ascending in each row: positions in the ``K`` of before.

    Raises:
        ValueError: ``count`` out of range; a shape, dtype or ``impl`` that does not fit.
    """
    patches = check("select_patches", {"scores": (scores, "B K", EXACT)})["K"]
    if not 1 <= count <= patches:
        raise ValueError(f"count={count}: must lie in 1..{patches}, the patches that are kept")
    unsupported = "float64 has no kernel" if scores.dtype == torch.float64 else None
    if patches > MOST_PATCHES:
        unsupported = f"{patches} patches, the kernel takes up to {MOST_PATCHES}"
    if choose("select_patches", impl, scores, unsupported) == "torch":
        return select_patches_reference(scores, count)
    slots: Tensor = _select(scores, count)
    return slots


def remap(state: Tensor, slots: Tensor, *, impl: Impl | None = None) -> Tensor:
    """Rows of a per-patch tensor.

    Args:
        state: ``[B, K, ...]``, any dtype.
        slots: ``[B, C]`` int64, in ``0..K-1``; not looked at.
        impl: see ``dispatch.py``. The kernel takes real numbers and booleans, and has no gradient.

    Returns:
        ``[B, C, ...]``.

    Raises:
        ValueError: a shape, dtype, device or ``impl`` that does not fit.
    """
    rest = [f"D{i}" for i in range(state.ndim - 2)]
    expected = {"state": (state, " ".join(["B", "K", *rest]), (state.dtype,)), "slots": (slots, "B C", IDS)}
    check("remap", expected)
    unsupported = None if state.dtype in COPIED else f"{state.dtype} has no kernel"
    if state.requires_grad and torch.is_grad_enabled():
        unsupported = "the kernel has no gradient"
    if choose("remap", impl, state, unsupported) == "torch":
        return remap_reference(state, slots)
    rows: Tensor = _remap(state, slots)
    return rows
