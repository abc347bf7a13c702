"""Inductor: what it compiles, where it keeps that, and whether it works on this machine."""

import functools
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._inductor.runtime.cache_dir_utils import default_cache_dir
from torch.fx.experimental.proxy_tensor import make_fx

from smi_fast.storage.environment import cache_home

CACHE_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"


def user_chose_cache() -> bool:
    """Did the user name a folder? PyTorch puts its own default into the variable when inductor is imported."""
    return os.environ.get(CACHE_VARIABLE) not in (None, default_cache_dir())


def use_private_cache() -> Path | None:
    """Let inductor keep compiled graphs in a folder that belongs to this user and outlives a reboot.

    PyTorch's default lies in the system's temporary folder. A folder that the user chose stays. Sets
    ``TORCHINDUCTOR_CACHE_DIR`` for this process and those that it starts.

    Returns:
        The folder; None where it cannot be made, and PyTorch's default is used.
    """
    if not user_chose_cache():
        folder = cache_home() / f"inductor-{torch.__version__}"
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError:
            return None
        if not os.access(folder, os.W_OK | os.X_OK):
            return None
        os.environ[CACHE_VARIABLE] = str(folder)
    return Path(os.environ[CACHE_VARIABLE])


def compile_graph(graph: torch.fx.GraphModule, example: Sequence[Tensor]) -> Callable[..., Any]:
    """Compile a graph for the shapes of its inputs; raises whatever inductor raises."""
    use_private_cache()
    # small kernels that do not wait for each other are one launch; inductor has this for GPUs alone
    joined = {"combo_kernels": any(tensor.is_cuda for tensor in example)}
    with torch.no_grad(), torch._inductor.config.patch(joined):
        return torch._inductor.standalone_compile(graph, [*example], dynamic_shapes="from_example_inputs")


@functools.cache
def why_not_compile(device_type: str) -> str | None:
    """None where inductor works on this machine, else the reason, in one line."""

    def probe(x: Tensor) -> Tensor:
        return (x * 2).relu()

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ones = torch.ones(16, device=device_type)
            compile_graph(make_fx(probe)(ones), (ones,))(ones)
    except Exception as error:
        # whatever breaks here (no compiler, no headers, a read-only cache) means the same: this machine cannot compile
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"
    return None
