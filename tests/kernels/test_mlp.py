"""The products of `mlp` with GELU in their epilogues: no farther from float64 than eager torch is."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from smi_fast.kernels import mlp as mlp_module
from smi_fast.kernels.common.launch import ProductConfig
from smi_fast.kernels.mlp import hidden_backward_launch, hidden_launch, mlp
from tests.kernels.cases import DEVICE, LOW, assert_near_truth, generator

pytestmark = pytest.mark.kernel


@dataclass(frozen=True)
class Shape:
    """Rows of any rank; widths D, F and E."""

    rows: tuple[int, ...]
    width: int
    hidden: int
    out: int


# less than a tile; several in both directions, ragged in rows, columns and depth; nothing ragged; wider out than in
SHAPES = (
    Shape((1,), 16, 16, 16),
    Shape((3, 47), 80, 272, 80),
    Shape((2, 64), 128, 128, 128),
    Shape((2, 2, 5), 48, 144, 208),
)
RAGGED = SHAPES[1]


def randn(*shape: int, salt: int, dtype: torch.dtype = torch.float16) -> Tensor:
    return torch.randn(*shape, generator=generator(salt)).to(DEVICE, dtype)


def inputs(shape: Shape, dtype: torch.dtype = torch.float16) -> tuple[list[Tensor], Tensor]:
    """Arguments of `mlp`, with hidden values from about -4 to 4, and a gradient that comes back."""
    weight1 = 1.5 * shape.width**-0.5 * randn(shape.hidden, shape.width, salt=1, dtype=torch.float32)
    weight2 = shape.hidden**-0.5 * randn(shape.out, shape.hidden, salt=2, dtype=torch.float32)
    x, draw = (randn(*shape.rows, side, salt=i, dtype=dtype) for i, side in ((3, shape.width), (4, shape.out)))
    biases = (randn(side, salt=i, dtype=dtype) for i, side in ((5, shape.hidden), (6, shape.out)))
    bias1, bias2 = biases
    return [x, weight1.to(dtype), bias1, weight2.to(dtype), bias2], draw


def with_gradient(given: list[Tensor | None], draw: Tensor, impl: str) -> tuple[Tensor, Tensor]:
    """The result, and the gradient of ``x``."""
    assert given[0] is not None
    leaf = given[0].detach().requires_grad_()
    out = mlp(leaf, *given[1:], impl=impl)  # type: ignore[arg-type]
    return out.detach(), torch.autograd.grad(out, leaf, draw.to(out.dtype))[0]


def assert_right(given: list[Tensor | None], draw: Tensor) -> None:
    x, weight1 = given[:2]
    assert x is not None
    assert weight1 is not None
    double = [None if tensor is None else tensor.double() for tensor in given]
    everything = [with_gradient(*call) for call in ((given, draw, "triton"), (given, draw, "torch"))]
    for found, eager, truth in zip(*everything, with_gradient(double, draw, "torch"), strict=True):
        assert found.dtype == x.dtype
        assert_near_truth(found, eager, truth, x.dtype, terms=weight1.numel())


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_result_and_gradient(shape: Shape, dtype: torch.dtype) -> None:
    assert_right(*inputs(shape, dtype))


@pytest.mark.parametrize("absent", [(2,), (4,), (2, 4)])
def test_layers_without_bias(absent: tuple[int, ...]) -> None:
    given, draw = inputs(SHAPES[3])
    assert_right([None if i in absent else tensor for i, tensor in enumerate(given)], draw)


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_gelu_and_its_derivative_are_rounded_once(dtype: torch.dtype) -> None:
    # the first layer is the identity, so that hidden values are known exactly, from -9 to 9
    eye = torch.eye(16, device=DEVICE, dtype=dtype)
    h = torch.linspace(-9, 9, 16 * 120, device=DEVICE).reshape(120, 16).to(dtype)
    launch, *found = hidden_launch(h, eye, None)
    launch.run()
    exact = h.double()
    share = torch.special.ndtr(exact)
    slope = share + exact * (-0.5 * exact.square()).exp() / (2 * torch.pi) ** 0.5
    limits = torch.finfo(dtype)
    for one, truth in zip(found, (exact * share, slope), strict=True):
        # half a rounding, but where the derivative goes through 0: there its two terms of 0.2 are off by 1e-6 each
        allowed = (0.52 * limits.eps * truth.abs()).clamp(min=0.52 * limits.smallest_normal * limits.eps)
        assert ((one.double() - truth).abs() <= allowed + 1e-6 * (one is found[1])).all()


@pytest.mark.parametrize("config", [ProductConfig(16, 4, 16, 16, 2), ProductConfig(32, 4, 64, 32, 3)], ids=str)
def test_tiles_of_other_sizes_in_groups(config: ProductConfig) -> None:
    (x, weight1, bias1, weight2, _), draw = inputs(Shape((150,), 48, 48, 32))
    launch, hidden, slope = hidden_launch(x, weight1, bias1, config)
    launch.run()
    backward, d_hidden = hidden_backward_launch(draw, weight2, slope, config)
    backward.run()
    assert launch.grid == backward.grid == (-(-150 // config.block) * -(-48 // config.columns),)
    exact = torch.nn.functional.linear(x.double(), weight1.double(), bias1.double())
    for found, truth in (
        (hidden, torch.nn.functional.gelu(exact)),
        (slope, mlp_module.hidden_reference(x.double(), weight1.double(), bias1.double())[1]),
        (d_hidden, mlp_module.hidden_backward_reference(draw.double(), weight2.double(), slope.double())),
    ):
        torch.testing.assert_close(found.double(), truth, rtol=2**-10, atol=1e-4)


def test_nothing_is_read_beyond_the_sides() -> None:
    given, draw = inputs(RAGGED)
    # a row more of the weights; every row of all tensors another distance from the next
    wide = [torch.nn.functional.pad(t, (0, 16 + 16 * i), value=torch.nan) for i, t in enumerate((*given, draw))]
    wide[1], wide[3] = (torch.nn.functional.pad(t, (0, 0, 0, 1), value=torch.nan)[:-1] for t in (wide[1], wide[3]))
    *cut, cut_draw = (w[..., : t.shape[-1]] for w, t in zip(wide, (*given, draw), strict=True))
    assert [t.stride(-2) for t in (cut[0], cut[1], cut[3])] == [80 + 16, 80 + 32, 272 + 64]
    found, wanted = with_gradient(cut, cut_draw, "triton"), with_gradient(given, draw, "triton")
    assert all(torch.equal(*pair) for pair in zip(found, wanted, strict=True))


def test_any_strides_of_rows_and_their_gradient() -> None:
    given, draw = inputs(RAGGED)
    wanted = with_gradient(given, draw, "triton")
    given[0] = given[0].transpose(0, 2).contiguous().transpose(0, 2)
    found = with_gradient(given, draw.transpose(0, 2).contiguous().transpose(0, 2), "triton")
    assert all(torch.equal(*pair) for pair in zip(found, wanted, strict=True))


def test_a_row_that_is_no_number_spoils_no_other() -> None:
    given, draw = inputs(RAGGED)
    wanted = with_gradient(given, draw, "triton")
    given[0][1, 3] = float("nan")
    found = with_gradient(given, draw, "triton")
    for one, other in zip(found, wanted, strict=True):
        assert one[1, 3].isnan().all()
        one[1, 3] = other[1, 3]
        assert torch.equal(one, other)


def test_no_gradient_where_none_is_needed() -> None:
    given, _ = inputs(SHAPES[0])
    assert not mlp(*given, impl="triton").requires_grad


def test_traced_and_compiled() -> None:
    given, draw = inputs(SHAPES[3])

    def forward(x: Tensor) -> Tensor:
        return mlp(x, *given[1:], impl="triton")

    def gradient(x: Tensor) -> Tensor:
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            return torch.autograd.grad(forward(leaf), leaf, draw)[0]

    wanted = with_gradient(given, draw, "triton")[1]
    traced = make_fx(gradient)(given[0])
    leaf = given[0].detach().requires_grad_()
    compiled = torch.compile(forward, fullgraph=True, backend="aot_eager")
    assert torch.equal(traced(given[0]), wanted)
    assert torch.equal(torch.autograd.grad(compiled(leaf), leaf, draw)[0], wanted)


def test_what_the_kernels_do_not_take() -> None:
    given, _ = inputs(SHAPES[0])
    narrow = [given[0][:, :8], given[1][:, :8], *given[2:]]
    learned = [given[0], given[1].clone().requires_grad_(), *given[2:]]
    for tensors, reason in (
        ([tensor.float() for tensor in given], "float32 has no kernel"),
        (narrow, "D=8, the kernel takes multiples of 16"),
        (learned, "weight1 requires a gradient"),
        ([given[0], given[1].t(), *given[2:]], "weight1 is strided"),
    ):
        with pytest.raises(ValueError, match=rf"^mlp: impl='triton' cannot run: .*{reason}"):
            mlp(*tensors, impl="triton")
