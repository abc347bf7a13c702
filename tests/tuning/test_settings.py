"""The one place that decides batch, dtype, implementation and attention."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import smi_fast.tuning.settings as settings_module
from smi_fast.config import InversionConfig
from smi_fast.kernels.common.grid import Grid
from smi_fast.model.spec import ViTShape
from smi_fast.storage import environment
from smi_fast.tuning.settings import Target, decide, decide_dtype, even_batches
from smi_fast.tuning.store import Tuned, key_of, save

CPU = torch.device("cpu")
SHAPE = ViTShape(Grid(224, 224, 16), 192, 12, 3, 64, 768, 1, 1, 1000)
TARGET = Target(SHAPE, "float32", CPU)
CONFIG = InversionConfig(iterations=9, stops=((3, 0.3),))


@pytest.fixture(autouse=True)
def own_home(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(settings_module, "why_not_compile", lambda device: None)


@given(st.lists(st.sampled_from([1, 2, 3, 4, 6, 12]), min_size=1, max_size=5), st.integers(1, 40))
def test_even_batches(sizes: list[int], images: int) -> None:
    limits = tuple(size for size in sizes if max(sizes) % size == 0)
    batches = even_batches(images, limits)
    group = max(batches)
    assert all(1 <= batch <= limit and group % batch == 0 for batch, limit in zip(batches, limits, strict=True))
    assert -(-images // group) == -(-images // max(limits)), "no more groups than full ones"
    if images % max(limits) == 0:
        assert batches == limits


@pytest.mark.parametrize(
    ("images", "limit", "batch"), [(1, 64, 1), (64, 64, 64), (65, 64, 33), (200, 64, 50), (10, 3, 3), (9, 4, 3)]
)
def test_even_batches_of_one_limit(images: int, limit: int, batch: int) -> None:
    assert even_batches(images, (limit, limit)) == (batch, batch)


def tuned_for(config: InversionConfig, impl: str) -> Tuned:
    found = Tuned(key_of(SHAPE, config, CPU, "float32", impl), (4, 8), 1.5, attention={197: "plain"})
    save(found)
    return found


def test_what_was_tuned_is_taken_where_nothing_is_asked_for() -> None:
    assert decide(TARGET, CONFIG, impl="eager").batches == (64, 64)
    tuned_for(CONFIG, "eager")
    found = decide(TARGET, CONFIG, impl="eager")
    assert (found.batches, found.source, found.attention) == ((4, 8), "tuned", {197: "plain"})
    assert found.notes == ("batch size 4, 8: tuned on this machine",)
    assert decide(TARGET, CONFIG, impl="compiled").source == "default", "another implementation"
    assert decide(TARGET, replace(CONFIG, priors=()), impl="eager").source == "default", "another loss"
    given = decide(TARGET, CONFIG, batch_size=3, impl="eager")
    assert (given.batches, given.source, given.attention) == ((3, 3), "given", {})
    assert decide(TARGET, CONFIG, impl="eager", images=4).batches == (4, 4)


def test_coupled_images_take_no_tuned_batch_and_are_not_evened() -> None:
    coupled = replace(CONFIG, loss="mean")
    tuned_for(coupled, "eager")
    found = decide(TARGET, coupled, impl="eager", images=10)
    assert (found.batches, found.source) == ((64, 64), "default")
    with pytest.raises(ValueError, match="all stages must have one batch: images depend on their batch-mates"):
        decide(TARGET, coupled, batch_size=(4, 8), impl="eager")


def test_where_nothing_compiles_eager_counts_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    tuned_for(CONFIG, "eager")
    monkeypatch.setattr(settings_module, "why_not_compile", lambda device: "no C++ compiler")
    found = decide(TARGET, CONFIG, impl="compiled")
    assert (found.impl, found.source) == ("eager", "tuned"), "plan asks here too, and so finds what tune saved"
    assert found.notes[0] == "impl='compiled' is not available here, running eager: no C++ compiler"


@pytest.mark.parametrize("units", [True, False])
def test_bf16_where_the_processor_has_units(monkeypatch: pytest.MonkeyPatch, units: bool) -> None:
    monkeypatch.setattr(environment, "has_bf16_units", lambda: units)
    environment.processor.cache_clear()
    assert decide_dtype("auto", CPU) == decide_dtype(None, CPU) == (torch.bfloat16 if units else torch.float32)
    assert decide_dtype("bf16", CPU) == torch.bfloat16, "what is asked for stands"
    assert decide_dtype("auto", torch.device("cuda")) == torch.bfloat16
    notes = decide(replace(TARGET, precision="bfloat16"), CONFIG, impl="eager").notes
    assert any("bf16 is slow here" in note and "no bf16 units" in note for note in notes) != units
    environment.processor.cache_clear()


def test_dtypes_refused() -> None:
    with pytest.raises(ValueError, match="dtype='int8': must be one of auto, fp32, bf16, fp8"):
        decide_dtype("int8", CPU)
    with pytest.raises(ValueError, match="has no fp8 units; use bf16"):
        decide_dtype("fp8", CPU)
