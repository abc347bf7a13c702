"""`mlp` in plain torch, and its ops' CPU bodies, against ``nn.Linear`` and ``nn.GELU`` in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from smi_fast.kernels import mlp as mlp_module
from smi_fast.kernels.common.launch import ProductConfig
from smi_fast.kernels.mlp import mlp

Layers = tuple[Tensor, Tensor | None, Tensor, Tensor | None]


def layers_of(width: int, hidden: int, out: int, bias: tuple[bool, bool] = (True, True)) -> Layers:
    draw = torch.Generator().manual_seed(width)
    weight1, weight2 = (torch.randn(*s, generator=draw).double() for s in ((hidden, width), (out, hidden)))
    biases = (torch.randn(side, generator=draw).double() for side in (hidden, out))
    bias1, bias2 = (b if wanted else None for b, wanted in zip(biases, bias, strict=True))
    return weight1, bias1, weight2, bias2


def op(x: Tensor, layers: Layers) -> Tensor:
    """As it stands in a graph on a GPU."""
    return mlp_module._Mlp.apply(x, *layers)


@settings(deadline=None, max_examples=40)
@given(
    rows=st.lists(st.integers(1, 4), max_size=3),
    widths=st.tuples(*[st.integers(1, 9)] * 3),
    bias=st.tuples(st.booleans(), st.booleans()),
)
def test_it_is_two_linear_layers_with_gelu_between(
    rows: list[int], widths: tuple[int, int, int], bias: tuple[bool, bool]
) -> None:
    layers = layers_of(*widths, bias)
    leaf = torch.randn(*rows, widths[0], dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    leaf.requires_grad_()
    linear1, linear2 = (nn.Linear(1, 1, w, dtype=torch.float64).requires_grad_(False) for w in bias)
    for linear, weight, b in ((linear1, *layers[:2]), (linear2, *layers[2:])):
        linear.weight = nn.Parameter(weight, requires_grad=False)
        linear.bias = None if b is None else nn.Parameter(b, requires_grad=False)
    wanted = linear2(nn.GELU()(linear1(leaf)))
    draw = torch.linspace(-1, 1, wanted.numel(), dtype=torch.float64).view_as(wanted)
    (gradient,) = torch.autograd.grad(wanted, leaf, draw)
    for found in (mlp(leaf, *layers), op(leaf, layers)):
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(torch.autograd.grad(found, leaf, draw)[0], gradient, rtol=1e-10, atol=1e-10)


def test_gradcheck() -> None:
    leaf = torch.randn(2, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    layers = layers_of(5, 4, 6)
    assert torch.autograd.gradcheck(lambda x: op(x, layers), (leaf,))


def test_a_graph_shows_torchs_products() -> None:
    layers = layers_of(5, 4, 6)

    def gradient(x: Tensor) -> Tensor:
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            return torch.autograd.grad(op(leaf, layers).square().sum(), leaf)[0]

    x = torch.randn(2, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    traced = make_fx(gradient)(x)
    targets = [str(node.target) for node in traced.graph.nodes if node.op == "call_function"]
    products = [name for name in targets if "mm" in name or "smi_fast" in name]
    ops = ("smi_fast.mlp_hidden", "aten.addmm", "smi_fast.mlp_hidden_backward", "aten.mm")
    assert products == [f"{name}.default" for name in ops]
    torch.testing.assert_close(traced(x), gradient(x))
    leaf = x.clone().requires_grad_()
    compiled = torch.compile(lambda x: op(x, layers), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(leaf).square().sum(), leaf)[0], gradient(x))


def test_learned_weights_get_their_gradient_in_plain_torch() -> None:
    weight1, *rest = layers_of(3, 4, 3)
    weight1.requires_grad_()
    out = mlp(torch.ones(2, 3, dtype=torch.float64), weight1, *rest)
    assert torch.autograd.grad(out.sum(), weight1)[0].abs().sum() > 0


def test_tensors_that_do_not_fit_each_other() -> None:
    x, (weight1, bias1, weight2, bias2) = torch.ones(2, 3, dtype=torch.float64), layers_of(3, 4, 5)
    for call, message in (
        ((x.float(), weight1, bias1, weight2, bias2), "weight1 is float64: must be float32"),
        ((x, weight1[:, :2], bias1, weight2, bias2), r"weight1 of shape \(4, 2\): must be \[F, D\] with D=3"),
        ((x, weight1, bias1, weight2[:, :2], bias2), r"weight2 of shape \(5, 2\): must be \[E, F\] with F=4"),
        ((x, weight1, bias2, weight2, bias2), r"bias1 of shape \(5,\): must be \[F\] with F=4"),
        ((x, weight1, None, weight2, bias1), r"bias2 of shape \(4,\): must be \[E\] with E=5"),
    ):
        with pytest.raises(ValueError, match=f"mlp: {message}"):
            mlp(*call)


def test_what_the_kernels_do_not_take() -> None:
    def reason(x: Tensor, weight1: Tensor, weight2: Tensor) -> str | None:
        return mlp_module.unsupported(x, weight1, None, weight2, None)

    x, weight = torch.zeros(2, 16, dtype=torch.bfloat16), torch.zeros(16, 16, dtype=torch.bfloat16)
    assert reason(x, weight, weight) is None
    assert "float32 has no kernel" in str(reason(x.float(), weight.float(), weight.float()))
    assert "D=8" in str(reason(x[:, :8], weight[:, :8], weight))
    assert "F=8" in str(reason(x, weight[:8], weight[:, :8]))
    assert "E=8" in str(reason(x, weight, weight[:8]))
    assert "weight2 requires a gradient" in str(reason(x, weight, weight.clone().requires_grad_()))
    assert "weight2 is strided" in str(reason(x, weight, weight.t()))


def test_a_device_with_little_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    class Properties:
        shared_memory_per_block_optin = 65536  # of sm_75

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    reason = mlp_module._short_of_memory(torch.zeros(2, 16, dtype=torch.float16))
    assert reason == "its tiles need 98304 bytes of shared memory, there are 65536"
    Properties.shared_memory_per_block_optin = 101376  # of sm_89
    assert mlp_module._short_of_memory(torch.zeros(2, 16, dtype=torch.float16)) is None
    assert ProductConfig(128, 4, 128, 64, 3).shared == 98304
