"""A model whose linear layers run on 8-bit floats, and the devices that can do so."""

import torch
from torch import nn

from smi_fast.model.scaled_linear import ScaledLinear, fits
from smi_fast.model.sparse_vit import SparseViT

CAPABILITY = (8, 9)  # Ada; Hopper is 9.0
LAYERS = ("qkv", "proj", "fc1", "fc2")


def why_not_fp8(device: torch.device) -> str | None:
    """None where ``device`` multiplies 8-bit floats, else what it has instead, in words."""
    if device.type != "cuda":
        return "no fp8 units"
    found = torch.cuda.get_device_capability(device)
    if found >= CAPABILITY:
        return None
    return f"no fp8 units (compute capability {found[0]}.{found[1]}, they came with {CAPABILITY[0]}.{CAPABILITY[1]})"


def to_fp8(model: SparseViT, gradient: torch.dtype = torch.float8_e5m2) -> SparseViT:
    """Let the linear layers of all blocks run on 8-bit floats, in place; the rest stays in bfloat16 and float32.

    Layers whose widths are no multiples of 16 stay as they are. On a CPU the result is the same, but slow.

    Args:
        model: in bfloat16, see `SparseViT.with_dtype`.
        gradient: format of the gradients; ``torch.float8_e4m3fn`` has one bit more, and ``2^15`` times less range.

    Raises:
        ValueError: a model of another dtype, a gradient of another format, or no layer whose widths fit.
    """
    if model.precision != "bfloat16":
        raise ValueError(f"model is {model.precision}: must be bfloat16, see SparseViT.with_dtype")
    for block in model.blocks:
        for name in LAYERS:
            layer = getattr(block, name)
            assert isinstance(layer, nn.Linear)
            if fits(layer):
                setattr(block, name, ScaledLinear(layer, gradient))
    if model.precision != "fp8":
        raise ValueError(f"model={model.info.name!r}: none of its linear layers has widths in multiples of 16")
    return model.eval()
