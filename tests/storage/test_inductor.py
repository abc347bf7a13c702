"""Compiled graphs outlive the process, in a folder of the user's own."""

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._inductor.runtime.cache_dir_utils import default_cache_dir
from torch.fx.experimental.proxy_tensor import make_fx

from smi_fast.engine.randomness import deterministic_algorithms
from smi_fast.storage.environment import cache_home
from smi_fast.storage.inductor import CACHE_VARIABLE, compile_graph, use_private_cache, why_not_compile

# a custom op and pointwise work behind it: what a step's graph is made of
SCRIPT = """
import json, torch
from torch.fx.experimental.proxy_tensor import make_fx
from smi_fast.storage.inductor import compile_graph
from smi_fast.kernels.common.grid import Grid
from smi_fast.kernels.total_variation import total_variation
given = torch.linspace(-9, 9, 2 * 3 * 64).view(2, 3, 8, 8).sin(), torch.tensor([[0, 3], [1, 2]])
graph = make_fx(lambda canvas, ids: total_variation(canvas, ids, Grid(8, 8, 4), "batch")[1] * 2)(*given)
assert any("smi_fast" in str(node.target) for node in graph.graph.nodes), "no custom op is in the graph"
found = compile_graph(graph, given)(*given)
print(json.dumps(dict(torch._dynamo.utils.counters["inductor"]) | {"sum": float(found.sum())}))
"""


@torch.library.custom_op("smi_fast_tests::twice", mutates_args=())
def twice(tensor: Tensor) -> Tensor:
    return tensor * 2


@twice.register_fake
def _(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor)


@pytest.fixture(autouse=True)
def no_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, "")  # so that it is put back as it was
    monkeypatch.delenv(CACHE_VARIABLE)


@pytest.mark.parametrize("imported", [False, True])
def test_the_folder_is_private_and_named_after_the_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, imported: bool
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    if imported:  # inductor, which puts its default there
        monkeypatch.setenv(CACHE_VARIABLE, default_cache_dir())
    folder = use_private_cache()
    assert folder == cache_home() / f"inductor-{torch.__version__}" == tmp_path / "smi_fast" / folder.name
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert os.environ[CACHE_VARIABLE] == str(folder)


def test_a_folder_that_the_user_chose_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "mine"))
    assert use_private_cache() == tmp_path / "mine"
    assert not (tmp_path / "mine").exists()


def test_where_the_folder_cannot_be_made_pytorch_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert use_private_cache() is None
    assert CACHE_VARIABLE not in os.environ


@pytest.mark.parametrize("wanted", [False, True])
def test_deterministic_algorithms_let_no_timing_choose(monkeypatch: pytest.MonkeyPatch, wanted: bool) -> None:
    seen = []
    monkeypatch.setattr(
        torch._inductor, "standalone_compile", lambda *_, **__: seen.append(torch._inductor.config.deterministic)
    )
    graph = make_fx(torch.relu)(torch.ones(2))
    with deterministic_algorithms(wanted):
        compile_graph(graph, [torch.ones(2)])
    assert seen == [wanted]
    assert not torch._inductor.config.deterministic


@pytest.mark.compiled
def test_a_second_process_finds_the_graph(tmp_path: Path) -> None:
    if why_not_compile("cpu"):
        pytest.skip(f"inductor does not work here: {why_not_compile('cpu')}")
    root = Path(__file__).parent.parent.parent
    environment = {k: v for k, v in os.environ.items() if k != CACHE_VARIABLE} | {
        "XDG_CACHE_HOME": str(tmp_path),
        "PYTHONPATH": str(root),
        "TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS": "0",  # they pay from the third kernel on
        "TORCHINDUCTOR_VEC_ISA_OK": "1",  # another test asks
    }
    command = [sys.executable, "-c", SCRIPT]
    runs = []
    for _ in range(2):
        done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        runs.append(json.loads(done.stdout.splitlines()[-1]))
    first, second = runs
    assert list(tmp_path.glob("smi_fast/inductor-*/fxgraph/*"))
    assert first["fxgraph_cache_miss"] == 1
    assert second["fxgraph_cache_hit"] == 1
    assert "fxgraph_cache_miss" not in second
    assert first["sum"] == second["sum"]


def test_inductor_knows_a_custom_op_before_it_looks_at_the_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor.lowering import lowerings

    op, known = torch.ops.smi_fast_tests.twice.default, list[bool]()
    monkeypatch.setattr(torch._inductor, "standalone_compile", lambda *_, **__: known.append(op in lowerings))
    assert op not in lowerings
    graph = make_fx(lambda tensor: twice(tensor) + 1)(torch.ones(3))
    compile_graph(graph, (torch.ones(3),))
    compile_graph(graph, (torch.ones(3),))
    assert known == [True, True]
