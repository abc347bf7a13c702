"""Batches by measurement: which are tried, which is chosen, and how the choice is kept."""

import json
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

import smi_fast.engine.timing as timing_module
import smi_fast.tuning.attention as attention_module
import smi_fast.tuning.measure as tune_module
from smi_fast import SparseImages
from smi_fast.config import InversionConfig
from smi_fast.engine.runner import Runner
from smi_fast.kernels.common.grid import Grid
from smi_fast.model.sparse_vit import SparseViT
from smi_fast.model.spec import ViTShape
from smi_fast.tuning.measure import StageTimes, candidates, choose, seconds_per_image, tune
from smi_fast.tuning.settings import Settings
from smi_fast.tuning.store import Key, Tuned, all_tuned, key_of, lookup, save, tuned_path
from tests.cli.test_cli import run

MakeModel = Callable[..., SparseViT]
DEIT_BASE = ViTShape(Grid(224, 224, 16), 768, 12, 12, 64, 3072, 1, 1, 1000)
CONFIG = InversionConfig(iterations=9, stops=((3, 0.3), (6, 0.4)))
SCHEDULE = ["--model", "demo", "--iterations", "6", "--stop", "2:0.5", "--impl", "eager", "--device", "cpu"]
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))


@pytest.fixture
def h100(monkeypatch: pytest.MonkeyPatch) -> None:
    """As far as wave arithmetic asks."""
    properties = type("Properties", (), {"multi_processor_count": 132})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(tune_module, "free_bytes", lambda device: 80 * 2**30)


@pytest.mark.usefixtures("h100")
def test_candidates_fill_whole_waves() -> None:
    assert candidates(DEIT_BASE, 46, CUDA, torch.bfloat16, 479) == [119, 239, 359, 479]
    assert candidates(DEIT_BASE, 46, CUDA, torch.bfloat16, 478) == [119, 239, 359]
    assert candidates(DEIT_BASE, 46, CUDA, torch.bfloat16, 1000) == [119, 239, 359, 479, 718, 958]
    assert candidates(DEIT_BASE, 196, CUDA, torch.bfloat16, 130) == [28, 57, 85, 114]
    assert candidates(DEIT_BASE, 46, CUDA, torch.bfloat16, 100) == [100], "less than a wave"


def test_candidates_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune_module, "free_bytes", lambda device: 80 * 2**30)
    assert candidates(DEIT_BASE, 46, CPU, torch.float32, 64) == [4, 8, 16, 32, 64]
    assert candidates(DEIT_BASE, 46, CPU, torch.float32, 63) == [4, 8, 16, 32]
    assert candidates(DEIT_BASE, 46, CPU, torch.float32, 3) == [3]
    monkeypatch.setattr(tune_module, "free_bytes", lambda device: 4 * 2**30)
    dense, sparse = (candidates(DEIT_BASE, kept, CPU, torch.float32, 512) for kept in (196, 46))
    assert dense[-1] < sparse[-1] < 512, "no more than fits into memory"
    monkeypatch.setattr(tune_module, "free_bytes", lambda device: 0)
    assert candidates(DEIT_BASE, 196, CPU, torch.float32, 512) == [1]


def test_times_between_the_measured() -> None:
    cpu = StageTimes(10, 47, 0, {4: 1.0, 8: 3.0})
    assert [cpu.at(batch) for batch in (1, 4, 6, 8)] == [1.0, 1.0, 2.0, 3.0]
    cuda = StageTimes(10, 47, 5632, {119: 1.0, 239: 1.5})
    assert [cuda.at(batch) for batch in (1, 119, 120, 178, 238, 239)] == [1.0, 1.0, 2.0, 2.0, 1.5, 1.5]
    assert cuda.cost(239) == 10 * 1.5 / 239


