"""The cases of the kernels' benchmark are what they say: kernel and reference agree on a small shape."""

import pytest
import torch

from benchmarks.speed.kernel_cases import Shape
from benchmarks.speed.kernels import all_ops, check
from smi_fast.kernels.common.grid import Grid
from tests.kernels.cases import DEVICE, DTYPES, SEED

pytestmark = pytest.mark.kernel


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kernels_agree_with_references(dtype: torch.dtype) -> None:
    shape = Shape(Grid(16, 24, 8), 2, 4, dtype, 2, DEVICE)
    ops = all_ops(shape)
    assert len({op.name for op in ops}) == len(ops) == (16 if dtype == torch.float32 else 18)
    for op in ops:
        draw = torch.Generator(DEVICE).manual_seed(SEED)
        check(op, op.kernel, "triton", draw)
        with pytest.raises(AssertionError, match="is off by"):
            check(op, lambda *args, op=op: _spoiled(op.kernel(*args)), "spoiled", draw)


def _spoiled(result: torch.Tensor | tuple[torch.Tensor, ...]) -> torch.Tensor | tuple[torch.Tensor, ...]:
    if isinstance(result, tuple):
        return (*result[:-1], result[-1] * 2 + 1)
    return result * 2 + 1
