"""The attention kernel and its backward: no farther from float64 than eager torch is."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from smi_fast.kernels.cls_attention import cls_attention
from tests.kernels.cases import DEVICE, DTYPES, LOW, assert_near_truth, generator

pytestmark = pytest.mark.kernel


@dataclass(frozen=True)
class Shape:
    """H heads, M queries, N tokens of which ``prefix`` are no patches, d channels; B is 1 or 2."""

    heads: int
    queries: int
    tokens: int
    width: int
    prefix: int

    @property
    def batch(self) -> int:
        return 1 if self.tokens > 100 else 2


# tokens: the published stages and odd ones; one tile and several; heads and widths of DeiT and ViT, and an odd one
SHAPES = (
    Shape(3, 1, 197, 64, 1),
    Shape(6, 1, 138, 64, 1),
    Shape(12, 1, 96, 32, 1),
    Shape(3, 2, 67, 64, 2),
    Shape(16, 1, 47, 64, 1),
    Shape(2, 5, 50, 80, 5),
    Shape(2, 1, 2, 100, 1),
    Shape(2, 1, 577, 64, 1),
    Shape(1, 2, 577, 80, 2),
    Shape(1, 5, 138, 100, 5),
    Shape(1, 1, 1100, 80, 5),
    Shape(2, 8, 9, 5, 0),
)
SOME = SHAPES[3], SHAPES[6], SHAPES[8]


def randn(*shape: int, salt: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, generator=generator(salt)).to(DEVICE, dtype)


def projections(shape: Shape, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """``[B, M, H, d]`` and ``[B, N, 2, H, d]``, as a model's last block has them; logits of about 3."""
    query = randn(shape.batch, shape.queries, shape.heads, shape.width, salt=shape.tokens, dtype=torch.float32)
    both = randn(shape.batch, shape.tokens, 2, shape.heads, shape.width, salt=shape.width, dtype=torch.float32)
    return (query * 3).to(dtype), both.to(dtype)


