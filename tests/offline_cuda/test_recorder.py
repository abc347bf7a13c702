"""The stand-in itself: two devices whose copies are real and whose kernels do nothing, and what it writes down."""

from collections.abc import Callable

import pytest
import torch

from tests.offline_cuda.recorder import Recorder, Row
from tests.offline_cuda.scenarios import DEVICE

pytestmark = pytest.mark.offline_cuda
MIB = 2**20


@pytest.fixture
def rows_of(recorder: Recorder) -> Callable[[Callable[[], object]], list[Row]]:
    """What a function tells the devices, when it is called a second time."""

    def run(function: Callable[[], object]) -> list[Row]:
        function()
        recorder.reset()
        function()
        return recorder.rows()

    return run


def test_devices_and_copies(recorder: Recorder) -> None:
    assert torch.cuda.device_count() == 2
    assert torch.cuda.get_device_capability() == (9, 0)
    numbers = torch.arange(100.0)
    assert torch.equal(numbers.to(DEVICE).clone().cpu(), numbers)
    assert float(torch.ones((), device=DEVICE)) == 0.0  # no kernel has filled it


def test_rows(rows_of: Callable[[Callable[[], object]], list[Row]]) -> None:
    left, right = torch.ones(48, 32, device=DEVICE), torch.ones(32, 16, device=DEVICE)
    (product,) = [row for row in rows_of(lambda: left @ right) if row.kind == "PRODUCT"]
    assert (product.m, product.n, product.k, product.batch) == (16, 48, 32, 1)  # column-major
    batched = torch.ones(5, 48, 32, device=DEVICE)
    (product,) = [row for row in rows_of(lambda: batched @ right.expand(5, -1, -1)) if row.kind == "PRODUCT"]
    assert product.m * product.n * product.k * product.batch == 5 * 48 * 32 * 16
    (kernel,) = [row for row in rows_of(lambda: left + 1) if row.kind == "KERNEL"]
    assert "elementwise" in kernel.name
    assert kernel.block[0] * kernel.grid[0] > 0
    (copy,) = [row for row in rows_of(left.clone) if row.kind == "COPY"]
    assert (copy.name, copy.bytes) == ("device to device", left.nbytes)
    kinds = {row.kind for row in rows_of(left.cpu)}
    assert {"COPY", "WAIT"} <= kinds


def test_memory_is_limited(recorder: Recorder) -> None:
    free, total = torch.cuda.mem_get_info()
    with recorder.memory_of(total - free + 64 * MIB):
        torch.empty(32 * MIB, dtype=torch.uint8, device=DEVICE)
        with pytest.raises(torch.OutOfMemoryError):
            torch.empty(128 * MIB, dtype=torch.uint8, device=DEVICE)
    torch.empty(128 * MIB, dtype=torch.uint8, device=DEVICE)


def test_calls_fail_as_often_as_was_asked_for(recorder: Recorder) -> None:
    # PyTorch's allocator asks three times, having given back what it can
    with recorder.failing("memory", times=3):
        with pytest.raises(torch.OutOfMemoryError):
            torch.empty(2048 * MIB, dtype=torch.uint8, device=DEVICE)
        torch.empty(2048 * MIB, dtype=torch.uint8, device=DEVICE)
    with recorder.failing("memory"):
        pass
    torch.empty(4096 * MIB, dtype=torch.uint8, device=DEVICE)
    assert sum(row.kind == "MALLOC" for row in recorder.rows()) == 5


@pytest.mark.parametrize("number", range(2))
def test_rows_name_their_device(recorder: Recorder, number: int) -> None:
    tensor = torch.empty(8, device=f"cuda:{number}")
    recorder.reset()
    tensor.add_(1)
    assert {row.device for row in recorder.rows()} == {number}
