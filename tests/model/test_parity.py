"""`SparseViT` against timm's own forward, in float64 and with weights at which every option shows."""

from functools import partial
from typing import Any

import pytest
import timm
import torch
from timm.layers import RmsNorm
from timm.layers.attention import Attention
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from smi_fast.model import ModelInfo, SparseViT
from smi_fast.model import from_timm as adapter
from smi_fast.model.from_timm import from_timm, weights_sha256

CLASSES = 11
BATCH = 3
TOLERANCE = 1e-9  # share of the largest value, float64
SMALL = {"embed_dim": 48, "num_heads": 3, "depth": 2}

# timm's factories, made narrow and shallow; the image sizes are not the models' own
FACTORIES: dict[str, dict[str, Any]] = {
    "deit_tiny_patch16_224": {"img_size": 64},
    "deit_tiny_distilled_patch16_224": {"img_size": 48},
    "deit3_small_patch16_224": {"img_size": 64},  # LayerScale, no_embed_class
    "vit_base_patch16_224": {"img_size": (32, 80)},
    "vit_base_patch16_224_miil": {"img_size": 48},  # no bias in qkv
    "vit_small_patch8_224": {"img_size": (40, 24)},
    "vit_small_patch32_224": {"img_size": 96},
    "vit_large_patch14_224": {"img_size": 70},
    "vit_base_patch32_clip_224": {"img_size": 96},  # norm_pre
    "vit_base_patch32_clip_quickgelu_224": {"img_size": (96, 64)},
    "vit_base_patch16_plus_clip_240": {"img_size": 48, "num_heads": 4},
    "vit_small_patch14_dinov2": {"img_size": 56},  # LayerScale
    "vit_small_patch14_reg4_dinov2": {"img_size": (42, 56)},  # registers, no_embed_class
    "eva_large_patch14_196": {"img_size": 42},  # averages the patches, fc_norm
    "flexivit_small": {"img_size": 48, "depth": 1},  # no_embed_class, one block alone
    "vit_small_patch16_36x1_224": {"img_size": 48, "depth": 3},
}
# options that no factory switches on together with a CLS token and a head
DIRECT: dict[str, dict[str, Any]] = {
    "qk_norm": {"qk_norm": True},
    "tanh_gelu": {"act_layer": "gelu_tanh"},
    "token_with_fc_norm": {"fc_norm": True},
    "avg_with_norm": {"global_pool": "avg", "fc_norm": False},
    "avg_with_registers": {"global_pool": "avg", "reg_tokens": 3, "init_values": 0.1, "qk_norm": True},
    "no_final_norm": {"final_norm": False},
    "registers_with_positions": {"reg_tokens": 2, "pre_norm": True},
    "no_proj_bias": {"proj_bias": False, "mlp_ratio": 2.5},
}
CASES = [*FACTORIES, *DIRECT]
BF16_CASES = ["deit_tiny_patch16_224", "vit_base_patch32_clip_quickgelu_224", "deit3_small_patch16_224", "qk_norm"]


def randomise(vit: Any, seed: int) -> Any:
    """Every parameter with an effect of O(1): tiny default tokens, gammas and biases would hide an error."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in vit.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        if parameter.ndim in (2, 4):  # matrices and patch filters
            noise = noise * 1.5 / parameter[0].numel() ** 0.5
        elif name.endswith(("weight", "gamma")):  # of norms and LayerScale
            noise = 1 + 0.5 * noise
        parameter.data = noise.to(parameter.dtype)
    return vit


def build(case: str) -> Any:
    if case in FACTORIES:
        vit = timm.create_model(case, num_classes=CLASSES, **(SMALL | FACTORIES[case]))
    else:
        vit = VisionTransformer(img_size=(32, 24), patch_size=8, num_classes=CLASSES, **(SMALL | DIRECT[case]))
    return randomise(vit, CASES.index(case)).double().eval()


def adapt(vit: nn.Module, name: str = "case") -> SparseViT:
    zeros, ones = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    return from_timm(vit, ModelInfo(name, weights_sha256(vit), zeros, ones))


@pytest.fixture(scope="module", params=CASES)
def pair(request: pytest.FixtureRequest) -> tuple[Any, SparseViT]:
    vit = build(request.param)
    return vit, adapt(vit, request.param)


def images(model: SparseViT, batch: int = BATCH) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    shape = (batch, 3, model.grid.height, model.grid.width)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def random_keep(batch: int, patches: int, kept: int) -> Tensor:
    generator = torch.Generator().manual_seed(kept)
    order = torch.rand(batch, patches, generator=generator).argsort(1)
    return order[:, :kept].sort(1).values


def timm_tokens(vit: Any, pixels: Tensor, keep: Tensor) -> Tensor:
    """Timm's input to the blocks, with the patches that are not kept taken out after position embedding."""
    x = vit._pos_embed(vit.patch_embed(pixels))
    prefix, patches = x[:, : vit.num_prefix_tokens], x[:, vit.num_prefix_tokens :]
    kept = patches.gather(1, keep[:, :, None].expand(-1, -1, patches.shape[2]))
    return vit.norm_pre(torch.cat([prefix, kept], dim=1))


