"""Folded models against timm's own forward in float64; casts and fp8 after folding; what is refused."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from smi_fast import load_model
from smi_fast.model.block import FrozenBlock
from smi_fast.model.fold import fold
from smi_fast.model.fp8 import to_fp8
from smi_fast.model.sparse_vit import SparseViT
from tests.model.test_parity import BATCH, adapt, assert_close, build, images, random_keep, timm_cls_scores, timm_logits

MakeModel = Callable[..., SparseViT]
CASES = [
    "deit_tiny_patch16_224",
    "deit_tiny_distilled_patch16_224",
    "deit3_small_patch16_224",
    "vit_base_patch16_224_miil",
    "vit_base_patch32_clip_quickgelu_224",
    "qk_norm",
    "avg_with_registers",
    "no_proj_bias",
]


def blocks_of(model: SparseViT) -> list[FrozenBlock]:
    return [block for block in model.blocks if isinstance(block, FrozenBlock)]


def weights_of(model: SparseViT) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.fixture(scope="module", params=CASES)
def pair(request: pytest.FixtureRequest) -> tuple[Any, SparseViT]:
    vit = build(request.param)
    return vit, fold(adapt(vit, request.param))


def test_results_are_timms(pair: tuple[Any, SparseViT]) -> None:
    vit, model = pair
    keep = random_keep(BATCH, model.grid.patches, model.grid.patches // 2)
    for kept in (None, keep):
        pixels = images(model).requires_grad_()
        logits, scores = model(pixels, kept)
        ids = torch.arange(model.grid.patches).expand(BATCH, -1) if kept is None else kept
        truth = vit(pixels) if kept is None else timm_logits(vit, pixels, kept)
        assert_close(logits, truth)
        assert_close(scores, timm_cls_scores(vit, pixels, ids))
        weights = torch.linspace(-1, 1, logits.numel(), dtype=torch.float64).view_as(logits)
        assert_close(*(torch.autograd.grad(each, pixels, weights)[0] for each in (logits, truth)))


def test_nothing_is_left_to_do_beside_the_layers(pair: tuple[Any, SparseViT]) -> None:
    _, model = pair
    for block in blocks_of(model):
        for norm in (block.norm1, block.norm2):
            assert isinstance(norm, nn.LayerNorm)
            assert norm.weight is None
            assert norm.bias is None
        assert block.scale == 1.0
        assert block.qkv.bias is not None
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not any(module.training for module in model.modules())


def test_twice_is_once(pair: tuple[Any, SparseViT]) -> None:
    _, model = pair
    before = weights_of(model)
    fold(model)
    after = weights_of(model)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_norm_of_the_block_keeps_its_epsilon(make_model: MakeModel) -> None:
    model = make_model()
    for block in blocks_of(model):
        block.norm1.eps, block.norm2.eps = 0.1, 0.2  # type: ignore[union-attr]
    pixels = torch.randn(2, 3, 24, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    truth, _ = model(pixels)
    torch.testing.assert_close(fold(model)(pixels)[0], truth, rtol=1e-10, atol=1e-12)


def test_a_norm_of_the_queries_without_affine_keeps_the_scale(make_model: MakeModel) -> None:
    model = make_model(qk_norm=True)
    for block in blocks_of(model):
        block.q_norm = nn.LayerNorm(16, elementwise_affine=False)
    pixels = torch.randn(2, 3, 24, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    truth, _ = model(pixels)
    torch.testing.assert_close(fold(model)(pixels)[0], truth, rtol=1e-10, atol=1e-12)
    assert all(block.scale is None for block in blocks_of(model))


def test_float32_weights_are_rounded_once(make_model: MakeModel) -> None:
    single = fold(make_model(torch.float32))
    double = fold(make_model(torch.float32).with_dtype(torch.float64))
    assert (single.precision, double.precision) == ("float32", "float64")
    for name, tensor in weights_of(double).items():
        # the queries' rows are multiplied twice, and of two heads' norm the scale is no power of two
        if "blocks" in name and "qkv" not in name:
            assert torch.equal(weights_of(single)[name], tensor.float()), name


def test_low_precision_is_no_worse(make_model: MakeModel) -> None:
    pixels = torch.randn(16, 3, 24, 32, generator=torch.Generator().manual_seed(0))
    truth = make_model(depth=4)(pixels.double())[0]
    plain, folded = (
        (change(make_model(torch.float32, depth=4)).with_dtype(torch.bfloat16)(pixels)[0] - truth).norm()
        for change in (lambda model: model, fold)
    )
    assert 0 < folded <= 1.5 * plain


def test_fp8_after_folding(make_model: MakeModel) -> None:
    pixels = torch.randn(16, 3, 24, 32, generator=torch.Generator().manual_seed(0))
    truth = make_model()(pixels.double())[0]
    plain, folded = (
        (to_fp8(change(make_model(torch.float32)).with_dtype(torch.bfloat16))(pixels)[0] - truth).norm()
        for change in (lambda model: model, fold)
    )
    assert 0 < folded <= 1.5 * plain
    assert folded < 0.3 * truth.norm()


@pytest.mark.parametrize("precision", ["bfloat16", "fp8"])
def test_rounded_weights_are_refused(precision: str, make_model: MakeModel) -> None:
    model = make_model(torch.bfloat16)
    if precision == "fp8":
        to_fp8(model)
    before = weights_of(model)
    with pytest.raises(ValueError, match=f"model is {precision}: must be float32 or float64; fold first, then cast"):
        fold(model)
    assert all(torch.equal(before[name].float(), tensor.float()) for name, tensor in weights_of(model).items())


def test_load_model() -> None:
    plain, folded = load_model("demo"), load_model("demo", fold=True)
    assert [block.scale for block in blocks_of(plain)] == [None] * plain.shape.depth
    assert [block.scale for block in blocks_of(folded)] == [1.0] * plain.shape.depth
    assert plain.info == folded.info
    pixels = torch.randn(2, 3, plain.grid.height, plain.grid.width, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(folded(pixels)[0], plain(pixels)[0], rtol=1e-4, atol=1e-4)
    assert load_model("demo", fold=True, dtype=torch.bfloat16).precision == "bfloat16"
