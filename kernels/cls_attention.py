"""``cls_attention``: the attention rows of a few query tokens, and the CLS score, with no ``[N, N]`` matrix.

    p[b, h, m, :] = softmax(scale q[b, h, m] . k[b, h, :])            float32, scale 1/sqrt(d) unless given
    out[b, h, m]  = sum_n p[b, h, m, n] v[b, h, n]
    score[b, k]   = mean_h p[b, h, 0, prefix + k]

The queries are the tokens that the head reads (CLS first); keys and values are all tokens. The score is the
post-softmax attention from CLS to each kept patch: it is not normalised again over the patches.

The kernel gives ``rows[b, h, k] = p[b, h, 0, prefix + k]`` and torch takes the mean over the heads, so that no two
programs write the same score. With the gradients ``g`` of ``out`` and ``r`` of ``rows``,

    dp[m, n] = g[m] . v[n] + r[n - prefix] for m = 0 and a patch n      ds = p (dp - sum_n p dp)
    dq[m] = scale sum_n ds[m, n] k[n]    dk[n] = scale sum_m ds[m, n] q[m]    dv[n] = sum_m p[m, n] g[m]

``p`` is computed again from its own maximum and sum, and ``sum_n p dp`` from ``p``: a saved log-sum-exp would lose
the sum beside a large maximum, and ``g . out`` with a rounded ``out`` a part of the keys' mean.

Bytes: one program per image and head. It reads its keys and values once where they fit in one tile (up to 256 tokens),
else once from memory and once from the cache, since the softmax needs a sweep of its own; it writes ``M d`` values
and ``N`` floats. The backward reads the same again and writes as much. There is no reuse to win with tensor cores.
Inputs are read through their strides, so slices of a projection are not copied; ``dk`` and ``dv`` are laid out
``[B, N, H, d]``, as the projection's gradient is.
"""

import math
from typing import Any

import torch
from torch import Tensor

from smi_fast.kernels.common.check import FLOATS, check
from smi_fast.kernels.common.configs import best
from smi_fast.kernels.common.dispatch import Impl, choose, tl, triton, why_not_triton
from smi_fast.kernels.common.launch import Arguments, Config, Launch

MOST_QUERIES, MOST_WIDTH, MOST_TOKENS = 8, 256, 2048
TILE_BYTES = 64 * 1024  # of keys under one query; as many of values lie beside them in registers


def scale_of(query: Tensor, scale: float | None) -> float:
    """The factor of the logits, ``1 / sqrt(d)`` unless given; ``ValueError`` if it is not finite."""
    if scale is None:
        return query.shape[-1] ** -0.5
    if not math.isfinite(scale):
        raise ValueError(f"scale={scale}: must be finite")
    return float(scale)  # a kernel argument, and an integer 1 would be compiled in


