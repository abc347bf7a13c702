"""The fused update against plain torch: un-gather, total variation, Adam, clamp, and what it must not touch."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from smi_fast.kernels.adam_update import AdamConstants, LossGradient, TVTerm, Updated, adam_update
from smi_fast.kernels.common.grid import Grid, slot_of_patch
from smi_fast.kernels.patch_mask import patch_mask
from tests.kernels.cases import (
    BATCH,
    DEVICE,
    DTYPES,
    FEW,
    GRIDS,
    assert_near_truth,
    counts,
    generator,
    label,
    make_case,
)

pytestmark = pytest.mark.kernel
RATES = (0.25, 1 - 0.5**3, 1 - 0.99**3)
TERMS = (None, TVTerm(0.3, "pixel"), TVTerm(0.3, "image"), TVTerm(0.3, "batch"))
Arguments = tuple[Updated, LossGradient, Tensor, AdamConstants]


def limits(dtype: torch.dtype) -> AdamConstants:
    low, high = (torch.tensor(v, dtype=dtype, device=DEVICE).view(3, 1, 1) for v in ((-2.1, -2, -1.8), (2.2, 2.4, 2.6)))
    return AdamConstants(0.5, 0.99, 1e-8, low, high)


def arguments(
    grid: Grid, kept: int, dtype: torch.dtype = torch.float32, everywhere: bool = False, batch: int = BATCH
) -> Arguments:
    """A second moment that is not small keeps the step well conditioned; ``everywhere``: all patches are updated."""
    case, draw = make_case(grid, kept, batch), generator(kept + 7)
    ids = torch.arange(grid.patches, device=DEVICE).repeat(batch, 1) if everywhere else case.keep
    shape = (*ids.shape, 3, grid.patch, grid.patch)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw).to(DEVICE)

    target = Updated(
        case.canvas, torch.full_like(case.canvas, 7.0), randn(*shape), 0.5 + randn(*shape).square(), ids,
        slot_of_patch(ids, grid.patches),
    )  # fmt: skip
    windows = randn(batch, kept, grid.patch_values).to(dtype)
    slots = slot_of_patch(case.keep, grid.patches)
    healthy = torch.ones(batch, dtype=torch.bool, device=DEVICE)
    gradient = LossGradient(windows, slots, case.moves, healthy, randn(*shape))
    return target, gradient, torch.tensor(RATES, device=DEVICE), limits(torch.float32)


def in_double(args: Arguments) -> Arguments:
    """The same inputs for the float64 truth."""
    target, gradient, rates, _ = args

    def double(thing: Any) -> Any:
        tensors = {name: value for name, value in vars(thing).items() if isinstance(value, Tensor)}
        return replace(thing, **{name: t.double() for name, t in tensors.items() if t.is_floating_point()})

    return double(target), double(gradient), rates.double(), limits(torch.float64)


def copied(args: Arguments) -> Arguments:
    """The buffers that are written, copied."""
    target = replace(args[0], **{name: getattr(args[0], name).clone() for name in ("out", "exp_avg", "exp_avg_sq")})
    return (target, *args[1:])


# `image` and `batch` are one kernel, and the update without total variation is a part of it
@pytest.mark.parametrize(
    ("grid", "tv"),
    [(grid, tv) for tv in TERMS for grid in (GRIDS if tv and tv.norm != "batch" else FEW)],
    ids=lambda value: value.norm if isinstance(value, TVTerm) else label(value),
)
def test_step_is_as_near_the_truth_as_eager(grid: Grid, tv: TVTerm | None) -> None:
    for kept in counts(grid):
        everywhere = kept == 1 and grid.patches <= 16
        args = arguments(grid, kept, everywhere=everywhere)
        found, eager, truth = copied(args), copied(args), in_double(args)
        values = [adam_update(*a, tv, impl=i) for a, i in ((found, "triton"), (eager, "torch"), (truth, "torch"))]
        mask = patch_mask(found[0].ids, grid)[:, None]
        for field in ("exp_avg", "exp_avg_sq", "out"):
            three = [getattr(a[0], field) for a in (found, eager, truth)]
            if field == "out":  # plain torch fills all of it
                assert torch.equal(torch.where(mask, 7.0, three[0]), torch.full_like(three[0], 7.0))
                three = [torch.where(mask, x, 0) for x in three]
            assert_near_truth(*three, torch.float32, terms=16)
        if tv:
            assert_near_truth(*values, torch.float32, terms=4 * max(2, kept * grid.patch**2))
        else:
            assert values == [None] * 3


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes_of_the_gradient(dtype: torch.dtype) -> None:
    args = arguments(Grid(24, 16, 8), 4, dtype)
    args = (args[0], replace(args[1], patches=None), *args[2:])
    found, eager = copied(args), copied(args)
    adam_update(*found, impl="triton")
    adam_update(*eager, impl="torch")
    for name in ("exp_avg", "exp_avg_sq"):
        torch.testing.assert_close(getattr(found[0], name), getattr(eager[0], name), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1.0])
def test_an_unhealthy_image_is_left_alone(bad: float) -> None:
    args = arguments(Grid(24, 16, 8), 4, batch=3)
    args[0].canvas[1] *= 100  # not even the clamp may touch it
    args[1].windows[1] = bad
    args[1].healthy[1] = False
    after = copied(args)
    adam_update(*after, TVTerm(0.1, "pixel"), impl="triton")
    mask = patch_mask(args[0].ids, Grid(24, 16, 8))[:, None]
    assert torch.equal(torch.where(mask, after[0].out, 0)[1], torch.where(mask, args[0].canvas, 0)[1])
    assert torch.isfinite(after[0].out).all()
    for name in ("exp_avg", "exp_avg_sq"):
        old, new = getattr(args[0], name), getattr(after[0], name)
        assert torch.equal(old[1], new[1])
        assert not torch.equal(old[0], new[0])
        assert not torch.equal(old[2], new[2])


def test_colours_stay_within_their_channels_limits() -> None:
    args = arguments(Grid(24, 16, 8), 6)
    args[0].exp_avg.mul_(1000)
    adam_update(*args, impl="triton")
    for channel in range(3):
        pixels = args[0].out[:, channel]
        assert pixels.min() == args[3].low[channel].item()
        assert pixels.max() == args[3].high[channel].item()


def test_it_is_the_same_each_time() -> None:
    args = arguments(Grid(32, 32, 16), 4)
    first, second = copied(args), copied(args)
    values = [adam_update(*a, TVTerm(0.3, "batch"), impl="triton") for a in (first, second)]
    assert torch.equal(*values)  # type: ignore[arg-type]
    for name in ("out", "exp_avg", "exp_avg_sq"):
        assert torch.equal(getattr(first[0], name), getattr(second[0], name))


def test_refusals() -> None:
    args = arguments(Grid(24, 16, 8), 4)
    with pytest.raises(ValueError, match="out is the canvas itself"):
        adam_update(replace(args[0], out=args[0].canvas), *args[1:], impl="triton")
    sideways = args[0].exp_avg.transpose(3, 4)
    with pytest.raises(ValueError, match="exp_avg is not contiguous"):
        adam_update(replace(args[0], exp_avg=sideways), *args[1:], impl="triton")
    with pytest.raises(ValueError, match="float64 has no kernel"):
        adam_update(*in_double(args), impl="triton")
