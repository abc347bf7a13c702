"""What attends: each choice that runs on a CPU against float64, in a model too; defaults, refusals, the variable."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from smi_fast.kernels.common.dispatch import HAS_TRITON, KERNELS_VARIABLE
from smi_fast.model import attention as attention_module
from smi_fast.model.attention import ATTENTION_VARIABLE, NAMES, attention, packed_attention, parts_of, why_not
from smi_fast.model.sparse_vit import SparseViT

MakeModel = Callable[..., SparseViT]
ON_CPU = ("flash", "math", "tile", "plain")
FLASH = "_scaled_dot_product_flash_attention_for_cpu"
MODELS: dict[str, dict[str, Any]] = {
    "plain": {},
    "qk_norm": {"qk_norm": True},
    "averaged": {"global_pool": "avg", "fc_norm": True},
}


@pytest.fixture(autouse=True)
def no_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ATTENTION_VARIABLE, raising=False)


def packed_of(dtype: torch.dtype = torch.float64) -> Tensor:
    """``[B, N, 3, H, d]``."""
    return 2 * torch.randn(2, 17, 3, 3, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


def truth_of(packed: Tensor, scale: float) -> Tensor:
    query, key, value = packed.unbind(2)
    weights = (torch.einsum("bmhd,bnhd->bhmn", query, key) * scale).softmax(-1)
    return torch.einsum("bhmn,bnhd->bhmd", weights, value)


class Seen(TorchDispatchMode):
    """The names of the operations that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("scale", [None, 0.3, 1.0])
