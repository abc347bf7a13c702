"""The one-tile attention kernel and its backward: no farther from float64 than eager torch is."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from smi_fast.kernels.tile_attention import packed_tile_attention, parts_of, tile_attention, tile_of
from tests.kernels.cases import DEVICE, DTYPES, assert_near_truth, generator

pytestmark = pytest.mark.kernel


@dataclass(frozen=True)
class Shape:
    """B images, H heads, N tokens, d channels."""

    batch: int
    heads: int
    tokens: int
    width: int

    def fits(self, dtype: torch.dtype) -> bool:
        """Into the shared memory of sm_80 and later, by the rule of `unsupported`."""
        side, width = tile_of(torch.empty(1, 1, self.tokens, self.width, device="meta"))
        return side * width * dtype.itemsize <= 32 * 1024


# tokens: the published stages and odd ones; one block of queries and several, whole and ragged; widths that are no
# powers of two
SHAPES = (
    Shape(2, 2, 1, 16),
    Shape(2, 3, 17, 24),
    Shape(2, 3, 47, 64),
    Shape(1, 2, 64, 80),
    Shape(1, 2, 67, 64),
    Shape(1, 1, 96, 128),
    Shape(2, 1, 138, 24),
    Shape(1, 2, 197, 64),
    Shape(1, 1, 256, 16),
)
RAGGED, ONE_TILE, BLOCKS = SHAPES[1], SHAPES[2], SHAPES[6]
CASES = [(shape, dtype) for shape in SHAPES for dtype in DTYPES if shape.fits(dtype)]


def randn(*shape: int, salt: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, generator=generator(salt)).to(DEVICE, dtype)


def projection(shape: Shape, dtype: torch.dtype) -> Tensor:
    """``[B, N, 3, H, d]``, as a model's blocks have it; logits of about 3."""
    packed = randn(shape.batch, shape.tokens, 3, shape.heads, shape.width, salt=shape.tokens, dtype=torch.float32)
    packed[:, :, 0] *= 3
    return packed.to(dtype)


def cotangent(shape: Shape, dtype: torch.dtype) -> Tensor:
    """As it comes back from ``[B, N, H, d]``."""
    return randn(shape.batch, shape.tokens, shape.heads, shape.width, salt=1, dtype=dtype).transpose(1, 2)


def of_parts(packed: Tensor, impl: str, scale: float | None = None) -> Tensor:
    return tile_attention(*parts_of(packed), impl=impl, scale=scale)


def with_gradient(function: Callable[..., Tensor], packed: Tensor, draw: Tensor, impl: str) -> tuple[Tensor, Tensor]:
    """The result, and the gradient of the projection."""
    leaf = packed.detach().requires_grad_()
    out = function(leaf, impl=impl)
    return out.detach(), torch.autograd.grad(out, leaf, draw.to(out.dtype))[0]


@pytest.mark.parametrize(("shape", "dtype"), CASES, ids=str)
def test_forward_and_gradients(shape: Shape, dtype: torch.dtype) -> None:
    packed, draw = projection(shape, dtype), cotangent(shape, dtype)
    truth, truth_gradient = with_gradient(of_parts, packed.double(), draw, "torch")
    eager, eager_gradient = with_gradient(of_parts, packed, draw, "torch")
    out, gradient = with_gradient(of_parts, packed, draw, "triton")
    assert out.dtype == gradient.dtype == dtype
    terms = shape.tokens * shape.width
    assert_near_truth(out, eager, truth, dtype, terms=terms)
    for part in range(3):  # of query, key and value
        slices = (g[:, :, part] for g in (gradient, eager_gradient, truth_gradient))
        assert_near_truth(*slices, dtype, terms=terms)


@pytest.mark.parametrize("shape", [RAGGED, ONE_TILE], ids=str)
def test_a_packed_projection_gives_the_same(shape: Shape) -> None:
    packed, draw = projection(shape, torch.float16), cotangent(shape, torch.float16)
    wanted = with_gradient(of_parts, packed, draw, "triton")
    found = with_gradient(packed_tile_attention, packed, draw, "triton")
    assert all(torch.equal(*pair) for pair in zip(found, wanted, strict=True))
    assert found[1].is_contiguous()


