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
    _declare_ops(graph)
    # small kernels that do not wait for each other are one launch; inductor has this for GPUs alone
    joined = {"combo_kernels": any(tensor.is_cuda for tensor in example)}
    with torch.no_grad(), torch._inductor.config.patch(joined):
        return torch._inductor.standalone_compile(graph, [*example], dynamic_shapes="from_example_inputs")


def _declare_ops(graph: torch.fx.GraphModule) -> None:
    """Tell inductor of a graph's custom ops before it looks at the graph, as it would when it met each of them.

    An op needs its inputs in memory. What inductor learns halfway changes only what comes behind, so that the first
    graph of a process would differ from later ones. And torch 2.11 writes out the arguments of an op that it does not
    know, for a log that nobody reads: with every op before it that has two results, that takes twice as long.
    """
    from torch._inductor.lowering import lowerings, make_fallback, tag_to_layout_constraint
    from torch._library.utils import get_layout_constraint_tag, is_builtin

    for node in graph.graph.nodes:
        op = node.target
        if isinstance(op, torch._ops.OpOverload) and not is_builtin(op) and op not in lowerings:
            make_fallback(op, layout_constraint=tag_to_layout_constraint(get_layout_constraint_tag(op)))


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
