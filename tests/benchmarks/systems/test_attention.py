"""PyTorch's attention in the benchmarks is held to a named back end, compiled or not, and is nowhere left to itself."""

import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from benchmarks.harness.tables import ROOT
from benchmarks.systems.attention import backend_of, torch_attention


def query(dtype: torch.dtype, width: int = 64) -> Any:
    """What a choice looks at, on a GPU."""
    return SimpleNamespace(shape=(2, 3, 47, width), dtype=dtype, device=torch.device("cuda"))


def test_the_back_end_follows_from_the_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert backend_of(query(torch.bfloat16)) == "flash"
    assert backend_of(query(torch.float32)) == "efficient"
    assert backend_of(query(torch.float32, width=5)) == "math"
    assert backend_of(query(torch.float64)) == "math"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert backend_of(query(torch.bfloat16)) == "efficient"
    assert backend_of(torch.empty(2, 3, 47, 64)) == "flash"


@pytest.mark.parametrize("backend", ["flash", "math"])
def test_a_compiler_sees_the_back_end(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.systems.attention.BACKENDS", (backend,))
    draw = torch.Generator().manual_seed(0)
    three = [torch.randn(2, 3, 7, 8, generator=draw, dtype=torch.float64) for _ in range(3)]
    seen: list[str] = []

    def record(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        seen.append(str(make_fx(graph)(*inputs).graph))
        return graph

    torch._dynamo.reset()
    found = torch.compile(torch_attention, fullgraph=True, backend=record)(*three)
    truth = (three[0] @ three[1].transpose(-2, -1) * 8**-0.5).softmax(-1) @ three[2]
    torch.testing.assert_close(found, truth)
    torch.testing.assert_close(torch_attention(*three), truth)
    assert len(seen) == 1
    assert ("flash_attention" in seen[0]) == (backend == "flash")


def test_no_benchmark_leaves_the_back_end_to_pytorch() -> None:
    for path in sorted((ROOT / "benchmarks").rglob("*.py")):
        assert not re.search(r"scaled_dot_product_attention\(", path.read_text()), path
