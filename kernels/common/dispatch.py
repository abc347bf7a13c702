"""Which implementation of an op runs: the Triton kernel, or the plain torch reference.

Every op with a kernel takes ``impl``: ``"triton"``, ``"torch"``, or None for the best one that the input and the
machine allow. The environment variable ``SMI_FAST_KERNELS`` decides for all calls with None:

    auto     (default) Triton on CUDA tensors, torch elsewhere; a CUDA input without a kernel warns once and runs torch
    torch    all kernels off
    triton   kernels or an error, on CPU tensors too where Triton's interpreter runs (``TRITON_INTERPRET=1``)

Behind it may stand ops that run in plain torch whatever else does: ``SMI_FAST_KERNELS="auto -mlp -tile_attention"``.
"""

import functools
import os
import warnings
from typing import Any, Literal

from torch import Tensor

try:
    import triton
    import triton.language as tl

    HAS_TRITON = True
except ImportError:  # not available on this system: the kernels' sources must still import

    class _NoTriton:
        """``@jit`` leaves a function as it is; it is never called."""

        constexpr = None

        def jit(self, function: Any = None, **_: Any) -> Any:
            return function if function is not None else lambda later: later

    triton = tl = _NoTriton()
    HAS_TRITON = False

__all__ = ["HAS_TRITON", "INTERPRETED", "KERNELS_VARIABLE", "Impl", "choose", "tl", "triton", "why_not_triton"]

Impl = Literal["triton", "torch"]
KERNELS_VARIABLE = "SMI_FAST_KERNELS"
SWITCHES = ("auto", "torch", "triton")
# whose kernel can be left out
OPS = (
    "adam_update", "add_layer_norm", "cls_attention", "composite", "first_failure", "kept_statistics", "mlp",
    "packed_tile_attention", "patch_gather", "patch_mask", "patch_scatter", "patch_ungather", "record_step", "remap",
    "select_patches", "tile_attention", "total_variation",
)  # fmt: skip
# Triton reads it when a kernel is decorated, that is, on import
INTERPRETED = HAS_TRITON and os.environ.get("TRITON_INTERPRET") == "1"


def why_not_triton(tensor: Tensor) -> str | None:
    """None where kernels can run on the device of a tensor, else the reason."""
    if not HAS_TRITON:
        return "Triton is not installed"
    if tensor.device.type == "cuda" or (tensor.device.type == "cpu" and INTERPRETED):
        return None
    return f"no kernels for tensors on {tensor.device.type!r}" + (
        " without TRITON_INTERPRET=1" if tensor.device.type == "cpu" else ""
    )


def read_switch(text: str) -> tuple[str, frozenset[str]]:
    """The first word of ``SMI_FAST_KERNELS``, and the ops whose kernel is left out.

    Raises:
        ValueError: another word, or an op that has no kernel.
    """
    words = text.split()
    if not words or words[0] not in SWITCHES:
        raise ValueError(f"{KERNELS_VARIABLE}={text!r}: must be 'auto', 'torch' or 'triton'")
    for word in words[1:]:
        if not word.startswith("-") or word[1:] not in OPS:
            raise ValueError(f"{KERNELS_VARIABLE}={text!r}: {word!r} must be '-' and one of {', '.join(OPS)}")
    return words[0], frozenset(word[1:] for word in words[1:])


def choose(op: str, impl: Impl | None, tensor: Tensor, unsupported: str | None = None) -> Impl:
    """The implementation of one call.

    Args:
        op: name of the op, for messages.
        impl: what the caller asked for.
        tensor: any input; its device counts.
        unsupported: why the kernel cannot take this input (dtype, width), None if it can.

    Raises:
        ValueError: an unknown ``impl``, or kernels asked for by name that cannot run; says why.
    """
    if impl not in ("triton", "torch", None):
        raise ValueError(f"impl={impl!r}: must be 'triton', 'torch' or None")
    switch, left_out = read_switch(os.environ.get(KERNELS_VARIABLE, "auto"))
    wanted = impl or ("torch" if op in left_out else switch)
    if wanted == "torch":
        return "torch"
    reason = why_not_triton(tensor) or unsupported
    if wanted == "triton":
        if reason:
            raise ValueError(f"{op}: impl='triton' cannot run: {reason}")
        return "triton"
    if tensor.device.type != "cuda":
        return "torch"
    if reason:
        _warn_once(f"{op}: plain torch runs instead of the kernel: {reason}")
        return "torch"
    return "triton"


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, stacklevel=4)
