"""A whole model on the kernels: as near to float64 as plain torch is, logits, scores and gradient."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from smi_fast.kernels import add_layer_norm as norm_module
from smi_fast.kernels import mlp as mlp_module
from smi_fast.kernels.common.dispatch import KERNELS_VARIABLE
from smi_fast.model.sparse_vit import SparseViT
from tests.kernels.cases import DEVICE, LOW, generator

pytestmark = pytest.mark.kernel
MakeModel = Callable[..., SparseViT]
MODELS: dict[str, dict[str, Any]] = {
    "plain": {},
    "registers": {"reg_tokens": 2, "init_values": 0.3, "qk_norm": True},
    "averaged": {"global_pool": "avg", "fc_norm": True},
    "no bias": {"qkv_bias": False, "proj_bias": False},
}


def evaluate(model: SparseViT, windows: Tensor, cells: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    leaf = windows.to(DEVICE, model.dtype).requires_grad_()
    output = model.to(DEVICE).forward_patches(leaf, cells.to(DEVICE))
    weights = torch.linspace(-1, 1, output.logits.numel(), device=DEVICE).view_as(output.logits)
    loss = (output.logits * weights).sum() + output.cls_scores.square().sum()
    (gradient,) = torch.autograd.grad(loss, leaf)
    return output.logits.detach(), output.cls_scores.detach(), gradient


@pytest.mark.parametrize("dtype", [torch.float32, *LOW], ids=str)
@pytest.mark.parametrize("case", MODELS)
def test_as_near_to_float64(
    make_model: MakeModel, case: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched: list[str] = []
    for module, name in ((norm_module, "norm_launch"), (mlp_module, "hidden_launch")):
        original = getattr(module, name)
        monkeypatch.setattr(
            module, name, lambda *a, original=original, name=name, **k: launched.append(name) or original(*a, **k)
        )
    windows = torch.randn(2, 5, 192, generator=generator(0), dtype=torch.float64)
    cells = torch.tensor([[0, 3, 4, 8, 11], [1, 2, 5, 6, 9]])
    truth = evaluate(make_model(torch.float64, **MODELS[case]), windows, cells)
    model, found = make_model(dtype, **MODELS[case]), {}
    for kernels in ("torch", "triton"):
        monkeypatch.setenv(KERNELS_VARIABLE, kernels)
        assert not launched
        found[kernels] = evaluate(model, windows, cells)
    assert set(launched) == {"norm_launch"} | ({"hidden_launch"} if dtype in LOW else set())
    for exact, plain, ours in zip(truth, found["torch"], found["triton"], strict=True):
        error, allowed = (ours - exact).norm(), (plain - exact).norm()
        assert error <= 1.5 * allowed + 16 * torch.finfo(torch.float32).eps * exact.norm(), (error, allowed)
