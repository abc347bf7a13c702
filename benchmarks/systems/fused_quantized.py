"""A quantized model compiled once, and run with one set of weights, scales and zero points after the other.

torch's fake-quantize operations are calls that inductor cannot fuse, and take almost half the time of a forward on a
CPU. Here the same arithmetic is written out, so that it becomes part of the loops around it.
"""

import copy

import torch
from torch import Tensor, nn

from smi_fast.quantize import QuantizedViT
from smi_fast.quantize.forward import forward_sites
from smi_fast.quantize.measure import signal_to_noise

# Fused norms and softmax differ in the last bit, which moves some values by a step: far less than quantization does
LEAST_SQNR = 30.0  # decibels, logits against those of `QuantizedViT`


class FusedViT(nn.Module):
    """What a `QuantizedViT` computes; `load` swaps in another of the same model without a new compilation."""

    def __init__(self, first: QuantizedViT) -> None:
        super().__init__()
        self.model = copy.deepcopy(first.model)
        self.index = {name: i for i, name in enumerate(first.activations)}
        self.register_buffer("numbers", torch.empty(len(self.index), 5, device=self.model.device))
        self.run = torch.compile(self._forward, fullgraph=True, dynamic=False)

    @torch.no_grad()
    def load(self, quantized: QuantizedViT) -> None:
        """Take over its weights and numbers, in place: compiled code goes on to read them from here."""
        self.model.load_state_dict(quantized.model.state_dict())
        rows = [(1 / a.scale, a.scale, a.zero_point, a.qmin, a.qmax) for a in quantized.activations.values()]
        self.numbers.copy_(torch.tensor([[float(value) for value in row] for row in rows]))

    def site(self, name: str, tensor: Tensor) -> Tensor:
        """`Affine.values` of `Affine.codes`."""
        inverse, scale, zero_point, least, most = self.numbers[self.index[name]].unbind()
        codes = ((tensor * inverse).round() + zero_point).clamp(least, most)
        return (codes - zero_point) * scale

    def _forward(self, pixels: Tensor) -> Tensor:
        return forward_sites(self.model, pixels, None, self.site)

    @torch.no_grad()
    def forward(self, pixels: Tensor) -> Tensor:
        """Logits ``[B, classes]`` of ``[B, 3, H, W]``; a new number of images is a new compilation."""
        return self.run(pixels)


@torch.no_grad()
def check(fused: FusedViT, quantized: QuantizedViT, pixels: Tensor) -> float:
    """SQNR of the logits against those of the model that was loaded, in decibels.

    Raises:
        AssertionError: they differ by more than a step here and there.
    """
    found = signal_to_noise(fused(pixels), quantized(pixels))
    assert found > LEAST_SQNR, f"compiled logits have {found:.1f} dB against eager ones, at least {LEAST_SQNR}"
    return found
