"""Whole inversions on devices that are not there: what is launched, captured, waited for and taken of memory."""

from collections import Counter
from collections.abc import Callable

import pytest
import torch

from smi_fast import InversionConfig
from smi_fast.engine.runner import UNROLLED
from smi_fast.kernels.common.dispatch import KERNELS_VARIABLE
from smi_fast.model.sparse_vit import SparseViT
from tests.offline_cuda.checks import empty_captures, faults_of_run, live_graphs
from tests.offline_cuda.recorder import Recorder, Row
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
    assert live_graphs(ran.rows) == len(ran.inverter.stages)
    replays = Counter(row.name for row in ran.rows if row.kind == "GRAPH")["launch"]
    assert replays == sum((stage.end - stage.start) // UNROLLED for stage in ran.inverter.stages)


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
    assert live_graphs(ran.rows) == len(ran.inverter.stages)


def test_kernels_off(recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    with_kernels = invert(recorder, demo_model(), batch=4, impl="eager").rows
    monkeypatch.setenv(KERNELS_VARIABLE, "torch")
    ran = invert(recorder, demo_model(), batch=4, impl="eager")
    assert_clean(ran.rows)
    assert launches(with_kernels, "adam_kernel") > 0
    assert launches(ran.rows, "adam_kernel") == 0


@pytest.mark.compiled
def test_compiled(recorder: Recorder) -> None:
    config = InversionConfig(iterations=25, stops=((12, 0.4),), jitter=0.3)
    ran = invert(recorder, tiny_model(), 4, config, impl="compiled")
    assert ran.inverter.impl == "compiled"
    assert_clean(ran.rows)
    assert live_graphs(ran.rows) == 2


def test_memory_runs_out(recorder: Recorder) -> None:
    model = demo_model()
    used, (free, total) = torch.cuda.memory_reserved(), torch.cuda.mem_get_info()
    whole = invert(recorder, model, batch=64, impl="eager")
    peak = torch.cuda.memory_reserved() - used
    del whole
    collect()
    with recorder.memory_of(total - free + peak * 3 // 4):
        ran = invert(recorder, model, batch=64, impl="eager")
    assert any("out of device memory at a batch of 64" in message for message in ran.messages), ran.messages
    assert ran.inverter.batches[0] < 64
    assert ran.shape[0] == 64
    assert_clean(ran.rows)


def test_the_second_device(recorder: Recorder) -> None:
    ran = invert(recorder, demo_model("cuda:1"), batch=4, impl="eager")
    assert_clean(ran.rows, device=1)
    assert len(ran.inverter.stages) == len(CONFIG.stages(64))
