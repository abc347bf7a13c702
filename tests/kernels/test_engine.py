"""The engine on kernels against the engine on plain torch: the same images."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from smi_fast.config import InversionConfig
from smi_fast.engine import Inverter
from smi_fast.engine.state import uses_kernels
from smi_fast.images import SparseImages
from smi_fast.kernels.dispatch import KERNELS_VARIABLE
from smi_fast.model.sparse_vit import SparseViT
from smi_fast.priors import L2, Prior, TotalVariation
from tests.kernels.cases import DEVICE

pytestmark = pytest.mark.kernel

THREE_STOPS = {"iterations": 30, "stops": ((6, 0.3), (12, 0.3), (20, 0.3)), "jitter": 0.3, "lr": 0.05}


def invert(
    model: SparseViT, config: InversionConfig, priors: tuple[Prior, ...] | None, kernels: str, patch: pytest.MonkeyPatch
) -> SparseImages:
    patch.setenv(KERNELS_VARIABLE, kernels)
    assert uses_kernels(model) == (kernels == "triton")
    return Inverter(model, config, batch_size=3, impl="eager", priors=priors)([0, 3, 4])


@pytest.mark.parametrize(
    ("options", "priors"),
    [
        ({}, None),
        ({"tv_norm": "image"}, None),
        ({"preset": "reference"}, None),
        ({}, (L2(0.01), TotalVariation(0.01))),  # another term at the pixels, and the columns the other way round
        ({}, (TotalVariation(0.01, "pixel"), TotalVariation(0.01, "image"))),  # two: none is taken into the update
    ],
    ids=["paper", "image norm", "reference", "two priors", "two total variations"],
)
def test_same_keep_sets_and_canvases(
    make_model: Callable[..., SparseViT],
    options: dict[str, Any],
    priors: tuple[Prior, ...] | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = make_model(torch.float32).to(DEVICE)
    config = InversionConfig(**THREE_STOPS, **options)
    ours, plain = (invert(model, config, priors, name, monkeypatch) for name in ("triton", "torch"))
    assert ours.keep.shape == (3, 3)
    assert torch.equal(ours.keep, plain.keep)
    assert torch.equal(ours.predicted, plain.predicted)
    assert ours.failed_at.tolist() == [-1] * 3
    moved = (ours.pixels - plain.pixels).abs().max()
    assert moved < 1e-4, moved  # rounding of 30 steps; 2e-6 was seen
