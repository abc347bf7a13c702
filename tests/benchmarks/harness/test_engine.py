"""Our step at a fixed set of patches is held against the eager one, and its gradient against autograd's."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

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
