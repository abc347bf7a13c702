"""A runner and its captures, which here do what a CUDA graph does; their memory, and the graph that is compiled."""

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import smi_fast.engine.runner as runner_module
from smi_fast.config import InversionConfig
from smi_fast.engine.compiler import lift_weights, trace_step
from smi_fast.engine.runner import UNROLLED, Bucket, Runner, Runners, Source
from smi_fast.engine.state import State
from smi_fast.engine.step import build_step
from smi_fast.model.sparse_vit import SparseViT
from tests.states import fresh

MakeModel = Callable[..., SparseViT]
CONFIG = InversionConfig(iterations=40, stops=(), seed=5)


def begun(model: SparseViT) -> State:
    state = fresh(model, CONFIG, [0, 1, 2, 3], [5, 6, 7, 8])
    with torch.no_grad():
        build_step(model, CONFIG)(state)
    return state


def swapping_step(state: State) -> None:
    """Stands for a step on two canvases."""
    assert state.spare is not None
    state.spare.copy_(2 * state.canvas + state.iteration)
    state.iteration.add_(1)
    state.turn()


class FakeGraph:
    """What a CUDA graph does: it works on the buffers as they were when it was captured."""

    def __init__(self, step: Callable[[State], None], state: State, iterations: int, pool: Any) -> None:
        self.step, self.state, self.iterations = step, replace(state), iterations

    def replay(self) -> None:
        captured = replace(self.state)
        for _ in range(self.iterations):
            self.step(captured)


@pytest.fixture
def fake_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner_module, "capture", FakeGraph)
    monkeypatch.setattr(runner_module, "warm_up", lambda step, state: None)


@pytest.mark.usefixtures("fake_graphs")
@pytest.mark.parametrize("total", [1, 7, UNROLLED, UNROLLED + 1, 3 * UNROLLED, 3 * UNROLLED + 7])
@pytest.mark.parametrize("pause", [0, 1, 13])
def test_a_runner_with_captures(make_model: MakeModel, total: int, pause: int) -> None:
    group = begun(make_model())
    group.canvas.fill_(1.0)
    group.spare = group.canvas.clone()
    want = group.clone()
    for _ in range(total):
        swapping_step(want)
    runner = Runner(swapping_step, group.rows(0, 2), object())
    for start in (0, 2, 0):  # whatever the canvases did, the next images find them in place
        state = group.clone()
        runner.load(state, start)
        done = runner.advance(pause) if 0 < pause <= total else 0  # one step or a replay first
        while done < total:
            done += runner.advance(total - done)
        assert done == total
        runner.store(state, start)
        assert torch.equal(state.canvas[start : start + 2], want.canvas[start : start + 2])
        assert torch.equal(state.canvas, state.spare)


@pytest.mark.usefixtures("fake_graphs")
def test_captures_do_all_of_the_work(make_model: MakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    group = begun(make_model())
    group.spare = group.canvas.clone()
    runner = Runner(swapping_step, group, object())
    runner.load(group, 0)
    monkeypatch.setattr(runner, "_step", None)  # beside a capture it would need memory of its own
    monkeypatch.setattr(runner_module, "capture", lambda step, *rest: FakeGraph(swapping_step, *rest))
    assert [runner.advance(25), runner.advance(15), runner.advance(5)] == [UNROLLED, UNROLLED, 1]
    assert runner.advance(50) == 1, "after an odd step the canvases are not where the capture expects them"
    assert runner.advance(1) == 1
    runner.load(group, 0)
    assert runner.advance(50) == UNROLLED, "new images find the canvases in place"
    assert runner.advance(50) == UNROLLED
    assert set(runner._captured) == {(UNROLLED, False), (1, False), (1, True)}


def test_a_pool_ends_with_its_last_capture(make_model: MakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    model, pools = make_model(), iter(range(9))
    runners = Runners(Source(model, CONFIG, compiled=False))
    runners._captures = True
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: next(pools))
    monkeypatch.setattr(runner_module, "Runner", lambda step, example, pool: SimpleNamespace(pool=pool))
    state = begun(model)
    assert [runners.of(state, 0, batch).pool for batch in (4, 2)] == [0, 0]  # type: ignore[attr-defined]
    runners.drop(Bucket(4, 12))
    assert runners.of(state, 0, 1).pool == 0, "one capture of it is left"  # type: ignore[attr-defined]
    for batch in (1, 2):
        runners.drop(Bucket(batch, 12))
    assert runners.of(state, 0, 2).pool == 1  # type: ignore[attr-defined]


def test_a_pool_whose_first_capture_failed_is_not_used_again(
    make_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, pools, met = make_model(), iter(range(9)), list[Any]()
    runners = Runners(Source(model, CONFIG, compiled=False))
    runners._captures = True
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: next(pools))

    def full(step: Any, example: State, pool: Any) -> Runner:
        met.append(pool)
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(runner_module, "Runner", full)
    for batch in (4, 2):
        with pytest.raises(torch.OutOfMemoryError):
            runners.of(begun(model), 0, batch)
    assert met == [0, 1]


@pytest.mark.parametrize("options", [{}, {"qk_norm": True, "reg_tokens": 2}])
def test_a_graph_takes_the_weights_of_the_model(make_model: MakeModel, options: dict[str, Any]) -> None:
    model = make_model(**options)
    state, step = begun(model), build_step(model, CONFIG)
    held = trace_step(step, state)
    graph, weights = lift_weights(trace_step(step, state))
    own = {parameter.data_ptr() for parameter in model.parameters()}
    assert sum(weight.data_ptr() in own for weight in weights) == len(own)
    assert len({id(weight) for weight in weights}) == len(weights), "each is taken once"
    assert not [*graph.parameters()]
    assert all(not buffer.ndim for buffer in graph.buffers())
    assert len(list(graph.graph.nodes)) == len(list(held.graph.nodes)) - sum(
        node.op == "get_attr" for node in held.graph.nodes
    ) + len(weights)
    with torch.no_grad():
        for one, other in zip(held(*state.tensors()), graph(*state.tensors(), *weights), strict=True):
            assert torch.equal(one, other)