def split(query: Tensor, both: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Strided views: query, key and value, ``[B, H, M or N, d]``."""
    key, value = both.permute(2, 0, 3, 1, 4).unbind(0)
    return query.transpose(1, 2), key, value


def gradients(leaves: tuple[Tensor, ...], draws: tuple[Tensor | None, Tensor | None], prefix: int, impl: str) -> list:
    """Of the sum of the results weighted with ``draws``; a result without draws is not used."""
    leaves = tuple(leaf.detach().requires_grad_() for leaf in leaves)
    results = cls_attention(*split(*leaves), prefix, impl=impl)
    pairs = [(result, draw) for result, draw in zip(results, draws, strict=True) if draw is not None]
    return list(torch.autograd.grad([r for r, _ in pairs], leaves, [d.to(r.dtype) for r, d in pairs]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward(shape: Shape, dtype: torch.dtype) -> None:
    query, both = projections(shape, dtype)
    truth = cls_attention(*split(query.double(), both.double()), shape.prefix, impl="torch")
    eager = cls_attention(*split(query, both), shape.prefix, impl="torch")
    found = cls_attention(*split(query, both), shape.prefix, impl="triton")
    assert found[0].dtype == dtype
    assert found[1].dtype == torch.float32
    assert_near_truth(found[0], eager[0], truth[0], dtype, terms=shape.tokens)
    assert_near_truth(found[1], eager[1], truth[1], torch.float32, terms=shape.tokens * shape.width)


def assert_gradients_near_truth(shape: Shape, dtype: torch.dtype, draws: tuple[Tensor | None, Tensor | None]) -> None:
    leaves = projections(shape, dtype)
    truth = gradients(tuple(leaf.double() for leaf in leaves), draws, shape.prefix, "torch")
    eager, found = (gradients(leaves, draws, shape.prefix, impl) for impl in ("torch", "triton"))
    terms = shape.tokens * shape.width
    assert_near_truth(found[0], eager[0], truth[0], dtype, terms=terms)
    for part in range(2):  # of key and of value
        assert_near_truth(found[1][:, :, part], eager[1][:, :, part], truth[1][:, :, part], dtype, terms=terms)


def draws_for(shape: Shape, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    out = randn(shape.batch, shape.queries, shape.heads, shape.width, salt=1, dtype=dtype).transpose(1, 2)
    return out, shape.tokens * randn(shape.batch, shape.tokens - shape.prefix, salt=2, dtype=torch.float32)


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [*((shape, torch.float32) for shape in SHAPES), *((shape, dtype) for shape in SHAPES[::2] for dtype in LOW)],
    ids=str,
)
def test_gradients(shape: Shape, dtype: torch.dtype) -> None:
    assert_gradients_near_truth(shape, dtype, draws_for(shape, dtype))


@pytest.mark.parametrize("shape", SOME, ids=str)
def test_gradients_of_one_result_alone(shape: Shape) -> None:
    out, score = draws_for(shape, torch.float32)
    assert_gradients_near_truth(shape, torch.float32, (out, None))
    assert_gradients_near_truth(shape, torch.float32, (None, score))


def test_a_scale_of_its_own() -> None:
    shape = SHAPES[3]
    query, both = projections(shape, torch.float32)
    factor, found = 0.5 * shape.width**0.5, []
    for leaf, scale, impl in ((query * factor, None, "torch"), (query, 0.5, "triton")):
        leaves = leaf.requires_grad_(), both.detach().requires_grad_()
        results = cls_attention(*split(*leaves), shape.prefix, scale=scale, impl=impl)
        found.append([*results, *torch.autograd.grad(results, leaves, draws_for(shape, torch.float32))])
    found[0][2] *= factor
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * float(one.detach().abs().max()))


@pytest.mark.parametrize("wanted", range(3))
def test_partial_requires_grad(wanted: int) -> None:
    shape = SHAPES[3]
    draws, found = draws_for(shape, torch.float32), []
    for impl in ("torch", "triton"):
        tensors = [tensor.contiguous() for tensor in split(*projections(shape, torch.float32))]
        tensors[wanted].requires_grad_()
        results = cls_attention(*tensors, shape.prefix, impl=impl)
        used = 1 if wanted == 2 else 2  # the score does not depend on the values
        found += torch.autograd.grad(results[:used], tensors[wanted], draws[:used])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5 * float(found[0].abs().max()))


@pytest.mark.parametrize("shape", SOME, ids=str)
def test_a_common_part_of_the_keys_has_no_gradient(shape: Shape) -> None:
    # it moves no softmax: what it adds to the query's gradient is error of sum(p dp) alone
    query, both = projections(shape, torch.float16)
    both = torch.stack([both[:, :, 0] + 16, both[:, :, 1]], 2)
    out, _ = draws_for(shape, torch.float16)
    truth = gradients((query.double(), both.double()), (out, None), shape.prefix, "torch")
    eager, found = (gradients((query, both), (out, None), shape.prefix, impl) for impl in ("torch", "triton"))
    assert_near_truth(found[0], eager[0], truth[0], torch.float16)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("tokens", [3, 577])
def test_large_logits(tokens: int, sign: int) -> None:
    key = torch.full((1, 1, tokens, 4), 1e4, device=DEVICE)
    tensors = [tensor.requires_grad_() for tensor in (sign * key[:, :, :1], key.clone(), torch.randn_like(key))]
    out, score = cls_attention(*tensors, 1, impl="triton")
    torch.testing.assert_close(out, tensors[2].mean(2, keepdim=True))
    torch.testing.assert_close(score, torch.full_like(score, 1 / tokens))
    d_query, d_key, d_value = torch.autograd.grad(out.sum(), tensors)
    assert all(torch.isfinite(gradient).all() for gradient in (d_query, d_key))
    torch.testing.assert_close(d_value, torch.full_like(d_value, 1 / tokens))


def test_any_strides() -> None:
    shape = SHAPES[3]
    dense = [tensor.contiguous() for tensor in split(*projections(shape, torch.float32))]
    transposed = [tensor.transpose(2, 3).contiguous().transpose(2, 3) for tensor in dense]
    assert transposed[1].stride(-1) != 1
    wanted = cls_attention(*dense, shape.prefix, impl="triton")
    for tensors in (transposed, split(*projections(shape, torch.float32))):
        found = cls_attention(*tensors, shape.prefix, impl="triton")
        assert torch.equal(found[0], wanted[0])
        assert torch.equal(found[1], wanted[1])


@pytest.mark.parametrize("shape", [SHAPES[5], SHAPES[10]], ids=str)
def test_nothing_is_read_beyond_the_sides(shape: Shape) -> None:
    dense = [tensor.contiguous() for tensor in split(*projections(shape, torch.float32))]
    out, score = draws_for(shape, torch.float32)
    results = []
    for pad in (0, 3):
        wide = [torch.nn.functional.pad(tensor, (0, pad, 0, pad), value=float("nan")) for tensor in (*dense, out)]
        *leaves, draw = (w[:, :, : t.shape[2], : shape.width] for w, t in zip(wide, (*dense, out), strict=True))
        leaves = [leaf.detach().requires_grad_() for leaf in leaves]
        found = cls_attention(*leaves, shape.prefix, impl="triton")
        results.append((*found, *torch.autograd.grad(found, leaves, (draw, score))))
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


def test_results_lie_as_the_model_reads_them() -> None:
    query, both = projections(SHAPES[4], torch.float32)
    tensors = [tensor.detach().requires_grad_() for tensor in split(query, both)]
    out, _ = cls_attention(*tensors, 1, impl="triton")
    assert all(g.transpose(1, 2).is_contiguous() for g in (out, *torch.autograd.grad(out.sum(), tensors)))


def test_it_is_the_same_each_time() -> None:
    shape = SHAPES[3]
    leaves, draws = projections(shape, torch.float32), draws_for(shape, torch.float32)
    first, second = (gradients(leaves, draws, shape.prefix, "triton") for _ in range(2))
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))


def test_what_the_kernel_does_not_take() -> None:
    query, key = torch.zeros(1, 1, 9, 4, device=DEVICE), torch.zeros(1, 1, 9, 4, device=DEVICE)
    one = query[:, :, :1]
    wide = torch.zeros(1, 1, 3, 257, device=DEVICE)
    long = torch.zeros(1, 1, 2049, 4, device=DEVICE)
    for tensors, reason in (
        ((query, key, key), "9 queries"),
        ((wide[:, :, :1], wide, wide), "257 wide"),
        ((one, long, long), "2049 tokens"),
        ((one.double(), key.double(), key.double()), "float64"),
        ((one.half(), key, key), "different dtypes"),
    ):
        with pytest.raises(ValueError, match=rf"cls_attention: impl='triton' cannot run: .*{reason}"):
            cls_attention(*tensors, 1, impl="triton")
    with pytest.raises(ValueError, match=r"prefix=10: must lie in 0\.\.9"):
        cls_attention(one, key, key, 10, impl="triton")
