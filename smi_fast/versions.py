"""Versions of what a result depends on."""

import platform
from importlib.metadata import PackageNotFoundError, version

__version__ = "0.1.0"
PACKAGES = ("torch", "triton", "torchao", "timm", "numpy", "safetensors")


def versions() -> dict[str, str]:
    """Of smi_fast, Python, and the libraries that take part in a result."""
    found = {"smi_fast": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # triton, off Linux; torchao, an extra
            continue
    return found
