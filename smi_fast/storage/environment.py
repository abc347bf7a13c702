"""What a result depends on besides its inputs: versions, the device and what it can do, and its cache folder."""

import functools
import os
import platform
import resource
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

__version__ = "0.1.0"
PACKAGES = ("torch", "triton", "torchao", "timm", "numpy", "safetensors")


def versions() -> dict[str, str]:
    """The versions of smi_fast, Python, and the libraries that take part in a result."""
    found = {"smi_fast": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # triton is for Linux alone, torchao is an extra
            continue
    return found


def device_name(device: torch.device) -> str:
    """The device in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"


@functools.cache
def processor() -> str:
    """The processor's name and its widest units for bf16, such as ``"AMD EPYC, no bf16 units"``."""
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):  # not Linux
        pass
    return f"{name}, {'with' if has_bf16_units() else 'no'} bf16 units"


@functools.cache
def has_bf16_units() -> bool:
    """Does this processor multiply bf16 in hardware (AVX-512 BF16, AMX, or Arm's BF16)?

    Without such units a bf16 product ran 7 times slower than float32.
    """
    if platform.machine().lower() in ("arm64", "aarch64"):
        try:
            return " bf16" in Path("/proc/cpuinfo").read_text()
        except OSError:
            return False
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def bf16_is_fast(device: torch.device) -> bool:
    """Is bf16 at least as fast as float32 on this device?"""
    return device.type == "cuda" or has_bf16_units()


def peak_memory_bytes(device: torch.device) -> int:
    """Most device memory allocated so far (CUDA), or the most resident memory of this process (CPU)."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def cache_home() -> Path:
    """The folder of all that this package keeps: ``$XDG_CACHE_HOME/smi_fast``, or ``~/.cache/smi_fast``."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "smi_fast"
