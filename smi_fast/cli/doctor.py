"""``smi-fast doctor``: what this machine has, and what works on it."""

import os
import shutil
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch._inductor.runtime.cache_dir_utils import cache_dir

from smi_fast.kernels.common.dispatch import KERNELS_VARIABLE, read_switch, why_not_triton
from smi_fast.model.fp8 import why_not_fp8
from smi_fast.storage.environment import device_name, processor, versions
from smi_fast.storage.inductor import CACHE_VARIABLE, use_private_cache, user_chose_cache, why_not_compile
from smi_fast.tuning.settings import decide_dtype, precision_of
from smi_fast.tuning.store import all_tuned, tuned_path


def doctor() -> None:
    """Report versions, device, what works here, the compile cache, and what was tuned."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    table = Table(show_header=False)
    for name, value in versions().items():
        table.add_row(name, value)
    table.add_row("device", device_name(device))
    table.add_row("processor", processor())
    table.add_row("--dtype auto", f"{precision_of(decide_dtype(None, device))}")
    table.add_row("CUDA", f"{torch.version.cuda}, {torch.cuda.device_count()} devices" if cuda else "no device")
    table.add_row("C++ compiler", shutil.which(os.environ.get("CXX", "g++")) or "none found")
    compile_cache = _compile_cache()  # before the probe, which chooses the folder
    reason = why_not_compile(device.type)
    table.add_row("torch.compile", "works" if reason is None else f"does not work, runs eager: {reason}")
    table.add_row("kernels", _kernels(device))
    table.add_row("fp8", why_not_fp8(device) or "works")
    table.add_row("CUDA graphs", _cuda_graphs(device))
    table.add_row("compile cache", compile_cache)
    table.add_row("tuned", _tuned(device))
    Console().print(table)


def _kernels(device: torch.device) -> str:
    """What the ops run on, and why."""
    switch = os.environ.get(KERNELS_VARIABLE, "auto")
    reason = (
        f"{KERNELS_VARIABLE}={switch}"
        if read_switch(switch)[0] == "torch"
        else why_not_triton(torch.empty(0, device=device))
    )
    return "Triton" if reason is None else f"plain torch: {reason}"


def _cuda_graphs(device: torch.device) -> str:
    """Capture one addition, and see what its replay does."""
    if device.type != "cuda":
        return "no device"
    try:
        value, graph = torch.zeros(1, device=device), torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            value.add_(1)
        graph.replay()
        return "works" if value.item() == 1 else "does not work: a replay did nothing"
    except RuntimeError as error:
        return f"does not work: {str(error).splitlines()[0]}"


def _compile_cache() -> str:
    """Where graphs are kept, whose folder that is, and what lies there."""
    chosen, private = user_chose_cache(), use_private_cache()
    folder = Path(cache_dir())
    whose = (
        f"set by {CACHE_VARIABLE}"
        if chosen
        else "private"
        if private
        else "PyTorch's default, the home cache is closed"
    )
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    graphs = sum(1 for _ in folder.glob("fxgraph/*/*"))
    return f"{folder} ({whose}): {graphs} graphs, {size / 2**20:.0f} MiB; a new process starts from these"


def _tuned(device: torch.device) -> str:
    """How many choices there are for this device."""
    try:
        count = sum(tuned.key.device == device_name(device) for tuned in all_tuned())
    except ValueError as error:
        return str(error)
    return f"{count} schedules on this device, in {tuned_path()} (smi-fast tune adds one)"
