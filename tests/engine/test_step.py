"""The step against autograd through timm's own modules, and the compiled step against the eager one."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from smi_fast.config import InversionConfig
from smi_fast.engine.compiler import compile_step, trace_step
from smi_fast.engine.state import State
from smi_fast.engine.step import build_step
from smi_fast.kernels.common.grid import target_cells
from smi_fast.kernels.patch_cells import take_patches
from smi_fast.method.priors import L2, TotalVariation
from smi_fast.model.sparse_vit import SparseViT
from smi_fast.storage.inductor import why_not_compile
from tests.states import fresh

MakeModel = Callable[..., SparseViT]
LABELS, IDS = [0, 3, 4], [7, 0, 2]
SHORT = {"iterations": 8, "stops": ((2, 0.3), (4, 0.4)), "jitter": 0.4}


def start(model: SparseViT, config: InversionConfig) -> tuple[State, Any]:
    return fresh(model, config, LABELS, IDS), build_step(model, config)


@torch.no_grad()
def advance(model: SparseViT, config: InversionConfig, steps: int) -> State:
    """The state after that many eager steps, stops included."""
    state, step = start(model, config)
    kept = model.grid.patches
    for iteration in range(steps):
        for at, ratio in config.strategy.stops:
            if at == iteration:
                kept = int(kept * (1 - ratio))
                state = state.stopped(config.strategy, kept, iteration)
        step(state)
    return state


def timm_logits(vit: Any, images: Tensor, cells: Tensor) -> Tensor:
    """timm's forward with all patches but ``cells`` dropped after the position embedding."""
    tokens = vit._pos_embed(vit.patch_embed(images))
    prefix = vit.num_prefix_tokens
    index = (cells + prefix)[..., None].expand(-1, -1, tokens.shape[-1])
    tokens = torch.cat([tokens[:, :prefix], tokens.gather(1, index)], 1)
    return vit.forward_head(vit.norm(vit.blocks(vit.norm_pre(tokens))))


def plain_tv(canvas: Tensor, kept: Tensor) -> Tensor:
    """Eq. 2 on whole images: pairs of stopped pixels are left out; ``kept [B, 1, H, W]`` bool."""
    total = canvas.new_zeros(())
    height, width = canvas.shape[-2:]
    for dy, dx in ((0, 1), (1, 0), (1, 1), (1, -1)):
        here = (slice(0, height - dy), slice(max(-dx, 0), width - max(dx, 0)))
        there = (slice(dy, height), slice(max(dx, 0), width + min(dx, 0)))
        pair = canvas[..., here[0], here[1]] - canvas[..., there[0], there[1]]
        counts = kept[..., here[0], here[1]] | kept[..., there[0], there[1]]
        total = total + (pair.square().sum(1, keepdim=True).clamp(min=1e-300).sqrt() * counts).sum()
    return total


@pytest.mark.parametrize("steps", [0, 3, 6], ids=["dense", "one stop", "two stops"])
def test_gradient_is_that_of_autograd_through_timm(make_model: MakeModel, tiny_vit: Any, steps: int) -> None:
    model = make_model()
    config = InversionConfig(**SHORT, tv_weight=0.05, tv_norm="pixel", l2_weight=0.3)
    before = advance(model, config, steps)
    after = before.clone()
    with torch.no_grad():
        build_step(model, config)(after)

    shift, flip = before.jitter[:, steps, :2], before.jitter[:, steps, 2] == 1
    assert steps == 3 or shift.any(), "a step that does not move the image proves little"  # 3 comes before a stop
    canvas = before.canvas.clone().requires_grad_()
    moved = torch.stack([
        image.roll(tuple(offset.tolist()), (1, 2)).flip(2) if mirrored else image.roll(tuple(offset.tolist()), (1, 2))
        for image, offset, mirrored in zip(canvas, shift, flip, strict=True)
    ])  # fmt: skip
    cells = target_cells(before.keep, shift, flip, model.grid)
    loss = F.cross_entropy(timm_logits(tiny_vit, moved, cells), before.labels, reduction="sum")
    kept = torch.zeros(len(LABELS), 12, dtype=torch.bool).scatter(1, before.keep, True).view(-1, 1, 3, 4)
    kept = kept.repeat_interleave(8, 2).repeat_interleave(8, 3)
    loss = loss + 0.05 * plain_tv(canvas, kept)
    loss = loss + 0.3 * (canvas * kept).flatten(1).norm(dim=1).sum()
    (expected,) = torch.autograd.grad(loss, canvas)

    beta1 = config.betas[0]
    gradient = (after.exp_avg - beta1 * before.exp_avg) / (1 - beta1)
    torch.testing.assert_close(gradient, take_patches(expected, before.keep, model.grid), rtol=1e-9, atol=1e-11)


def test_losses_and_scores_are_those_of_the_forward(make_model: MakeModel) -> None:
    model = make_model()
    config = InversionConfig(iterations=2, stops=(), jitter=0.0, flip=False, tv_weight=0.0)
    state, step = start(model, config)
    logits, scores = model(state.canvas, state.keep)
    with torch.no_grad():
        step(state)
    torch.testing.assert_close(state.losses[:, 0], F.cross_entropy(logits, state.labels, reduction="none"))
    torch.testing.assert_close(state.scores, scores)


