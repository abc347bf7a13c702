"""FLOPs against torch's own counter and the published anchors; the estimates stay in range."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from smi_fast.kernels.common.grid import Grid
from smi_fast.method.strategies.stops import PAPER_STOPS
from smi_fast.model.flops import iteration_flops, paper_iteration_flops, run_flops
from smi_fast.model.sparse_vit import SparseViT
from smi_fast.model.spec import ViTShape
from smi_fast.schedule import plan_stages, sparsity
from smi_fast.tuning.cost import estimate, memory_bytes

DEIT_BASE = ViTShape(Grid(224, 224, 16), 768, 12, 12, 64, 3072, 1, 1, 1000)


@pytest.mark.parametrize("options", [{}, {"reg_tokens": 2}, {"global_pool": "avg", "fc_norm": True}], ids=str)
@pytest.mark.parametrize("kept", [1, 5, 12])
def test_true_flops_are_those_of_the_matrix_products(
    make_model: Callable[..., SparseViT], options: dict[str, Any], kept: int
) -> None:
    model = make_model(**options)
    leaf = torch.randn(1, kept, 192, dtype=torch.float64, requires_grad=True)
    cells = torch.arange(kept)[None]
    with FlopCounterMode(display=False) as counter:
        logits = model.forward_patches(leaf * 1, cells).logits  # the counter's hooks want no leaf
        torch.autograd.grad(logits.sum(), leaf)
    expected = iteration_flops(model.shape, kept)
    if options.get("global_pool") == "avg":
        expected += 2 * model.shape.width * (kept + model.shape.prefix) * 2  # the CLS row of the scores, p v included
    assert counter.get_total_flops() == expected


def test_anchors_of_deit_base() -> None:
    stages = plan_stages(196, PAPER_STOPS, 4000)
    assert sparsity(stages, 196) == pytest.approx(0.765, abs=1e-3)
    # at the 790 TFLOP/s of a large bf16 product: image-iterations a second of the last stage
    assert 790e12 / iteration_flops(DEIT_BASE, 46) == pytest.approx(52e3, rel=0.01)
    flops = run_flops(DEIT_BASE, stages)
    assert flops.true == sum(s.length * iteration_flops(DEIT_BASE, s.kept) for s in stages)
    assert flops.paper == 4000 * paper_iteration_flops(DEIT_BASE, 46)
    # the usual 17.6 GMACs of DeiT-Base less 0.7 of attention products, three times
    assert paper_iteration_flops(DEIT_BASE, 196) == pytest.approx(3 * 16.85e9, rel=0.01)


def test_estimates() -> None:
    stages = plan_stages(196, PAPER_STOPS, 4000)
    small = ViTShape(Grid(32, 32, 4), 192, 6, 3, 64, 768, 1, 1, 10)
    cost = estimate(small, plan_stages(64, (), 10), (4,), torch.device("cpu"), torch.float32)
    assert cost.seconds_per_image > 0
    assert cost.matmul_flops_per_s > 1e8
    assert stages[-1].kept == 46
    one, many = (memory_bytes(DEIT_BASE, batch, torch.bfloat16) for batch in (1, 128))
    assert 2 * 86e6 < one < many < 40e9
    assert memory_bytes(DEIT_BASE, 128, torch.bfloat16, 196) == many
    assert memory_bytes(DEIT_BASE, 128, torch.bfloat16, 46) < many
    pruned = plan_stages(64, ((5, 0.5),), 10)
    pair = estimate(small, pruned, (4, 64), torch.device("cpu"), torch.float32)
    assert pair.memory_bytes == memory_bytes(small, 64, torch.float32, 32)
