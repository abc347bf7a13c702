"""Errors that are planted into a step are found: each check is seen to fail."""

import ctypes
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import smi_fast.engine.runner as runner_module
from smi_fast.engine.runner import Runners, Source
from smi_fast.engine.state import State
from smi_fast.engine.step import build_step
from smi_fast.model.sparse_vit import SparseViT
from tests.offline_cuda.checks import copied_weights, faults_of_run, faults_of_step, live_graphs
from tests.offline_cuda.recorder import Recorder, Row
from tests.offline_cuda.scenarios import CONFIG, collect, invert, measure_bucket, state_of, tiny_model, weights_of

pytestmark = pytest.mark.offline_cuda
Plant = Callable[[Callable[[State], object]], None]
BATCH, KEPT = 4, 8


@pytest.fixture
def model(recorder: Recorder) -> SparseViT:
    """On the first device."""
    return tiny_model()


@pytest.fixture
def plant(monkeypatch: pytest.MonkeyPatch) -> Plant:
    """Have every step that is built do something besides, once its iteration is done."""

    def do(error: Callable[[State], object]) -> None:
        def build(model: SparseViT, config: object) -> Callable[[State], None]:
            step = build_step(model, CONFIG)

            def faulty(state: State) -> None:
                step(state)
                error(state)

            return faulty

        monkeypatch.setattr(runner_module, "build_step", build)

    return do


def steps(recorder: Recorder, model: SparseViT) -> list[Row]:
    """The rows of a single step."""
    state = state_of(model, CONFIG, BATCH, KEPT)
    runner = Runners(Source(model, CONFIG, compiled=False, graphs=False)).of(state, 0, BATCH)
    for _ in range(2):
        runner.advance(1)
    recorder.reset()
    runner.advance(1)
    return recorder.rows()


def capture(recorder: Recorder, model: SparseViT) -> list[Row]:
    """The rows of a capture, whether it comes to its end or not."""
    state = state_of(model, CONFIG, BATCH, KEPT)
    recorder.reset()
    try:
        Runners(Source(model, CONFIG, compiled=False)).of(state, 0, BATCH)
    except RuntimeError:
        torch.cuda.synchronize()
    return recorder.rows()


def test_without_any_nothing_is_found(recorder: Recorder, model: SparseViT) -> None:
    assert faults_of_step(steps(recorder, model)) == []
    assert faults_of_run(capture(recorder, model), device=0) == []


def test_a_wait_in_the_step(recorder: Recorder, model: SparseViT, plant: Plant) -> None:
    plant(lambda state: state.losses.sum().item())
    assert "cudaStreamSynchronize waits" in faults_of_step(steps(recorder, model))
    found = faults_of_run(capture(recorder, model), device=0)
    assert any("waits for a capturing stream" in fault or "pageable memory" in fault for fault in found), found


def test_memory_that_grows_in_the_step(recorder: Recorder, model: SparseViT, plant: Plant) -> None:
    kept = list[Tensor]()
    plant(lambda state: kept.append(torch.empty(2**24, device=state.canvas.device)))
    assert "cudaMalloc in a step" in faults_of_step(steps(recorder, model))


def test_an_allocation_in_a_capture(recorder: Recorder, model: SparseViT, plant: Plant) -> None:
    # as a library does that knows nothing of captures
    plant(lambda state: ctypes.CDLL(None).cudaMalloc(ctypes.byref(ctypes.c_void_p()), ctypes.c_size_t(4096)))
    found = faults_of_run(capture(recorder, model), device=0)
    assert any(fault.startswith("cudaMalloc during a capture") for fault in found), found


def test_a_launch_outside_the_capture(recorder: Recorder, model: SparseViT, plant: Plant) -> None:
    beside = torch.cuda.Stream()

    def launch(state: State) -> None:
        with torch.cuda.stream(beside):
            torch.add(state.canvas, 1, out=state.canvas)

    plant(launch)
    found = faults_of_run(capture(recorder, model), device=0)
    assert any("outside the capture of its thread" in fault for fault in found), found


def test_another_device(recorder: Recorder, model: SparseViT, plant: Plant) -> None:
    plant(lambda state: torch.ones(4, device="cuda:1"))
    found = faults_of_run(steps(recorder, model), device=0)
    assert any("on device 1, not 0" in fault for fault in found), found


def test_a_capture_that_outlives_its_inverter(recorder: Recorder, model: SparseViT) -> None:
    ran = invert(recorder, model, BATCH, impl="eager")
    leaked, made = ran.inverter.runners, live_graphs(ran.rows)
    del ran
    collect()
    assert live_graphs(recorder.rows()) == made > 0
    del leaked
    collect()
    assert live_graphs(recorder.rows()) == 0


def test_weights_that_are_copied_for_a_bucket(
    recorder: Recorder, model: SparseViT, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = state_of(model, CONFIG, BATCH, KEPT)
    weights = sum(weight.nbytes for weight in weights_of(model))
    clean = measure_bucket(recorder, model, CONFIG, state, compiled=False)
    assert copied_weights(clean.memory, weights) == []

    def build(model: SparseViT, config: object) -> Callable[[State], None]:
        step, copies = build_step(model, CONFIG), [each.clone() for each in weights_of(model)]
        return lambda state: step(state) if copies else None

    monkeypatch.setattr(runner_module, "build_step", build)
    planted = measure_bucket(recorder, model, CONFIG, state, compiled=False)
    assert copied_weights(planted.memory, weights) != []
