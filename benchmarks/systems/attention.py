"""PyTorch's own attention, held to one named back end, for the yard-stick loop and the references of kernels.

Left to itself, PyTorch takes cuDNN on some devices, whose backward returned NaN at these lengths in torch 2.11, and
what a benchmark compares with would differ from one machine to the next.
"""

from torch import Tensor

from smi_fast.model.attention import attention, why_not

BACKENDS = ("flash", "efficient", "math")  # the first that can run is taken; cuDNN is none of them


def backend_of(query: Tensor) -> str:
    """The back end for ``query [B, H, N, d]`` and keys of its dtype."""
    return next(name for name in BACKENDS if why_not(name, query) is None)


def torch_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """``softmax(q k^T / sqrt(d)) v`` by the back end of `backend_of`.

    ``SMI_FAST_ATTENTION`` counts here too, as it does for every call. A compiler sees what the back end calls.

    Args:
        query, key, value: ``[B, H, N, d]``, of one floating dtype.

    Returns:
        ``[B, H, N, d]`` in that dtype.
    """
    return attention(query, key, value, choice=backend_of(query))
