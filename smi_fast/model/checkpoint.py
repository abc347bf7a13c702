"""Weights from a file: read as plain tensors and nothing else, and fitted into a timm ViT by name and shape."""

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor

TORCH_SUFFIXES = (".pth", ".pt", ".bin", ".tar")
PATCH_WEIGHT = "patch_embed.proj.weight"
NAMED_DIFFERENCES = 4  # how many tensors an error message names


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Read named weights from a file.

    Args:
        path: ``.safetensors``, or what ``torch.save`` wrote (``.pth``, ``.pt``, ``.bin``, ``.tar``). A state dict may
            sit under "model" or "state_dict".

    Returns:
        The tensors on the CPU, floating ones as float32.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: another suffix, a damaged file, a pickle that holds more than weights, or NaN or infinite weights.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint={str(path)!r}: no such file")
    if path.suffix not in (".safetensors", *TORCH_SUFFIXES):
        raise ValueError(
            f"checkpoint={str(path)!r}: unknown suffix {path.suffix!r}, must be .safetensors or one of {TORCH_SUFFIXES}"
        )
    state = _unwrap(_read(path), path)
    return {name: _exact(tensor, name, path) for name, tensor in state.items()}


def _read(path: Path) -> Any:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, weights_only=True, map_location="cpu")
    except PermissionError:
        raise
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"checkpoint={str(path)!r}: refused, because only plain weights are loaded and it holds something else, "
            f"or is damaged ({_reason(error)}); save the state dict alone, best as .safetensors"
        ) from error
    except Exception as error:  # damage shows as EOFError, OSError, KeyError, RuntimeError, SafetensorError and others
        raise ValueError(f"checkpoint={str(path)!r}: truncated or corrupt ({type(error).__name__}: {error})") from error


def _reason(error: pickle.UnpicklingError) -> str:
    """The sentence that says what is wrong; the rest of torch's message is advice to load the file unsafely."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if "GLOBAL" in line or "Unsupported" in line]
    return (telling or lines)[0].partition(". ")[0]


def _unwrap(content: Any, path: Path) -> dict[str, Tensor]:
    for key in ("model", "state_dict"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping):
        raise ValueError(f"checkpoint={str(path)!r}: holds a {type(content).__name__}, not a state dict")
    for name, value in content.items():
        if not isinstance(value, Tensor):
            raise ValueError(f"checkpoint={str(path)!r}: {name!r} is a {type(value).__name__}, not a tensor")
    return dict(content)


def _exact(tensor: Tensor, name: str, path: Path) -> Tensor:
    if not tensor.is_floating_point():
        return tensor
    tensor = tensor.float()
    if not tensor.isfinite().all():
        raise ValueError(f"checkpoint={str(path)!r}: {name!r} holds NaN or infinite values")
    return tensor


def load_weights(vit: VisionTransformer, state: Mapping[str, Tensor], checkpoint: str | Path, name: str) -> None:
    """Load a state dict into a timm ViT, in place.

    Other layouts that timm knows are converted, and position embeddings of another image size are resampled, both
    by timm's own code.

    Args:
        vit: a timm ``VisionTransformer``.
        state: named weights, as `read_state_dict` gives them.
        checkpoint, name: of the file and the model, for the error message.

    Raises:
        ValueError: tensors are missing, left over, or of another shape.
    """
    where = f"checkpoint={str(checkpoint)!r} does not fit model={name!r}"
    try:
        adapted = checkpoint_filter_fn(dict(state), vit, adapt_layer_scale=True)
    except Exception as error:  # timm's converters fail in many ways on tensors that they do not expect
        raise ValueError(f"{where}: timm cannot convert it ({type(error).__name__}: {error})") from error
    raw = state.get(PATCH_WEIGHT)
    if raw is not None and raw.ndim == 4:
        # timm resamples the filters to another patch size: that is another model, so it counts as a difference
        adapted[PATCH_WEIGHT] = raw
    differences = _differences(vit.state_dict(), adapted)
    if differences:
        rest = len(differences) - NAMED_DIFFERENCES
        more = f"; and {rest} more" if rest > 0 else ""
        raise ValueError(f"{where}: {'; '.join(differences[:NAMED_DIFFERENCES])}{more}")
    vit.load_state_dict(adapted)


def _differences(expected: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> list[str]:
    shapes = [
        f"{name} is {tuple(given[name].shape)}, the model's is {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in given and given[name].shape != tensor.shape
    ]
    missing = [f"{name} {tuple(tensor.shape)} is missing" for name, tensor in expected.items() if name not in given]
    unknown = [f"{name} {tuple(t.shape)} is not in the model" for name, t in given.items() if name not in expected]
    return shapes + missing + unknown
