"""Adapt a timm ``VisionTransformer``: take what is understood, refuse the rest by name."""

import contextlib
import copy
import hashlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from timm.layers import (
    GELU,
    GELUTanh,
    LayerNorm,
    LayerScale,
    Mlp,
    PatchEmbed,
    QuickGELU,
)
from timm.layers.attention import Attention
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from smi_fast.kernels.common.grid import Grid
from smi_fast.model.block import FrozenBlock, Norm
from smi_fast.model.sparse_vit import SparseViT, ViTParts
from smi_fast.model.spec import ModelInfo, ViTShape

NORMS = (nn.Identity, nn.LayerNorm, LayerNorm)
ACTIVATIONS = (nn.GELU, GELU, GELUTanh, QuickGELU)


class _Refusal:
    """Checks that raise ``ValueError`` with the model's name and the option at fault."""

    def __init__(self, name: str) -> None:
        self.name = name

    def unless(self, understood: bool, option: str) -> None:
        if not understood:
            raise ValueError(f"model={self.name!r}: {option}; SparseViT does not support it")

    def module(self, option: str, module: nn.Module | None, allowed: tuple[type, ...]) -> None:
        # exact types: a subclass may compute something else
        names = ", ".join(sorted({t.__name__ for t in allowed}))
        self.unless(type(module) in allowed, f"{option} is {type(module).__name__}, not one of: {names}")


def check_supported(vit: Any, name: str) -> None:
    """Refuse every model and option that is not understood.

    Raises:
        ValueError: naming the model and the option.
    """
    refuse = _Refusal(name)
    kind = type(vit)
    refuse.unless(
        kind in (VisionTransformer, VisionTransformerDistilled),
        f"it is a {kind.__name__}, not a timm VisionTransformer",
    )
    distilled = kind is VisionTransformerDistilled
    refuse.unless(vit.cls_token is not None, "it has no CLS token, whose attention says which patches to keep")
    refuse.unless(vit.attn_pool is None, f"global_pool={vit.global_pool!r} pools by attention")
    refuse.unless(vit.global_pool in ("token", "avg"), f"global_pool={vit.global_pool!r} is neither 'token' nor 'avg'")
    refuse.unless(not vit.pool_include_prefix, "pool_include_prefix=True averages the prefix tokens too")
    refuse.unless(vit.pos_embed is not None, "it has no learned position embedding (pos_embed='none')")
    heads = (vit.head, vit.head_dist) if distilled else (vit.head,)
    for head in heads:
        refuse.unless(type(head) is nn.Linear, "it has no classifier head (num_classes=0)")
    for option in ("norm_pre", "norm", "fc_norm"):
        refuse.module(option, getattr(vit, option), NORMS)
    refuse.unless(not distilled or type(vit.fc_norm) is nn.Identity, "fc_norm on a distilled model")
    _check_patch_embed(vit, refuse)
    for index, block in enumerate(vit.blocks):
        _check_block(block, f"blocks[{index}]", refuse)


def _check_patch_embed(vit: Any, refuse: _Refusal) -> None:
    embed = vit.patch_embed
    refuse.module("patch_embed", embed, (PatchEmbed,))
    refuse.module("patch_embed.norm", embed.norm, (nn.Identity,))
    proj = embed.proj
    refuse.unless(proj.in_channels == 3, f"in_chans={proj.in_channels}, not 3")
    refuse.unless(proj.kernel_size[0] == proj.kernel_size[1], f"patch_size={proj.kernel_size} is not square")
    plain = proj.kernel_size == proj.stride and set(proj.padding) == {0} and proj.groups == 1
    refuse.unless(plain, "its patches overlap or are padded")


def _check_block(block: Any, where: str, refuse: _Refusal) -> None:
    refuse.module(where, block, (Block,))
    refuse.module(f"{where}.attn", block.attn, (Attention,))
    refuse.unless(getattr(block.attn, "gate", None) is None, f"{where}.attn is gated")
    refuse.module(f"{where}.attn.norm", block.attn.norm, (nn.Identity,))
    refuse.module(f"{where}.mlp", block.mlp, (Mlp,))
    refuse.module(f"{where}.mlp.norm", block.mlp.norm, (nn.Identity,))
    refuse.module(f"{where}.mlp.act", block.mlp.act, ACTIVATIONS)
    for option, module in (
        ("norm1", block.norm1),
        ("norm2", block.norm2),
        ("attn.q_norm", block.attn.q_norm),
        ("attn.k_norm", block.attn.k_norm),
    ):
        refuse.module(f"{where}.{option}", module, NORMS)
    for option in ("ls1", "ls2"):
        refuse.module(f"{where}.{option}", getattr(block, option), (nn.Identity, LayerScale))


