"""The kernel of residual sum and layer norm, and its backward: no farther from float64 than eager torch is."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from smi_fast.kernels.add_layer_norm import add_layer_norm, norm_backward_launch, norm_launch
from smi_fast.kernels.common.configs import pinned
from smi_fast.kernels.common.launch import Config
from tests.kernels.cases import DEVICE, DTYPES, assert_near_truth, generator

pytestmark = pytest.mark.kernel
EPS = 1e-6


@dataclass(frozen=True)
class Inputs:
    """Of one call; ``d_sum`` and ``d_normed`` are the gradients that come back, None where nothing reads a result."""

    x: Tensor
    branch: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    d_sum: Tensor | None
    d_normed: Tensor | None

    def map(self, function: Callable[[Tensor], Tensor]) -> "Inputs":
        return Inputs(*(None if tensor is None else function(tensor) for tensor in vars(self).values()))

    def run(self, impl: str) -> dict[str, Tensor]:
        """Results and gradients, by name."""
        leaves = {name: tensor for name in ("x", "branch") if (tensor := getattr(self, name)) is not None}
        leaves = {name: tensor.detach().requires_grad_() for name, tensor in leaves.items()}
        results = add_layer_norm(leaves["x"], leaves.get("branch"), self.weight, self.bias, EPS, impl=impl)
        read = [(r, d) for r, d in zip(results, (self.d_sum, self.d_normed), strict=True) if d is not None]
        gradients = torch.autograd.grad([r for r, _ in read], list(leaves.values()), [d for _, d in read])
        found = {"sum": results[0].detach(), "normed": results[1].detach()}
        return found | {f"d_{name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}


def inputs(*shape: int, dtype: torch.dtype = torch.float32) -> Inputs:
    """Rows that lie off 0, as a residual stream's do."""
    draw = generator(sum(shape))
    x, branch, d_sum, d_normed = (torch.randn(*shape, generator=draw) for _ in range(4))
    weight, bias = (torch.randn(shape[-1], generator=draw) for _ in range(2))
    return Inputs(x + 1, branch, 1 + 0.5 * weight, bias, d_sum, d_normed).map(lambda t: t.to(DEVICE, dtype))


def assert_right(given: Inputs, impl: str = "triton") -> None:
    """Sum exact; the rest near float64, which starts from the same rounded sum."""
    dtype, width = given.x.dtype, given.x.shape[-1]
    found, eager = given.run(impl), given.run("torch")
    assert torch.equal(found["sum"], eager["sum"])
    exact = replace(given, x=eager["sum"], branch=None).map(Tensor.double).run("torch")
    exact |= {"d_branch": exact["d_x"]} if given.branch is not None else {}
    assert found.keys() == eager.keys() == exact.keys()
    for name, truth in exact.items():
        assert found[name].dtype == dtype
        assert found[name].shape == given.x.shape
        assert_near_truth(found[name], eager[name], truth, dtype, terms=2 + width)


