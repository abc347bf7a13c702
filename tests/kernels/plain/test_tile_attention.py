"""`tile_attention` in plain torch, and its op's CPU body, against PyTorch's attention in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from smi_fast.kernels import tile_attention as tile_module
from smi_fast.kernels.tile_attention import packed_tile_attention, parts_of, tile_attention


def packed_of(tokens: int = 7, width: int = 5, dtype: torch.dtype = torch.float64) -> Tensor:
    """``[B, N, 3, H, d]``."""
    return 2 * torch.randn(2, tokens, 3, 3, width, generator=torch.Generator().manual_seed(tokens), dtype=dtype)


def op(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return tile_module._attend(query, key, value, query.shape[-1] ** -0.5)


def packed_op(packed: Tensor) -> Tensor:
    return tile_module._attend_packed(packed, packed.shape[-1] ** -0.5)


@pytest.mark.parametrize(("tokens", "scale"), [(1, None), (2, None), (47, None), (47, 0.3), (7, 1), (300, None)])
def test_it_is_scaled_dot_product_attention(tokens: int, scale: float | None) -> None:
    leaf = packed_of(tokens, 64).requires_grad_()
    wanted = F.scaled_dot_product_attention(*parts_of(leaf), scale=scale)
    number = 64**-0.5 if scale is None else scale
    weights = torch.linspace(-1, 1, wanted.numel(), dtype=torch.float64).view_as(wanted)
    (gradient,) = torch.autograd.grad(wanted, leaf, weights)
    for found in (
        tile_attention(*parts_of(leaf), scale=scale),
        packed_tile_attention(leaf, scale=scale),
        tile_module._attend(*parts_of(leaf), number),
        tile_module._attend_packed(leaf, number),
    ):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(*torch.autograd.grad(found, leaf, weights), gradient, rtol=1e-11, atol=1e-12)


def test_gradcheck() -> None:
    leaves = [part.detach().requires_grad_() for part in parts_of(packed_of())]
    assert torch.autograd.gradcheck(tile_attention, leaves, fast_mode=True)
    assert torch.autograd.gradcheck(op, leaves, fast_mode=True)
    assert torch.autograd.gradcheck(packed_op, (packed_of().requires_grad_(),), fast_mode=True)


@pytest.mark.parametrize("which", [(0,), (1,), (2,), (1, 2)])
def test_partial_requires_grad(which: tuple[int, ...]) -> None:
    parts = [part.detach().requires_grad_(i in which) for i, part in enumerate(parts_of(packed_of()))]
    leaves = [parts[i] for i in which]
    found, wanted = (
        torch.autograd.grad(attend(*parts).square().sum(), leaves) for attend in (op, F.scaled_dot_product_attention)
    )
    torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-12)


def test_one_tensor_three_times() -> None:
    leaf = parts_of(packed_of())[0].detach().requires_grad_()

    def gradient(x: Tensor) -> Tensor:
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            return torch.autograd.grad(op(leaf, leaf, leaf).square().sum(), leaf)[0]

    (wanted,) = torch.autograd.grad(F.scaled_dot_product_attention(leaf, leaf, leaf).square().sum(), leaf)
    compiled = torch.compile(make_fx(gradient)(leaf.detach()), fullgraph=True, backend="aot_eager")
    attend = torch.compile(lambda x: op(x, x, x), fullgraph=True, backend="aot_eager")
    for found in (
        gradient(leaf),
        compiled(leaf.detach()),
        torch.autograd.grad(attend(leaf).square().sum(), leaf)[0],
    ):
        torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-12)


def test_low_precision() -> None:
    packed = packed_of(47, 64).bfloat16()
    out, exact = tile_attention(*parts_of(packed)), tile_attention(*parts_of(packed.float()))
    assert out.dtype == torch.bfloat16
    eps = torch.finfo(torch.bfloat16).eps
    torch.testing.assert_close(out.float(), exact, rtol=8 * eps, atol=8 * eps)


def test_large_logits_do_not_overflow() -> None:
    query = torch.full((1, 1, 3, 64), 40.0, dtype=torch.float16)  # 40 * 40 * 64 is beyond float16
    value = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float16).reshape(1, 1, 3, 1).expand(1, 1, 3, 64)
    torch.testing.assert_close(tile_attention(query, query, value), torch.full_like(query, 2.0))
    far = torch.tensor([1e4, -1e4, 1e4]).reshape(1, 1, 3, 1)
    found = tile_attention(far[:, :, :1].expand(1, 1, 3, 1), far, value[..., :1].float())
    assert torch.equal(found, torch.full((1, 1, 3, 1), 2.0))


def test_the_fake_lays_results_out_as_the_op_does() -> None:
    parts = [part.contiguous() for part in parts_of(packed_of())]
    assert op(*parts).stride() == op(*(part.to("meta") for part in parts)).stride()
    assert op(*parts).transpose(1, 2).is_contiguous()


def test_what_the_kernel_does_not_take() -> None:
    def reason(tokens: int, width: int, *dtypes: torch.dtype) -> str | None:
        return tile_module.unsupported(*(torch.zeros(1, 1, tokens, width, dtype=dtype) for dtype in dtypes))

    half, single, double = torch.float16, torch.float32, torch.float64
    assert reason(256, 128, half, half, half) is None
    assert "257 tokens" in str(reason(257, 64, half, half, half))
    assert "heads 129 wide" in str(reason(9, 129, half, half, half))
    assert "different dtypes" in str(reason(9, 64, half, half, single))
    assert "float64" in str(reason(9, 64, double, double, double))


@pytest.mark.parametrize("scale", [float("nan"), float("inf")])
def test_a_scale_that_is_no_number(scale: float) -> None:
    packed = packed_of()
    for call in (
        lambda: tile_attention(*parts_of(packed), scale=scale),
        lambda: packed_tile_attention(packed, scale=scale),
    ):
        with pytest.raises(ValueError, match=rf"scale={scale}: must be finite"):
            call()


def test_a_device_with_little_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    class Properties:
        shared_memory_per_block_optin = 101376  # of sm_89

    class OnDevice:
        """What `unsupported` looks at, of a tensor on a device that is not there."""

        def __init__(self, *shape: int) -> None:
            self.shape, self.dtype, self.device = shape, torch.bfloat16, torch.device("cuda")

        def element_size(self) -> int:
            return 2

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    small, large = OnDevice(1, 1, 96, 64), OnDevice(1, 1, 197, 64)
    assert tile_module.unsupported(small, small, small) is None
    reason = tile_module.unsupported(large, large, large)
    assert reason == "197 tokens of 64 torch.bfloat16 need 163840 bytes of shared memory, there are 101376"
