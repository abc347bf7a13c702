"""The engine on kernels against the engine on plain torch: the same images."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from smi_fast.config import InversionConfig
from smi_fast.engine import Inverter
from smi_fast.engine.compiler import compile_step
from smi_fast.engine.state import uses_kernels
from smi_fast.engine.step import build_step
from smi_fast.images import SparseImages
from smi_fast.kernels.common.dispatch import KERNELS_VARIABLE
from smi_fast.kernels.patch_mask import patch_mask
from smi_fast.method.priors import L2, TotalVariation
from smi_fast.method.strategies import Stops
from smi_fast.model.sparse_vit import SparseViT
from smi_fast.storage.inductor import why_not_compile
from tests.kernels.cases import DEVICE
from tests.states import fresh

pytestmark = [pytest.mark.kernel, pytest.mark.usefixtures("few_programs")]

LONG_STOPS = ((4, 0.3), (8, 0.3), (12, 0.3))
LONG = InversionConfig(iterations=16, stops=LONG_STOPS, jitter=0.3, lr=0.05)
SHORT = replace(LONG, iterations=8, strategy=Stops(((2, 0.3), (4, 0.3), (6, 0.3))))
TWO = replace(SHORT, priors=(TotalVariation(0.01), L2(0.01)))


def invert(model: SparseViT, config: InversionConfig, kernels: str, patch: pytest.MonkeyPatch) -> SparseImages:
    patch.setenv(KERNELS_VARIABLE, kernels)
    assert uses_kernels(model) == (kernels == "triton")
    return Inverter(model, config, batch_size=3, impl="eager")([0, 3, 4])


@pytest.mark.parametrize(
    "config",
    [
        LONG,
        replace(LONG, loss="mean", priors=(TotalVariation(norm="batch"),), strategy=Stops(LONG_STOPS, False)),
        replace(SHORT, priors=(TotalVariation(norm="image"),)),
        # another term at the pixels, and the columns the other way round
        replace(SHORT, priors=(L2(0.01), TotalVariation(0.01))),
        # none of two is taken into the update
        replace(SHORT, priors=(TotalVariation(0.01, "pixel"), TotalVariation(0.01, "image"))),
    ],
    ids=["paper", "reference", "image norm", "two priors", "two total variations"],
)
def test_same_keep_sets_and_canvases(
    make_model: Callable[..., SparseViT],
    config: InversionConfig,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = make_model(torch.float32).to(DEVICE)
    ours, plain = (invert(model, config, name, monkeypatch) for name in ("triton", "torch"))
    assert ours.keep.shape == (3, 3)
    assert torch.equal(ours.keep, plain.keep)
    assert torch.equal(ours.predicted, plain.predicted)
    assert ours.failed_at.tolist() == [-1] * 3
    moved = (ours.pixels - plain.pixels).abs().max()
    assert moved < 1e-4, moved  # rounding of 16 steps; 2e-6 was seen after 30


@torch.no_grad()
def test_same_losses_and_scores_after_a_stop(
    make_model: Callable[..., SparseViT], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model(torch.float32).to(DEVICE)
    states = []
    for kernels in ("triton", "torch"):
        monkeypatch.setenv(KERNELS_VARIABLE, kernels)
        state, step = fresh(model, TWO, [0, 3, 4], [7, 0, 2]), build_step(model, TWO)
        step(state)
        state = state.stopped(TWO.strategy, 5, 2)
        step(state)
        states.append(state)
    ours, plain = states
    torch.testing.assert_close(ours.losses, plain.losses, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(ours.scores, plain.scores, rtol=1e-4, atol=1e-6)


@pytest.mark.compiled
@torch.no_grad()
def test_compiled_step_equals_eager(make_model: Callable[..., SparseViT], monkeypatch: pytest.MonkeyPatch) -> None:
    backend = "aot_eager" if why_not_compile(DEVICE) else "inductor"
    model = make_model(torch.float32).to(DEVICE)
    monkeypatch.setenv(KERNELS_VARIABLE, "triton")
    state = fresh(model, SHORT, [0, 3, 4], [7, 0, 2])
    step = build_step(model, SHORT)
    for _ in range(2):
        step(state)
    state = state.stopped(SHORT.strategy, 8, 2)
    eager, compiled = state.clone(), state.clone()
    run = compile_step(step, state, backend)
    for _ in range(3):
        step(eager)
        run(compiled)
    for name, one, other in zip(vars(eager), eager.tensors(), compiled.tensors(), strict=False):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")
    assert compiled.spare is not None
    stopped = ~patch_mask(state.keep, model.grid)[:, None].expand_as(state.canvas)
    for canvas in (compiled.canvas, compiled.spare):
        assert torch.equal(canvas[stopped], state.canvas[stopped])
