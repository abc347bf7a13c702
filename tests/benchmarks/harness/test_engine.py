"""Our step at a fixed set of patches is held against the eager one, and its gradient against autograd's."""

import contextlib
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from benchmarks.harness import engine
from benchmarks.harness.engine import REFERENCE, FixedStep, StageRunners
from benchmarks.harness.models import fixed_keep
from benchmarks.systems.loops import batch_total_variation
from smi_fast.config import InversionConfig
from smi_fast.model.sparse_vit import SparseViT

BATCH, KEPT = 3, 7


def test_a_step_that_goes_wrong_is_not_timed(model: SparseViT) -> None:
    fixed = FixedStep(model, InversionConfig(), fixed_keep(BATCH, model.grid.patches, KEPT), "eager").check()
    eager = fixed.run

    def scaled(factor: float) -> Callable[[Any], None]:
        def run(state: Any) -> None:
            eager(state)
            state.losses.mul_(factor)

        return run

    fixed.run = scaled(1.01)
    with pytest.raises(AssertionError, match="differ from the eager step's"):
        fixed.check()
    fixed.run = scaled(float("nan"))
    with pytest.raises(AssertionError, match="not finite"):
        fixed.check()


def test_a_cpu_is_timed_step_by_step(model: SparseViT, monkeypatch: pytest.MonkeyPatch) -> None:
    fixed = FixedStep(model, InversionConfig(), fixed_keep(BATCH, model.grid.patches, KEPT), "eager")
    monkeypatch.setattr(engine, "Runner", None)
    calls: list[Any] = []
    fixed.run = calls.append
    assert fixed.seconds(3) > 0
    assert len(calls) == 3


def test_a_gpu_is_timed_in_whole_captures(model: SparseViT, monkeypatch: pytest.MonkeyPatch) -> None:
    """As far as a CPU can tell: what the runner is asked for, and what the time is divided by."""
    advanced: list[int] = []

    class Captured(engine.Runner):
        def advance(self, most: int) -> int:
            advanced.append(most)
            return engine.UNROLLED

    fixed = FixedStep(model, InversionConfig(), fixed_keep(BATCH, model.grid.patches, KEPT), "eager")
    fixed.model = SimpleNamespace(device=torch.device("cuda"))  # type: ignore[assignment]
    monkeypatch.setattr(engine, "Runner", lambda step, state, pool: Captured(step, state, None))
    monkeypatch.setattr(engine, "current", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))
    monkeypatch.setattr(engine, "seconds_each", lambda call, count, device: [call() for _ in range(count)] and 3.0)
    runners = []
    for steps, most in ((5, [10]), (10, [10]), (11, [20, 10])):
        advanced.clear()
        assert fixed.seconds(steps) == pytest.approx(3.0 / sum(most[:1]))
        assert advanced == most
        runners.append(fixed._runner)
    assert len(set(map(id, runners))) == 1, "captured once"


def test_gradients_are_those_of_the_loss(make_model: Callable[..., SparseViT]) -> None:
    model, keep = make_model(), fixed_keep(BATCH, 12, KEPT)
    leaf = torch.randn(BATCH, 3, 24, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    leaf.requires_grad_()
    loss = F.cross_entropy(model(leaf, keep)[0], torch.arange(BATCH)) + 1e-4 * batch_total_variation(leaf)
    (truth,) = torch.autograd.grad(loss, leaf)
    canvas = leaf.detach()
    torch.testing.assert_close(FixedStep(model, REFERENCE, keep, "eager").gradient(canvas), truth)
    # the inverter's own runner gives the same as the step
    config = InversionConfig()
    runners = StageRunners(model, config, [fixed_keep(BATCH, 12, 12), keep], compiled=False, graphs=False)
    runners.advance(1, 2)
    exact = FixedStep(model, config, keep, "eager").gradient(canvas)
    torch.testing.assert_close(runners.gradient(1, canvas), exact)
    assert (exact == 0).double().mean() == pytest.approx(1 - KEPT / 12), "patches that have stopped"