@pytest.mark.parametrize("choice", [*ON_CPU, None])
def test_it_is_attention(choice: str | None, scale: float | None) -> None:
    leaf = packed_of().requires_grad_()
    wanted = truth_of(leaf, 8**-0.5 if scale is None else scale)
    weights = torch.linspace(-1, 1, wanted.numel(), dtype=torch.float64).view_as(wanted)
    (gradient,) = torch.autograd.grad(wanted, leaf, weights)
    for found in (
        attention(*parts_of(leaf), choice=choice, scale=scale),
        packed_attention(leaf, choice=choice, scale=scale),
    ):
        torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(*torch.autograd.grad(found, leaf, weights), gradient, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("choice", ON_CPU)
def test_low_precision(choice: str, dtype: torch.dtype) -> None:
    packed = packed_of(dtype)
    found, wanted = packed_attention(packed, choice=choice), truth_of(packed.double(), 8**-0.5)
    assert found.dtype == dtype
    # logits of up to 2^5 are off by an eps of their size, and the weights by as much
    assert (found - wanted).norm() < 32 * torch.finfo(dtype).eps * wanted.norm()


@pytest.mark.parametrize("case", MODELS)
@pytest.mark.parametrize("choice", ON_CPU)
def test_a_model(choice: str, case: str, make_model: MakeModel) -> None:
    model = make_model(**MODELS[case])
    pixels = torch.randn(2, 3, 24, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    keep = torch.arange(0, 12, 2).expand(2, -1)
    results = []
    for chosen in (False, True):
        if chosen:
            model.choose_attention(7, choice)
        leaf = pixels.clone().requires_grad_()
        with Seen() as seen:
            logits, scores = model(leaf, keep)
        results.append((logits, scores, torch.autograd.grad(logits[:, 0].sum(), leaf)[0]))
    assert model.attention_choices == {7: choice}
    attending = 2 if case == "averaged" else 1
    assert seen.names.count(FLASH) == (attending if choice == "flash" else 0)
    for found, wanted in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)
    with Seen() as others:
        model(pixels)
    assert FLASH not in others.names, "it was chosen for 7 tokens alone"


@pytest.mark.parametrize(("case", "packed"), [("plain", 1), ("qk_norm", 0)])
def test_the_projection_goes_to_the_tile_in_one_piece(
    case: str, packed: int, make_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    for name in ("tile_attention", "packed_tile_attention"):
        function = getattr(attention_module, name)

        def spy(*args: Any, name: str = name, function: Any = function, **options: Any) -> Tensor:
            calls.append(name)
            return function(*args, **options)

        monkeypatch.setattr(attention_module, name, spy)
    model = make_model(**MODELS[case])
    model.choose_attention(13, "tile")
    model(torch.zeros(1, 3, 24, 32, dtype=torch.float64))
    assert calls == ["packed_tile_attention" if packed else "tile_attention"]


def test_the_choice_counts_when_the_forward_is_traced(make_model: MakeModel) -> None:
    model = make_model()
    model.choose_attention(13, "flash")
    windows, cells = torch.zeros(1, 12, 192, dtype=torch.float64), torch.arange(12)[None]
    graph = make_fx(lambda *both: model.forward_patches(*both).logits)(windows, cells)
    model.attention_choices.clear()
    with Seen() as seen:
        graph(windows, cells)
    assert FLASH in seen.names


# --- refused


def test_choices_are_refused_with_their_reason(make_model: MakeModel) -> None:
    model, parts = make_model(), parts_of(packed_of())
    known = "must be one of 'flash', 'efficient', 'math', 'tile', 'plain'"
    with pytest.raises(ValueError, match=f"choice='cudnn': {known}"):
        attention(*parts, choice="cudnn")
    with pytest.raises(ValueError, match="choice='efficient': 'efficient' attention cannot run at 17 tokens: there is"):
        packed_attention(packed_of(), choice="efficient")
    with pytest.raises(ValueError, match=f"name='fast': {known}"):
        model.choose_attention(5, "fast")
    with pytest.raises(ValueError, match=r"name='efficient': .* at 5 tokens: there is none on a CPU"):
        model.choose_attention(5, "efficient")
    for tokens in (1, 14):
        with pytest.raises(ValueError, match=rf"tokens={tokens}: must lie in 2..13, prefix tokens and kept patches"):
            model.choose_attention(tokens, "math")
    assert model.attention_choices == {}


def test_the_variable_overrides_all(make_model: MakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    model, pixels = make_model(), torch.zeros(1, 3, 24, 32, dtype=torch.float64)
    model.choose_attention(13, "plain")
    for value, expected in (("flash", 1), ("", 0)):
        monkeypatch.setenv(ATTENTION_VARIABLE, value)
        with Seen() as seen:
            model(pixels)
        assert seen.names.count(FLASH) == expected
    monkeypatch.setenv(ATTENTION_VARIABLE, "fused")
    with pytest.raises(ValueError, match="SMI_FAST_ATTENTION='fused': must be one of 'flash'"):
        model(pixels)
    monkeypatch.setenv(ATTENTION_VARIABLE, "efficient")
    with pytest.raises(
        ValueError, match=r"SMI_FAST_ATTENTION='efficient': .* cannot run at 13 tokens: there is none on"
    ):
        model(pixels)


# --- a device that is not there


class OnDevice:
    """What the checks look at, of a tensor on a GPU."""

    def __init__(self, tokens: int, width: int, dtype: torch.dtype) -> None:
        self.shape, self.dtype, self.device = (1, 1, tokens, width), dtype, torch.device("cuda")

    def element_size(self) -> int:
        return self.dtype.itemsize


HALF, SINGLE, DOUBLE = torch.bfloat16, torch.float32, torch.float64
ON_GPU: list[tuple[str, tuple[int, int, torch.dtype], str | None]] = [
    ("flash", (47, 64, HALF), None),
    ("flash", (47, 64, SINGLE), "it takes 16 bits, not torch.float32"),
    ("flash", (47, 264, HALF), "it takes heads up to 256 wide, not 264"),
    ("efficient", (47, 64, HALF), None),
    ("efficient", (47, 64, DOUBLE), "it takes no float64"),
    ("efficient", (47, 20, HALF), "it takes heads in multiples of 16 bytes, not 20 of torch.bfloat16"),
    ("efficient", (47, 20, SINGLE), None),
    ("tile", (300, 64, HALF), "300 tokens, the kernel takes up to 256"),
    ("tile", (47, 64, DOUBLE), "float64 has no kernel"),
    *((name, (300, 300, DOUBLE), None) for name in ("math", "plain")),
]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    properties = SimpleNamespace(shared_memory_per_block_optin=232448)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    return monkeypatch


@pytest.mark.skipif(not HAS_TRITON, reason="the kernel's own reasons come after Triton's")
@pytest.mark.parametrize(("name", "query", "reason"), ON_GPU)
def test_reasons_on_a_gpu(
    name: str, query: tuple[int, int, torch.dtype], reason: str | None, gpu: pytest.MonkeyPatch
) -> None:
    assert name in NAMES
    assert why_not(name, OnDevice(*query)) == reason  # type: ignore[arg-type]


@pytest.mark.skipif(not HAS_TRITON, reason="without Triton there is no tile")
def test_defaults_on_a_gpu(gpu: pytest.MonkeyPatch) -> None:
    def default(*query: Any) -> str:
        return attention_module._settle(OnDevice(*query), None)  # type: ignore[arg-type]

    gpu.delenv(KERNELS_VARIABLE, raising=False)
    assert [default(tokens, 64, HALF) for tokens in (1, 64, 197, 256, 257, 999)] == ["tile"] * 4 + ["flash"] * 2
    assert default(99, 136, HALF) == "flash", "too wide for a tile"
    assert default(300, 20, HALF) == "flash", "it is filled up to 24"
    assert default(300, 300, HALF) == "math", "too wide, and 600 bytes a head are too odd"
    assert default(47, 64, SINGLE) == "efficient"
    assert default(47, 64, DOUBLE) == "math"
    gpu.setenv(KERNELS_VARIABLE, "torch")
    assert default(47, 64, HALF) == "flash"
    gpu.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert default(200, 64, torch.float16) == "efficient", "no flash before Ampere"


def switches() -> tuple[bool, ...]:
    cuda = torch.backends.cuda
    return cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.math_sdp_enabled(), cuda.cudnn_sdp_enabled()


@pytest.mark.parametrize("choice", ON_CPU)
def test_no_switch_of_the_process_moves(choice: str) -> None:
    """Another thread may attend meanwhile, and would be refused."""
    before, seen = switches(), set()

    class Look(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.add(switches())
            return func(*args, **(kwargs or {}))

    with Look():
        packed_attention(packed_of(), choice=choice)
    assert seen == {before}
