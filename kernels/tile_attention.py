"""``tile_attention``: self-attention of a few tokens, with each head's keys and values in one tile.

    p[b, h, m, :] = softmax(scale q[b, h, m] . k[b, h, :])            float32, scale 1/sqrt(d) unless given
    out[b, h, m]  = sum_n p[b, h, m, n] v[b, h, n]                    with p rounded to the dtype of v

No mask and no dropout. With the gradient ``g`` of ``out``,

    dp[m, n] = g[m] . v[n]                                 ds = p (dp - sum_n p dp)
    dq[m] = scale sum_n ds[m, n] k[n]    dk[n] = scale sum_m ds[m, n] q[m]    dv[n] = sum_m p[m, n] g[m]

A tile holds all keys, so each row of the softmax is computed whole: there is nothing to carry from block to
block. The forward cuts the queries into blocks, a program each. The backward has one program per image and head, which
goes through the blocks and keeps ``dk`` and ``dv`` in registers: no atomics, and the same sums in the same order each
time. The loop is not pipelined: a second block in flight costs the registers that ``dk`` and ``dv`` need.
``p`` is computed again from its own maximum and sum, and ``sum_n p dp`` from ``p``, for the reasons that
``cls_attention.py`` gives. Products are of the input's dtype with float32 sums; ``p`` and ``ds`` are rounded to it.
float32 is multiplied as float32, without tensor cores, and its backward spills: it is there to be exact, not fast.

Bytes: everything is read once and written once, ``4 N d`` values per image and head forward, ``7 N d`` backward; beyond
one block of queries the forward reads keys and values again for each, from the cache.
Inputs are read through their strides, so slices of a projection are not copied; ``out`` is laid out ``[B, N, H, d]``.
The three gradients are slices of one ``[B, N, 3, H, d]``: `packed_tile_attention` hands it back as the gradient of the
projection as it is.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from smi_fast.kernels.cls_attention import dense_rows, load_rows, power_of_two, scale_of, token_major
from smi_fast.kernels.common.check import FLOATS, check
from smi_fast.kernels.common.configs import best
from smi_fast.kernels.common.dispatch import Impl, choose, tl, triton, why_not_triton
from smi_fast.kernels.common.launch import Arguments, Config, Launch

MOST_TOKENS, MOST_WIDTH = 256, 128
LEAST_SIDE = 16  # of a matrix that tensor cores multiply
# shared memory that the compiled backward asks for, in tiles of keys (4 to 5 were seen)
SHARED_TILES = 5


def tile_attention_reference(query: Tensor, key: Tensor, value: Tensor, scale: float | None = None) -> Tensor:
    """Plain torch; shapes as in `tile_attention`."""
    exact = torch.promote_types(query.dtype, torch.float32)
    scaled = query.to(exact) * scale_of(query, scale)
    p = (scaled @ key.to(exact).transpose(-2, -1)).softmax(-1)  # [B, H, N, N]
    return p.to(value.dtype) @ value


def tile_attention_backward_reference(
    query: Tensor, key: Tensor, value: Tensor, d_out: Tensor, scale: float | None = None
) -> Tensor:
    """Plain torch: gradients of query, key and value, ``[B, N, 3, H, d]``, from that of ``out``."""
    exact = torch.promote_types(query.dtype, torch.float32)
    scale = scale_of(query, scale)
    scaled, keys, d_out = query.to(exact) * scale, key.to(exact), d_out.to(exact)
    p = (scaled @ keys.transpose(-2, -1)).softmax(-1)
    dp = d_out @ value.to(exact).transpose(-2, -1)
    ds = p * (dp - (p * dp).sum(-1, keepdim=True))
    parts = scale * ds @ keys, ds.transpose(-2, -1) @ scaled, p.transpose(-2, -1) @ d_out
    return torch.stack(parts).permute(1, 3, 0, 2, 4).to(query.dtype).contiguous()


@triton.jit
def store_rows(matrix, row, rows, stride, values, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows of a matrix, rounded to its dtype; the reverse of `load_rows`."""
    channel = tl.arange(0, BLOCK_D)
    inside = (row < rows)[:, None] & (channel < D)[None, :]
    tl.store(matrix + row[:, None] * stride + channel[None, :], values.to(matrix.dtype.element_ty), mask=inside)


