"""What a forward hands over beyond logits: block outputs and attention maps, those that are asked for and no others."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from smi_fast.config import InversionConfig
from smi_fast.engine.step import build_step
from smi_fast.method.objective import Objective
from smi_fast.method.priors import L2, TotalVariation
from smi_fast.method.view import View
from smi_fast.model.block import FrozenBlock, Stream
from smi_fast.model.sparse_vit import SparseViT, ViTOutput
from smi_fast.model.spec import Needs
from smi_fast.plugins import register
from tests.conftest import build_vit
from tests.states import fresh

MakeModel = Callable[..., SparseViT]
KINDS: list[dict[str, Any]] = [{}, {"global_pool": "avg"}, {"qk_norm": True, "reg_tokens": 2}]


def both(model: SparseViT, pixels: Tensor, needs: Needs) -> tuple[ViTOutput, ViTOutput]:
    """The forward with nothing asked for, and with needs; on 5 of 12 patches."""
    keep = torch.tensor([[0, 3, 4, 8, 11]]).expand(len(pixels), -1)
    windows, cells = model.cut(pixels, keep)
    return model.forward_patches(windows, cells), model.forward_patches(windows, cells, needs.of(model.shape.depth))


@pytest.mark.parametrize("options", KINDS)
@pytest.mark.parametrize("needs", [Needs(features="all"), Needs(attention="all"), Needs((-1,), (0,)), Needs((), (-1,))])
def test_nothing_else_changes(make_model: MakeModel, pixels: Tensor, options: dict[str, Any], needs: Needs) -> None:
    model = make_model(depth=3, **options)
    plain, asked = both(model, pixels.double(), needs)
    assert (plain.features, plain.attention) == ({}, {}), "no more than is asked for"
    torch.testing.assert_close(asked.logits, plain.logits)
    torch.testing.assert_close(asked.cls_scores, plain.cls_scores)
    wanted = needs.of(3)
    assert tuple(asked.features) == wanted.features
    assert tuple(asked.attention) == wanted.attention


def test_features_and_attention_are_those_of_timm(make_model: MakeModel, pixels: Tensor) -> None:
    vit, model = build_vit(depth=3).double(), make_model(depth=3)
    seen: dict[str, Tensor] = {}
    for index, block in enumerate(vit.blocks):
        block.register_forward_hook(lambda _, __, out, index=index: seen.update({f"block {index}": out}))
        block.attn.fused_attn = False
        block.attn.attn_drop.register_forward_hook(lambda _, __, out, index=index: seen.update({f"map {index}": out}))
    with torch.no_grad():
        vit(pixels.double())
    windows, cells = model.cut(pixels.double(), None)
    output = model.forward_patches(windows, cells, Needs("all", "all").of(3))
    for index in range(3):
        torch.testing.assert_close(output.features[index], seen[f"block {index}"])
        torch.testing.assert_close(output.attention[index], seen[f"map {index}"])


def test_gradients_flow_through_what_is_handed_over(make_model: MakeModel, pixels: Tensor) -> None:
    model = make_model(depth=2, img_size=(16, 16))
    windows, cells = model.cut(pixels[:1, :, :16, :16].double(), None)

    def values(windows: Tensor) -> tuple[Tensor, ...]:
        output = model.forward_patches(windows, cells, Needs((0, 1), (0, 1)))
        return (*output.features.values(), *output.attention.values())

    windows = windows.detach()[:, :, ::1].requires_grad_()
    assert torch.autograd.gradcheck(values, (windows,), fast_mode=True)


@pytest.mark.parametrize(
    ("needs", "message"),
    [(Needs((3,)), r"needs.features=\(3,\): the model has no block 3, only 0..2"), (Needs((), (-4,)), "no block -4")],
)
def test_a_block_that_is_not_there(needs: Needs, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        needs.of(3)


def test_union() -> None:
    assert Needs.union([Needs((0,)), Needs((-1, 0), "all"), Needs()], 2) == Needs((0, 1), (0, 1))


@register("prior", "test_attention")
@dataclass(frozen=True)
class LastAttention:
    """Reads the attention of the last block."""

    weight: float = 1.0
    needs = Needs(attention=(-1,))

    def __call__(self, view: View) -> Tensor:
        return view.output.attention[1][:, :, 0].square().sum((1, 2))


@register("prior", "test_calm")
@dataclass(frozen=True)
class Calm(TotalVariation):
    """Says something else than its base, and nothing of the update."""

    def __call__(self, view: View) -> Tensor:
        return super().__call__(view) * 2


def test_the_forward_computes_what_priors_need(make_model: MakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    config = InversionConfig(iterations=3, stops=(), priors=(TotalVariation(), LastAttention()))
    assert Objective.of(config, 2).needs == Needs((), (1,))
    written: list[int] = []
    original = FrozenBlock.forward_with_attention

    def counted(self: FrozenBlock, stream: Stream) -> tuple[Stream, Tensor]:
        written.append(1)
        return original(self, stream)

    monkeypatch.setattr(FrozenBlock, "forward_with_attention", counted)
    model = make_model(torch.float32)
    for each, times in ((config, 1), (replace(config, priors=(TotalVariation(),)), 0)):
        written.clear()
        state = fresh(model, each, [0, 1], [0, 1])
        with torch.no_grad():
            build_step(model, each)(state)
        assert len(written) == times
        assert state.losses.isfinite().all()
    with pytest.raises(ValueError, match=r"no block 1, only 0\.\.0"):
        Objective.of(replace(config, priors=(Deep(),)), 1)


@register("prior", "test_deep")
@dataclass(frozen=True)
class Deep:
    """Needs a second block."""

    weight: float = 1.0
    needs = Needs(features=(1,))

    def __call__(self, view: View) -> Tensor:
        return view.output.features[1].sum((1, 2))


def test_one_willing_prior_is_taken_into_the_update() -> None:
    def term(*priors: Any) -> tuple[Any, int]:
        found = Objective.of(InversionConfig(stops=(), priors=priors), 2)
        return found.term, found.term_column

    assert term(L2(), TotalVariation(0.5, "image")) == (TotalVariation(0.5, "image").update_term(), 2)
    assert term(TotalVariation(), TotalVariation())[0] is None, "none of two"
    assert term(L2())[0] is None
    assert term(Calm())[0] is None, "a subclass computes something else than the update would"
