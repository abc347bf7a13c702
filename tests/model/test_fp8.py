"""Models in fp8: against float32, traced and compiled; what is refused, and what is estimated."""

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from smi_fast import Inverter, load_model
from smi_fast.config import InversionConfig
from smi_fast.engine.compiler import trace_step
from smi_fast.engine.report import build_report
from smi_fast.engine.step import build_step
from smi_fast.model.fp8 import to_fp8, why_not_fp8
from smi_fast.model.from_timm import from_timm, weights_sha256
from smi_fast.model.scaled_linear import FP8, ScaledLinear
from smi_fast.model.sparse_vit import SparseViT
from smi_fast.model.spec import ModelInfo
from smi_fast.storage.inductor import compile_graph, why_not_compile
from smi_fast.tuning.cost import matmul_rate, memory_bytes
from tests.states import fresh

MakeModel = Callable[..., SparseViT]
E5M2 = torch.float8_e5m2
ROUNDING = {FP8: 2.0**-4, E5M2: 2.0**-3}  # largest relative error of a normal value
GRADIENTS = pytest.mark.parametrize("gradient", [E5M2, FP8], ids=str)
LABELS, IDS = [0, 3, 4], [7, 0, 2]
SHORT = InversionConfig(iterations=8, stops=((2, 0.3),), jitter=0.4)


# --- models


def distilled() -> SparseViT:
    """Two prefix tokens that the head reads."""
    options = {"img_size": 48, "embed_dim": 48, "num_heads": 3, "depth": 2, "num_classes": 5}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vit = timm.create_model("deit_tiny_distilled_patch16_224", **options).eval()
        for parameter in vit.parameters():
            spread = parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.4
            parameter.data.add_(torch.randn_like(parameter) * spread)
    return from_timm(vit, ModelInfo("distilled", weights_sha256(vit), (0.5,) * 3, (0.25,) * 3))


MODELS: dict[str, dict[str, Any]] = {
    "plain": {},
    "averaged": {"global_pool": "avg", "fc_norm": True},
    "no_qkv_bias": {"qkv_bias": False},
    "odd_mlp": {"mlp_ratio": 1.25},  # 40 wide
}


def scaled_layers(model: SparseViT) -> dict[str, torch.dtype]:
    """Names, and the formats of their gradients."""
    return {name: module.gradient for name, module in model.named_modules() if isinstance(module, ScaledLinear)}


@GRADIENTS
@pytest.mark.parametrize("case", [*MODELS, "distilled"])
def test_model(case: str, gradient: torch.dtype, make_model: MakeModel) -> None:
    def build() -> SparseViT:
        return distilled() if case == "distilled" else make_model(torch.float32, **MODELS[case])

    truth, low = build(), build().with_dtype(torch.bfloat16)
    model = to_fp8(build().with_dtype(torch.bfloat16), gradient)
    layers = ("qkv", "proj") if case == "odd_mlp" else ("qkv", "proj", "fc1", "fc2")
    assert scaled_layers(model) == {f"blocks.{i}.{name}": gradient for i in range(2) for name in layers}
    assert (model.precision, model.dtype, low.precision) == ("fp8", torch.bfloat16, "bfloat16")
    assert not any(p.requires_grad for p in model.parameters())
    assert not any(m.training for m in model.modules())

    pixels = torch.randn(16, 3, model.grid.height, model.grid.width, generator=torch.Generator().manual_seed(0))
    keep = torch.arange(1, model.grid.patches, 2).expand(16, -1)
    results = []
    for each in (truth, low, model):
        leaf = pixels.clone().requires_grad_()
        logits, scores = each(leaf, keep)
        results.append((logits.detach(), scores.detach(), torch.autograd.grad(logits[:, 0].sum(), leaf)[0]))
    # as if each product added an error of its own, see tests/test_scaled_linear.py
    forward = 2 * len(layers) * 2 * ROUNDING[FP8] ** 2 / 3
    backward = 2 * len(layers) * (ROUNDING[gradient] ** 2 + ROUNDING[FP8] ** 2) / 3
    allowed = forward**0.5, forward**0.5, (forward + backward) ** 0.5
    for limit, exact, bf16, fp8 in zip(allowed, *results, strict=True):
        assert fp8.dtype == torch.float32
        assert (bf16 - exact).norm() < (fp8 - exact).norm() < limit * exact.norm()


def start(model: SparseViT) -> tuple[Any, Any]:
    step = build_step(model, SHORT)
    state = fresh(model, SHORT, LABELS, IDS)
    with torch.no_grad():
        for _ in range(3):
            step(state)
    return state.stopped(SHORT.strategy, 8, 3), step


