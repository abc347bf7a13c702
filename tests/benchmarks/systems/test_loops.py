"""The yard-stick: both loops do the same job, and it is that of autograd through timm's own forward."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from benchmarks.systems.loops import InversionLoop, Jitter, PublishedLoop, TunedLoop, batch_total_variation
from smi_fast.kernels.common.grid import Grid, target_cells
from smi_fast.kernels.total_variation import total_variation
from smi_fast.schedule import plan_stages

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
LABELS = torch.tensor([1, 3, 0])
STOPS = ((3, 0.3), (5, 0.5))  # 16 -> 11 -> 5
OPTIONS: list[dict[str, Any]] = [
    {},
    {"reg_tokens": 2, "qk_norm": True, "init_values": 0.5},
    {"global_pool": "avg", "pre_norm": True},
]
KEEP = torch.tensor([[0, 5, 6, 15], [1, 2, 3, 4], [3, 7, 8, 12]])


def tiny_vit(**options: Any) -> VisionTransformer:
    torch.manual_seed(0)
    vit = VisionTransformer(
        img_size=32, patch_size=8, embed_dim=64, depth=2, num_heads=4, num_classes=7, **options
    ).eval()
    with torch.no_grad():
        for weight in vit.parameters():  # no zero bias, and attention that prefers some patches
            weight.add_(0.1 * torch.randn_like(weight))
    return vit


def published(vit: VisionTransformer, seed: int = 5) -> PublishedLoop:
    return PublishedLoop(vit, LABELS, MEAN, STD, seed)


def pixels(loop: InversionLoop) -> Tensor:
    return loop.canvas.detach().clone()


@pytest.mark.parametrize("options", OPTIONS)
def test_both_loops_give_the_same_canvas_in_float64(options: dict[str, Any]) -> None:
    vit = tiny_vit(**options).double()
    slow, quick = published(vit), TunedLoop(vit, LABELS, MEAN, STD, 5)
    start = pixels(slow)
    assert torch.equal(start, pixels(quick))
    for loop in (slow, quick):
        loop.run(8, STOPS)
    assert torch.equal(slow.keep, quick.keep)
    assert slow.keep.shape == (3, 5)
    torch.testing.assert_close(pixels(slow), pixels(quick), rtol=0, atol=1e-8)
    torch.testing.assert_close(slow.loss, quick.loss, rtol=1e-10, atol=0)
    assert (pixels(slow) - start).abs().mean() > 0.5


def test_one_step_in_lower_precision_is_close() -> None:
    vit = tiny_vit()
    loops = (
        published(copy.deepcopy(vit).double()),
        TunedLoop(vit, LABELS, MEAN, STD, 5),
        TunedLoop(vit, LABELS, MEAN, STD, 5, torch.bfloat16),
    )
    start = pixels(loops[1])
    gradients = []
    for loop in loops:
        with torch.no_grad():
            loop.canvas.copy_(start)
        loop.set_keep(KEEP)
        loop.step()
        assert loop.canvas.grad is not None
        gradients.append(loop.canvas.grad.double())
    for gradient, share in zip(gradients[1:], (1e-5, 3e-2), strict=True):
        assert (gradient - gradients[0]).norm() < share * gradients[0].norm()


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("kind", [PublishedLoop, TunedLoop])
def test_dense_steps_are_those_of_timms_forward(kind: type[PublishedLoop | TunedLoop], options: dict[str, Any]) -> None:
    vit = tiny_vit(**options).double()
    loop = kind(vit, LABELS, MEAN, STD, 5)
    canvas = pixels(loop).requires_grad_()
    optimiser = torch.optim.Adam([canvas], lr=0.25, betas=(0.5, 0.99))
    for _ in range(3):
        optimiser.zero_grad()
        loss = F.cross_entropy(vit(canvas), LABELS) + 1e-4 * batch_total_variation(canvas)
        loss.backward()
        optimiser.step()
        with torch.no_grad():
            for channel, (mean, std) in enumerate(zip(MEAN, STD, strict=True)):
                canvas[:, channel].clamp_(-mean / std, (1 - mean) / std)
        loop.step(jitter=False)
        torch.testing.assert_close(loop.canvas.grad, canvas.grad, rtol=1e-8, atol=1e-13)
        torch.testing.assert_close(loop.loss, loss.detach(), rtol=1e-10, atol=0)
        torch.testing.assert_close(pixels(loop), canvas.detach(), rtol=0, atol=1e-8)


def test_total_variation_is_the_batch_norm_of_the_kernels() -> None:
    grid = Grid(8, 12, 4)
    canvas = torch.randn(3, 3, 8, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    value, _ = total_variation(canvas, torch.arange(6).expand(3, -1), grid, "batch")
    torch.testing.assert_close(batch_total_variation(canvas), value.sum())


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize(("dy", "dx"), [(0, 0), (4, -4), (3, -5), (-4, 12), (8, 1), (-28, 27)])
def test_kept_patches_land_on_the_nearest_cell(dy: int, dx: int, flip: bool) -> None:
    found = Jitter(dy, dx, flip).cells(KEEP, (4, 4), 8)
    want = target_cells(KEEP, torch.tensor([[dy, dx]] * 3), torch.tensor([flip] * 3), Grid(32, 32, 8))
    assert torch.equal(found, want)


def test_a_shift_of_whole_patches_moves_images_and_cells_alike() -> None:
    grid, jitter = Grid(32, 32, 8), Jitter(8, -16, True)
    ids = torch.arange(16).reshape(1, 1, 4, 4).repeat_interleave(8, 2).repeat_interleave(8, 3).expand(3, 3, -1, -1)
    corners = jitter.images(ids)[:, 0, ::8, ::8].flatten(1)  # the patch that each cell shows
    assert torch.equal(corners.gather(1, jitter.cells(KEEP, (4, 4), grid.patch)), KEEP)


@pytest.mark.parametrize(
    ("iterations", "stops"), [(8, STOPS), (6, ()), (4, ((1, 0.5), (2, 0.5), (3, 0.5))), (7, ((2, 0.1), (6, 0.9)))]
)
def test_keep_counts_follow_the_plan(iterations: int, stops: tuple[tuple[int, float], ...]) -> None:
    loop = published(tiny_vit())
    loop.set_keep(KEEP)  # a run starts from all patches nevertheless
    kept, jittered = [], []
    step = loop.step

    def recorded(jitter: bool = True) -> None:
        kept.append(loop.keep.shape[1])
        jittered.append(jitter)
        step(jitter)

    loop.step = recorded  # type: ignore[method-assign]
    loop.run(iterations, stops)
    plan = plan_stages(16, stops, iterations)
    assert kept == [stage.kept for stage in plan for _ in range(stage.length)]
    still = {n for stop, _ in stops for n in (stop - 1, stop)}
    assert jittered == [n not in still for n in range(iterations)]
    assert (loop.keep.diff(dim=1) > 0).all()


def test_a_stop_keeps_what_cls_attends_to() -> None:
    vit = tiny_vit().double()
    loop = published(vit)
    rows: list[Tensor] = []
    last: Any = vit.blocks[-1]
    last.attn.fused_attn = False
    last.attn.attn_drop.register_forward_hook(lambda _layer, _args, out: rows.append(out))
    vit(loop.canvas)
    loop.run(2, ((1, 0.5),))
    scores = rows[0][:, :, 0, 1:].mean(1)
    assert torch.equal(loop.keep, scores.argsort(1, descending=True)[:, :8].sort(1).values)


def test_dropped_patches_are_still_smoothed_and_updated() -> None:
    loop = published(tiny_vit())
    start = pixels(loop)
    loop.set_keep(KEEP)
    loop.step()
    assert (pixels(loop) != start).float().mean() > 0.99


def test_only_the_published_loop_pays_for_weights_maps_and_losses() -> None:
    vit = tiny_vit()
    slow, quick = published(vit), TunedLoop(vit, LABELS, MEAN, STD, 5)
    for loop in (slow, quick):
        loop.set_keep(KEEP)
        loop.step()
    assert all(weight.grad is not None for weight in slow.vit.parameters())
    assert all(weight.grad is None for weight in quick.vit.parameters())
    assert [tuple(m.shape) for m in slow.maps] == [(3, 4, 5, 5)] * 2
    assert [tuple(m.shape) for m in quick.maps] == [(3, 4, 5, 5)]
    assert slow.best_loss == float(slow.loss)
    assert quick.best_loss == float("inf")
    assert all(weight.grad is None and weight.requires_grad for weight in vit.parameters())


@pytest.mark.parametrize("kind", [PublishedLoop, TunedLoop])
def test_the_loss_goes_down(kind: type[PublishedLoop | TunedLoop]) -> None:
    loop = kind(tiny_vit(), LABELS, MEAN, STD, 5)
    loop.step(jitter=False)
    first = float(loop.loss)
    for _ in range(99):
        loop.step(jitter=False)
    assert float(loop.loss) < 0.2 * first  # total variation remains


def test_the_best_loss_of_a_whole_run() -> None:
    loop = published(tiny_vit())
    loop.step()
    first = float(loop.loss)
    loop.run(100, ((20, 0.3), (40, 0.3)))
    # 0.25 of the first was seen; the jittered loss of a random teacher stays noisy
    assert loop.best_loss < 0.5 * first
    assert loop.best_loss <= float(loop.loss)


@pytest.mark.parametrize("keep", [KEEP.int(), KEEP[:2], KEEP[0], torch.zeros(3, 0).long(), torch.zeros(3, 17).long()])
def test_set_keep_refuses(keep: Tensor) -> None:
    with pytest.raises(ValueError, match=r"must be int64 \[B, K\] with B=3 and K in 1..16"):
        published(tiny_vit()).set_keep(keep)


def test_refusals_at_the_start() -> None:
    with pytest.raises(ValueError, match="no CLS token"):
        published(tiny_vit(class_token=False, global_pool="avg"))
    with pytest.raises(ValueError, match=r"dtype=torch\.float16: must be"):
        TunedLoop(tiny_vit(), LABELS, MEAN, STD, 5, torch.float16)
    with pytest.raises(ValueError, match="before the last iteration"):
        published(tiny_vit()).run(3, ((3, 0.3),))
