"""Models to time, with the same random weights in every process, and sets of kept patches."""

import json
from importlib import resources
from typing import Any

import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from benchmarks.harness.engine import paper_stages
from smi_fast.kernels.common.grid import Grid
from smi_fast.model.checkpoint import read_state_dict
from smi_fast.model.from_timm import from_timm
from smi_fast.model.sparse_vit import SparseViT
from smi_fast.model.spec import ModelInfo

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def build_vit(name: str, device: str, image: int | None = None) -> Any:
    """A timm model with the same random weights in every process; ``image``: its side, None for the model's own."""
    torch.manual_seed(0)
    options: dict[str, Any] = {} if image is None else {"img_size": image}
    return timm.create_model(name, **options).eval().to(device)


def sparse(vit: Any, name: str) -> SparseViT:
    """The `SparseViT` of a timm model, in float32."""
    return from_timm(vit, ModelInfo(name, "", MEAN, STD))


def build_model(name: str, device: str, dtype: torch.dtype, image: int | None = None) -> SparseViT:
    """The `SparseViT` of `build_vit`."""
    return sparse(build_vit(name, device, image), name).with_dtype(dtype)


def demo_vit(device: str) -> tuple[VisionTransformer, list[float], list[float]]:
    """The bundled teacher as timm's own model, with the mean and deviation of its colours."""
    with resources.as_file(resources.files("smi_fast.model") / "assets") as assets:
        facts = json.loads((assets / "demo.json").read_text())
        weights = read_state_dict(assets / "demo.safetensors")
    vit = VisionTransformer(**facts["architecture"])
    vit.load_state_dict(weights)
    return vit.eval().to(device), facts["mean"], facts["std"]


def grid_of(name: str) -> Grid:
    """The patch grid of a timm model; its weights are not made."""
    with torch.device("meta"):
        embed: Any = timm.create_model(name).patch_embed
    height, width = embed.img_size
    return Grid(height, width, embed.patch_size[0])


def paper_kept(patches: int) -> list[int]:
    """Kept patches of the paper's stages, all of them first."""
    return [stage.kept for stage in paper_stages(patches)]


def fixed_keep(batch: int, patches: int, kept: int) -> Tensor:
    """``[B, kept]`` ascending ids, the same in every process."""
    generator = torch.Generator().manual_seed(kept)
    rows = [torch.randperm(patches, generator=generator)[:kept].sort().values for _ in range(batch)]
    return torch.stack(rows)


def relative_error(found: Tensor, truth: Tensor) -> float:
    """``||found - truth|| / ||truth||``."""
    return float((found - truth).norm() / truth.norm())