def weights_sha256(module: nn.Module) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of all weights, in the order of their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        tensor = tensor.detach().cpu().contiguous()
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}".encode())
        digest.update(tensor.view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _linear(layer: nn.Linear, gamma: Tensor | None = None) -> nn.Linear:
    """A copy of a linear layer, its outputs scaled by ``gamma`` (LayerScale) if given."""
    fresh = copy.deepcopy(layer)
    if gamma is not None:
        fresh.weight.data = fresh.weight.data * gamma[:, None]
        if fresh.bias is not None:
            fresh.bias.data = fresh.bias.data * gamma
    return fresh


def _norm(layer: nn.Module) -> Norm:
    """A plain torch copy of a norm."""
    if isinstance(layer, nn.Identity):
        return nn.Identity()
    assert isinstance(layer, nn.LayerNorm)
    fresh = nn.LayerNorm(layer.normalized_shape, layer.eps, layer.elementwise_affine, layer.bias is not None)
    for name, parameter in layer.named_parameters():  # the copy is in their dtype, and on their device
        setattr(fresh, name, nn.Parameter(parameter.detach().clone()))
    return fresh


def _block(block: Any) -> FrozenBlock:
    gamma1, gamma2 = (ls.gamma.detach() if isinstance(ls, LayerScale) else None for ls in (block.ls1, block.ls2))
    attn, mlp = block.attn, block.mlp
    # timm's own GELU computes what torch's does
    act: Callable[[Tensor], Tensor] = nn.GELU() if type(mlp.act) is GELU else copy.deepcopy(mlp.act)
    return FrozenBlock(
        attn.num_heads,
        (_norm(block.norm1), _norm(block.norm2)),
        (_linear(attn.qkv), _norm(attn.q_norm), _norm(attn.k_norm), _linear(attn.proj, gamma1)),
        (_linear(mlp.fc1), act, _linear(mlp.fc2, gamma2)),
    )


def _prefix_and_positions(vit: Any) -> tuple[Tensor, Tensor]:
    """Prefix tokens ``[prefix, D]`` with their position embedding added, and that of the patches ``[L, D]``."""
    tokens = [vit.cls_token]
    if isinstance(vit, VisionTransformerDistilled):
        tokens.append(vit.dist_token)
    if vit.reg_token is not None:
        tokens.append(vit.reg_token)
    prefix = torch.cat([token.detach()[0] for token in tokens])
    positions = vit.pos_embed.detach()[0]
    if vit.no_embed_class:
        return prefix, positions.clone()
    return prefix + positions[: len(prefix)], positions[len(prefix) :].clone()


def _patch_linear(proj: nn.Conv2d) -> nn.Linear:
    """The patch embedding's convolution as a linear layer on ``[3 * P * P]``."""
    width = proj.out_channels
    linear = nn.Linear(proj.weight[0].numel(), width, bias=False, device="meta")
    linear.weight = nn.Parameter(proj.weight.detach().reshape(width, -1).clone())
    if proj.bias is not None:
        linear.bias = nn.Parameter(proj.bias.detach().clone())
    return linear


def _shape(vit: Any, prefix: int) -> ViTShape:
    block, embed = vit.blocks[0], vit.patch_embed
    reads = 0 if vit.global_pool == "avg" else 1 + isinstance(vit, VisionTransformerDistilled)
    return ViTShape(
        grid=Grid(embed.img_size[0], embed.img_size[1], embed.patch_size[0]),
        width=vit.embed_dim,
        depth=len(vit.blocks),
        heads=block.attn.num_heads,
        head_width=block.attn.head_dim,
        mlp_width=block.mlp.fc1.out_features,
        prefix=prefix,
        reads=reads,
        num_classes=vit.num_classes,
    )


def from_timm(vit: Any, info: ModelInfo) -> SparseViT:
    """Build a `SparseViT` from a timm model's weights, and prove it on a random image.

    Args:
        vit: a timm ``VisionTransformer`` or ``VisionTransformerDistilled``; it is left as it was.
        info: name and colour statistics to go with it.

    Returns:
        A frozen model in the dtype and on the device of ``vit``.

    Raises:
        ValueError: a model or option that is not understood, or logits that differ from timm's own.
    """
    check_supported(vit, info.name)
    prefix, positions = _prefix_and_positions(vit)
    parts = ViTParts(
        patch_embed=_patch_linear(vit.patch_embed.proj),
        prefix_tokens=prefix,
        pos_embed=positions,
        norm_pre=_norm(vit.norm_pre),
        blocks=[_block(block) for block in vit.blocks],
        norm=_norm(vit.norm),
        fc_norm=_norm(vit.fc_norm),
        heads=[_linear(vit.head)] + ([_linear(vit.head_dist)] if isinstance(vit, VisionTransformerDistilled) else []),
    )
    model = SparseViT(_shape(vit, len(prefix)), info, parts)
    _prove(model, vit)
    return model


@contextlib.contextmanager
def exact_float32() -> Iterator[None]:
    """A block in which no product or convolution of float32 is rounded to TF32; these are switches of the process.

    cuDNN rounds by default, which moved logits by a share of 1.7e-4 to 3.8e-4 (ViT-Small to Large). Without cuDNN the
    convolution is an ordinary product.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.backends.cudnn.flags(enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


@torch.no_grad()
def _prove(model: SparseViT, vit: Any) -> None:
    """Compare with timm's own forward once: an option that slipped through must not be silently wrong."""
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(1, 3, model.grid.height, model.grid.width, generator=generator).to(model.device, model.dtype)
    training = vit.training
    with exact_float32():
        theirs = vit.eval()(image)
        ours, _ = model(image)
    vit.train(training)
    error = float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-12))
    # rounding of float32 sums in another order stayed below 1e-6 on 24 architectures; GELU for QuickGELU gives 2e-3
    if not error < 1e-4:
        raise ValueError(
            f"model={model.info.name!r}: logits differ from timm's own forward by a share of {error:.2g}; it has an "
            "option that SparseViT does not understand, please report it"
        )