def timm_logits(vit: Any, pixels: Tensor, keep: Tensor) -> Tensor:
    return vit.forward_head(vit.norm(vit.blocks(timm_tokens(vit, pixels, keep))))


def timm_cls_scores(vit: Any, pixels: Tensor, keep: Tensor) -> Tensor:
    """Mean over heads of the last block's softmax row of CLS, on the kept patches."""
    x = vit.blocks[:-1](timm_tokens(vit, pixels, keep))
    block = vit.blocks[-1]
    attn = block.attn
    batch, tokens, _ = x.shape
    qkv = attn.qkv(block.norm1(x)).reshape(batch, tokens, 3, attn.num_heads, attn.head_dim).permute(2, 0, 3, 1, 4)
    query, key = attn.q_norm(qkv[0]), attn.k_norm(qkv[1])
    rows = (query @ key.mT * attn.scale).softmax(-1)  # [B, H, N, N]
    return rows[:, :, 0, vit.num_prefix_tokens :].mean(1)


def assert_close(ours: Tensor, truth: Tensor) -> None:
    assert ours.shape == truth.shape
    assert ((ours - truth).abs().max() / truth.abs().max()).item() < TOLERANCE


def test_dense_logits(pair: tuple[Any, SparseViT]) -> None:
    vit, model = pair
    pixels = images(model)
    truth = vit(pixels)
    assert truth.shape == (BATCH, CLASSES)
    assert truth.std(0).min() > 1e-2, "the logits must depend on the image, or this test sees nothing"
    logits, scores = model(pixels)
    assert_close(logits, truth)
    assert scores.shape == (BATCH, model.grid.patches)


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_kept_patches(pair: tuple[Any, SparseViT], share: float) -> None:
    vit, model = pair
    pixels = images(model)
    kept = max(1, int(model.grid.patches * share))
    keep = random_keep(BATCH, model.grid.patches, kept)
    logits, scores = model(pixels, keep)
    assert_close(logits, timm_logits(vit, pixels, keep))
    assert_close(scores, timm_cls_scores(vit, pixels, keep))