TIMES = st.builds(
    StageTimes,
    length=st.integers(1, 1000),
    tokens=st.integers(1, 200),
    wave=st.sampled_from([0, 128, 1000]),
    seconds=st.dictionaries(st.integers(1, 40), st.floats(0.01, 100), min_size=1, max_size=5),
)


@given(st.lists(TIMES, min_size=1, max_size=5), st.data())
def test_the_choice_is_valid_and_never_worse_than_one_batch(stages: list[StageTimes], data: st.DataObject) -> None:
    batches = choose(stages)
    assert all(max(batches) % batch == 0 for batch in batches)
    assert all(1 <= batch <= stage.most for batch, stage in zip(batches, stages, strict=True))
    best = seconds_per_image(stages, batches)
    for uniform in range(1, min(stage.most for stage in stages) + 1):
        assert best <= seconds_per_image(stages, [uniform] * len(stages)) * (1 + 1e-12)
    other = [data.draw(st.integers(1, stage.most)) for stage in stages]
    assume(all(max(other) % batch == 0 for batch in other))
    assert best <= seconds_per_image(stages, other) * (1 + 1e-12)


def test_late_stages_get_larger_batches() -> None:
    early = StageTimes(50, 197, 5632, {28: 1.0, 57: 1.99})
    late = StageTimes(3700, 47, 5632, {119: 1.0, 239: 1.9})
    # whole waves, 28 and 239, do not divide; 9 * 26 gives up less than 8 * 28
    assert choose([early, late]) == (26, 234)


def some_tuned(name: str = "GPU", kept: tuple[int, ...] = (12, 8), **options: Any) -> Tuned:
    key = Key(name, {"grid": {"height": 24}}, "bfloat16", "eager", kept, True, [{"name": "l2"}], "2.15")
    return Tuned(key, **({"batches": (4, 8), "gain": 1.5} | options))


def test_round_trip() -> None:
    assert lookup(some_tuned().key) is None
    full = some_tuned(timings=({4: 0.5}, {4: 0.25, 8: 0.375}), attention={9: "tile"})
    path = save(full)
    assert path == tuned_path()
    assert lookup(full.key) == full
    for name, value in {
        "device": "CPU",
        "shape": {},
        "precision": "fp8",
        "impl": "compiled",
        "kept": (12,),
        "priors": [],
    }.items():
        assert lookup(replace(full.key, **{name: value})) is None, name
    save(some_tuned("other"))
    save(replace(full, batches=(2, 2)))
    assert [tuned.batches for tuned in all_tuned()] == [(2, 2), (4, 8)]
    assert {file.name for file in path.parent.iterdir()} == {"tuned.json", "tuned.lock"}


def test_a_key_is_the_same_after_json() -> None:
    config, later = (InversionConfig(iterations=n, stops=((at, 0.3),)) for n, at in ((9, 5), (99, 7)))
    key = key_of(DEIT_BASE, config, CPU, "bfloat16", "eager")
    save(Tuned(key, (1, 1), 1.0))
    assert lookup(key_of(DEIT_BASE, later, CPU, "bfloat16", "eager")) is not None
    assert lookup(key_of(replace(DEIT_BASE, width=384), config, CPU, "bfloat16", "eager")) is None


def test_unknown_keys_are_kept() -> None:
    path = save(some_tuned())
    content = json.loads(path.read_text())
    content["note"] = "mine"
    content["entries"][0]["later"] = [1]
    path.write_text(json.dumps(content))
    save(some_tuned("other"))
    save(some_tuned(gain=2.0))
    after = json.loads(path.read_text())
    assert (after["note"], after["entries"][0]["later"], after["entries"][0]["gain"]) == ("mine", [1], 2.0)