@triton.jit
def probabilities(q, k, tokens, scale, TOKENS: tl.constexpr):
    """Softmax over the keys, ``[len(q), TOKENS]`` float32; 0 where there is no key."""
    logits = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    logits = tl.where((tl.arange(0, TOKENS) < tokens)[None, :], logits, float("-inf"))
    powers = tl.exp(logits - tl.max(logits, 1)[:, None])
    return powers * (1 / tl.sum(powers, 1))[:, None]


@triton.jit(do_not_specialize=["tokens"])
def tile_kernel(
    query,  # [B, H, N, d], strided
    key,  # [B, H, N, d], strided
    value,  # [B, H, N, d], strided
    out,  # [B, N, H, d]
    tokens, scale,
    query_b, query_h, query_n, key_b, key_h, key_n, value_b, value_h, value_n,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    head, heads = tl.program_id(1), tl.num_programs(1)
    image = tl.program_id(2).to(tl.int64)
    query += image * query_b + head * query_h
    key += image * key_b + head * key_h
    value += image * value_b + head * value_h
    out += image * tokens * (heads * D) + head * D
    row, token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, TOKENS)

    q = load_rows(query, row, tokens, query_n, D, BLOCK_D)
    k = load_rows(key, token, tokens, key_n, D, BLOCK_D)
    v = load_rows(value, token, tokens, value_n, D, BLOCK_D)
    p = probabilities(q, k, tokens, scale, TOKENS)
    store_rows(out, row, tokens, heads * D, tl.dot(p.to(v.dtype), v, input_precision="ieee"), D, BLOCK_D)


