"""What a `SparseViT` is made of besides its weights, as JSON, and an empty model made of that again."""

from dataclasses import asdict
from typing import Any

import torch
from timm.layers import QuickGELU
from torch import Tensor, nn

from smi_fast.kernels.common.grid import Grid
from smi_fast.model import ModelInfo, SparseViT, ViTShape
from smi_fast.model.block import FrozenBlock, Norm
from smi_fast.model.sparse_vit import ViTParts

BLOCK_NORMS = ("norm1", "norm2", "q_norm", "k_norm")


def describe(model: SparseViT) -> dict[str, Any]:
    """Shape, origin, norms, activations and scales of a model, as JSON has them."""
    return {
        "shape": asdict(model.shape),
        "info": asdict(model.info),
        "norms": {name: _describe_norm(getattr(model, name)) for name in ("norm_pre", "norm", "fc_norm")},
        "blocks": [
            {
                "norms": {name: _describe_norm(getattr(block, name)) for name in BLOCK_NORMS},
                "act": _describe_act(block.act),
                "scale": block.scale,
            }
            for block in model.blocks
        ],
    }


def build(structure: dict[str, Any], floats: dict[str, Tensor], codes: dict[str, Tensor]) -> SparseViT:
    """A model of that structure, its linear layers still without their weights.

    Args:
        structure: of `describe`.
        floats: tensors of the state dict except the weights of linear layers.
        codes: ``[rows, columns]`` by name of the linear layer, for the sizes.

    Raises:
        ValueError: tensors that are missing, too many or of another shape.
        KeyError, TypeError: something else in ``structure``.
    """
    shape, info = structure["shape"], structure["info"]
    count = sum(name.startswith("heads.") for name in codes)

    def linear(name: str) -> nn.Linear:
        rows, columns = codes[name].shape
        return nn.Linear(columns, rows, bias=f"{name}.bias" in floats)

    parts = ViTParts(
        patch_embed=linear("patch_embed"),
        prefix_tokens=torch.zeros_like(floats["prefix_tokens"]),
        pos_embed=torch.zeros_like(floats["pos_embed"]),
        blocks=[
            _block(block, shape["heads"], [linear(f"blocks.{i}.{name}") for name in ("qkv", "proj", "fc1", "fc2")])
            for i, block in enumerate(structure["blocks"])
        ],
        heads=[linear(f"heads.{index}") for index in range(count)],
        **{name: _norm(norm) for name, norm in structure["norms"].items()},
    )
    names = info["class_names"]
    known = {"mean": tuple(info["mean"]), "std": tuple(info["std"]), "class_names": names and tuple(names)}
    model = SparseViT(ViTShape(**shape | {"grid": Grid(**shape["grid"])}), ModelInfo(**info | known), parts)
    _fill(model, floats)
    return model


def _fill(model: SparseViT, floats: dict[str, Tensor]) -> None:
    weights = {f"{name}.weight" for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    try:
        missing, extra = model.load_state_dict(floats, strict=False)
    except RuntimeError as error:  # a tensor of another shape
        raise ValueError(str(error).splitlines()[-1].strip()) from error
    if extra or set(missing) != weights:
        raise ValueError(f"tensors missing: {sorted(set(missing) - weights)}, or not of the model: {sorted(extra)}")


def _describe_norm(norm: Norm) -> dict[str, Any] | None:
    if isinstance(norm, nn.Identity):
        return None
    width, affine = norm.normalized_shape[0], norm.elementwise_affine
    return {"width": width, "eps": norm.eps, "affine": affine, "bias": norm.bias is not None}


def _norm(norm: dict[str, Any] | None) -> Norm:
    if norm is None:
        return nn.Identity()
    return nn.LayerNorm(norm["width"], norm["eps"], norm["affine"], norm["bias"])


def _describe_act(act: Any) -> str:
    """One of the activations that `from_timm` takes; timm's own GELU computes what torch's does."""
    if isinstance(act, nn.GELU):
        return f"gelu_{act.approximate}"
    return {"GELU": "gelu_none", "GELUTanh": "gelu_tanh", "QuickGELU": "quick_gelu"}[type(act).__name__]


def _act(name: str) -> nn.Module:
    known = {"gelu_none": nn.GELU(), "gelu_tanh": nn.GELU("tanh"), "quick_gelu": QuickGELU()}
    return known[name]


def _block(block: dict[str, Any], heads: int, linears: list[nn.Linear]) -> FrozenBlock:
    norms = {name: _norm(norm) for name, norm in block["norms"].items()}
    qkv, proj, fc1, fc2 = linears
    made = FrozenBlock(
        heads,
        (norms["norm1"], norms["norm2"]),
        (qkv, norms["q_norm"], norms["k_norm"], proj),
        (fc1, _act(block["act"]), fc2),
    )
    made.scale = block["scale"]
    return made
