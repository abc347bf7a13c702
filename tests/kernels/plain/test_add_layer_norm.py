"""`add_layer_norm` in plain torch, and its ops' CPU bodies, against ``nn.LayerNorm`` in float64."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from smi_fast.kernels import add_layer_norm as norm_module
from smi_fast.kernels.add_layer_norm import add_layer_norm, rows_of

EPS = 1e-6
Call = Callable[..., tuple[Tensor, Tensor]]


def op(x: Tensor, branch: Tensor | None, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """As it stands in a graph on a GPU."""
    if branch is None:
        return x, norm_module._norm(x, weight, bias, EPS)[0]
    return norm_module._add_norm(x, branch, weight, bias, EPS)[:2]


def public(x: Tensor, branch: Tensor | None, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    return add_layer_norm(x, branch, weight, bias, EPS)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@st.composite
def calls(draw: st.DrawFn) -> tuple[Tensor | None, ...]:
    """Rows of any rank, with or without branch, weight and bias; last the gradients of both results, or of one."""
    shape = (*draw(st.lists(st.integers(1, 4), max_size=3)), draw(st.integers(1, 9)))
    seed = draw(st.integers(0, 2**16))
    of_rows = [3 * randn(*shape, seed=seed + i) for i in range(4)]
    of_width = [randn(shape[-1], seed=seed + i) for i in (4, 5)]
    keep = [draw(st.booleans()) for _ in range(4)]
    x, branch, d_sum, d_normed = of_rows
    optional = [t if kept else None for t, kept in zip((branch, *of_width, d_sum), keep, strict=True)]
    return x, *optional, d_normed if optional[-1] is None or draw(st.booleans()) else None


def with_gradients(function: Call, call: tuple[Tensor | None, ...]) -> list[Tensor]:
    """Both results, and the gradients of x and branch."""
    x, branch, weight, bias, *cotangents = call
    leaves = [t.detach().requires_grad_() for t in (x, branch) if t is not None]
    results = function(leaves[0], leaves[1] if len(leaves) > 1 else None, weight, bias)
    read = [(r, d) for r, d in zip(results, cotangents, strict=True) if d is not None]
    gradients = torch.autograd.grad([r for r, _ in read], leaves, [d for _, d in read])
    return [*(r.detach() for r in results), *gradients]


@settings(deadline=None, max_examples=60)
@given(call=calls())
def test_it_is_the_sum_and_torchs_layer_norm(call: tuple[Tensor | None, ...]) -> None:
    def wanted(x: Tensor, branch: Tensor | None, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        norm = nn.LayerNorm(x.shape[-1], EPS, elementwise_affine=False)
        total = x if branch is None else x + branch
        normed = norm(total) if weight is None else norm(total) * weight
        return total, normed if bias is None else normed + bias

    expected = with_gradients(wanted, call)
    for function in (public, op):
        torch.testing.assert_close(with_gradients(function, call), expected, rtol=1e-8, atol=1e-8)


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**16), width=st.integers(3, 20), level=st.floats(-50, 50), factor=st.floats(0.5, 20))
def test_level_and_scale_of_a_row_have_no_effect_and_no_gradient(
    seed: int, width: int, level: float, factor: float
) -> None:
    x, draw = randn(4, width, seed=seed), randn(4, width, seed=seed + 1)
    leaf = (factor * x + level).requires_grad_()
    normed = norm_module._norm(leaf, None, None, 0.0)[0]
    torch.testing.assert_close(normed, norm_module._norm(x, None, None, 0.0)[0], rtol=1e-8, atol=1e-8)
    (gradient,) = torch.autograd.grad(normed, leaf, draw)
    zeros = torch.zeros(4, dtype=torch.float64)
    torch.testing.assert_close(gradient.sum(-1), zeros, rtol=0, atol=1e-9)
    torch.testing.assert_close((gradient * normed.detach()).sum(-1), zeros, rtol=0, atol=1e-9)


def test_gradcheck() -> None:
    weight, bias = randn(5, seed=2), randn(5, seed=3)
    leaves = [randn(2, 3, 5, seed=seed).requires_grad_() for seed in range(2)]
    for function in (op, public):
        assert torch.autograd.gradcheck(lambda x, y, f=function: f(x, y, weight, bias), leaves)
        assert torch.autograd.gradcheck(lambda x, f=function: f(x, None, weight, None)[1], leaves[:1])


def test_without_a_branch_the_sum_is_x_itself() -> None:
    x = randn(2, 5)
    assert add_layer_norm(x, None, None, None, EPS)[0] is x


def test_low_precision_rounds_the_sum_once_and_norms_what_was_rounded() -> None:
    x, branch = (randn(4, 64, seed=seed, dtype=torch.float32).bfloat16() for seed in range(2))
    for function in (public, op):
        total, normed = function(x, branch, None, None)
        assert total.dtype == normed.dtype == torch.bfloat16
        assert torch.equal(total, (x.float() + branch.float()).bfloat16())
        exact = nn.functional.layer_norm(total.double(), (64,), eps=EPS)
        torch.testing.assert_close(normed.double(), exact, rtol=2**-8, atol=1e-6)


def test_traced_and_compiled() -> None:
    weight, cotangent = randn(6, seed=2), randn(2, 3, 6, seed=3)

    def forward(x: Tensor) -> Tensor:
        total, normed = op(x, x.flip(0), weight, None)
        return (total + op(normed, None, None, None)[1] * cotangent).square().sum()

    def gradient(x: Tensor) -> Tensor:
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            return torch.autograd.grad(forward(leaf), leaf)[0]

    x = randn(2, 3, 6)
    traced = make_fx(gradient)(x)
    names = [str(node.target) for node in traced.graph.nodes]
    assert sum("smi_fast.add_layer_norm_backward" in name for name in names) == 2
    leaf = x.clone().requires_grad_()
    compiled = torch.compile(forward, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(traced(x), gradient(x))
    torch.testing.assert_close(torch.autograd.grad(compiled(leaf), leaf)[0], gradient(x))


def test_rows_are_copied_only_where_they_must_be() -> None:
    x = randn(2, 3, 8)
    assert rows_of(x).data_ptr() == x.data_ptr()
    assert rows_of(x[:, :1]).data_ptr() == x.data_ptr()
    assert rows_of(x[..., :4]).stride() == (8, 1)
    assert rows_of(x.transpose(1, 2)).is_contiguous()
    assert rows_of(torch.ones(()).expand(2, 3, 8)).is_contiguous()


@pytest.mark.parametrize("eps", [-1e-6, float("nan"), float("inf")])
def test_an_eps_that_is_none(eps: float) -> None:
    with pytest.raises(ValueError, match=rf"add_layer_norm: eps={eps}: must be finite and at least 0"):
        add_layer_norm(randn(2, 3), None, None, None, eps)


def test_tensors_that_do_not_fit_each_other() -> None:
    x = randn(2, 3)
    for call, message in (
        ((x, x[:1], None, None), r"branch of shape \(1, 3\): must be \(2, 3\), as x"),
        ((x, x.float(), None, None), "branch is float32: must be float64"),
        ((x, None, x[0, :2], None), r"weight of shape \(2,\): must be \[D\] with D=3"),
        ((x, None, None, x[0].float()), "bias is float32: must be float64"),
    ):
        with pytest.raises(ValueError, match=f"add_layer_norm: {message}"):
            public(*call)


def test_what_the_kernel_does_not_take() -> None:
    row, learned = torch.zeros(1, 8), torch.zeros(8, requires_grad=True)
    assert norm_module.unsupported(row, row[0], row[0]) is None
    assert "float64" in str(norm_module.unsupported(row.double(), None, None))
    assert "rows of 4097" in str(norm_module.unsupported(torch.zeros(1, 4097), None, None))
    assert "weight requires a gradient" in str(norm_module.unsupported(row, learned, None))
    assert "bias requires a gradient" in str(norm_module.unsupported(row, None, learned))


def test_learned_weights_get_their_gradient_in_plain_torch() -> None:
    weight = randn(3).requires_grad_()
    normed = add_layer_norm(randn(2, 3), None, weight, None, EPS)[1]
    assert torch.autograd.grad(normed.sum(), weight)[0].abs().sum() > 0