# DeiT-Base, the demo, widths that are no powers of two, one warp and several, one value, one row
SHAPES = ((2, 3, 768), (2, 2, 192), (7, 100), (1, 3, 1), (2, 1500), (1, 4096), (16,))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_results_and_gradients(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    assert_right(inputs(*shape, dtype=dtype))


@pytest.mark.parametrize(
    "absent", ["branch", "weight", "bias", "d_sum", "d_normed", "branch d_sum", "weight bias d_sum"]
)
def test_parts_that_are_absent(absent: str) -> None:
    for dtype in DTYPES:
        assert_right(replace(inputs(2, 2, 48, dtype=dtype), **dict.fromkeys(absent.split())))


@pytest.mark.parametrize("rows", [2, 4])
def test_several_rows_a_program(rows: int) -> None:
    given, config = inputs(7, 48), Config(rows, 4)
    launch, found = norm_launch(given.x, given.branch, given.weight, given.bias, EPS, config)
    launch.run()
    backward, dx = norm_backward_launch(
        found[0], (found[2], found[3]), given.weight, given.d_normed, given.d_sum, config
    )
    backward.run()
    assert launch.grid == backward.grid == (-(-7 // rows),)
    wanted = given.run("triton")
    for one, name in ((found[0], "sum"), (found[1], "normed"), (dx, "d_x")):
        torch.testing.assert_close(one, wanted[name], rtol=1e-5, atol=1e-5)


def test_statistics_are_those_of_the_rounded_sum() -> None:
    given = inputs(4, 48, dtype=torch.float16)
    launch, (total, _, mean, rstd) = norm_launch(given.x, given.branch, None, None, EPS)
    launch.run()
    exact = total.double()
    assert not torch.equal(exact, given.x.double() + given.branch.double())
    torch.testing.assert_close(mean.double(), exact.mean(-1), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(rstd.double(), (exact.var(-1, correction=0) + EPS).rsqrt(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_far_from_zero(dtype: torch.dtype) -> None:
    # a variance from the mean of squares would lose it: 1024^2 beside 1
    given = inputs(4, 64, dtype=dtype)
    assert_right(replace(given, x=given.x + 1024))


def test_rows_of_one_number() -> None:
    given = replace(inputs(3, 48), x=torch.full((3, 48), 2.0, device=DEVICE), branch=None, d_sum=None)
    found = given.run("triton")
    assert torch.equal(found["normed"], given.bias.expand(3, 48))
    assert_right(given)


def test_any_strides() -> None:
    for given in (inputs(2, 3, 16), replace(inputs(2, 3, 16), branch=None)):
        wanted, pads = given.run("triton"), iter(range(1, 9))
        axes = given.map(lambda t: t.transpose(0, -1).contiguous().transpose(0, -1))
        # rows of every tensor another distance apart, and nothing to be read between them
        padded = given.map(lambda t, pads=pads: torch.nn.functional.pad(t, (0, next(pads)), value=torch.nan)[..., :16])
        assert axes.x.stride(-1) != 1
        assert padded.x.stride(-2) == 17
        for other in (axes, padded):
            found = replace(other, weight=given.weight, bias=given.bias).run("triton")
            assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_first_tokens_alone_and_an_expanded_gradient() -> None:
    given = inputs(2, 3, 16)
    tokens = replace(
        given.map(lambda t: t[:, :1] if t.ndim == 3 else t), d_sum=torch.ones((), device=DEVICE).expand(2, 1, 16)
    )
    assert tokens.x.stride(0) == 48
    assert_right(tokens)


def test_both_gradients_are_one_tensor() -> None:
    found = inputs(2, 3, 16).run("triton")
    assert found["d_x"].data_ptr() == found["d_branch"].data_ptr()
    assert found["d_x"].is_contiguous()


@pytest.mark.parametrize("which", ["x", "branch"])
def test_partial_requires_grad(which: str) -> None:
    given = inputs(2, 3, 16)
    leaves = {name: getattr(given, name).detach().requires_grad_(name == which) for name in ("x", "branch")}
    total, normed = add_layer_norm(*leaves.values(), given.weight, given.bias, EPS, impl="triton")
    (found,) = torch.autograd.grad((total, normed), (leaves[which],), (given.d_sum, given.d_normed))
    assert torch.equal(found, given.run("triton")["d_x"])


def test_tensors_that_need_no_gradient() -> None:
    given = inputs(2, 3, 16)
    total, normed = add_layer_norm(given.x, given.branch, given.weight, given.bias, EPS, impl="triton")
    assert not total.requires_grad
    assert not normed.requires_grad


def test_one_tensor_twice_traced_and_compiled() -> None:
    given = inputs(2, 3, 16)

    def norms(x: Tensor, impl: str = "triton") -> Tensor:
        total, normed = add_layer_norm(x, x, given.weight, given.bias, EPS, impl=impl)
        again = add_layer_norm(normed, None, None, None, EPS, impl=impl)[1]
        return (total * again).sum()

    def gradient(x: Tensor) -> Tensor:
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            return torch.autograd.grad(norms(leaf), leaf)[0]

    leaf = given.x.detach().requires_grad_()
    (wanted,) = torch.autograd.grad(norms(leaf, "torch"), leaf)
    traced = make_fx(gradient)(leaf.detach())
    compiled = torch.compile(norms, fullgraph=True, backend="aot_eager")
    for found in (gradient(leaf), traced(leaf.detach()), torch.autograd.grad(compiled(leaf), leaf)[0]):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_pinned_configurations_cover_the_widest_row() -> None:
    for op in ("add_layer_norm", "add_layer_norm_backward"):
        for width in (256, 512, 1024, 2048, 4096):
            assert pinned(op, width).block * width / pinned(op, width).warps <= 32 * 32, "more than 32 values a thread"


def test_what_the_kernel_does_not_take() -> None:
    row, wide = torch.zeros(1, 8, device=DEVICE), torch.zeros(1, 4097, device=DEVICE)
    for x, weight, reason in (
        (row.double(), None, "float64"),
        (wide, None, "rows of 4097"),
        (row, row[0].clone().requires_grad_(), "weight requires a gradient"),
    ):
        with pytest.raises(ValueError, match=rf"^add_layer_norm: impl='triton' cannot run: .*{reason}"):
            add_layer_norm(x, x, weight, None, EPS, impl="triton")
