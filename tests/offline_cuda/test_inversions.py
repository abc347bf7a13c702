"""Whole inversions on devices that are not there: what is launched, captured, waited for and taken of memory."""

import gc
from collections import Counter
from collections.abc import Callable

import pytest
import torch

from smi_fast import InversionConfig
from smi_fast.engine.runner import UNROLLED
from smi_fast.kernels.adam_update import adam_kernel
from smi_fast.kernels.common.dispatch import KERNELS_VARIABLE
from smi_fast.model.sparse_vit import SparseViT
from tests.offline_cuda.checks import empty_captures, faults_of_run, live_graphs
from tests.offline_cuda.recorder import Fault, Recorder, Row
from tests.offline_cuda.scenarios import CONFIG, collect, demo_model, invert, tiny_model

pytestmark = pytest.mark.offline_cuda
MODELS = {"tiny": tiny_model, "demo": demo_model}
MakeModel = Callable[..., SparseViT]
every_model = pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)


def assert_clean(rows: list[Row], device: int = 0) -> None:
    """Nothing that must not be there, and no capture of nothing."""
    assert faults_of_run(rows, device) == []
    assert empty_captures(rows) == []


def launches(rows: list[Row], name: str) -> int:
    """How often a kernel was launched or captured."""
    return sum(row.kind == "KERNEL" and row.name == name for row in rows)


@every_model
def test_eager(recorder: Recorder, make: MakeModel) -> None:
    ran = invert(recorder, make(), batch=4, impl="eager")
    assert ran.shape[0] == 4
    assert ran.messages == []
    assert_clean(ran.rows)
    assert live_graphs(ran.rows) >= len(ran.inverter.stages)
    replays = sum((row.kind, row.name) == ("GRAPH", "launch") for row in ran.rows)
    lengths = [stage.end - stage.start for stage in ran.inverter.stages]
    assert replays == sum(length // UNROLLED + length % UNROLLED for length in lengths)


def test_graphs_go_with_their_inverter(recorder: Recorder) -> None:
    ran = invert(recorder, tiny_model(), batch=4, impl="eager")
    assert live_graphs(ran.rows) > 0
    del ran
    collect()
    assert live_graphs(recorder.rows()) == 0


def test_waits_do_not_grow_with_iterations(recorder: Recorder) -> None:
    """But for the throttle, which waits for a launch that is some way back."""

    def waits(iterations: int) -> Counter[str]:
        config = InversionConfig(iterations=iterations, stops=((20, 0.3),), jitter=0.3)
        rows = invert(recorder, model, 4, config, impl="eager").rows
        return Counter(row.name for row in rows if row.kind == "WAIT")

    model = tiny_model()
    short, long = waits(40), waits(120)
    assert short.pop("cudaEventSynchronize") < long.pop("cudaEventSynchronize")
    assert short == long


def test_deterministic(recorder: Recorder) -> None:
    ran = invert(recorder, demo_model(), batch=4, impl="eager", deterministic=True)
    assert_clean(ran.rows)


def test_kernels_off(recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    with_kernels = invert(recorder, demo_model(), batch=4, impl="eager").rows
    monkeypatch.setenv(KERNELS_VARIABLE, "torch")
    ran = invert(recorder, demo_model(), batch=4, impl="eager")
    assert_clean(ran.rows)
    assert launches(with_kernels, "adam_kernel") > 0
    assert launches(ran.rows, "adam_kernel") == 0


@pytest.mark.compiled
def test_compiled(recorder: Recorder) -> None:
    config = InversionConfig(iterations=20, stops=(), jitter=0.3)
    ran = invert(recorder, tiny_model(), 4, config, impl="compiled")
    assert ran.inverter.impl == "compiled"
    assert any(row.kind == "KERNEL" and row.name.startswith("triton_") for row in ran.rows)
    assert_clean(ran.rows)


def test_memory_runs_out(recorder: Recorder) -> None:
    model, batch = demo_model(), 256
    config = InversionConfig(iterations=20, stops=((10, 0.3),), jitter=0.3)
    before, (free, total) = torch.cuda.memory_reserved(), torch.cuda.mem_get_info()
    whole = invert(recorder, model, batch, config, impl="eager")
    needed = torch.cuda.memory_reserved() - before
    del whole
    collect()
    with recorder.memory_of(total - free + needed * 6 // 10):
        ran = invert(recorder, model, batch, config, impl="eager")
    assert f"stage 1: out of device memory at a batch of {batch}, going on with {batch // 2}" in ran.messages
    assert ran.inverter.batches[0] == batch // 2
    assert ran.shape[0] == batch
    assert_clean(ran.rows)


def test_the_second_device(recorder: Recorder) -> None:
    ran = invert(recorder, demo_model("cuda:1"), batch=4, impl="eager")
    assert_clean(ran.rows, device=1)
    assert len(ran.inverter.stages) == len(CONFIG.stages(64))


def test_inverters_leave_no_memory_behind(recorder: Recorder) -> None:
    """A workspace of cuBLAS for each capture would be one that stays."""

    def held() -> int:
        ran = invert(recorder, model, batch=4, impl="eager")
        assert ran.shape[0] == 4
        del ran
        gc.collect()
        return torch.cuda.memory_allocated()

    model = tiny_model()
    assert held() == held()


@pytest.mark.parametrize("fault", ["instantiate", "module"])
def test_a_call_that_fails_for_want_of_memory(recorder: Recorder, fault: Fault) -> None:
    model = demo_model()
    if fault == "module":  # which are loaded once for each device
        adam_kernel.device_caches.clear()
    with recorder.failing(fault):
        ran = invert(recorder, model, batch=8, impl="eager")
    assert [message for message in ran.messages if "out of device memory at a batch of 8, going on with 4" in message]
    assert ran.shape[0] == 8
    assert_clean(ran.rows)
