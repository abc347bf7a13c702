"""What a step notes, by its kernels against their references, bit for bit."""

import pytest
import torch
from torch import Tensor

from smi_fast.kernels.step_record import Column, Record, first_failure, record_step
from tests.kernels.cases import DEVICE, generator

pytestmark = pytest.mark.kernel
BAD = (float("nan"), float("inf"), float("-inf"))
IMAGES = 6


def gradients(dtype: torch.dtype, kept: int, values: int) -> Tensor:
    return torch.randn(IMAGES, kept, values, generator=generator(kept)).to(DEVICE, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("sides", [(1, 3), (7, 48), (46, 192)], ids=str)
@pytest.mark.parametrize("with_patches", [False, True])
def test_one_bad_value_anywhere_is_found(dtype: torch.dtype, sides: tuple[int, int], with_patches: bool) -> None:
    windows, losses = gradients(dtype, *sides), torch.ones(IMAGES, 2, device=DEVICE)
    patches = torch.ones(IMAGES, sides[0], 3, 2, 2, device=DEVICE) if with_patches else None
    failed_at = torch.tensor([-1, -1, -1, 4, -1, 9], device=DEVICE)
    iteration = torch.tensor([17], device=DEVICE)
    windows[0, -1, -1], losses[1, 1], windows[3, 0, 0] = BAD[0], BAD[1], BAD[2]
    windows[4] = torch.finfo(dtype).max  # large, but finite
    if patches is not None:
        patches[2, -1, -1, -1, -1] = BAD[0]
    found = first_failure(failed_at, iteration, losses, windows, patches, impl="triton")
    assert found.tolist() == [17, 17, 17 if with_patches else -1, 4, -1, 9]
    assert torch.equal(found, first_failure(failed_at, iteration, losses, windows, patches, impl="torch"))


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("place", [0, 4095, 4096, 46 * 192 - 1])
def test_every_kind_and_place(bad: float, place: int) -> None:
    windows = gradients(torch.bfloat16, 46, 192)
    windows.view(IMAGES, -1)[2, place] = bad
    start = torch.full((IMAGES,), -1, device=DEVICE)
    losses = torch.zeros(IMAGES, 1, device=DEVICE)
    found = first_failure(start, torch.zeros(1, dtype=torch.int64, device=DEVICE), losses, windows, impl="triton")
    assert found.tolist() == [-1, -1, 0, -1, -1, -1]


@pytest.mark.parametrize("late", [None, 0, 1, 2])
@pytest.mark.parametrize("kept", [1, 46, 300])
def test_a_step_is_recorded(late: int | None, kept: int) -> None:
    def record(salt: int) -> Record:
        draw = generator(salt)
        failed_at = torch.randint(-1, 9, (IMAGES,), generator=draw)
        losses, scores = (torch.randn(IMAGES, side, generator=draw) for side in (3, kept))
        return Record(failed_at.to(DEVICE), losses.to(DEVICE), scores.to(DEVICE))

    value = torch.randn(IMAGES, generator=generator(5)).to(DEVICE)
    column = None if late is None else Column(late, value, 0.3)
    targets = [record(1), record(1)]
    iterations = [torch.tensor([40], device=DEVICE) for _ in targets]
    record_step(targets[0], iterations[0], record(2), column, impl="triton")
    record_step(targets[1], iterations[1], record(2), column, impl="torch")
    for ours, plain, found in zip(*targets, record(2), strict=True):
        assert torch.equal(ours, plain)
        assert torch.equal(ours, found) or late is not None
    assert iterations[0].tolist() == iterations[1].tolist() == [41]
    if late is not None:
        assert torch.equal(targets[0].losses[:, late], 0.3 * value)