@triton.jit(do_not_specialize=["tokens"])
def tile_backward_kernel(
    query,  # [B, H, N, d], strided
    key,  # [B, H, N, d], strided
    value,  # [B, H, N, d], strided
    d_out,  # [B, H, N, d], strided
    gradients,  # [B, N, 3, H, d]
    tokens, scale,
    query_b, query_h, query_n, key_b, key_h, key_n, value_b, value_h, value_n, out_b, out_h, out_n,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    head, heads = tl.program_id(0), tl.num_programs(0)
    image = tl.program_id(1).to(tl.int64)
    query += image * query_b + head * query_h
    key += image * key_b + head * key_h
    value += image * value_b + head * value_h
    d_out += image * out_b + head * out_h
    inner = heads * D
    gradients += image * tokens * (3 * inner) + head * D
    token = tl.arange(0, TOKENS)

    k = load_rows(key, token, tokens, key_n, D, BLOCK_D)
    v = load_rows(value, token, tokens, value_n, D, BLOCK_D)
    dk, dv = tl.zeros((TOKENS, BLOCK_D), tl.float32), tl.zeros((TOKENS, BLOCK_D), tl.float32)
    for block in tl.range(BLOCKS, num_stages=1):
        # where there is no query, q and g are 0: ds is 0 there, and p meets a g of 0
        row = block * BLOCK + tl.arange(0, BLOCK)
        q = load_rows(query, row, tokens, query_n, D, BLOCK_D)
        g = load_rows(d_out, row, tokens, out_n, D, BLOCK_D)
        p = probabilities(q, k, tokens, scale, TOKENS)
        dv = tl.dot(tl.trans(p.to(g.dtype)), g, dv, input_precision="ieee")
        dp = tl.dot(g, tl.trans(v), input_precision="ieee")
        ds = (p * (dp - tl.sum(p * dp, 1)[:, None])).to(q.dtype)
        dk = tl.dot(tl.trans(ds), q, dk, input_precision="ieee")
        dq = tl.dot(ds, k, input_precision="ieee")
        store_rows(gradients, row, tokens, 3 * inner, dq * scale, D, BLOCK_D)
    store_rows(gradients + inner, token, tokens, 3 * inner, dk * scale, D, BLOCK_D)
    store_rows(gradients + 2 * inner, token, tokens, 3 * inner, dv, D, BLOCK_D)


def tile_of(query: Tensor) -> tuple[int, int]:
    """Tokens and channels of a tile: powers of two that tensor cores take."""
    tokens, width = (max(LEAST_SIDE, power_of_two(side)) for side in query.shape[2:])
    return tokens, width


def sides_of(query: Tensor, config: Config) -> dict[str, Any]:
    """Constants of both kernels, but for the number of blocks."""
    tokens, block_d = tile_of(query)
    return {"D": query.shape[3], "BLOCK_D": block_d, "BLOCK": min(config.block, tokens), "TOKENS": tokens}


def config_of(op: str, query: Tensor, build: Callable[[Config], Launch]) -> Config:
    """Of an op at a number of tokens; float32, which has no tensor cores, is cut up in its own way."""
    return best(op + "_float32" if query.dtype == torch.float32 else op, power_of_two(query.shape[2]), build)


def strides_of(**tensors: Tensor) -> dict[str, int]:
    """``name_b``, ``name_h`` and ``name_n``: how far apart images, heads and tokens are."""
    return {
        f"{name}_{letter}": stride
        for name, tensor in tensors.items()
        for letter, stride in zip("bhn", tensor.stride(), strict=False)
    }


def tile_launch(
    query: Tensor, key: Tensor, value: Tensor, scale: float | None = None, config: Config | None = None
) -> tuple[Launch, Tensor]:
    """Launch of the forward, and ``out``, which it fills."""
    batch, heads, tokens, _ = query.shape
    out = token_major(query, tokens)
    config = config or config_of("tile_attention", query, lambda c: tile_launch(query, key, value, scale, c)[0])
    sides = sides_of(query, config)
    arguments: Arguments = {"query": query, "key": key, "value": value, "out": out}
    arguments |= {"tokens": tokens, "scale": scale_of(query, scale), **strides_of(query=query, key=key, value=value)}
    return Launch(tile_kernel, (triton.cdiv(tokens, sides["BLOCK"]), heads, batch), arguments, sides, config.warps), out


def tile_backward_launch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    d_out: Tensor,
    scale: float | None = None,
    config: Config | None = None,
) -> tuple[Launch, Tensor]:
    """Launch of the backward, and the gradients ``[B, N, 3, H, d]`` that it fills."""
    batch, heads, tokens, width = query.shape
    gradients = query.new_empty(batch, tokens, 3, heads, width)
    tensors, op = (query, key, value, d_out), "tile_attention_backward"
    config = config or config_of(op, query, lambda c: tile_backward_launch(*tensors, scale, c)[0])
    sides = sides_of(query, config)
    sides["BLOCKS"] = triton.cdiv(tokens, sides["BLOCK"])
    arguments: Arguments = {"query": query, "key": key, "value": value, "d_out": d_out, "gradients": gradients}
    arguments |= {"tokens": tokens, "scale": scale_of(query, scale)}
    arguments |= strides_of(query=query, key=key, value=value, out=d_out)
    return Launch(tile_backward_kernel, (heads, batch), arguments, sides, config.warps), gradients


def unsupported(query: Tensor, key: Tensor, value: Tensor) -> str | None:
    """Why the kernels cannot take these tensors, None if they can."""
    if not query.dtype == key.dtype == value.dtype:
        return "query, key and value of different dtypes"
    if query.dtype == torch.float64:
        return "float64 has no kernel"
    tokens, width = query.shape[2:]
    if tokens > MOST_TOKENS:
        return f"{tokens} tokens, the kernel takes up to {MOST_TOKENS}"
    if width > MOST_WIDTH:
        return f"heads {width} wide, the kernel takes up to {MOST_WIDTH}"
    if query.device.type == "cuda":
        shared = torch.cuda.get_device_properties(query.device).shared_memory_per_block_optin
        needed = SHARED_TILES * math.prod(tile_of(query)) * query.element_size()
        if needed > shared:
            return f"{tokens} tokens of {width} {query.dtype} need {needed} bytes of shared memory, there are {shared}"
    return None