@pytest.mark.parametrize(
    "content",
    [
        b"{",
        b"[]",
        b"\xff\xfe\xfd",
        b'{"entries": []}',
        b'{"format": "smi_fast.tuned.v2"}',
        b'{"format": "smi_fast.tuned.v2", "entries": [{}]}',
    ],
)
def test_a_broken_file_is_refused_and_not_lost(content: bytes) -> None:
    path = tuned_path()
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    with pytest.raises(ValueError, match="not a whole") as refused:
        lookup(some_tuned().key)
    assert str(path) in str(refused.value)
    with pytest.raises(ValueError, match="not a whole"):
        save(some_tuned())
    assert path.read_bytes() == content


def test_commands_meet_a_broken_file(capsys: pytest.CaptureFixture[str]) -> None:
    path = tuned_path()
    path.parent.mkdir(parents=True)
    path.write_text("{")
    run("tune", *SCHEDULE, code=2)
    assert str(path) in capsys.readouterr().err
    run("plan", *SCHEDULE[:6])
    assert "batch size 64, since what was tuned cannot be read" in capsys.readouterr().out
    assert path.read_text() == "{"


def test_writers_take_turns() -> None:
    threads = [threading.Thread(target=save, args=(some_tuned(f"GPU {index}"),)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {tuned.key.device for tuned in all_tuned()} == {f"GPU {index}" for index in range(8)}


def test_tune_a_tiny_model(make_model: MakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing_module, "ROUND_SECONDS", 0.001)
    told: list[str] = []
    model = make_model(torch.float32)
    tuned = tune(timer_of(model), most=8, rounds=2, say=told.append)
    assert tuned.key == key_of(model.shape, CONFIG, CPU, "float32", "eager")
    assert [set(times) for times in tuned.timings] == [{4, 8}] * 3
    assert all(seconds > 0 for times in tuned.timings for seconds in times.values())
    assert tuned.gain >= 1
    assert told[:3] == [
        "preparing 12 patches at batch 8",
        "preparing 12 patches at batch 4",
        "measuring 12 patches at batch 4",
    ]
    with pytest.raises(ValueError, match="most=0, rounds=2: both"):
        tune(timer_of(model), most=0, rounds=2)
    with pytest.raises(ValueError, match="tune: images depend on their batch-mates"):
        tune(timer_of(model, replace(CONFIG, loss="mean")))


def test_out_of_memory_leaves_a_batch_out(make_model: MakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    limit, advance, told = 4, Runner.advance, list[str]()

    def full(self: Runner, most: int) -> int:
        if len(self.state.keep) > limit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return advance(self, most)

    monkeypatch.setattr(timing_module, "ROUND_SECONDS", 0.001)
    monkeypatch.setattr(Runner, "advance", full)
    model = make_model(torch.float32)
    tuned = tune(timer_of(model), most=8, rounds=1, say=told.append)
    assert [set(times) for times in tuned.timings] == [{4}] * 3
    assert "out of device memory with 12 patches at batch 8: left out" in told
    limit = 0
    with pytest.raises(MemoryError, match="12 patches at a batch of 4, the smallest tried"):
        tune(timer_of(model), most=8, rounds=1, say=told.append)


class Choosy:
    """As much of a model on CUDA as the choice of attention asks for."""

    device = CUDA

    def __init__(self) -> None:
        self.attention_choices = {13: "math"}

    def choose_attention(self, tokens: int, name: str) -> None:
        self.attention_choices[tokens] = name


def test_attention_is_chosen_by_time(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {"flash": 2.0, "efficient": 3.0, "math": 4.0, "tile": 1.0, "plain": float("inf")}
    calls: list[tuple[int, int, str]] = []
    captured: list[tuple[int, str]] = []

    def clock_of(model: Any, tokens: int, batch: int, name: str) -> Callable[[], float]:
        captured.append((tokens, name))

        def clock() -> float:
            calls.append((tokens, batch, name))
            return seconds[name] if tokens < 100 or name == "efficient" else float("inf")

        return clock

    monkeypatch.setattr(attention_module, "attention_clock", clock_of)
    model: Any = Choosy()
    chosen = attention_module.tune_attention(model, {197: 2, 47: 8, 13: 8}, 2, lambda line: None)
    assert chosen == {197: "efficient", 47: "tile"}
    assert model.attention_choices == {197: "efficient", 47: "tile", 13: "math"}
    assert [name for tokens, _, name in calls if tokens == 47] == [*attention_module.NAMES] * 3, "they take turns"
    assert {tokens for tokens, *_ in calls} == {197, 47}, "a choice that was made stands"
    assert len(captured) == len(set(captured)) == 2 * len(attention_module.NAMES), "captured once, replayed each round"


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("out of memory"), ValueError("cannot run"), RuntimeError("no")]
)
def test_attention_that_does_not_run_takes_for_ever(
    make_model: MakeModel, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def refuse(*args: Any) -> Any:
        raise error

    monkeypatch.setattr(attention_module, "_Capture", refuse)
    assert attention_module.attention_clock(make_model(), 13, 2, "flash")() == float("inf")


def test_attention_is_timed_on_a_packed_projection(make_model: MakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is captured, as far as a CPU can tell: forward and backward, with the gradient in one piece."""
    model, found = make_model(torch.float32), []
    waits: list[Any] = []
    monkeypatch.setattr(attention_module, "wait", waits.append)

    def capture(call: Callable[[], Any], device: Any) -> Any:
        return SimpleNamespace(replay=lambda: found.append(call()))

    monkeypatch.setattr(attention_module, "_Capture", capture)
    clock = attention_module.attention_clock(model, 13, 2, "plain")
    with torch.no_grad():
        assert 0 < clock() < 10
    ((gradient,),) = found
    assert gradient.shape == (2, 13, 3, model.shape.heads, model.shape.head_width)
    assert len(waits) == 2, "before and after a replay"


def test_no_attention_is_chosen_on_a_cpu(make_model: MakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_module, "attention_clock", None)
    assert attention_module.tune_attention(make_model(), {13: 4}, 1, print) == {}


def test_choices_are_applied_where_none_was_made(make_model: MakeModel) -> None:
    model = make_model()
    model.choose_attention(9, "math")
    Settings((1,), "tuned", "eager", {13: "plain", 9: "plain"}).apply(model)
    assert model.attention_choices == {9: "math", 13: "plain"}


def test_tuned_batches_are_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timing_module, "ROUND_SECONDS", 0.001)
    run("tune", *SCHEDULE, "--most", "4", "--rounds", "1")
    printed = capsys.readouterr()
    assert "chosen: 4, 4" in printed.out
    assert "us / image-iteration" in printed.out
    assert str(tuned_path()) in printed.out.replace("\n", "")
    assert "measuring 32 patches at batch 4" in printed.err
    (tuned,) = all_tuned()
    save(replace(tuned, batches=(1, 2)))
    run("invert", *SCHEDULE, "--labels", "0,1,2,3", "--out", str(tmp_path / "out"))
    assert "batch size 1, 2: tuned on this machine" in capsys.readouterr().err
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert (report["batch_size"], report["batch_source"]) == ([1, 2], "tuned")
    assert len(SparseImages.load(tmp_path / "out" / "images.safetensors")) == 4
    run("plan", *SCHEDULE, "--images", "4")
    assert "batch size 1, 2: tuned on this machine" in capsys.readouterr().out


def timer_of(model: SparseViT, config: InversionConfig = CONFIG) -> timing_module.StageTimer:
    return timing_module.StageTimer(model, config, "eager")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--most", "0"], "--most 0: must be an integer of at least 1"),
        (["--rounds", "-1"], "--rounds -1: must be an integer of at least 1"),
        (["--impl", "fast"], "--impl 'fast': must be one of"),
        (["--dense"], "--dense and --stop exclude each other"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_nonsense_is_refused(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    run("tune", *SCHEDULE, *arguments, code=2)
    assert message in capsys.readouterr().err
