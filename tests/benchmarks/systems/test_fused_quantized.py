"""What is compiled for quantized models computes what they do."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from benchmarks.systems.fused_quantized import FusedViT, check
from smi_fast.model.sparse_vit import SparseViT
from smi_fast.quantize import Calibration, QuantConfig, QuantizedViT, quantize


@pytest.fixture
def quantized(model: SparseViT) -> Callable[..., QuantizedViT]:
    def make(seed: int, scheme: str = "psaq", bits: int = 4) -> QuantizedViT:
        noise = Calibration.gaussian(model.grid, 4, seed)
        return quantize(model, noise, QuantConfig(bits, 8, scheme))

    return make


@torch.no_grad()
def test_written_out_fake_quantization_is_that_of_torch(quantized: Callable[..., QuantizedViT], pixels: Tensor) -> None:
    fused = FusedViT(quantized(0))
    fused.run = fused._forward
    for other in (quantized(0), quantized(1, bits=8), quantized(2, "paper")):
        fused.load(other)
        assert torch.equal(fused(pixels), other(pixels)), "eager, the same bits"
        assert check(fused, other, pixels) == float("inf")
    with pytest.raises(AssertionError, match="compiled logits have"):
        check(fused, quantized(0), pixels)