@torch.library.custom_op("smi_fast::tile_attention", mutates_args=())
def _attend(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """The kernel; where it cannot run, the reference."""
    if why_not_triton(query) or unsupported(query, key, value):
        return token_major(value, query.shape[2]).copy_(tile_attention_reference(query, key, value, scale))
    launch, out = tile_launch(dense_rows(query), dense_rows(key), dense_rows(value), scale)
    launch.run()
    return out


@_attend.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    return token_major(value, query.shape[2])


@torch.library.custom_op("smi_fast::tile_attention_backward", mutates_args=())
def _attend_backward(query: Tensor, key: Tensor, value: Tensor, d_out: Tensor, scale: float) -> Tensor:
    """The kernel; where it cannot run, the reference."""
    if why_not_triton(query) or unsupported(query, key, value):
        return tile_attention_backward_reference(query, key, value, d_out, scale)
    query, key, value, d_out = (dense_rows(tensor) for tensor in (query, key, value, d_out))
    launch, gradients = tile_backward_launch(query, key, value, d_out, scale)
    launch.run()
    return gradients


@_attend_backward.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, d_out: Tensor, scale: float) -> Tensor:
    batch, heads, tokens, width = query.shape
    return query.new_empty(batch, tokens, 3, heads, width)


def parts_of(packed: Tensor) -> tuple[Tensor, ...]:
    """``[B, N, 3, H, d]`` to its query, key and value, ``[B, H, N, d]`` each, without a copy."""
    return packed.permute(2, 0, 3, 1, 4).unbind(0)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
    return (*parts_of(_attend_backward(*ctx.saved_tensors, d_out, ctx.scale)), None)


_attend.register_autograd(_backward, setup_context=_save_for_backward)


@torch.library.custom_op("smi_fast::packed_tile_attention", mutates_args=())
def _attend_packed(packed: Tensor, scale: float) -> Tensor:
    """`_attend` of the parts; an op of its own, so that its gradient is one tensor."""
    return _attend(*parts_of(packed), scale)


@_attend_packed.register_fake
def _(packed: Tensor, scale: float) -> Tensor:
    batch, tokens, _, heads, width = packed.shape
    return packed.new_empty(batch, tokens, heads, width).transpose(1, 2)


def _packed_backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, None]:
    (packed,) = ctx.saved_tensors
    return _attend_backward(*parts_of(packed), d_out, ctx.scale), None


_attend_packed.register_autograd(_packed_backward, setup_context=_save_for_backward)


def tile_attention(
    query: Tensor, key: Tensor, value: Tensor, *, scale: float | None = None, impl: Impl | None = None
) -> Tensor:
    """``softmax(scale q k^T) v`` over all tokens.

    Args:
        query, key, value: ``[B, H, N, d]``; any strides.
        scale: of the logits; None for ``1 / sqrt(d)``.
        impl: see ``dispatch.py``. The kernel takes one dtype of at most 32 bits, up to 256 tokens and 128 channels,
            and on a device as many of them as its shared memory holds: see `unsupported`.

    Returns:
        ``[B, H, N, d]`` in the dtype of ``value``, from the kernel laid out ``[B, N, H, d]``.

    Raises:
        ValueError: a shape, dtype, device or ``impl`` that does not fit; a scale that is not finite.
    """
    shape = "B H N d"
    expected = {"query": (query, shape, FLOATS), "key": (key, shape, FLOATS), "value": (value, shape, FLOATS)}
    check("tile_attention", expected)
    scale = scale_of(query, scale)
    if choose("tile_attention", impl, query, unsupported(query, key, value)) == "torch":
        return tile_attention_reference(query, key, value, scale)
    return _attend(query, key, value, scale)


def packed_tile_attention(packed: Tensor, *, scale: float | None = None, impl: Impl | None = None) -> Tensor:
    """`tile_attention` of the three parts of one projection, whose gradient comes back in one piece.

    The gradients of three slices would be written, then copied into one tensor; this one is written in its place.

    Args:
        packed: ``[B, N, 3, H, d]``: query, key and value of each token; any strides.
        scale, impl: as for `tile_attention`.

    Returns:
        ``[B, H, N, d]`` in the dtype of ``packed``, from the kernel laid out ``[B, N, H, d]``.

    Raises:
        ValueError: a shape, dtype or ``impl`` that does not fit; a scale that is not finite.
    """
    check("packed_tile_attention", {"packed": (packed, "B N 3 H d", FLOATS)})
    query, key, value = parts_of(packed)
    scale = scale_of(packed, scale)
    if choose("packed_tile_attention", impl, packed, unsupported(query, key, value)) == "torch":
        return tile_attention_reference(query, key, value, scale)
    return _attend_packed(packed, scale)
