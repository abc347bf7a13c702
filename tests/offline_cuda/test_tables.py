"""The step of a DeiT-Base as a table in the repository: a change of the step is a change of that file."""

from pathlib import Path

import pytest
import torch

from smi_fast import InversionConfig, load_model
from tests.offline_cuda.checks import copied_weights, faults_of_step
from tests.offline_cuda.inductor import watch
from tests.offline_cuda.recorder import Recorder
from tests.offline_cuda.scenarios import DEVICE, measure_bucket, state_of, weights_of
from tests.offline_cuda.table import table_of

pytestmark = [pytest.mark.offline_cuda, pytest.mark.compiled]
TABLES = Path(__file__).parent / "tables"
AGAIN = "python -m tests.offline_cuda --write-tables"
MODEL, BATCH, KEPT = "deit_base_patch16_224", 64, 46


def test_deit_base(recorder: Recorder, pytestconfig: pytest.Config) -> None:
    model = load_model(MODEL, pretrained=False, dtype=torch.bfloat16, device=DEVICE)
    config = InversionConfig(iterations=400)
    state = state_of(model, config, BATCH, KEPT)
    with watch() as watched:
        bucket = measure_bucket(recorder, model, config, state, compiled=True)
    assert faults_of_step(bucket.step) == []
    assert copied_weights(bucket.memory, sum(weight.nbytes for weight in weights_of(model))) == []
    spills = [name for name, candidates in watched.timed.items() if any(each.spilled for each in candidates)]
    assert spills == []

    title = f"A step of {MODEL}, batch {BATCH}, {KEPT} kept patches, bf16, compiled"
    found = table_of(title, bucket.step, watched, bucket.memory)
    path = TABLES / f"deit_base-torch-{'.'.join(torch.__version__.split('.')[:2])}.md"
    if pytestconfig.getoption("--write-tables"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(found)
    assert path.exists(), f"{path.name} is missing: {AGAIN}"
    # line by line, so that pytest shows what has changed
    assert found.splitlines() == path.read_text().splitlines(), f"if that is meant: {AGAIN}"
