"""The engine on kernels against the engine on plain torch: the same images."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from smi_fast.config import InversionConfig
from smi_fast.engine import Inverter
from smi_fast.engine.compiler import compile_step, why_not_compile
from smi_fast.engine.state import new_state, stop_patches, uses_kernels
from smi_fast.engine.step import build_step
from smi_fast.images import SparseImages
from smi_fast.kernels.common.dispatch import KERNELS_VARIABLE
from smi_fast.kernels.patch_mask import patch_mask
from smi_fast.model.sparse_vit import SparseViT
from smi_fast.priors import L2, Prior, TotalVariation, priors_of
from tests.kernels.cases import DEVICE

pytestmark = [pytest.mark.kernel, pytest.mark.usefixtures("few_programs")]

LONG = InversionConfig(iterations=16, stops=((4, 0.3), (8, 0.3), (12, 0.3)), jitter=0.3, lr=0.05)
SHORT = replace(LONG, iterations=8, stops=((2, 0.3), (4, 0.3), (6, 0.3)))


def invert(
    model: SparseViT, config: InversionConfig, priors: tuple[Prior, ...] | None, kernels: str, patch: pytest.MonkeyPatch
) -> SparseImages:
    patch.setenv(KERNELS_VARIABLE, kernels)
    assert uses_kernels(model) == (kernels == "triton")
    return Inverter(model, config, batch_size=3, impl="eager", priors=priors)([0, 3, 4])


@pytest.mark.parametrize(
    ("config", "priors"),
    [
        (LONG, None),
        (replace(LONG, preset="reference"), None),
        (replace(SHORT, tv_norm="image"), None),
        (SHORT, (L2(0.01), TotalVariation(0.01))),  # another term at the pixels, and the columns the other way round
        (SHORT, (TotalVariation(0.01, "pixel"), TotalVariation(0.01, "image"))),  # none of two is taken into the update
    ],
    ids=["paper", "reference", "image norm", "two priors", "two total variations"],
)
def test_same_keep_sets_and_canvases(
    make_model: Callable[..., SparseViT],
    config: InversionConfig,
    priors: tuple[Prior, ...] | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = make_model(torch.float32).to(DEVICE)
    ours, plain = (invert(model, config, priors, name, monkeypatch) for name in ("triton", "torch"))
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
    model, priors = make_model(torch.float32).to(DEVICE), (TotalVariation(0.01), L2(0.01))
    states = []
    for kernels in ("triton", "torch"):
        monkeypatch.setenv(KERNELS_VARIABLE, kernels)
        state, step = new_state(model, SHORT, [0, 3, 4], [7, 0, 2], 2), build_step(model, SHORT, priors)
        step(state)
        state = stop_patches(state, 5, True)
        step(state)
        states.append(state)
    ours, plain = states
    torch.testing.assert_close(ours.losses, plain.losses, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(ours.scores, plain.scores, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.compiled)])
@torch.no_grad()
def test_compiled_step_equals_eager(
    make_model: Callable[..., SparseViT], backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if backend == "inductor" and why_not_compile(DEVICE):
        pytest.skip(f"inductor does not work here: {why_not_compile(DEVICE)}")
    model = make_model(torch.float32).to(DEVICE)
    monkeypatch.setenv(KERNELS_VARIABLE, "triton")
    priors = priors_of(SHORT)
    state = new_state(model, SHORT, [0, 3, 4], [7, 0, 2], len(priors))
    step = build_step(model, SHORT, priors)
    for _ in range(2):
        step(state)
    state = stop_patches(state, 8, True)
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
