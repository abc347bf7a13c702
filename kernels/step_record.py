"""What a step notes down beside the pixels: which images failed, their losses and scores, and that one more is done.

    first_failure   failed'[b] = failed[b]     where failed[b] >= 0, or all that was found of image b is finite
                                 iteration     else
    record_step     failed, losses, scores <- what was found, a column of losses being weight * value; iteration += 1

Both have one program per image, and each is one launch where plain torch takes three to eight: at a millisecond per
step their launches count, not their bytes.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from smi_fast.kernels.cls_attention import power_of_two
from smi_fast.kernels.common.check import EXACT, FLOATS, IDS, Expected, check
from smi_fast.kernels.common.configs import best
from smi_fast.kernels.common.dispatch import Impl, choose, tl, triton, why_not_triton
from smi_fast.kernels.common.launch import Arguments, Config, Launch


class Record(NamedTuple):
    """What is noted of a step."""

    failed_at: Tensor  # [B] int64, -1 or the iteration whose step was not finite
    losses: Tensor  # [B, C] float32 (or float64, plain torch only)
    scores: Tensor  # [B, K] in the dtype of losses


class Column(NamedTuple):
    """A loss that became known later than the others."""

    number: int
    value: Tensor  # [B] in the dtype of losses
    weight: float


def all_finite(gradient: Tensor) -> Tensor:
    """``[B]`` bool. The largest magnitude tells, NaN included; reducing booleans took six times as long on a CPU."""
    return gradient.abs().flatten(1).amax(1).isfinite()


def first_failure_reference(
    failed_at: Tensor, iteration: Tensor, losses: Tensor, windows: Tensor, patches: Tensor | None
) -> Tensor:
    """Plain torch; shapes as in `first_failure`."""
    finite = losses.isfinite().all(1) & all_finite(windows)
    if patches is not None:
        finite = finite & all_finite(patches)
    return torch.where((failed_at < 0) & ~finite, iteration, failed_at)


def record_step_reference(target: Record, iteration: Tensor, found: Record, late: Column | None) -> None:
    """Plain torch; shapes as in `record_step`."""
    losses = found.losses
    if late is not None:
        before, _, after = losses.tensor_split((late.number, late.number + 1), dim=1)
        losses = torch.cat([before, (late.weight * late.value).to(losses.dtype)[:, None], after], 1)
    for place, value in zip(target, (found.failed_at, losses, found.scores), strict=True):
        place.copy_(value)
    iteration.add_(1)


@triton.jit
def broken(values):
    """1 for NaN and infinite values, else 0."""
    return tl.where(tl.abs(values.to(tl.float32)) < float("inf"), 0, 1)


@triton.jit  # lengths in multiples of 16 are code of their own, with wide loads
def failure_kernel(
    failed_at, iteration,  # [B], [1] int64
    losses,  # [B, C]
    windows, patches,  # [B, ...], or None
    out,  # [B] int64
    windows_length, patches_length,
    C: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK: tl.constexpr,
    WINDOWS_PIECES: tl.constexpr, PATCHES_PIECES: tl.constexpr,
):  # fmt: skip
    image = tl.program_id(0).to(tl.int64)
    element, column = tl.arange(0, BLOCK), tl.arange(0, BLOCK_C)
    found = tl.zeros((BLOCK,), tl.int32)
    for piece in range(WINDOWS_PIECES):
        at = piece * BLOCK + element
        inside = at < windows_length
        found |= broken(tl.load(windows + image * windows_length + at, mask=inside, other=0.0))
    if patches is not None:
        for piece in range(PATCHES_PIECES):
            at = piece * BLOCK + element
            inside = at < patches_length
            found |= broken(tl.load(patches + image * patches_length + at, mask=inside, other=0.0))
    of_losses = broken(tl.load(losses + image * C + column, mask=column < C, other=0.0))
    fails = tl.max(found) + tl.max(of_losses) > 0
    before = tl.load(failed_at + image)
    tl.store(out + image, tl.where((before < 0) & fails, tl.load(iteration), before))


@triton.jit(do_not_specialize=["scores_length"])
def record_kernel(
    failed_at, losses, scores, iteration,  # written: [B] int64, [B, C], [B, K], [1] int64
    new_failed_at, new_losses, new_scores,
    value,  # [B], or None
    weight, scores_length,
    C: tl.constexpr, BLOCK_C: tl.constexpr, LATE: tl.constexpr, BLOCK: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    image = tl.program_id(0).to(tl.int64)
    for piece in range(PIECES):
        at = piece * BLOCK + tl.arange(0, BLOCK)
        row = image * scores_length + at
        tl.store(scores + row, tl.load(new_scores + row, mask=at < scores_length), mask=at < scores_length)
    column = tl.arange(0, BLOCK_C)
    told = tl.load(new_losses + image * C + column, mask=column < C)
    if value is not None:
        told = tl.where(column == LATE, weight * tl.load(value + image), told)
    tl.store(losses + image * C + column, told, mask=column < C)
    tl.store(failed_at + image, tl.load(new_failed_at + image))
    if image == 0:
        tl.store(iteration, tl.load(iteration) + 1)


def failure_launch(
    failed_at: Tensor,
    iteration: Tensor,
    losses: Tensor,
    windows: Tensor,
    patches: Tensor | None,
    config: Config | None = None,
) -> tuple[Launch, Tensor]:
    """Launch of `first_failure`, and what it fills."""
    tensors = (failed_at, iteration, losses, windows, patches)
    config = config or best("first_failure", 0, lambda tried: failure_launch(*tensors, tried)[0])
    out, columns = torch.empty_like(failed_at), losses.shape[1]
    arguments: Arguments = {"failed_at": failed_at, "iteration": iteration, "losses": losses, "out": out}
    arguments |= {"windows": windows, "patches": patches}
    lengths = windows[0].numel(), 0 if patches is None else patches[0].numel()
    arguments |= {"windows_length": lengths[0], "patches_length": lengths[1]}
    pieces = [triton.cdiv(length, config.block) for length in lengths]
    constants = {"C": columns, "BLOCK_C": power_of_two(columns), "BLOCK": config.block}
    constants |= {"WINDOWS_PIECES": pieces[0], "PATCHES_PIECES": pieces[1]}
    return Launch(failure_kernel, (len(failed_at),), arguments, constants, config.warps), out


def record_launch(
    target: Record, iteration: Tensor, found: Record, late: Column | None, config: Config | None = None
) -> Launch:
    """Launch of `record_step`."""
    config = config or best("record_step", 0, lambda tried: record_launch(target, iteration, found, late, tried))
    columns = target.losses.shape[1]
    arguments: Arguments = {**target._asdict(), "iteration": iteration}
    arguments |= {f"new_{name}": tensor for name, tensor in found._asdict().items()}
    arguments |= {"value": None if late is None else late.value, "weight": 0.0 if late is None else late.weight}
    arguments |= {"scores_length": target.scores.shape[1]}
    constants = {"C": columns, "BLOCK_C": power_of_two(columns), "LATE": -1 if late is None else late.number}
    constants |= {"BLOCK": config.block, "PIECES": triton.cdiv(target.scores.shape[1], config.block)}
    return Launch(record_kernel, (len(target.failed_at),), arguments, constants, config.warps)


@torch.library.custom_op("smi_fast::first_failure", mutates_args=())
def _failure(failed_at: Tensor, iteration: Tensor, losses: Tensor, windows: Tensor, patches: Tensor | None) -> Tensor:
    """The kernel; on a machine without, the reference."""
    if why_not_triton(windows):
        return first_failure_reference(failed_at, iteration, losses, windows, patches)
    dense = None if patches is None else patches.contiguous()
    launch, out = failure_launch(failed_at.contiguous(), iteration, losses.contiguous(), windows.contiguous(), dense)
    launch.run()
    return out


@_failure.register_fake
def _(failed_at: Tensor, *_: object) -> Tensor:
    return torch.empty_like(failed_at)


@torch.library.custom_op("smi_fast::record_step", mutates_args=("failed_at", "losses", "scores", "iteration"))
def _record(
    failed_at: Tensor,
    losses: Tensor,
    scores: Tensor,
    iteration: Tensor,
    new_failed_at: Tensor,
    new_losses: Tensor,
    new_scores: Tensor,
    value: Tensor | None,
    weight: float,
    column: int,
) -> None:
    """The kernel; on a machine without, the reference."""
    target, found = Record(failed_at, losses, scores), Record(new_failed_at, new_losses, new_scores)
    late = None if value is None else Column(column, value, weight)
    if why_not_triton(losses):
        record_step_reference(target, iteration, found, late)
        return
    dense = Record(*(tensor.contiguous() for tensor in found))
    record_launch(target, iteration, dense, late).run()


def first_failure(
    failed_at: Tensor,
    iteration: Tensor,
    losses: Tensor,
    windows: Tensor,
    patches: Tensor | None = None,
    *,
    impl: Impl | None = None,
) -> Tensor:
    """The iteration at which the step of each image first was not finite.

    Args:
        failed_at: ``[B]`` int64, -1 or such an iteration.
        iteration: ``[1]`` int64, that of this step.
        losses: ``[B, C]`` float32 (or float64, plain torch only).
        windows: ``[B, K, V]``, gradients in any floating dtype.
        patches: ``[B, A, 3, P, P]``, further gradients, or None.
        impl: see ``dispatch.py``.

    Returns:
        ``[B]`` int64.

    Raises:
        ValueError: a shape, dtype, device or ``impl`` that does not fit.
    """
    expected: dict[str, Expected] = {"failed_at": (failed_at, "B", IDS), "iteration": (iteration, "1", IDS)}
    expected |= {"losses": (losses, "B C", EXACT), "windows": (windows, "B K V", FLOATS)}
    if patches is not None:
        expected["patches"] = (patches, "B A 3 P P", FLOATS)
    check("first_failure", expected)
    tensors = [tensor for tensor in (losses, windows, patches) if tensor is not None]
    if choose("first_failure", impl, windows, _no_kernel(*tensors)) == "torch":
        return first_failure_reference(failed_at, iteration, losses, windows, patches)
    return _failure(failed_at, iteration, losses, windows, patches)


def record_step(
    target: Record, iteration: Tensor, found: Record, late: Column | None = None, *, impl: Impl | None = None
) -> None:
    """Note a step in ``target``, and count it in ``iteration``, both in place.

    Args:
        target: what is written; contiguous for the kernel.
        iteration: ``[1]`` int64.
        found: what is noted.
        late: in place of a column of ``found.losses``, or None.
        impl: see ``dispatch.py``.

    Raises:
        ValueError: a shape, dtype, device, column or ``impl`` that does not fit.
    """
    kind = (target.losses.dtype,)
    expected: dict[str, Expected] = {"losses": (target.losses, "B C", EXACT), "iteration": (iteration, "1", IDS)}
    expected |= {"failed_at": (target.failed_at, "B", IDS), "scores": (target.scores, "B K", kind)}
    expected |= {"found.losses": (found.losses, "B C", kind), "found.failed_at": (found.failed_at, "B", IDS)}
    expected |= {"found.scores": (found.scores, "B K", kind)}
    if late is not None:
        expected["late.value"] = (late.value, "B", kind)
    columns = check("record_step", expected)["C"]
    if late is not None and not 0 <= late.number < columns:
        raise ValueError(f"record_step: late.number={late.number}: must lie in 0..{columns - 1}")
    reason = _no_kernel(target.losses)
    if not all(tensor.is_contiguous() for tensor in (*target, iteration)):
        reason = "what is written is not contiguous"
    if choose("record_step", impl, target.losses, reason) == "torch":
        record_step_reference(target, iteration, found, late)
        return
    value, weight, index = (None, 0.0, -1) if late is None else (late.value, late.weight, late.number)
    _record(*target, iteration, *found, value, weight, index)


def _no_kernel(*tensors: Tensor) -> str | None:
    return "float64 has no kernel" if any(tensor.dtype == torch.float64 for tensor in tensors) else None
