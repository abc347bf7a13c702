"""Where compiled graphs are kept from one process to the next."""

import os
from pathlib import Path

import torch
from torch._inductor.runtime.cache_dir_utils import default_cache_dir

VARIABLE = "TORCHINDUCTOR_CACHE_DIR"


def cache_home() -> Path:
    """The folder of all that this package keeps: ``$XDG_CACHE_HOME/smi_fast``, or ``~/.cache/smi_fast``."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "smi_fast"


def user_chose() -> bool:
    """Did the user name a folder? PyTorch puts its own default into the variable when inductor is imported."""
    return os.environ.get(VARIABLE) not in (None, default_cache_dir())


def use_private_cache() -> Path | None:
    """Let inductor keep its cache in a folder of this user alone that outlives a reboot, unless the user chose one.

    PyTorch's default lies in the system's temporary folder. Sets ``TORCHINDUCTOR_CACHE_DIR`` for this process and those
    that it starts. None, and PyTorch's default, where the folder cannot be made.
    """
    if not user_chose():
        folder = cache_home() / f"inductor-{torch.__version__}"
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError:
            return None
        if not os.access(folder, os.W_OK | os.X_OK):
            return None
        os.environ[VARIABLE] = str(folder)
    return Path(os.environ[VARIABLE])
