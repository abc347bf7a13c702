"""``smi-fast doctor``: what this machine has, and what works on it."""

import os
import shutil
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch._inductor.runtime.cache_dir_utils import cache_dir

from smi_fast.engine.compiler import why_not_compile
from smi_fast.kernels.dispatch import KERNELS_VARIABLE, why_not_triton
from smi_fast.model.fp8 import why_not_fp8
from smi_fast.report import device_name
from smi_fast.versions import versions


def doctor() -> None:
    """Report versions, device, whether compilation and Triton work, and the compile cache."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    table = Table(show_header=False)
    for name, value in versions().items():
        table.add_row(name, value)
    table.add_row("device", device_name(device))
    table.add_row("CUDA", f"{torch.version.cuda}, {torch.cuda.device_count()} devices" if cuda else "no device")
    table.add_row("C++ compiler", shutil.which(os.environ.get("CXX", "g++")) or "none found")
    reason = why_not_compile(device.type)
    table.add_row("torch.compile", "works" if reason is None else f"does not work, runs eager: {reason}")
    table.add_row("kernels", _kernels(device))
    table.add_row("fp8", why_not_fp8(device) or "works")
    folder = Path(cache_dir())
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    table.add_row("compile cache", f"{folder}, {size / 2**20:.0f} MiB (set TORCHINDUCTOR_CACHE_DIR to move it)")
    Console().print(table)


def _kernels(device: torch.device) -> str:
    """What the ops run on, and why."""
    switch = os.environ.get(KERNELS_VARIABLE, "auto")
    reason = f"{KERNELS_VARIABLE}={switch}" if switch == "torch" else why_not_triton(torch.empty(0, device=device))
    return "Triton" if reason is None else f"plain torch: {reason}"
