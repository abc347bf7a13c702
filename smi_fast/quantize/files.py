"""A quantized model on disk: integer codes, scales and zero points, and what stays in float32.

The tensors of the safetensors file, by name:

    codes/<layer>             uint8, code - qmin of a weight: [rows, columns], or two to a byte, low half first, for 4
                              bits and fewer: [ceil(rows * columns / 2)]
    scale/<layer>             float32 [] or [rows]; zero_point/<layer> int32 likewise
    activations/scale         float32 [sites], activations/zero_point int32 [sites], in the order of the metadata
    float/<name>              float32, whatever else the state dict of the model has

A weight is ``(code - zero_point) * scale``, exactly what the simulation computes with. The model is built from the
file alone.
"""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from smi_fast.quantize.quantized import QuantizedViT, linears
from smi_fast.quantize.scheme import Affine, QuantConfig, code_range
from smi_fast.quantize.structure import build, describe
from smi_fast.storage.environment import versions
from smi_fast.storage.files import check_tensor, load_tensors, save_tensors

FORMAT = "smi_fast.quantized/1"
PACKED_BITS = 4  # and fewer: two codes to a byte


def pack(codes: Tensor) -> Tensor:
    """Codes 0..15, uint8 of any shape, to ``[ceil(n / 2)]`` uint8; the first is the low half of its byte."""
    flat = torch.nn.functional.pad(codes.flatten(), (0, codes.numel() % 2))
    return flat[::2] | (flat[1::2] << 4)


def unpack(packed: Tensor, shape: tuple[int, int]) -> Tensor:
    """The inverse of `pack`.

    Raises:
        ValueError: another number of bytes than ``shape`` asks for.
    """
    count = shape[0] * shape[1]
    check_tensor("packed codes", packed, ((count + 1) // 2,), torch.uint8)
    return torch.stack([packed & 15, packed >> 4], 1).flatten()[:count].reshape(shape)


def save_quantized(quantized: QuantizedViT, path: str | Path, overwrite: bool = False) -> None:
    """Write a quantized model, whole or not at all.

    Raises:
        FileExistsError: the file exists and ``overwrite`` is false.
        OSError: the system could not write; the file is as it was.
    """
    model, config = quantized.model, quantized.config
    layers = linears(model)
    tensors = {}
    for name, layer in layers.items():
        affine = quantized.weights[name].to(torch.device("cpu"))
        codes = (affine.codes(layer.weight.cpu()) - affine.qmin).to(torch.uint8)
        tensors[f"codes/{name}"] = pack(codes) if config.weight_bits <= PACKED_BITS else codes
        tensors[f"scale/{name}"], tensors[f"zero_point/{name}"] = affine.scale, affine.zero_point
    for name in ("scale", "zero_point"):
        parts = [getattr(affine, name) for affine in quantized.activations.values()]
        tensors[f"activations/{name}"] = torch.stack(parts)
    weights = {f"{name}.weight" for name in layers}
    tensors |= {f"float/{name}": x for name, x in model.state_dict().items() if name not in weights}
    metadata = {
        "config": asdict(config),
        "calibration": quantized.calibration,
        "sites": list(quantized.activations),
        "layers": {name: list(layer.weight.shape) for name, layer in layers.items()},
        "structure": describe(model),
        "versions": versions(),
    }
    save_tensors(path, FORMAT, tensors, metadata, overwrite)


def load_quantized(path: str | Path) -> QuantizedViT:
    """Read a file of `save_quantized`, to the CPU; its logits are those of the model that was saved, bit for bit.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is truncated, not ours, of another version, or contradicts itself.
    """
    return load_tensors(path, FORMAT, _build)


@torch.no_grad()
def _build(tensors: dict[str, Tensor], metadata: dict[str, Any]) -> QuantizedViT:
    config = QuantConfig(**metadata["config"])
    codes, weights = {}, {}
    for name, shape in metadata["layers"].items():
        codes[name], weights[name] = _weight(tensors, name, (shape[0], shape[1]), config)
    start = "float/"
    floats = {name.removeprefix(start): tensor for name, tensor in tensors.items() if name.startswith(start)}
    model = build(metadata["structure"], floats, codes)
    layers = linears(model)
    if set(layers) != set(codes):
        raise ValueError(f"weights of {sorted(codes)}: must be of {sorted(layers)}")
    for name, layer in layers.items():
        layer.weight.copy_(weights[name].values(codes[name]))
    activations = _activations(tensors, metadata["sites"], config)
    return QuantizedViT(model, weights, activations, config, metadata["calibration"])


def _weight(
    tensors: dict[str, Tensor], name: str, shape: tuple[int, int], config: QuantConfig
) -> tuple[Tensor, Affine]:
    """Codes ``[rows, columns]`` int32 of a layer, and their scale."""
    by_row = config.scheme == "psaq"
    qmin, qmax = code_range(config.weight_bits, symmetric=by_row)
    stored = tensors[f"codes/{name}"]
    codes = unpack(stored, shape) if config.weight_bits <= PACKED_BITS else stored
    check_tensor(f"codes/{name}", codes, shape, torch.uint8)
    if int(codes.max()) > qmax - qmin:
        raise ValueError(f"codes/{name} has the code {int(codes.max())}: must be at most {qmax - qmin}")
    size = shape[:1] if by_row else ()
    for kind, dtype in (("scale", torch.float32), ("zero_point", torch.int32)):
        check_tensor(f"{kind}/{name}", tensors[f"{kind}/{name}"], size, dtype)
    return codes.int() + qmin, Affine(tensors[f"scale/{name}"], tensors[f"zero_point/{name}"], qmin, qmax)


def _activations(tensors: dict[str, Tensor], sites: list[str], config: QuantConfig) -> dict[str, Affine]:
    scale, zero_point = tensors["activations/scale"], tensors["activations/zero_point"]
    check_tensor("activations/scale", scale, (len(sites),), torch.float32)
    check_tensor("activations/zero_point", zero_point, (len(sites),), torch.int32)
    qmin, qmax = code_range(config.act_bits, symmetric=False)
    return {name: Affine(scale[i].clone(), zero_point[i].clone(), qmin, qmax) for i, name in enumerate(sites)}
