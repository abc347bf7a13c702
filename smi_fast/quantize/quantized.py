"""`QuantizedViT`: a model whose weights and activations are quantized in simulation, and `quantize`, which makes one.

The simulation computes in float32 on values that were rounded to their grid. It says how accurate a quantized model
is, and is no faster than the model it comes from.
"""

import copy

import torch
from torch import Tensor, nn

from smi_fast.model import SparseViT
from smi_fast.quantize.calibration import Calibration
from smi_fast.quantize.forward import forward_sites
from smi_fast.quantize.observers import Progress, observe, silent
from smi_fast.quantize.scheme import Affine, QuantConfig, weight_affine


class QuantizedViT(nn.Module):
    """A `SparseViT` with quantized weights, whose activations are fake-quantized on their way.

    Quantized are the weights of all linear layers (patch embedding, blocks, heads) and the tensors that
    `forward_sites` lists. In full precision stay biases, norms and prefix tokens.

    Args:
        model: with quantized weights; it is taken over.
        weights: how each weight was quantized, by the name of its layer in ``model``.
        activations: likewise by the name of the site.
        config: that both were made by.
        calibration: name of the calibration set.
    """

    def __init__(
        self,
        model: SparseViT,
        weights: dict[str, Affine],
        activations: dict[str, Affine],
        config: QuantConfig,
        calibration: str,
    ) -> None:
        super().__init__()
        self.model, self.weights, self.activations = model, weights, activations
        self.config, self.calibration = config, calibration
        # as numbers: nothing is read off a device in a forward, and none of it moves with the model
        self._numbers = {name: (float(a.scale), int(a.zero_point), a.qmin, a.qmax) for name, a in activations.items()}

    def site(self, name: str, tensor: Tensor) -> Tensor:
        """The quantized values of an activation."""
        return torch.fake_quantize_per_tensor_affine(tensor, *self._numbers[name])

    def forward(self, pixels: Tensor, keep: Tensor | None = None) -> Tensor:
        """Logits ``[B, classes]`` float32 of ``[B, 3, H, W]`` float32 normalised colours; ``keep`` as `SparseViT`.

        Raises:
            ValueError: as `SparseViT.forward`.
        """
        return forward_sites(self.model, pixels, keep, self.site)


@torch.no_grad()
def quantize(
    model: SparseViT, calibration: Calibration, config: QuantConfig | None = None, progress: Progress = silent
) -> QuantizedViT:
    """Quantize a model after its training; ranges are observed in full precision, as published.

    Args:
        model: in float32, and left as it is.
        calibration: images of its size; only their kept patches are looked at.
        config: bits, scheme and observer; None for ``QuantConfig()``.
        progress: is told what is done.

    Returns:
        A model on the same device.

    Raises:
        ValueError: a model in another dtype, images of another size, or values that are not finite.
    """
    if model.precision != "float32":
        raise ValueError(f"model is {model.precision}: must be float32, in which quantization is simulated")
    config = config or QuantConfig()
    activations = observe(model, calibration, config, progress)
    rounded = copy.deepcopy(model)
    weights = {}
    for name, layer in linears(rounded).items():
        weights[name] = weight_affine(layer.weight, config)
        layer.weight.copy_(weights[name].fake(layer.weight))
    return QuantizedViT(rounded, weights, activations, config, calibration.name)


def linears(model: SparseViT) -> dict[str, nn.Linear]:
    """The layers whose weights are quantized, by name: all linear ones."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