def test_a_scale_of_its_own() -> None:
    packed, draw = projection(BLOCKS, torch.float32), cotangent(BLOCKS, torch.float32)
    scaled = packed.clone()
    scaled[:, :, 0] *= 0.5 * BLOCKS.width**0.5
    wanted, gradient = with_gradient(of_parts, scaled, draw, "torch")
    gradient[:, :, 0] *= 0.5 * BLOCKS.width**0.5
    for function in (of_parts, packed_tile_attention):
        found = with_gradient(partial(function, scale=0.5), packed, draw, "triton")
        for one, other in zip(found, (wanted, gradient), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * float(other.abs().max()))


def test_partial_requires_grad() -> None:
    draw, parts = cotangent(RAGGED, torch.float32), parts_of(projection(RAGGED, torch.float32))
    wanted = parts_of(with_gradient(of_parts, projection(RAGGED, torch.float32), draw, "torch")[1])
    for which in ((0,), (1,), (2,), (0, 2)):
        tensors = [part.detach().requires_grad_(i in which) for i, part in enumerate(parts)]
        out = tile_attention(*tensors, impl="triton")
        found = torch.autograd.grad(out, [tensors[i] for i in which], draw)
        for i, gradient in zip(which, found, strict=True):
            torch.testing.assert_close(gradient, wanted[i], rtol=1e-4, atol=1e-5 * float(wanted[i].abs().max()))


def test_one_tensor_three_times() -> None:
    leaf = randn(2, 2, 17, 24, salt=3, dtype=torch.float32).requires_grad_()

    def attend(x: Tensor, impl: str = "triton") -> Tensor:
        return tile_attention(x, x, x, impl=impl)

    def gradient(x: Tensor) -> Tensor:
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            return torch.autograd.grad(attend(leaf).square().sum(), leaf)[0]

    (wanted,) = torch.autograd.grad(attend(leaf.double(), "torch").square().sum(), leaf)
    traced = make_fx(gradient)(leaf.detach())
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    found = (
        gradient(leaf),
        traced(leaf.detach()),
        torch.compile(traced, fullgraph=True, backend="aot_eager")(leaf.detach()),
        torch.autograd.grad(compiled(leaf).square().sum(), leaf)[0],
    )
    for one in found:
        torch.testing.assert_close(one, wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [17, 96])
