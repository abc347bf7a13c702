"""The selection and remapping kernels against their references, bit for bit."""

import pytest
import torch
from torch import Tensor

from smi_fast.kernels.select_patches import remap, select_patches
from tests.kernels.cases import DEVICE, generator

pytestmark = pytest.mark.kernel
# the published stages and others; one of each launch configuration and its edges
PATCHES = (196, 137, 46, 1, 2, 64, 1100) if DEVICE == "cpu" else (196, 137, 95, 66, 46, 49, 64, 1, 2, 576, 1100)
INF, NAN = float("inf"), float("nan")


def assert_selected(scores: Tensor, count: int) -> None:
    found = select_patches(scores, count, impl="triton")
    assert found.dtype == torch.int64
    assert torch.equal(found, select_patches(scores, count, impl="torch"))


@pytest.mark.parametrize("patches", PATCHES)
def test_select_is_exact(patches: int) -> None:
    draw = generator(patches)
    distinct = torch.randn(1 if DEVICE == "cpu" else 2, patches, generator=draw).to(DEVICE)
    scores = torch.cat([distinct, distinct.softmax(1), (distinct * 2).round(), torch.zeros_like(distinct)])
    for count in sorted({1, 1 + patches // 3, max(1, patches - 1), patches}):
        assert_selected(scores, count)


def test_every_float_has_its_place() -> None:
    tiny, huge = 1e-45, 3.4e38
    values = [0.0, -0.0, 1.0, -1.0, INF, -INF, tiny, -tiny, huge, -huge, NAN, -NAN]
    draw = generator(0)
    for _ in range(2):
        picks = torch.randint(len(values), (3, 29), generator=draw)
        scores = torch.tensor(values, device=DEVICE)[picks.to(DEVICE)]
        for count in (1, 2, 3, 7, 12, 20, 29):
            assert_selected(scores, count)


def test_ties_go_to_the_lower_id() -> None:
    scores = torch.tensor([[1.0, 2, 1, 2, 1], [NAN, INF, NAN, 3, INF], [-0.0, 0, -1, -0.0, 0]], device=DEVICE)
    assert select_patches(scores, 3, impl="triton").tolist() == [[0, 1, 3], [0, 1, 2], [0, 1, 3]]


@pytest.mark.parametrize("rest", [(), (3,), (3, 2, 2), (3, 16, 16), (257,)], ids=str)
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.float64, torch.int64, torch.uint8, torch.bool], ids=str
)
def test_remap_is_exact(dtype: torch.dtype, rest: tuple[int, ...]) -> None:
    draw = generator(len(rest))
    for patches, count in ((1, 1), (7, 5), (46, 33)):
        state = (100 * torch.rand(2, patches, *rest, generator=draw)).to(DEVICE, dtype)
        rows = [torch.randperm(patches, generator=draw)[:count].sort().values for _ in range(2)]
        slots = torch.stack(rows).to(DEVICE)
        found = remap(state, slots, impl="triton")
        assert found.dtype == dtype
        assert torch.equal(found, remap(state, slots, impl="torch"))


def test_remap_keeps_every_bit() -> None:
    bits = torch.randint(-(2**31), 2**31, (2, 5, 64), generator=generator(1)).int().to(DEVICE)
    slots = torch.tensor([[0, 2, 4], [1, 2, 3]], device=DEVICE)
    found = remap(bits.view(torch.float32), slots, impl="triton")
    assert torch.equal(found.view(torch.int32), remap(bits, slots, impl="torch"))
    # bfloat16 is moved only, which the interpreter does well
    assert torch.equal(
        remap(bits.view(torch.bfloat16), slots, impl="triton").view(torch.int32), remap(bits, slots, impl="torch")
    )


def test_views_are_as_good_as_copies() -> None:
    wide = torch.rand(2, 9, 6, generator=generator(2)).to(DEVICE)
    slots = torch.tensor([[0, 2, 4], [1, 2, 3]], device=DEVICE)
    strided = torch.stack([slots, slots], -1)[..., 0]
    assert torch.equal(remap(wide[..., ::2], strided, impl="triton"), remap(wide[..., ::2], slots, impl="torch"))
    assert_selected(wide[..., 1], 4)


def test_what_the_kernels_do_not_take() -> None:
    slots = torch.zeros(1, 2, dtype=torch.int64, device=DEVICE)
    with pytest.raises(ValueError, match="select_patches: impl='triton' cannot run: float64"):
        select_patches(torch.zeros(1, 3, device=DEVICE).double(), 1, impl="triton")
    with pytest.raises(ValueError, match="4097 patches, the kernel takes up to 4096"):
        select_patches(torch.zeros(1, 4097, device=DEVICE), 1, impl="triton")
    with pytest.raises(ValueError, match="complex64 has no kernel"):
        remap(torch.zeros(1, 3, dtype=torch.complex64, device=DEVICE), slots, impl="triton")
    with pytest.raises(ValueError, match="has no gradient"):
        remap(torch.zeros(1, 3, device=DEVICE, requires_grad=True), slots, impl="triton")
    with pytest.raises(ValueError, match=r"remap: slots of shape \(1, 2\): must be \[B, C\] with B=2"):
        remap(torch.zeros(2, 3, device=DEVICE), slots)
