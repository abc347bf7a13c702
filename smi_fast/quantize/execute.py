"""Real low-bit execution: the linear layers of a `SparseViT` replaced by torchao's, which multiply 8-bit numbers.

    dynamic   int8 x int8; weights have a scale a row, activations a scale a token, worked out at every call
    static    int8 x int8; as above, but activations have one scale a layer, ``max|x| / 127`` of the calibration images
    fp8       float8_e4m3 x float8_e4m3 beside bfloat16, scales as in ``dynamic``; CUDA from capability 8.9 on

All are symmetric. Patch embedding and the linear layers of the blocks are replaced where both of their sides are
multiples of 16, which matrix units ask for; heads, norms, attention and position embeddings stay as they are.
"""

import copy
import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from smi_fast.model.fp8 import why_not_fp8
from smi_fast.model.sparse_vit import SparseViT
from smi_fast.quantize.forward import forward_sites
from smi_fast.storage.environment import versions
from smi_fast.storage.files import METADATA_KEY, load_tensors, write_atomically

MODES = ("dynamic", "static", "fp8")
SIDE = 16
KIND = "smi_fast low-bit model, version 1"
INSTALL = "torchao is not installed or too old: pip install 'torchao>=0.18', or the extra smi-fast[torchao]"
# a parameter that torchao replaced is saved by its parts: name, mark, part
MARK = ":"
Batches = Sequence[tuple[Tensor, Tensor | None]]


class LowBitViT(nn.Module):
    """A model that really computes in 8 bits; build one with `to_low_bit` or `load_low_bit`.

    It is compiled as it stands by ``torch.compile(model, dynamic=False)``.
    """

    def __init__(self, model: SparseViT, mode: str, layers: list[str]) -> None:
        super().__init__()
        self.model, self.mode, self.layers = model, mode, layers

    def forward(self, pixels: Tensor, keep: Tensor | None = None) -> Tensor:
        """``[B, classes]`` float32 logits, as `forward_sites`."""
        return forward_sites(self.model, pixels, keep)


def why_not_real(mode: str, device: torch.device) -> str | None:
    """None where a mode can run on a device, else the reason in words.

    Raises:
        ValueError: ``mode`` is none of `MODES`.
    """
    if mode not in MODES:
        raise ValueError(f"mode={mode!r}: must be one of {', '.join(MODES)}")
    try:
        _torchao()
    except ImportError:
        return INSTALL
    if mode == "fp8":
        reason = why_not_fp8(device)
        return reason and f"{device} has {reason}"
    return None if device.type in ("cpu", "cuda") else f"int8 products are there for cpu and cuda, not for {device}"


def to_low_bit(model: SparseViT, mode: str, batches: Batches = ()) -> LowBitViT:
    """A copy of ``model`` whose linear layers run in 8 bits; the model stays as it is.

    Args:
        model: in float32 or bfloat16; for "fp8" the copy is cast to bfloat16.
        mode: one of `MODES`.
        batches: for "static": pixels ``[b, 3, H, W]`` and keep ``[b, K]`` (or None), as in `Calibration.batches`.

    Raises:
        ValueError: the mode cannot be had on the model's device (the reason is given), a model of another precision,
            no calibration batch for "static", or no layer whose sides fit.
    """
    if reason := why_not_real(mode, model.device):
        raise ValueError(f"mode={mode!r}: {reason}")
    if model.precision not in ("float32", "bfloat16"):
        raise ValueError(f"model is {model.precision}: must be float32 or bfloat16")
    if mode == "static" and not batches:
        raise ValueError("batches is empty: mode='static' takes its scales from at least one calibration batch")
    layers = _layers(model)
    if not layers:
        raise ValueError(f"model={model.info.name!r}: none of its linear layers has sides in multiples of {SIDE}")
    largest = _largest_inputs(model, layers, batches) if mode == "static" else {}
    return _convert(model, mode, layers, {name: value / 127 for name, value in largest.items()})


def save_low_bit(path: str | Path, model: LowBitViT, overwrite: bool = False) -> None:
    """Write the 8-bit weights, scales and all else as one safetensors file, atomically.

    Raises:
        FileExistsError: ``path`` exists and ``overwrite`` is false.
        OSError: the system could not write; ``path`` is as it was.
    """
    write_atomically(path, low_bit_bytes(model), overwrite)


def low_bit_bytes(model: LowBitViT) -> bytes:
    """The file of `save_low_bit`."""
    info = model.model.info
    facts = {"mode": model.mode, "model": {"name": info.name, "sha256": info.sha256}, "versions": versions()}
    return _file(_parts(model.model), facts)


def float32_bytes(model: SparseViT) -> bytes:
    """The same file of the model before, its weights in float32: what sizes are compared with."""
    return _file({name: value.float() for name, value in model.state_dict().items()}, {})


