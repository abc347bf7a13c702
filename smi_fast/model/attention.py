"""Self-attention without a mask, and what computes it.

    "flash", "efficient", "math"  PyTorch's own, each called by its name
    "tile"                        the kernel of `tile_attention`, for few tokens; in plain torch on a CPU
    "plain"                       written out, with the whole matrix of weights

The environment variable ``SMI_FAST_ATTENTION`` names one for all calls, else the caller may (`SparseViT` does so for
each number of tokens, see `SparseViT.choose_attention`), else the device and dtype decide:

    CPU                         "plain"
    CUDA, 16 bits               "tile" up to 256 tokens, else "flash"
    CUDA otherwise              "efficient"

and where that cannot run, the next of "flash", "efficient" and "math" that can. "tile" comes first by count: it
writes the gradients of query, key and value in one piece, which the others' are copied into, and its backward is one
kernel where that of "flash" is three. None has been timed on a device; ``smi-fast tune`` does so.

The backward of "tile", "math" and "plain" takes its sums in the same order each time. On a GPU those of "flash" and
"efficient" add with atomics, and differ in the last bits from run to run, unless
``torch.use_deterministic_algorithms`` is on.

``F.scaled_dot_product_attention`` is not used: what it takes is decided by switches of the whole process
(``sdpa_kernel`` sets them), and another thread that attends meanwhile would be refused. On Hopper it takes cuDNN,
whose backward returned NaN at these lengths in torch 2.11.
"""

import os

import torch
import torch.nn.functional as F
from torch import Tensor

from smi_fast.kernels.common.dispatch import choose, why_not_triton
from smi_fast.kernels.tile_attention import packed_tile_attention, parts_of, tile_attention, unsupported

ATTENTION_VARIABLE = "SMI_FAST_ATTENTION"
NAMES = ("flash", "efficient", "math", "tile", "plain")
AMPERE = (8, 0)
MOST_FLASH_WIDTH, FLASH_MULTIPLE = 256, 8


def why_not(name: str, query: Tensor) -> str | None:
    """Why a choice cannot attend with ``query [B, H, N, d]`` and keys of its dtype, None if it can."""
    width, dtype = query.shape[-1], query.dtype
    if query.device.type != "cuda":
        return "there is none on a CPU" if name == "efficient" else None
    if name == "tile":
        return why_not_triton(query) or unsupported(query, query, query)
    if name == "flash":
        return _why_not_flash(query)
    if name == "efficient":
        if dtype == torch.float64:
            return "it takes no float64"
        if width * dtype.itemsize % 16:
            return f"it takes heads in multiples of 16 bytes, not {width} of {dtype}"
    return None


def _why_not_flash(query: Tensor) -> str | None:
    width, dtype = query.shape[-1], query.dtype
    if dtype.itemsize != 2:
        return f"it takes 16 bits, not {dtype}"
    if width > MOST_FLASH_WIDTH:
        return f"it takes heads up to {MOST_FLASH_WIDTH} wide, not {width}"
    found = torch.cuda.get_device_capability(query.device)
    if found < AMPERE:
        return f"it needs compute capability {AMPERE[0]}.{AMPERE[1]}, not {found[0]}.{found[1]}"
    return None


def require(source: str, name: str, query: Tensor) -> None:
    """Refuse a choice that is unknown or cannot run.

    Args:
        source: who asks for what, to begin the message with, such as ``"choice='flash'"``.
        name: the choice.
        query: ``[B, H, N, d]``, or anything of its shape, dtype and device.

    Raises:
        ValueError: with the rule, or the reason.
    """
    if name not in NAMES:
        raise ValueError(f"{source}: must be one of {', '.join(map(repr, NAMES))}")
    if reason := why_not(name, query):
        raise ValueError(f"{source}: {name!r} attention cannot run at {query.shape[-2]} tokens: {reason}")


def _settle(query: Tensor, choice: str | None) -> str:
    """The choice that counts."""
    forced = os.environ.get(ATTENTION_VARIABLE)
    if forced:
        require(f"{ATTENTION_VARIABLE}={forced!r}", forced, query)
        return forced
    if choice is not None:
        require(f"choice={choice!r}", choice, query)
        return choice
    if query.device.type != "cuda":
        return "plain"
    if query.dtype.itemsize == 2:
        if not why_not("tile", query) and choose("tile_attention", None, query) == "triton":
            return "tile"
        if not why_not("flash", query):
            return "flash"
    return "math" if why_not("efficient", query) else "efficient"


def attention(
    query: Tensor, key: Tensor, value: Tensor, *, choice: str | None = None, scale: float | None = None
) -> Tensor:
    """``softmax(scale q k^T) v``.

    Args:
        query, key, value: ``[B, H, N, d]``, of one floating dtype.
        choice: see the top of the file; None for the default.
        scale: of the logits; None for ``1 / sqrt(d)``.

    Returns:
        ``[B, H, N, d]`` in the dtype of ``value``.

    Raises:
        ValueError: a choice that is unknown, or cannot run with these tensors.
    """
    name = _settle(query, choice)
    if name == "tile":
        return tile_attention(query, key, value, scale=scale)
    if name == "plain":
        return _plain(query, key, value, scale)
    if name == "flash":
        return _flash(query, key, value, scale)
    if name == "efficient":
        return torch.ops.aten._scaled_dot_product_efficient_attention(query, key, value, None, True, scale=scale)[0]
    return torch.ops.aten._scaled_dot_product_attention_math(query, key, value, scale=scale)[0]


def _flash(query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
    """On a GPU heads are filled up with zeros to a multiple of 8, which changes no product."""
    if query.device.type == "cpu":
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, scale=scale)[0]
    width = query.shape[-1]
    if missing := -width % FLASH_MULTIPLE:
        query, key, value = (F.pad(tensor, (0, missing)) for tensor in (query, key, value))
        scale = width**-0.5 if scale is None else scale
    out = torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, scale=scale)[0]
    return out[..., :width]


def packed_attention(packed: Tensor, *, choice: str | None = None, scale: float | None = None) -> Tensor:
    """`attention` of the three parts of one projection ``[B, N, 3, H, d]``, which "tile" takes in one piece."""
    query, key, value = parts_of(packed)
    if _settle(query, choice) == "tile":
        return packed_tile_attention(packed, scale=scale)
    return attention(query, key, value, choice=choice, scale=scale)


def attention_weights(query: Tensor, key: Tensor, scale: float | None = None) -> Tensor:
    """``softmax(scale q k^T)``, written out.

    Args:
        query, key: ``[B, H, N, d]``, of one floating dtype.
        scale: of the logits; None for ``1 / sqrt(d)``.

    Returns:
        ``[B, H, N, N]`` in float32, or float64 for such tensors.
    """
    exact = torch.promote_types(query.dtype, torch.float32)
    if scale != 1:  # queries that come scaled need no product
        query = query * (query.shape[-1] ** -0.5 if scale is None else scale)
    return (query @ key.transpose(-2, -1)).to(exact).softmax(-1)


def _plain(query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
    """The default on a CPU. At 33 tokens a training step of the demo model took 1.15 s with the flash kernel and 0.71 s
    this way (two Zen 4 cores, torch 2.15); the kernel's backward is the slow part.
    """
    return attention_weights(query, key, scale).to(value.dtype) @ value
