"""A plain forward of a `SparseViT` in which every tensor that gets quantized passes through a function.

Shape letters: B images, K kept patches, L all patches, N = K + prefix tokens, D width, H heads, d head width, P patch
side. The sites, in the order they are passed:

    input               [B, K, 3 * P * P]  the kept patches of the normalised image
    patch_embed         [B, K, D]
    tokens              [B, N, D]          prefix tokens and embedded patches
    pos_embed           [L, D]             the whole table: a weight, the same for all images
    embedded            [B, N, D]          tokens and position embeddings, added
    norm_pre            [B, N, D]          where the model has it
    blocks.0.norm1      [B, N, D]
    blocks.0.qkv        [B, N, 3 * H * d]
    blocks.0.q, .k      [B, H, N, d]       where the model norms queries and keys
    blocks.0.logits     [B, H, N, N]       scaled, before softmax
    blocks.0.attended   [B, N, H * d]
    blocks.0.proj       [B, N, D]
    blocks.0.sum1       [B, N, D]
    blocks.0.norm2      [B, N, D]
    blocks.0.gelu       [B, N, mlp width]
    blocks.0.fc2        [B, N, D]
    blocks.0.sum2       [B, N, D]
    norm                [B, N, D]
    fc_norm             [B, D]             where the model has it
    logits              [B, classes]       mean of the heads

Two things differ from a timm model that is quantized in place. The prefix tokens of a `SparseViT` carry their position
embedding already, so that theirs is 0 where positions are added, and takes no part in the range of ``pos_embed``. And
norm, query, projection and MLP of the last block are computed for all tokens, as PSAQ-ViT does: its ranges are those
of all tokens, though the head reads few.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from smi_fast.kernels.tile_attention import parts_of
from smi_fast.model.block import FrozenBlock
from smi_fast.model.sparse_vit import SparseViT

Site = Callable[[str, Tensor], Tensor]


def unchanged(name: str, tensor: Tensor) -> Tensor:
    """The site function that does nothing."""
    return tensor


def forward_sites(model: SparseViT, pixels: Tensor, keep: Tensor | None = None, site: Site = unchanged) -> Tensor:
    """Logits of a model, every tensor of the list above replaced by what ``site(name, tensor)`` makes of it.

    Args:
        model: on any device, in any dtype.
        pixels: ``[B, 3, H, W]`` float, normalised colours.
        keep: ``[B, K]`` int64, ascending patch ids; None for all. Nothing else of ``pixels`` is looked at.
        site: takes a name and a tensor, and returns a tensor of the same shape and dtype.

    Returns:
        ``[B, classes]`` float32 (float64 for a float64 model); those of ``model(pixels, keep)`` but for rounding, if
        ``site`` changes nothing.

    Raises:
        ValueError: as `SparseViT.forward`.
    """
    windows, keep = model.cut(pixels, keep)
    x = _embed(model, site("input", windows), keep, site)
    for index, block in enumerate(model.blocks):
        assert isinstance(block, FrozenBlock)
        x = _block(block, x, f"blocks.{index}.", site)
    return site("logits", _head(model, x, site))


def site_names(model: SparseViT) -> list[str]:
    """The sites of a model, in the order of a forward."""
    pixels = torch.zeros(1, 3, model.grid.height, model.grid.width, device=model.device)
    names = []

    def note(name: str, tensor: Tensor) -> Tensor:
        names.append(name)
        return tensor

    with torch.no_grad():
        forward_sites(model, pixels, torch.zeros(1, 1, dtype=torch.int64, device=model.device), note)
    return names


def _embed(model: SparseViT, windows: Tensor, keep: Tensor, site: Site) -> Tensor:
    patches = site("patch_embed", model.patch_embed(windows))  # [B, K, D]
    tokens = site("tokens", torch.cat([model.prefix_tokens.expand(len(patches), -1, -1), patches], 1))
    positions = site("pos_embed", model.pos_embed)[keep]  # [B, K, D]
    still = positions.new_zeros(1, 1, 1).expand(len(keep), model.shape.prefix, positions.shape[2])
    x = site("embedded", tokens + torch.cat([still, positions], 1))
    return x if isinstance(model.norm_pre, nn.Identity) else site("norm_pre", model.norm_pre(x))


def _block(block: FrozenBlock, x: Tensor, prefix: str, site: Site) -> Tensor:
    attended = _attend(block, site(prefix + "norm1", block.norm1(x)), prefix, site)
    x = site(prefix + "sum1", x + site(prefix + "proj", block.proj(attended)))
    hidden = block.act(block.fc1(site(prefix + "norm2", block.norm2(x))))
    hidden = site(prefix + "fc2", block.fc2(site(prefix + "gelu", hidden)))
    return site(prefix + "sum2", x + hidden)


def _attend(block: FrozenBlock, normed: Tensor, prefix: str, site: Site) -> Tensor:
    """``[B, N, D]`` to ``[B, N, H * d]``; written out, since the logits are quantized before their softmax."""
    packed = site(prefix + "qkv", block.qkv(normed))
    query, key, value = parts_of(packed.unflatten(2, (3, block.heads, -1)))  # [B, H, N, d] each
    if not isinstance(block.q_norm, nn.Identity):
        query = site(prefix + "q", block.q_norm(query))
    if not isinstance(block.k_norm, nn.Identity):
        key = site(prefix + "k", block.k_norm(key))
    scale = query.shape[-1] ** -0.5 if block.scale is None else block.scale
    logits = site(prefix + "logits", (query * scale) @ key.mT)  # [B, H, N, N]
    exact = torch.promote_types(logits.dtype, torch.float32)
    attended = logits.softmax(-1, dtype=exact).to(value.dtype) @ value
    return site(prefix + "attended", attended.transpose(1, 2).flatten(2))


def _head(model: SparseViT, x: Tensor, site: Site) -> Tensor:
    """Logits from ``[B, N, D]``; final norm and heads in float32 at least, as in `SparseViT`."""
    x = site("norm", model.norm(x.to(torch.promote_types(model.dtype, torch.float32))))
    shape = model.shape
    read = x[:, : shape.reads].unbind(1) if shape.reads else (x[:, shape.prefix :].mean(1),)
    if not isinstance(model.fc_norm, nn.Identity):
        read = tuple(site("fc_norm", model.fc_norm(token)) for token in read)
    return torch.stack([head(token) for head, token in zip(model.heads, read, strict=True)]).mean(0)