def test_logits_thousands_apart(tokens: int, dtype: torch.dtype) -> None:
    # whole numbers: products, sums and a scale of 1/4 are exact in every dtype, so the softmax must be right as well
    draw = generator(tokens)
    packed = torch.randint(-16, 17, (1, tokens, 3, 2, 16), generator=draw).to(DEVICE, dtype)
    packed[:, : tokens // 2, 1] *= 64  # a head's logits lie up to 30,000 apart
    packed[:, 0, 1] = packed[:, 1, 1]  # and ties
    cotangents = torch.randint(-4, 5, (1, 2, tokens, 16), generator=draw).to(DEVICE, dtype)
    truth, wanted = with_gradient(of_parts, packed.double(), cotangents, "torch")
    out, gradient = with_gradient(of_parts, packed, cotangents, "triton")
    eager, eager_gradient = with_gradient(of_parts, packed, cotangents, "torch")
    logits = (parts_of(packed.double())[0] @ parts_of(packed.double())[1].transpose(2, 3)) / 4
    assert logits.max() - logits.min() > 4000
    assert_near_truth(out, eager, truth, dtype, terms=tokens)
    assert_near_truth(gradient, eager_gradient, wanted, dtype, terms=tokens)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("tokens", [3, 138])
def test_large_logits(tokens: int, sign: int) -> None:
    key = torch.full((1, 1, tokens, 16), 1e4, device=DEVICE)
    tensors = [tensor.requires_grad_() for tensor in (sign * key, key.clone(), torch.randn_like(key))]
    out = tile_attention(*tensors, impl="triton")
    torch.testing.assert_close(out, tensors[2].mean(2, keepdim=True).expand_as(out))
    d_query, d_key, d_value = torch.autograd.grad(out.sum(), tensors)
    assert all(torch.isfinite(gradient).all() for gradient in (d_query, d_key))
    torch.testing.assert_close(d_value, torch.ones_like(d_value))


def test_a_common_part_of_the_keys_has_no_gradient() -> None:
    # it moves no softmax: what it adds to the query's gradient is error of sum(p dp) alone
    packed, draw = projection(ONE_TILE, torch.float32), cotangent(ONE_TILE, torch.float32)
    packed[:, :, 1] += 16
    truth = with_gradient(of_parts, packed.double(), draw, "torch")[1][:, :, 0]
    eager, found = (with_gradient(of_parts, packed, draw, impl)[1][:, :, 0] for impl in ("torch", "triton"))
    assert_near_truth(found, eager, truth, torch.float32, terms=ONE_TILE.tokens * ONE_TILE.width)


def test_any_strides() -> None:
    views = parts_of(projection(RAGGED, torch.float32))
    dense = [tensor.contiguous() for tensor in views]
    transposed = [tensor.transpose(2, 3).contiguous().transpose(2, 3) for tensor in dense]
    assert transposed[1].stride(-1) != 1
    wanted = tile_attention(*dense, impl="triton")
    for tensors in (transposed, views):
        assert torch.equal(tile_attention(*tensors, impl="triton"), wanted)


@pytest.mark.parametrize("shape", [RAGGED, BLOCKS], ids=str)
def test_nothing_is_read_beyond_the_sides(shape: Shape) -> None:
    dense = [tensor.contiguous() for tensor in parts_of(projection(shape, torch.float32))]
    dense.append(cotangent(shape, torch.float32))
    results = []
    for pad in (0, 3):
        wide = [torch.nn.functional.pad(tensor, (0, pad, 0, pad), value=float("nan")) for tensor in dense]
        *leaves, draw = (tensor[:, :, : shape.tokens, : shape.width] for tensor in wide)
        leaves = [leaf.detach().requires_grad_() for leaf in leaves]
        out = tile_attention(*leaves, impl="triton")
        results.append((out, *torch.autograd.grad(out, leaves, draw)))
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


def test_results_lie_as_the_model_reads_them() -> None:
    tensors = [part.detach().requires_grad_() for part in parts_of(projection(RAGGED, torch.float32))]
    out = tile_attention(*tensors, impl="triton")
    assert out.transpose(1, 2).is_contiguous()
    gradients = torch.autograd.grad(out.sum(), tensors)
    assert {g.untyped_storage().data_ptr() for g in gradients} == {gradients[0].untyped_storage().data_ptr()}
    assert all(g.stride() == part.stride() for g, part in zip(gradients, tensors, strict=True))


@pytest.mark.parametrize("shape", [ONE_TILE, BLOCKS], ids=str)
def test_it_is_the_same_each_time(shape: Shape) -> None:
    packed, draw = projection(shape, torch.float32), cotangent(shape, torch.float32)
    first, second = (with_gradient(of_parts, packed, draw, "triton") for _ in range(2))
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))


def test_what_the_kernel_does_not_take() -> None:
    key = torch.zeros(1, 1, 9, 4, device=DEVICE)
    wide, long = torch.zeros(1, 1, 3, 129, device=DEVICE), torch.zeros(1, 1, 257, 4, device=DEVICE)
    for tensors, reason in (
        ((wide, wide, wide), "129 wide"),
        ((long, long, long), "257 tokens"),
        ((key.double(), key.double(), key.double()), "float64"),
        ((key.half(), key, key), "different dtypes"),
    ):
        with pytest.raises(ValueError, match=rf"^tile_attention: impl='triton' cannot run: .*{reason}"):
            tile_attention(*tensors, impl="triton")
    with pytest.raises(ValueError, match=r"^packed_tile_attention: impl='triton' cannot run: .*257 tokens"):
        packed_tile_attention(torch.zeros(1, 257, 3, 1, 4, device=DEVICE), impl="triton")