def load_low_bit(path: str | Path, model: SparseViT) -> LowBitViT:
    """Read a file of `save_low_bit`.

    Args:
        path: the file.
        model: as it was before, from `smi_fast.load_model`: it says how the weights are put together, and where they
            go. Every number is taken from the file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is truncated or not ours, made of other weights or of a model in another dtype, or its
            mode cannot be had here.
    """
    tensors, facts = load_tensors(path, KIND, lambda tensors, facts: (tensors, facts))
    if facts["model"]["sha256"] != model.info.sha256:
        raise ValueError(f"path={str(path)!r}: made of {facts['model']['name']} with other weights than model's")
    if reason := why_not_real(facts["mode"], model.device):
        raise ValueError(f"path={str(path)!r}: mode={facts['mode']!r}: {reason}")
    layers = _layers(model)
    ones = dict.fromkeys(layers, torch.ones(1, 1, 1, device=model.device))
    found = _convert(model, facts["mode"], layers, ones if facts["mode"] == "static" else {})
    wanted = _parts(found.model)
    if {name: (t.shape, t.dtype) for name, t in wanted.items()} != {n: (t.shape, t.dtype) for n, t in tensors.items()}:
        raise ValueError(f"path={str(path)!r}: its tensors are not those of {model.info.name} in {model.precision}")
    _fill(found.model, {name: tensor.to(model.device) for name, tensor in tensors.items()})
    return found


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the notes of torchao's import: on enumerations of its own, and on kernels for other devices."""
    loggers = [logging.getLogger(name) for name in ("torch.utils._pytree", "torchao")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _torchao() -> Any:
    """The module, imported where it is needed.

    Raises:
        ImportError: it is missing, or too old to have static int8.
    """
    with _quiet():
        quantization = import_module("torchao.quantization")
    if not hasattr(quantization, "Int8StaticActivationInt8WeightConfig"):
        raise ImportError(INSTALL)
    return import_module("torchao")


def _layers(model: SparseViT) -> list[str]:
    """Names of the linear layers that are replaced."""
    return [
        name
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear)
        and not name.startswith("heads.")
        and layer.in_features % SIDE == layer.out_features % SIDE == 0
    ]


@torch.no_grad()
def _largest_inputs(model: SparseViT, layers: list[str], batches: Batches) -> dict[str, Tensor]:
    """By layer: the largest magnitude of its input, ``[1, 1, 1]``; kept tokens are all that is ever seen.

    Raises:
        ValueError: a layer's input is zero throughout, or not finite.
    """
    least = torch.zeros(1, 1, 1, device=model.device)
    largest = dict.fromkeys(layers, least)

    def note(name: str, given: tuple[Tensor]) -> None:
        largest[name] = torch.maximum(largest[name], given[0].abs().amax().float())

    hooks = [
        model.get_submodule(name).register_forward_pre_hook(lambda _, given, name=name: note(name, given))
        for name in layers
    ]
    try:
        for pixels, keep in batches:
            forward_sites(model, pixels.to(model.device), None if keep is None else keep.to(model.device))
    finally:
        for hook in hooks:
            hook.remove()
    for name, value in largest.items():
        if not 0 < float(value) < float("inf"):
            raise ValueError(f"batches: the largest input of {name} is {float(value)}: must be positive and finite")
    return largest


def _convert(model: SparseViT, mode: str, layers: list[str], scales: dict[str, Tensor]) -> LowBitViT:
    """The copy of a model with its layers replaced; ``scales`` of activations for "static"."""
    _torchao()
    ao = import_module("torchao.quantization")
    ours = copy.deepcopy(model)
    if mode == "fp8":
        ours = ours.with_dtype(torch.bfloat16)
    for name in layers:
        # torchao's recommended settings of inductor are left alone: they would be those of the whole process
        if mode == "static":
            config = ao.Int8StaticActivationInt8WeightConfig(
                scales[name], granularity=[ao.PerTensor(), ao.PerRow()], set_inductor_config=False
            )
        elif mode == "dynamic":
            config = ao.Int8DynamicActivationInt8WeightConfig(set_inductor_config=False)
        else:
            config = ao.Float8DynamicActivationFloat8WeightConfig(granularity=ao.PerRow(), set_inductor_config=False)
        ao.quantize_(ours.get_submodule(name), config, filter_fn=None)
    return LowBitViT(ours, mode, layers).eval()


def _parts(model: SparseViT) -> dict[str, Tensor]:
    """The state of a model in plain tensors: a tensor of torchao's by its parts."""
    found: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        if hasattr(value, "__tensor_flatten__"):
            found |= {f"{name}{MARK}{part}": getattr(value, part) for part in value.__tensor_flatten__()[0]}
        else:
            found[name] = value
    return found


def _fill(model: SparseViT, tensors: dict[str, Tensor]) -> None:
    """Put the tensors of `_parts` into a model of the same layers."""
    for name, value in list(model.named_parameters()):
        if hasattr(value, "__tensor_flatten__"):
            parts, context = value.__tensor_flatten__()
            inner = {part: tensors[f"{name}{MARK}{part}"] for part in parts}
            owner, _, attribute = name.rpartition(".")
            kind: Any = type(value)
            made = kind.__tensor_unflatten__(inner, context, value.shape, value.stride())
            setattr(model.get_submodule(owner), attribute, nn.Parameter(made, requires_grad=False))
        else:
            value.data.copy_(tensors[name])


def _file(tensors: dict[str, Tensor], facts: dict[str, Any]) -> bytes:
    # copies, since safetensors refuses tensors that share memory
    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    return safetensors.torch.save(plain, {METADATA_KEY: json.dumps({"format": KIND, **facts}, sort_keys=True)})
