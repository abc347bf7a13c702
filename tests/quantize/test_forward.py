"""`forward_sites` against `SparseViT.forward`, in float64, and what its sites see."""

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from torch import Tensor

from smi_fast.model import ModelInfo, SparseViT
from smi_fast.model.fold import fold
from smi_fast.model.from_timm import from_timm
from smi_fast.quantize.forward import forward_sites, site_names

TOLERANCE = 1e-9  # share of the largest logit, float64
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "qk_norm": {"qk_norm": True},
    "norm_pre": {"pre_norm": True},
    "registers": {"reg_tokens": 2, "no_embed_class": True},
    "average": {"global_pool": "avg", "fc_norm": False},
    "average_fc_norm": {"global_pool": "avg", "reg_tokens": 3, "init_values": 0.1},
    "token_fc_norm": {"fc_norm": True},
    "no_bias": {"qkv_bias": False, "proj_bias": False, "final_norm": False},
}
BLOCK = ["norm1", "qkv", "logits", "attended", "proj", "sum1", "norm2", "gelu", "fc2", "sum2"]


def distilled() -> SparseViT:
    with torch.random.fork_rng():
        torch.manual_seed(2)
        vit = timm.create_model(
            "deit_tiny_distilled_patch16_224", img_size=48, embed_dim=48, num_heads=3, depth=2, num_classes=7
        )
        for parameter in vit.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
    zeros, ones = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    return from_timm(vit.double().eval(), ModelInfo("distilled", "0" * 64, zeros, ones))


def some(model: SparseViT, kept: int | None) -> tuple[Tensor, Tensor | None]:
    """Three images, and what is kept of them."""
    generator = torch.Generator().manual_seed(3)
    size = (3, 3, model.grid.height, model.grid.width)
    pixels = torch.randn(size, generator=generator, dtype=torch.float64).to(model.dtype)
    if kept is None:
        return pixels, None
    return pixels, torch.rand(3, model.grid.patches, generator=generator).argsort(1)[:, :kept].sort(1).values


@pytest.mark.parametrize("kept", [None, 5, 1])
@pytest.mark.parametrize("case", [*OPTIONS, "distilled", "folded"])
def test_equals_the_model(make_model: Callable[..., SparseViT], case: str, kept: int | None) -> None:
    model = distilled() if case == "distilled" else make_model(**OPTIONS.get(case, {}))
    if case == "folded":
        fold(model)
    pixels, keep = some(model, kept)
    truth, _ = model(pixels, keep)
    ours = forward_sites(model, pixels, keep)
    assert ours.dtype == truth.dtype
    assert float((ours - truth).abs().max() / truth.abs().max()) < TOLERANCE


def test_names(make_model: Callable[..., SparseViT]) -> None:
    blocks = [f"blocks.{index}.{name}" for index in range(2) for name in BLOCK]
    embedding = ["input", "patch_embed", "tokens", "pos_embed", "embedded"]
    assert site_names(make_model()) == [*embedding, *blocks, "norm", "logits"]
    more = site_names(make_model(qk_norm=True, pre_norm=True, fc_norm=True))
    blocks = [f"blocks.{i}.{name}" for i in range(2) for name in ["norm1", "qkv", "q", "k", *BLOCK[2:]]]
    assert more == [*embedding, "norm_pre", *blocks, "norm", "fc_norm", "logits"]


def test_every_site_is_in_the_way(make_model: Callable[..., SparseViT]) -> None:
    model = make_model(qk_norm=True, pre_norm=True, fc_norm=True)
    pixels, keep = some(model, 5)
    truth = forward_sites(model, pixels, keep)
    for name in site_names(model):

        def site(own: str, tensor: Tensor, name: str = name) -> Tensor:
            weights = torch.linspace(0.5, 1.5, tensor.shape[-1], dtype=tensor.dtype)
            return tensor * weights if own == name else tensor

        assert not torch.allclose(forward_sites(model, pixels, keep, site), truth), name


def test_sites_see_kept_tokens_alone(make_model: Callable[..., SparseViT]) -> None:
    model = make_model()
    pixels, keep = some(model, 4)
    seen: dict[str, Tensor] = {}

    def note(name: str, tensor: Tensor) -> Tensor:
        seen[name] = tensor
        return tensor

    forward_sites(model, pixels, keep, note)
    assert seen["input"].shape == (3, 4, 192)
    assert seen["embedded"].shape == seen["blocks.1.sum2"].shape == seen["norm"].shape == (3, 5, 32)
    assert seen["blocks.1.logits"].shape == (3, 2, 5, 5)
    assert seen["pos_embed"].shape == (12, 32)


@pytest.mark.parametrize("keep", [torch.tensor([[1, 0]]), torch.tensor([[0, 12]]), torch.tensor([[0]]).int()])
def test_bad_keep(make_model: Callable[..., SparseViT], keep: Tensor) -> None:
    model = make_model()
    pixels, _ = some(model, None)
    with pytest.raises(ValueError, match="keep"):
        forward_sites(model, pixels[:1], keep)