class NoHost(TorchDispatchMode):
    """Refuses what reads a value back."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func is not torch.ops.aten._local_scalar_dense.default, "a value went to the host"
        return func(*args, **(kwargs or {}))


def test_the_step_does_not_wait_for_the_host(make_model: MakeModel) -> None:
    state, step = start(to_fp8(make_model(torch.bfloat16)))
    with torch.no_grad(), NoHost():
        step(state)


def test_traced_graph_equals_eager(make_model: MakeModel) -> None:
    eager, step = start(to_fp8(make_model(torch.bfloat16)))
    traced = eager.clone()
    graph = trace_step(step, eager)
    assert sum(node.target is torch.ops.aten._scaled_mm.default for node in graph.graph.nodes) == 2 * (8 + 1)
    with torch.no_grad():
        for _ in range(3):
            step(eager)
            step.finish(traced, graph(*traced.tensors()))
    for one, other in zip(eager.tensors(), traced.tensors(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.compiled
def test_inductor_compiles_the_products() -> None:
    """A layer between pointwise neighbours, with its gradient; the whole step is traced above."""
    if why_not_compile("cpu"):
        pytest.skip(f"inductor does not work here: {why_not_compile('cpu')}")
    draw = torch.Generator().manual_seed(0)
    linear = nn.Linear(32, 48)
    linear.load_state_dict({"weight": torch.randn(48, 32, generator=draw), "bias": torch.randn(48, generator=draw)})
    layer, x = ScaledLinear(linear), torch.randn(40, 32, generator=draw)

    def results(run: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            y = run(F.silu(leaf)).float()
            return y.detach(), torch.autograd.grad(y.sin().sum(), leaf)[0]

    def in_fp8(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return results(lambda given: layer(given.bfloat16()), x)

    graph = make_fx(in_fp8)(x)
    assert sum(node.target is torch.ops.aten._scaled_mm.default for node in graph.graph.nodes) == 2
    compiled = compile_graph(graph, (x,))(x)
    for found, eager, exact in zip(compiled, in_fp8(x), results(linear, x), strict=True):
        # inductor keeps float32 where eager rounds to bfloat16, and one bit there can become a step of e4m3
        assert (found - exact).norm() <= 1.5 * (eager - exact).norm()
        assert (eager - exact).norm() < 0.2 * exact.norm()


def test_a_failure_stays_in_its_image(make_model: MakeModel) -> None:
    state, step = start(to_fp8(make_model(torch.bfloat16)))
    state.canvas[1, 0] = torch.nan
    with torch.no_grad():
        step(state)
    assert state.failed_at.tolist() == [-1, 3, -1]
    assert state.losses.isfinite().all(1).tolist() == [True, False, True]


def test_images_are_still_recognised() -> None:
    model = to_fp8(load_model("demo", dtype=torch.bfloat16))
    config = InversionConfig(iterations=20, stops=((4, 0.3), (8, 0.3)), seed=3)
    inverter = Inverter(model, config, batch_size=3, impl="eager")
    images = inverter([0, 3, 5])
    judged, _ = load_model("demo")(images.pixels, images.keep)
    assert judged.argmax(1).tolist() == [0, 3, 5]
    assert build_report(inverter, images)["dtype"] == "fp8"


# --- refused, and estimated


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    assert why_not_fp8(torch.device("cpu")) == "no fp8 units"
    for capability, reason in (
        ((8, 0), "no fp8 units (compute capability 8.0, they came with 8.9)"),
        ((8, 9), None),
        ((9, 0), None),
        ((12, 0), None),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert why_not_fp8(torch.device("cuda")) == reason


@pytest.mark.parametrize("name", ["demo", "deit_tiny_patch16_224"])
def test_load_model_refuses_before_any_work(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for work in ("_demo", "_from_timm_name"):
        monkeypatch.setattr(f"smi_fast.model.load.{work}", lambda request: pytest.fail("work was started"))
    with pytest.raises(ValueError, match=r"dtype=torch.float8_e4m3fn: device='cpu' has no fp8 units; use torch.bfl"):
        load_model(name, dtype=FP8)


def test_load_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("smi_fast.model.load.why_not_fp8", lambda device: None)
    model = load_model("demo", dtype=FP8)
    assert (model.precision, model.dtype) == ("fp8", torch.bfloat16)
    with pytest.raises(ValueError, match=r"dtype=torch.float32: demo is in fp8"):
        model.with_dtype(torch.float32)
    with pytest.raises(ValueError, match="model is fp8: must be bfloat16"):
        to_fp8(model)


def test_conversion_refuses(make_model: MakeModel) -> None:
    with pytest.raises(ValueError, match="model is float32: must be bfloat16"):
        to_fp8(make_model(torch.float32))
    with pytest.raises(ValueError, match="model='tiny': none of its linear layers has widths in multiples of 16"):
        to_fp8(make_model(torch.bfloat16, embed_dim=24))


@pytest.mark.parametrize("width", [48, 24])
def test_cost(width: int, make_model: MakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    product, seen = torch._scaled_mm, []
    monkeypatch.setattr(torch, "_scaled_mm", lambda *args, **options: seen.append(1) or product(*args, **options))
    shape = make_model(embed_dim=width).shape
    assert memory_bytes(shape, 4, FP8) == memory_bytes(shape, 4, torch.bfloat16)
    assert matmul_rate(shape, 4, torch.device("cpu"), FP8) > 0
    assert bool(seen) == (width == 48), "24 has no fp8 product"