def test_the_columns_of_the_losses_are_those_of_the_priors(make_model: MakeModel) -> None:
    model = make_model()
    priors = (L2(0.3), TotalVariation(0.05), L2(0.1))
    config = InversionConfig(iterations=2, stops=(), jitter=0.0, flip=False, priors=priors)
    state, step = start(model, config)
    canvas = state.canvas.clone()
    with torch.no_grad():
        step(state)
    norms = canvas.flatten(1).norm(dim=1)
    whole = torch.ones(1, 1, 24, 32, dtype=torch.bool)
    variation = torch.stack([plain_tv(image[None], whole) for image in canvas])
    expected = torch.stack([0.3 * norms, 0.05 * variation, 0.1 * norms], 1)
    torch.testing.assert_close(state.losses[:, 1:], expected)


def test_stopped_pixels_never_change_again(make_model: MakeModel) -> None:
    model, config = make_model(), InversionConfig(**SHORT)
    at_stop = advance(model, config, 4)
    later = advance(model, config, 8)
    stopped = torch.ones(3, 12, dtype=torch.bool).scatter(1, later.keep, False)
    for image in range(3):
        ids = stopped[image].nonzero().T
        old, new = (take_patches(s.canvas[image : image + 1], ids, model.grid) for s in (at_stop, later))
        assert torch.equal(old, new)
    moved = take_patches(at_stop.canvas, later.keep, model.grid) != take_patches(later.canvas, later.keep, model.grid)
    assert moved.float().mean() > 0.9


def test_reference_goes_on_with_stopped_patches(make_model: MakeModel) -> None:
    model, config = make_model(), InversionConfig(**SHORT, preset="reference")
    at_stop, later = advance(model, config, 5), advance(model, config, 8)
    assert later.keep.shape == (3, 4)
    assert later.exp_avg.shape[1] == 12
    assert (at_stop.canvas != later.canvas).float().mean() > 0.9


def test_stop_keeps_the_best_scores_and_their_state(make_model: MakeModel) -> None:
    model, config = make_model(), InversionConfig(**SHORT)
    state = advance(model, config, 2)
    following = state.stopped(config.strategy, 8, 2)
    for image in range(3):
        best = sorted(state.scores[image].argsort(descending=True)[:8].tolist())
        assert following.keep[image].tolist() == best
        assert torch.equal(following.exp_avg[image], state.exp_avg[image, best])
        assert torch.equal(following.exp_avg_sq[image], state.exp_avg_sq[image, best])
    assert torch.equal(following.updated, following.keep)


@pytest.mark.parametrize("preset", ["paper", "reference"])
def test_the_first_half_writes_nothing(make_model: MakeModel, preset: Any) -> None:
    model, config = make_model(), InversionConfig(**SHORT, preset=preset, l2_weight=0.1)
    state = advance(model, config, 5)
    before = state.clone()
    with torch.no_grad():
        build_step(model, config).compute(state)
    for one, other in zip(state.tensors(), before.tensors(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("preset", ["paper", "reference"])
@pytest.mark.parametrize("options", [{}, {"qk_norm": True, "init_values": 0.3}, {"reg_tokens": 2}])
def test_traced_graph_equals_eager(make_model: MakeModel, preset: Any, options: dict[str, Any]) -> None:
    model, config = make_model(**options), InversionConfig(**SHORT, preset=preset, l2_weight=0.1)
    eager = advance(model, config, 5)
    traced = eager.clone()
    step = build_step(model, config)
    graph = trace_step(step, eager)
    with torch.no_grad():
        for _ in range(3):
            step(eager)
            step.finish(traced, graph(*traced.tensors()))
    for one, other in zip(eager.tensors(), traced.tensors(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.compiled
def test_compiled_step_equals_eager(make_model: MakeModel) -> None:
    dtype = torch.bfloat16  # its casts are code of their own; test_batches compiles float32
    if why_not_compile("cpu"):
        pytest.skip(f"inductor does not work here: {why_not_compile('cpu')}")
    model, config = make_model(dtype, depth=1), InversionConfig(**SHORT)  # a second block adds minutes, and no new code
    state = advance(model, config, 5)
    truth_model = make_model(torch.float64, depth=1)
    truth = State(*(t.double() if t.is_floating_point() else t.clone() for t in state.tensors()))
    eager, compiled = state.clone(), state.clone()
    with torch.no_grad():
        build_step(truth_model, config)(truth)
        build_step(model, config)(eager)
    compile_step(build_step(model, config), state)(compiled)
    # as near to float64 as eager is, but for one rounding of the compute dtype; the first moment holds the gradient
    for name in ("exp_avg", "scores"):
        exact = getattr(truth, name)
        error, allowed = ((getattr(state, name) - exact).norm() for state in (compiled, eager))
        assert error <= allowed + torch.finfo(dtype).eps * exact.norm(), (name, error, allowed)
    assert compiled.iteration.item() == eager.iteration.item() == 6
    stopped = ~torch.zeros(3, 12, dtype=torch.bool).scatter(1, state.keep, True)
    ids = torch.stack([row.nonzero().flatten() for row in stopped])
    assert torch.equal(
        take_patches(compiled.canvas, ids, model.grid), take_patches(state.canvas, ids, model.grid)
    )  # bit for bit
