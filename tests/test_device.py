"""What counts as memory that ran out, whoever says so."""

import pytest
import torch

from smi_fast.device import current, out_of_memory, wait


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        torch.AcceleratorError("CUDA error: out of memory"),  # the instantiation of a graph
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
    ],
    ids=str,
)
def test_memory_ran_out(error: Exception) -> None:
    assert out_of_memory(error)
    later = ValueError("the end of a capture that is broken")
    later.__context__ = error
    assert out_of_memory(later), "it was raised on the way out"


@pytest.mark.parametrize(
    "error",
    [
        None,
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        ValueError("out of memory"),
        KeyboardInterrupt(),
    ],
    ids=str,
)
def test_something_else(error: BaseException | None) -> None:
    assert not out_of_memory(error)


def test_a_cpu_needs_nothing() -> None:
    wait(torch.device("cpu"))
    with current(torch.device("cpu")):
        assert torch.ones(1).sum() == 1
