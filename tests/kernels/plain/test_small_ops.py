"""`adam_update`, `select_patches`, `cls_attention` and `patch_mask` against torch's optimiser and plain loops."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from smi_fast.kernels.adam_update import AdamConstants, adam_step
from smi_fast.kernels.cls_attention import cls_attention
from smi_fast.kernels.common.grid import Grid
from smi_fast.kernels.patch_cells import put_patches_, take_patches
from smi_fast.kernels.patch_mask import composite, patch_mask
from smi_fast.kernels.select_patches import remap, select_patches

LOW, HIGH = (-2.1, -2.0, -1.8), (2.2, 2.4, 2.6)
BETAS, EPS, LR = (0.5, 0.99), 1e-8, 0.25


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def constants(dtype: torch.dtype) -> AdamConstants:
    low, high = (torch.tensor(limits, dtype=dtype)[:, None, None] for limits in (LOW, HIGH))
    return AdamConstants(*BETAS, EPS, low, high)


def rates(step: int, dtype: torch.dtype) -> Tensor:
    return torch.tensor([LR, 1 - BETAS[0] ** step, 1 - BETAS[1] ** step], dtype=dtype)


def clamp_channels(pixels: Tensor) -> None:
    for channel, (low, high) in enumerate(zip(LOW, HIGH, strict=True)):
        pixels[:, :, channel].clamp_(low, high)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_adam_is_that_of_torch(dtype: torch.dtype, tolerance: float) -> None:
    pixels = randn(2, 5, 3, 4, 4, dtype=dtype)
    theirs = torch.nn.Parameter(pixels.clone())
    optimiser = torch.optim.Adam([theirs], lr=LR, betas=BETAS, eps=EPS)
    moments = (torch.zeros_like(pixels), torch.zeros_like(pixels))
    healthy = torch.tensor([True, True])
    clamped = 0
    for step in range(1, 9):
        gradient = randn(2, 5, 3, 4, 4, seed=step, dtype=dtype) * 10.0 ** (step % 3 - 4)
        pixels, *both = adam_step(pixels, moments, gradient, rates(step, dtype), healthy, constants(dtype))
        moments = (both[0], both[1])
        theirs.grad = gradient
        optimiser.step()
        with torch.no_grad():
            before = theirs.clone()
            clamp_channels(theirs)
            clamped += int((before != theirs).sum())
        torch.testing.assert_close(pixels, theirs.detach(), rtol=tolerance, atol=tolerance)
    assert clamped > 0
    state = optimiser.state[theirs]
    torch.testing.assert_close(moments[0], state["exp_avg"], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(moments[1], state["exp_avg_sq"], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1.0])
def test_adam_leaves_an_unhealthy_image_alone(bad: float) -> None:
    # pixels of the unhealthy image lie outside the limits: not even the clamp may touch them
    pixels, moments = 10 * randn(3, 2, 3, 2, 2), (randn(3, 2, 3, 2, 2, seed=1), randn(3, 2, 3, 2, 2, seed=2).square())
    gradient = randn(3, 2, 3, 2, 2, seed=3)
    gradient[1] = bad
    args = (gradient, rates(4, torch.float64), torch.tensor([True, False, True]), constants(torch.float64))
    after, first, second = adam_step(pixels, moments, *args)
    for old, new in ((pixels, after), (moments[0], first), (moments[1], second)):
        assert torch.equal(old[1], new[1])
        assert torch.isfinite(new).all()
        assert not torch.equal(old[0], new[0])
        assert not torch.equal(old[2], new[2])


def by_sorting(scores: list[float], count: int) -> list[int]:
    return sorted(sorted(range(len(scores)), key=lambda slot: (-scores[slot], slot))[:count])


@settings(deadline=None, max_examples=200)
@given(st.data())
def test_select_patches_is_a_python_sort(data: st.DataObject) -> None:
    kept, batch = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 3))
    # few different scores, so that ties are the rule
    row = st.lists(st.integers(0, 4).map(float), min_size=kept, max_size=kept)
    scores = data.draw(st.lists(row, min_size=batch, max_size=batch))
    count = data.draw(st.integers(1, kept))
    slots = select_patches(torch.tensor(scores), count)
    assert slots.dtype == torch.int64
    assert slots.tolist() == [by_sorting(one, count) for one in scores]


def test_select_patches_at_full_size() -> None:
    scores = randn(4, 196, dtype=torch.float32).softmax(1)
    assert select_patches(scores, 137).tolist() == [by_sorting(row, 137) for row in scores.tolist()]


def test_select_patches_settles_ties_for_the_lower_id() -> None:
    assert select_patches(torch.tensor([[1.0, 2.0, 1.0, 2.0, 1.0]]), 3).tolist() == [[0, 1, 3]]
    assert select_patches(torch.zeros(1, 300), 7).tolist() == [list(range(7))]


@pytest.mark.parametrize("count", [0, -1, 4])
def test_select_patches_refuses_a_count_out_of_range(count: int) -> None:
    with pytest.raises(ValueError, match=rf"count={count}: must lie in 1..3"):
        select_patches(torch.zeros(2, 3), count)


@pytest.mark.parametrize("rest", [(), (3,), (3, 2, 2)])
def test_remap_takes_the_slots(rest: tuple[int, ...]) -> None:
    state, slots = randn(2, 5, *rest), torch.tensor([[0, 2, 4], [1, 2, 3]])
    found = remap(state, slots)
    assert found.shape == (2, 3, *rest)
    for b, row in enumerate(slots.tolist()):
        for k, slot in enumerate(row):
            assert torch.equal(found[b, k], state[b, slot])


def softmax(logits: list[float]) -> list[float]:
    largest = max(logits)
    powers = [math.exp(value - largest) for value in logits]
    return [power / sum(powers) for power in powers]


@pytest.mark.parametrize(
    ("queries", "prefix", "tokens"), [(1, 1, 1), (1, 1, 2), (1, 1, 8), (2, 2, 7), (1, 5, 6), (8, 1, 8)]
)
def test_cls_attention_is_an_explicit_softmax(queries: int, prefix: int, tokens: int) -> None:
    batch, heads, width = 2, 3, 5
    query, key, value = (3 * randn(batch, heads, n, width, seed=s) for s, n in enumerate((queries, tokens, tokens)))
    out, score = cls_attention(query, key, value, prefix)
    assert out.shape == (batch, heads, queries, width)
    assert score.shape == (batch, tokens - prefix)
    want = torch.zeros_like(score)
    for b in range(batch):
        for h in range(heads):
            for m in range(queries):
                logits = [float(query[b, h, m] @ key[b, h, n]) / math.sqrt(width) for n in range(tokens)]
                row = torch.tensor(softmax(logits), dtype=torch.float64)
                torch.testing.assert_close(out[b, h, m], (row[:, None] * value[b, h]).sum(0), rtol=1e-12, atol=1e-12)
                if m == 0:
                    want[b] += row[prefix:] / heads
    torch.testing.assert_close(score, want, rtol=1e-12, atol=1e-12)


def test_cls_attention_takes_a_scale() -> None:
    query, key, value = (randn(2, 3, n, 16, seed=n) for n in (2, 9, 10))
    value = value[:, :, :9]
    found = cls_attention(query, key, value, 1, scale=0.7)
    wanted = cls_attention(query * (0.7 * 16**0.5), key, value, 1)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="scale=nan: must be finite"):
        cls_attention(query, key, value, 1, scale=math.nan)


def test_cls_attention_in_bfloat16() -> None:
    query, key, value = (randn(2, 3, n, 16, seed=n).bfloat16() for n in (1, 9, 10))
    key = torch.cat([key, key[:, :, :1]], 2)
    out, score = cls_attention(query, key, value, 1)
    exact_out, exact_score = cls_attention(query.float(), key.float(), value.float(), 1)
    assert out.dtype == torch.bfloat16
    assert score.dtype == torch.float32
    eps = torch.finfo(torch.bfloat16).eps
    torch.testing.assert_close(score, exact_score, rtol=1e-5, atol=0)  # logits and softmax are float32
    torch.testing.assert_close(out.float(), exact_out, rtol=8 * eps, atol=8 * eps)


def test_cls_attention_does_not_overflow_in_float16() -> None:
    query = torch.full((1, 1, 1, 64), 40.0, dtype=torch.float16)  # 40 * 40 * 64 is beyond float16
    _, score = cls_attention(query, query.expand(1, 1, 3, 64), torch.ones(1, 1, 3, 64, dtype=torch.float16), 1)
    torch.testing.assert_close(score, torch.full((1, 2), 1 / 3))


def test_cls_attention_does_not_overflow() -> None:
    query = key = torch.full((1, 1, 3, 4), 1e4)
    out, score = cls_attention(query[:, :, :1], key, torch.ones(1, 1, 3, 4), 1)
    assert torch.equal(out, torch.ones(1, 1, 1, 4))
    torch.testing.assert_close(score, torch.full((1, 2), 1 / 3))


@st.composite
def kept_patches(draw: st.DrawFn) -> tuple[Grid, Tensor]:
    """A small grid, and ids ``[B, K]`` of kept patches."""
    patch, rows, columns = draw(st.integers(1, 4)), draw(st.integers(1, 3)), draw(st.integers(1, 4))
    kept, generator = draw(st.integers(1, rows * columns)), torch.Generator().manual_seed(draw(st.integers(0, 999)))
    ids = [torch.randperm(rows * columns, generator=generator)[:kept].sort().values for _ in range(2)]
    return Grid(rows * patch, columns * patch, patch), torch.stack(ids)


@settings(deadline=None, max_examples=50)
@given(kept_patches())
def test_patch_mask_and_composite_pixel_by_pixel(case: tuple[Grid, Tensor]) -> None:
    grid, keep = case
    pixels = randn(2, 3, grid.height, grid.width)
    other = randn(2, 3, grid.height, grid.width, seed=1)
    colour = torch.tensor([7.0, 8.0, 9.0])[:, None, None]
    mask, on_colour, on_other = (
        patch_mask(keep, grid),
        composite(pixels, keep, grid, colour),
        composite(pixels, keep, grid, other),
    )
    assert mask.dtype == torch.bool
    for b in range(2):
        for y in range(grid.height):
            for x in range(grid.width):
                kept = y // grid.patch * grid.columns + x // grid.patch in keep[b].tolist()
                assert bool(mask[b, y, x]) == kept
                assert torch.equal(on_colour[b, :, y, x], pixels[b, :, y, x] if kept else colour[:, 0, 0].double())
                assert torch.equal(on_other[b, :, y, x], (pixels if kept else other)[b, :, y, x])


@settings(deadline=None, max_examples=50)
@given(kept_patches())
def test_take_and_put_patches(case: tuple[Grid, Tensor]) -> None:
    grid, keep = case
    canvas = randn(2, 3, grid.height, grid.width)
    fresh, put = randn(2, keep.shape[1], 3, grid.patch, grid.patch, seed=1), canvas.clone()
    taken = take_patches(canvas, keep, grid)
    put_patches_(put, keep, fresh)
    want = canvas.clone()
    for b, row in enumerate(keep.tolist()):
        for k, patch in enumerate(row):
            y, x = patch // grid.columns * grid.patch, patch % grid.columns * grid.patch
            where = (b, slice(None), slice(y, y + grid.patch), slice(x, x + grid.patch))
            assert torch.equal(taken[b, k], canvas[where])
            want[where] = fresh[b, k]
    assert torch.equal(put, want)
    with pytest.raises(ValueError, match=r"put_patches_: canvas has strides .*: must be contiguous"):
        put_patches_(canvas[:1].expand_as(canvas), keep, fresh)