def rows_reference(
    query: Tensor, key: Tensor, value: Tensor, prefix: int, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """Plain torch: ``out [B, H, M, d]``, and the CLS row of each head without the prefix, ``[B, H, N - prefix]``."""
    exact = torch.promote_types(query.dtype, torch.float32)
    scaled = query.to(exact) * scale_of(query, scale)
    row = (scaled @ key.to(exact).transpose(-2, -1)).softmax(-1)  # [B, H, M, N]
    return row.to(value.dtype) @ value, row[:, :, 0, prefix:]


def cls_attention_reference(
    query: Tensor, key: Tensor, value: Tensor, prefix: int, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """Plain torch; shapes as in `cls_attention`."""
    out, rows = rows_reference(query, key, value, prefix, scale)
    return out, rows.mean(1)


def cls_attention_backward_reference(
    query: Tensor, key: Tensor, value: Tensor, d_out: Tensor, d_rows: Tensor, scale: float | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Plain torch: gradients of query, key and value, from those of `rows_reference`'s results."""
    exact = torch.promote_types(query.dtype, torch.float32)
    scale = scale_of(query, scale)
    scaled, keys, d_out = query.to(exact) * scale, key.to(exact), d_out.to(exact)
    p = (scaled @ keys.transpose(-2, -1)).softmax(-1)  # [B, H, M, N]
    dp = d_out @ value.to(exact).transpose(-2, -1)
    dp[:, :, 0, key.shape[2] - d_rows.shape[2] :] += d_rows
    ds = p * (dp - (p * dp).sum(-1, keepdim=True))
    d_key, d_value = ds.transpose(-2, -1) @ scaled, p.transpose(-2, -1) @ d_out
    return (scale * ds @ keys).to(query.dtype), d_key.to(key.dtype), d_value.to(value.dtype)


@triton.jit
def load_rows(matrix, row, rows, stride, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows of a matrix, ``[len(row), BLOCK_D]``, 0 where there are none."""
    channel = tl.arange(0, BLOCK_D)
    inside = (row < rows)[:, None] & (channel < D)[None, :]
    return tl.load(matrix + row[:, None] * stride + channel[None, :], mask=inside, other=0.0)


@triton.jit
def load_vector(vector, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """A vector of ``D`` in float32, padded with 0."""
    channel = tl.arange(0, BLOCK_D)
    return tl.load(vector + channel, mask=channel < D, other=0.0).to(tl.float32)


@triton.jit
def products(vector, matrix):
    """Dot product of a vector with each row, in float32."""
    return tl.sum(vector[None, :] * matrix.to(tl.float32), 1)


@triton.jit
def put(values, which, value):
    """``values`` with ``value`` at the one place that ``which`` marks."""
    return tl.where(which, value, values)


@triton.jit
def take(values, which):
    """The one number of ``values`` that ``which`` marks."""
    return tl.sum(tl.where(which, values, 0.0), 0)


@triton.jit(do_not_specialize=["tokens"])
def attention_kernel(
    query,  # [B, H, M, d], strided
    key,  # [B, H, N, d], strided
    value,  # [B, H, N, d], strided
    out,  # [B, M, H, d]
    rows,  # [B, H, N - prefix] float32
    tokens, prefix, scale,
    query_b, query_h, query_m, key_b, key_h, key_n, value_b, value_h, value_n,
    M: tl.constexpr, MP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    head, heads = tl.program_id(0), tl.num_programs(0)
    image = tl.program_id(1).to(tl.int64)
    query += image * query_b + head * query_h
    key += image * key_b + head * key_h
    value += image * value_b + head * value_h
    out += image * (M * heads * D) + head * D
    rows += (image * heads + head) * (tokens - prefix)
    index, channel = tl.arange(0, MP), tl.arange(0, BLOCK_D)

    largest, total = tl.full((MP,), float("-inf"), tl.float32), tl.zeros((MP,), tl.float32)
    for block in range(BLOCKS):
        token = block * BLOCK + tl.arange(0, BLOCK)
        k = load_rows(key, token, tokens, key_n, D, BLOCK_D)
        for m in tl.static_range(M):
            q = load_vector(query + m * query_m, D, BLOCK_D) * scale
            logits = tl.where(token < tokens, products(q, k), float("-inf"))
            before = take(largest, index == m)
            now = tl.maximum(before, tl.max(logits, 0))
            sums = take(total, index == m) * tl.exp(before - now) + tl.sum(tl.exp(logits - now), 0)
            largest, total = put(largest, index == m, now), put(total, index == m, sums)

    # where there is one block the compiler keeps keys and logits of the first sweep
    sums = tl.zeros((MP, BLOCK_D), tl.float32)
    for block in range(BLOCKS):
        token = block * BLOCK + tl.arange(0, BLOCK)
        k = load_rows(key, token, tokens, key_n, D, BLOCK_D)
        v = load_rows(value, token, tokens, value_n, D, BLOCK_D).to(tl.float32)
        for m in tl.static_range(M):
            q = load_vector(query + m * query_m, D, BLOCK_D) * scale
            logits = tl.where(token < tokens, products(q, k), float("-inf"))
            p = tl.exp(logits - take(largest, index == m)) / take(total, index == m)
            sums += tl.where((index == m)[:, None], tl.sum(p[:, None] * v, 0)[None, :], 0.0)
            if m == 0:
                tl.store(rows + token - prefix, p, mask=(token >= prefix) & (token < tokens))
    inside = (index < M)[:, None] & (channel < D)[None, :]
    tl.store(out + index[:, None] * (heads * D) + channel[None, :], sums.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["tokens"])
def attention_backward_kernel(
    query,  # [B, H, M, d], strided
    key,  # [B, H, N, d], strided
    value,  # [B, H, N, d], strided
    d_out,  # [B, H, M, d], strided
    d_rows,  # [B, H, N - prefix] float32
    d_query,  # [B, M, H, d]
    d_key,  # [B, N, H, d]
    d_value,  # [B, N, H, d]
    tokens, prefix, scale,
    query_b, query_h, query_m, key_b, key_h, key_n, value_b, value_h, value_n, out_b, out_h, out_m,
    M: tl.constexpr, MP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    head, heads = tl.program_id(0), tl.num_programs(0)
    image = tl.program_id(1).to(tl.int64)
    query += image * query_b + head * query_h
    key += image * key_b + head * key_h
    value += image * value_b + head * value_h
    d_out += image * out_b + head * out_h
    d_rows += (image * heads + head) * (tokens - prefix)
    d_query += image * (M * heads * D) + head * D
    d_key += image * tokens * (heads * D) + head * D
    d_value += image * tokens * (heads * D) + head * D
    index, channel = tl.arange(0, MP), tl.arange(0, BLOCK_D)

    largest, total = tl.full((MP,), float("-inf"), tl.float32), tl.zeros((MP,), tl.float32)
    delta = tl.zeros((MP,), tl.float32)  # sum of p dp, not divided by the total yet
    for block in range(BLOCKS):
        token = block * BLOCK + tl.arange(0, BLOCK)
        k = load_rows(key, token, tokens, key_n, D, BLOCK_D)
        v = load_rows(value, token, tokens, value_n, D, BLOCK_D)
        for m in tl.static_range(M):
            q = load_vector(query + m * query_m, D, BLOCK_D) * scale
            logits = tl.where(token < tokens, products(q, k), float("-inf"))
            dp = products(load_vector(d_out + m * out_m, D, BLOCK_D), v)
            if m == 0:
                dp += tl.load(d_rows + token - prefix, mask=(token >= prefix) & (token < tokens), other=0.0)
            before = take(largest, index == m)
            now = tl.maximum(before, tl.max(logits, 0))
            powers, fade = tl.exp(logits - now), tl.exp(before - now)
            total = put(total, index == m, take(total, index == m) * fade + tl.sum(powers, 0))
            delta = put(delta, index == m, take(delta, index == m) * fade + tl.sum(powers * dp, 0))
            largest = put(largest, index == m, now)

    sums = tl.zeros((MP, BLOCK_D), tl.float32)
    for block in range(BLOCKS):
        token = block * BLOCK + tl.arange(0, BLOCK)
        k = load_rows(key, token, tokens, key_n, D, BLOCK_D)
        v = load_rows(value, token, tokens, value_n, D, BLOCK_D)
        dk, dv = tl.zeros((BLOCK, BLOCK_D), tl.float32), tl.zeros((BLOCK, BLOCK_D), tl.float32)
        for m in tl.static_range(M):
            q = load_vector(query + m * query_m, D, BLOCK_D) * scale
            g = load_vector(d_out + m * out_m, D, BLOCK_D)
            logits = tl.where(token < tokens, products(q, k), float("-inf"))
            dp = products(g, v)
            if m == 0:
                dp += tl.load(d_rows + token - prefix, mask=(token >= prefix) & (token < tokens), other=0.0)
            over = 1 / take(total, index == m)
            p = tl.exp(logits - take(largest, index == m)) * over
            ds = p * (dp - take(delta, index == m) * over)
            dk += ds[:, None] * q[None, :]
            dv += p[:, None] * g[None, :]
            dq = tl.sum(ds[:, None] * k.to(tl.float32), 0) * scale
            sums += tl.where((index == m)[:, None], dq[None, :], 0.0)
        inside = (token < tokens)[:, None] & (channel < D)[None, :]
        at = token[:, None] * (heads * D) + channel[None, :]
        tl.store(d_key + at, dk.to(d_key.dtype.element_ty), mask=inside)
        tl.store(d_value + at, dv.to(d_value.dtype.element_ty), mask=inside)
    inside = (index < M)[:, None] & (channel < D)[None, :]
    tl.store(d_query + index[:, None] * (heads * D) + channel[None, :], sums.to(d_query.dtype.element_ty), mask=inside)


def power_of_two(number: int) -> int:
    """The next power of two, ``number`` itself if it is one."""
    return 1 << (number - 1).bit_length()


def sides_of(query: Tensor, tokens: int, config: Config) -> dict[str, Any]:
    """Constants of both kernels."""
    queries, width = query.shape[2:]
    block_d = power_of_two(width)
    # rows that do not start at multiples of 16 bytes are loaded in pieces, each with an address of its own
    spare = TILE_BYTES // power_of_two(queries) // (4 if width * query.element_size() % 16 else 1)
    block = min(config.block, power_of_two(tokens), max(32, spare // (block_d * query.element_size())))
    sides = {"M": queries, "MP": power_of_two(queries), "D": width, "BLOCK_D": block_d}
    return {**sides, "BLOCK": block, "BLOCKS": triton.cdiv(tokens, block)}


def strides_of(**tensors: Tensor) -> dict[str, int]:
    """``name_b``, ``name_h`` and ``name_m`` or ``name_n``: how far apart images, heads and tokens are."""
    last = {"query": "m", "out": "m", "key": "n", "value": "n"}
    return {
        f"{name}_{letter}": stride
        for name, tensor in tensors.items()
        for letter, stride in zip(("b", "h", last[name]), tensor.stride(), strict=False)
    }


def attention_launch(
    query: Tensor, key: Tensor, value: Tensor, prefix: int, scale: float | None = None, config: Config | None = None
) -> tuple[Launch, Tensor, Tensor]:
    """Launch of the forward, and the tensors it fills: ``out`` and ``rows``."""
    batch, heads, queries, _ = query.shape
    tokens = key.shape[2]
    out = token_major(query, queries)
    rows = query.new_empty(batch, heads, tokens - prefix, dtype=torch.float32)
    kind = power_of_two(tokens)
    config = config or best("cls_attention", kind, lambda c: attention_launch(query, key, value, prefix, scale, c)[0])
    sides = sides_of(query, tokens, config)
    arguments: Arguments = {"query": query, "key": key, "value": value, "out": out, "rows": rows}
    arguments |= {"tokens": tokens, "prefix": prefix, "scale": scale_of(query, scale)}
    arguments |= strides_of(query=query, key=key, value=value)
    return Launch(attention_kernel, (heads, batch), arguments, sides, config.warps), out, rows


def attention_backward_launch(
    inputs: tuple[Tensor, Tensor, Tensor],
    d_out: Tensor,
    d_rows: Tensor,
    scale: float | None = None,
    config: Config | None = None,
) -> tuple[Launch, tuple[Tensor, Tensor, Tensor]]:
    """Launch of the backward, and the gradients it fills; ``inputs``: query, key, value."""
    query, key, value = inputs
    batch, heads, queries, _ = query.shape
    tokens = key.shape[2]
    gradients = token_major(query, queries), token_major(query, tokens), token_major(query, tokens)
    tensors, kind = (inputs, d_out, d_rows), power_of_two(tokens)
    config = config or best("cls_attention_backward", kind, lambda c: attention_backward_launch(*tensors, scale, c)[0])
    sides = sides_of(query, tokens, config)
    arguments: Arguments = {"query": query, "key": key, "value": value, "d_out": d_out, "d_rows": d_rows}
    arguments |= dict(zip(("d_query", "d_key", "d_value"), gradients, strict=True))
    arguments |= {"tokens": tokens, "prefix": tokens - d_rows.shape[2], "scale": scale_of(query, scale)}
    arguments |= strides_of(query=query, key=key, value=value, out=d_out)
    return Launch(attention_backward_kernel, (heads, batch), arguments, sides, config.warps), gradients


def token_major(query: Tensor, tokens: int) -> Tensor:
    """Fresh memory ``[B, H, tokens, d]``, laid out ``[B, tokens, H, d]``."""
    batch, heads, _, width = query.shape
    return query.new_empty(batch, tokens, heads, width).transpose(1, 2)


def dense_rows(tensor: Tensor) -> Tensor:
    """The tensor, copied only where its last dimension is strided."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def unsupported(query: Tensor, key: Tensor, value: Tensor) -> str | None:
    """Why the kernels cannot take these tensors, None if they can."""
    if not query.dtype == key.dtype == value.dtype:
        return "query, key and value of different dtypes"
    if query.dtype == torch.float64:
        return "float64 has no kernel"
    if query.shape[2] > MOST_QUERIES:
        return f"{query.shape[2]} queries, the kernel takes up to {MOST_QUERIES}"
    if query.shape[3] > MOST_WIDTH:
        return f"heads {query.shape[3]} wide, the kernel takes up to {MOST_WIDTH}"
    if key.shape[2] > MOST_TOKENS:
        return f"{key.shape[2]} tokens, the kernel takes up to {MOST_TOKENS}"
    return None


@torch.library.custom_op("smi_fast::cls_attention", mutates_args=())
def _attend(query: Tensor, key: Tensor, value: Tensor, prefix: int, scale: float) -> tuple[Tensor, Tensor]:
    """The kernel; where it cannot run, the reference."""
    if why_not_triton(query) or unsupported(query, key, value):
        out, rows = rows_reference(query, key, value, prefix, scale)
        return token_major(value, query.shape[2]).copy_(out), rows.contiguous()
    launch, out, rows = attention_launch(dense_rows(query), dense_rows(key), dense_rows(value), prefix, scale)
    launch.run()
    return out, rows


@_attend.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, prefix: int, scale: float) -> tuple[Tensor, Tensor]:
    batch, heads, queries, _ = query.shape
    exact = torch.promote_types(query.dtype, torch.float32)
    return token_major(value, queries), query.new_empty(batch, heads, key.shape[2] - prefix, dtype=exact)


@torch.library.custom_op("smi_fast::cls_attention_backward", mutates_args=())
def _attend_backward(
    query: Tensor, key: Tensor, value: Tensor, d_out: Tensor, d_rows: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The kernel; where it cannot run, the reference."""
    if why_not_triton(query) or unsupported(query, key, value):
        d_query, d_key, d_value = cls_attention_backward_reference(query, key, value, d_out, d_rows, scale)
        tokens = key.shape[2]
        return (
            token_major(query, query.shape[2]).copy_(d_query),
            token_major(key, tokens).copy_(d_key),
            token_major(value, tokens).copy_(d_value),
        )
    query, key, value, d_out = (dense_rows(tensor) for tensor in (query, key, value, d_out))
    launch, gradients = attention_backward_launch((query, key, value), d_out, d_rows.contiguous(), scale)
    launch.run()
    return gradients


@_attend_backward.register_fake
def _(
    query: Tensor, key: Tensor, value: Tensor, d_out: Tensor, d_rows: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    tokens = key.shape[2]
    return token_major(query, query.shape[2]), token_major(key, tokens), token_major(value, tokens)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, ctx.prefix, ctx.scale = inputs
    ctx.save_for_backward(query, key, value)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, d_out: Tensor | None, d_rows: Tensor | None) -> tuple[Tensor | None, ...]:
    query, key, value = ctx.saved_tensors
    if d_out is None:
        d_out = torch.zeros_like(query, dtype=value.dtype)
    if d_rows is None:
        exact = torch.promote_types(query.dtype, torch.float32)
        d_rows = query.new_zeros(*query.shape[:2], key.shape[2] - ctx.prefix, dtype=exact)
    return (*_attend_backward(query, key, value, d_out, d_rows, ctx.scale), None, None)


_attend.register_autograd(_backward, setup_context=_save_for_backward)


def cls_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix: int,
    *,
    scale: float | None = None,
    impl: Impl | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of the query tokens over all tokens, and the CLS scores.

    Args:
        query: ``[B, H, M, d]``, CLS at ``m = 0``.
        key, value: ``[B, H, N, d]``; any strides.
        prefix: how many of the ``N`` tokens are not patches.
        scale: of the logits; None for ``1 / sqrt(d)``.
        impl: see ``dispatch.py``. The kernel takes one dtype of at most 32 bits, up to 8 queries, 256 channels and
            2048 tokens.

    Returns:
        out: ``[B, H, M, d]`` in the dtype of ``value``; score: ``[B, N - prefix]`` float32 (float64 for float64).

    Raises:
        ValueError: a prefix out of range; a scale that is not finite; a shape, dtype, device or ``impl`` that does not
            fit.
    """
    expected = {
        "query": (query, "B H M d", FLOATS),
        "key": (key, "B H N d", FLOATS),
        "value": (value, "B H N d", FLOATS),
    }
    tokens = check("cls_attention", expected)["N"]
    if not 0 <= prefix <= tokens:
        raise ValueError(f"cls_attention: prefix={prefix}: must lie in 0..{tokens}, the tokens")
    scale = scale_of(query, scale)
    if choose("cls_attention", impl, query, unsupported(query, key, value)) == "torch":
        return cls_attention_reference(query, key, value, prefix, scale)
    out, rows = _attend(query, key, value, prefix, scale)
    return out, rows.mean(1)