def test_pixel_gradient(pair: tuple[Any, SparseViT]) -> None:
    vit, model = pair
    weights = torch.randn(BATCH, CLASSES, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    pixels = images(model).requires_grad_()
    (truth,) = torch.autograd.grad((vit(pixels) * weights).sum(), pixels)
    (ours,) = torch.autograd.grad((model(pixels)[0] * weights).sum(), pixels)
    assert_close(ours, truth)


def test_pixel_gradient_of_kept_patches(pair: tuple[Any, SparseViT]) -> None:
    vit, model = pair
    keep = random_keep(BATCH, model.grid.patches, model.grid.patches // 2)
    pixels = images(model).requires_grad_()
    (truth,) = torch.autograd.grad(timm_logits(vit, pixels, keep)[:, 0].sum(), pixels)
    (ours,) = torch.autograd.grad(model(pixels, keep)[0][:, 0].sum(), pixels)
    assert_close(ours, truth)
    patch = model.grid.patch
    touched = ours.abs().amax(1).unfold(1, patch, patch).unfold(2, patch, patch).amax((-1, -2)).flatten(1) > 0
    wanted = torch.zeros_like(touched).scatter(1, keep, True)
    assert torch.equal(touched, wanted), "a stopped patch got a gradient, or a kept one got none"


@pytest.mark.parametrize("case", BF16_CASES)
def test_bfloat16_is_as_good_as_timm(case: str) -> None:
    vit = build(case)
    pixels = images(adapt(vit), batch=8)
    truth = vit(pixels)
    ours = adapt(vit.float()).with_dtype(torch.bfloat16)(pixels.float())[0]
    theirs = vit.to(torch.bfloat16)(pixels.to(torch.bfloat16))
    assert ours.dtype == torch.float32
    error, allowed = (ours - truth).norm(), 2 * (theirs - truth).norm() + torch.finfo(torch.bfloat16).eps
    assert 0 < error <= allowed, f"{case}: {float(error)} against {float(allowed)}"


def test_weights_are_frozen_and_evaluating(pair: tuple[Any, SparseViT]) -> None:
    vit, model = pair
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not any(module.training for module in model.modules())
    assert all(parameter.requires_grad for parameter in vit.parameters()), "the timm model must stay as it was"
    owned = {parameter.data_ptr() for parameter in vit.parameters()}
    assert not any(parameter.data_ptr() in owned for parameter in model.parameters())


def small(**options: Any) -> Any:
    """A randomised ViT with one option set."""
    kinds = {"img_size": 32, "patch_size": 8, "num_classes": CLASSES}
    return randomise(VisionTransformer(**(kinds | SMALL | options)), 0)


def named(name: str, **options: Any) -> Any:
    return timm.create_model(name, num_classes=CLASSES, **options)


REFUSED: dict[str, tuple[Any, str]] = {
    "swin": (partial(named, "swin_tiny_patch4_window7_224", embed_dim=24), "SwinTransformer"),
    "convnext": (partial(named, "convnext_atto", dims=(8, 8, 8, 8), depths=(1, 1, 1, 1)), "ConvNeXt"),
    "siglip": (partial(named, "vit_base_patch16_siglip_224", **SMALL), "no CLS token"),
    "gap": (partial(named, "vit_medium_patch16_gap_240", **SMALL), "no CLS token"),
    "swiglu": (partial(named, "vit_giant_patch14_dinov2", img_size=28, **SMALL), r"blocks\[0\].mlp is \w*Glu\w*"),
    "parallel": (partial(named, "vit_small_patch16_18x2_224", **SMALL), r"blocks\[0\] is ParallelThingsBlock"),
    "rms_norm": (partial(small, norm_layer=RmsNorm), "norm is RmsNorm"),
    "hybrid": (partial(named, "vit_tiny_r_s16_p8_224", **SMALL), "patch_embed is HybridEmbed"),
    "attn_pool": (partial(small, global_pool="map"), "global_pool='map'"),
    "max_pool": (partial(small, global_pool="avgmax"), "global_pool='avgmax'"),
    "prefix_in_average": (partial(small, global_pool="avg", pool_include_prefix=True), "pool_include_prefix=True"),
    "attn_norm": (partial(small, scale_attn_norm=True), r"blocks\[0\].attn.norm is LayerNorm"),
    "mlp_norm": (partial(small, scale_mlp_norm=True), r"blocks\[0\].mlp.norm is LayerNorm"),
    "activation": (partial(small, act_layer="silu"), r"blocks\[0\].mlp.act is SiLU"),
    "embed_norm": (partial(small, embed_norm_layer="layernorm"), r"patch_embed.norm is LayerNorm"),
    "no_positions": (partial(small, pos_embed="none"), "pos_embed='none'"),
    "no_head": (partial(small, num_classes=0), "num_classes=0"),
    "channels": (partial(small, in_chans=1), "in_chans=1"),
    "oblong_patch": (partial(small, patch_size=(8, 4)), r"patch_size=\(8, 4\) is not square"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_name(case: str) -> None:
    make, option = REFUSED[case]
    with pytest.raises(ValueError, match=rf"model='{case}': .*{option}.*"):
        adapt(make(), case)


@pytest.mark.skipif("gated" not in Attention.__init__.__annotations__, reason="this timm has no gated attention")
def test_gated_attention_is_refused() -> None:
    vit = small()
    vit.blocks[1].attn = Attention(SMALL["embed_dim"], SMALL["num_heads"], gated=True)
    with pytest.raises(ValueError, match=r"model='gated': blocks\[1\].attn is gated"):
        adapt(vit, "gated")


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


def test_an_option_that_slips_through_is_caught() -> None:
    vit = small()
    vit.blocks[0].drop_path1 = Doubled()  # nothing looks there
    with pytest.raises(ValueError, match=r"model='case': logits differ from timm's own forward by a share of"):
        adapt(vit)


@pytest.mark.parametrize(
    ("part", "fault"),
    [
        ("_norm", lambda layer: nn.Identity()),
        ("_linear", lambda layer, gamma=None: layer),
        ("_prefix_and_positions", lambda vit: (vit.cls_token[0], vit.pos_embed[0, 1:])),
    ],
)
def test_a_fault_of_the_adapter_is_caught(monkeypatch: pytest.MonkeyPatch, part: str, fault: Any) -> None:
    vit = small(init_values=0.1)
    adapt(vit)
    monkeypatch.setattr(adapter, part, fault)
    with pytest.raises(ValueError, match="logits differ"):
        adapt(vit)


@pytest.mark.parametrize(
    "norm", [nn.LayerNorm(4), nn.LayerNorm(4, bias=False), nn.LayerNorm(4, elementwise_affine=False)]
)
def test_a_norm_is_copied_where_it_is(norm: nn.LayerNorm) -> None:
    there = norm.to("meta", torch.float16)
    found = adapter._norm(there)
    assert isinstance(found, nn.LayerNorm)
    assert [(name, p.device.type, p.dtype) for name, p in found.named_parameters()] == [
        (name, "meta", torch.float16) for name, _ in there.named_parameters()
    ]


def test_the_patch_embedding_is_copied_where_it_is() -> None:
    found = adapter._patch_linear(nn.Conv2d(3, 8, 4, 4, device="meta", dtype=torch.float16))
    assert {(p.device.type, p.dtype) for p in found.parameters()} == {("meta", torch.float16)}
    assert (found.in_features, found.out_features) == (48, 8)


def test_nothing_is_rounded_to_tf32_in_the_proof(monkeypatch: pytest.MonkeyPatch) -> None:
    vit = build("deit_tiny_patch16_224")
    seen = []
    vit.register_forward_pre_hook(lambda *_: seen.append(state()))

    def state() -> tuple[bool, str]:
        rounds = torch.backends.cudnn.enabled and torch.backends.cudnn.allow_tf32
        return rounds, torch.get_float32_matmul_precision()

    torch.set_float32_matmul_precision("high")
    try:
        before = state()
        adapt(vit)
        assert seen == [(False, "highest")]
        assert state() == before == (True, "high")
    finally:
        torch.set_float32_matmul_precision("highest")
