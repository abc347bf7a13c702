"""``cls_attention``: the attention rows of a few query tokens, and the CLS score, with no ``[N, N]`` matrix.

    p[b, h, m, :] = softmax(q[b, h, m] . k[b, h, :] / sqrt(d))        float32
    out[b, h, m]  = sum_n p[b, h, m, n] v[b, h, n]
    score[b, k]   = mean_h p[b, h, 0, prefix + k]

The queries are the tokens that the head reads (CLS first); keys and values are all tokens. The score is the
post-softmax attention from CLS to each kept patch: it is not normalised again over the patches.
"""

import torch
from torch import Tensor


def cls_attention_reference(query: Tensor, key: Tensor, value: Tensor, prefix: int) -> tuple[Tensor, Tensor]:
    """Plain torch; shapes as in `cls_attention`."""
    exact = torch.promote_types(query.dtype, torch.float32)
    scaled = query.to(exact) * query.shape[-1] ** -0.5
    row = (scaled @ key.to(exact).transpose(-2, -1)).softmax(-1)  # [B, H, M, N]
    return row.to(value.dtype) @ value, row[:, :, 0, prefix:].mean(1)


def cls_attention(query: Tensor, key: Tensor, value: Tensor, prefix: int) -> tuple[Tensor, Tensor]:
    """Attention of the query tokens over all tokens, and the CLS scores.

    Args:
        query: ``[B, H, M, d]``, CLS at ``m = 0``.
        key, value: ``[B, H, N, d]``.
        prefix: how many of the ``N`` tokens are not patches.

    Returns:
        out: ``[B, H, M, d]`` in the dtype of ``value``; score: ``[B, N - prefix]`` float32 (float64 for float64).
    """
    return cls_attention_reference(query, key, value, prefix)
