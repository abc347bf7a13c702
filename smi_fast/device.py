"""What a CUDA device needs to be told, and how it says that its memory is full; a CPU needs none of it."""

import contextlib
import functools
import threading
from contextlib import AbstractContextManager

import torch

# what a driver call, cuBLAS or Triton says, whose errors have no class of their own
NO_MEMORY = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUBLAS_STATUS_NOT_INITIALIZED")


def out_of_memory(error: BaseException | None) -> bool:
    """Did the device's memory run out?

    PyTorch's allocator raises `torch.OutOfMemoryError`. A CUDA graph that is instantiated, a cuBLAS handle that is
    created and a Triton kernel that is loaded take memory too, and raise a ``RuntimeError`` that says so in words. An
    error that was raised while such a one was handled counts as well.
    """
    while error is not None:
        if isinstance(error, torch.OutOfMemoryError):
            return True
        if isinstance(error, RuntimeError) and any(words in str(error) for words in NO_MEMORY):
            return True
        error = error.__cause__ or error.__context__
    return False


def current(device: torch.device) -> AbstractContextManager[object]:
    """A block in which ``device`` is CUDA's current device; each thread starts out on device 0."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def wait(device: torch.device) -> None:
    """Let the host wait until a CUDA device has done all that was launched on it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def release(device: torch.device) -> None:
    """Give the memory back to a CUDA device that PyTorch keeps for later; streams do not share what is kept."""
    if device.type == "cuda":
        with current(device):
            torch.cuda.empty_cache()


# one stream is captured on by one thread at a time
capturing = threading.RLock()


@functools.cache
def side_stream(device: torch.device) -> torch.cuda.Stream:
    """The one stream beside the default one, on which captures are made.

    cuBLAS keeps a workspace of 32 MiB for each stream it has met, for the life of the process.
    """
    return torch.cuda.Stream(device)
