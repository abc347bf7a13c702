"""Batches of each stage, runners and captures: how the work is cut up changes no image."""

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from smi_fast.config import InversionConfig
from smi_fast.engine import Bucket, Inverter, Progress
from smi_fast.engine.batches import Batches, Group, halved
from smi_fast.engine.randomness import deterministic_algorithms
from smi_fast.engine.runner import Runner
from smi_fast.engine.state import State
from smi_fast.engine.step import build_step
from smi_fast.images import SparseImages
from smi_fast.model.sparse_vit import SparseViT
from smi_fast.storage.inductor import why_not_compile
from tests.states import fresh

MakeModel = Callable[..., SparseViT]
CONFIG = InversionConfig(iterations=9, stops=((3, 0.3), (6, 0.4)), jitter=0.3, seed=5)
LABELS = [0, 1, 2, 3, 4, 0, 1]


def invert(model: SparseViT, labels: list[int] = LABELS, **options: Any) -> SparseImages:
    return Inverter(model, CONFIG, **({"impl": "eager"} | options))(labels)


def with_preset(preset: Any, **options: Any) -> InversionConfig:
    """`CONFIG` under a preset."""
    return InversionConfig(iterations=9, stops=((3, 0.3), (6, 0.4)), jitter=0.3, seed=5, preset=preset, **options)


def assert_same(one: SparseImages, other: SparseImages) -> None:
    for name in ("keep", "labels", "image_ids", "failed_at"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name
    torch.testing.assert_close(one.pixels, other.pixels, rtol=0, atol=1e-6)


@pytest.mark.parametrize("batches", [(2, 4, 4), (1, 2, 4), (4, 2, 1), (3, 3, 3), (7, 7, 7), (2, 2, 6), (8, 4, 2)])
def test_the_batch_of_a_stage_changes_no_image(make_model: MakeModel, batches: tuple[int, ...]) -> None:
    model = make_model()
    assert_same(invert(model, batch_size=batches), invert(model, batch_size=8))


def test_each_stage_runs_on_its_own_batch(make_model: MakeModel) -> None:
    seen: list[tuple[int, int, int]] = []

    class Watch(Progress):
        def stage_started(self, index: int, stage: Any, first: int, images: int) -> None:
            seen.append((index, first, images))

    inverter = Inverter(make_model(), CONFIG, batch_size=(2, 4, 8), impl="eager")
    inverter.progress = Watch()
    inverter([0, 1, 2, 3, 4, 0, 1, 2, 3])
    assert inverter.stats.seconds_compile == 0, "nothing is compiled"
    assert inverter.runners.met == {Bucket(2, 12), Bucket(4, 8), Bucket(8, 4)}
    first = [(0, 0, 2), (0, 2, 2), (0, 4, 2), (0, 6, 2), (1, 0, 4), (1, 4, 4), (2, 0, 8)]
    assert seen == [*first, (0, 0, 1), (1, 0, 1), (2, 0, 1)], "batches that only fill up are left out"


SIZES = st.lists(st.sampled_from([1, 2, 3, 4, 6, 12]), min_size=1, max_size=5)


def group_of(images: int, index: int) -> Group:
    return Group(index, [0] * images, list(range(images)), threading.Event())


@given(SIZES, st.integers(1, 12), st.integers(0, 1), st.data())
def test_a_group_is_cut_into_batches_that_fit(sizes: list[int], images: int, index: int, data: st.DataObject) -> None:
    limits = tuple(size for size in sizes if max(sizes) % size == 0)
    images = min(images, max(limits))
    batches = Batches(limits, coupled=False)
    for _ in range(data.draw(st.integers(0, 3))):  # memory runs out a few times
        stage = data.draw(st.integers(0, len(limits) - 1))
        if batches.limits[stage] > 1:
            before = batches.limits[stage]
            assert 2 * batches.lower(stage, before) <= before
            assert batches.limits[stage] < before
    assert batches.group_size == max(limits), "how many images a group has never changes"
    size, cut = batches.of(group_of(images, index))
    assert size >= images
    assert all(size % batch == 0 and 1 <= batch <= limit for batch, limit in zip(cut, batches.limits, strict=True))
    if index:
        assert (size, tuple(cut)) == (max(limits), batches.limits)


def test_coupled_images_are_one_batch_and_never_filled_up() -> None:
    assert Batches((8, 8), coupled=True).of(group_of(5, 2)) == (5, [5, 5])


@pytest.mark.parametrize(("batch", "smaller"), [(8, 4), (9, 3), (7, 1), (1, 0)])
def test_halved(batch: int, smaller: int) -> None:
    assert halved(batch) == smaller


@pytest.mark.parametrize(
    ("batch_size", "preset", "message"),
    [
        ((2, 4), "paper", r"batch_size=\(2, 4\): 2 numbers for 3 stages"),
        ((2, 3, 4), "paper", r"each must divide the largest, 4; 3 does not"),
        ((2, 0, 4), "paper", "must be an integer of at least 1, or one for each stage"),
        ((2, 2, 4), "reference", "images depend on their batch-mates here, because of loss='mean'"),
        ("222", "paper", "must be an integer"),
    ],
)
def test_batches_refused(make_model: MakeModel, batch_size: Any, preset: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Inverter(make_model(), with_preset(preset), batch_size=batch_size, impl="eager")


NO_MEMORY = torch.OutOfMemoryError("CUDA out of memory")


def refuse_above(
    limit: int,
    kept: int,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception = NO_MEMORY,
) -> None:
    """Let batches of more than ``limit`` images run out of memory in the second iteration at ``kept`` patches."""
    advance = Runner.advance
    calls: dict[int, int] = {}

    def full(self: Runner, most: int) -> int:
        batch, patches = self.state.keep.shape
        calls[batch] = calls.get(batch, 0) + 1
        if patches == kept and batch > limit and calls[batch] > 1:
            raise error
        return advance(self, most)

    monkeypatch.setattr(Runner, "advance", full)


def test_out_of_memory_steps_down_and_loses_nothing(make_model: MakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[int, int, int]] = []

    class Told(Progress):
        def out_of_memory(self, index: int, batch: int, smaller: int) -> None:
            told.append((index, batch, smaller))

    model = make_model()
    whole = invert(model, batch_size=8)
    refuse_above(2, 8, monkeypatch)
    inverter = Inverter(model, CONFIG, batch_size=8, impl="eager")
    inverter.progress = Told()
    assert_same(inverter([*LABELS, 3, 4])[torch.arange(7)], whole)
    assert told == [(1, 8, 4), (1, 4, 2)]
    assert inverter.batches == (8, 2, 8)
    assert_same(inverter(LABELS), whole)
    with pytest.warns(UserWarning, match="stage 2: out of device memory at a batch of 4, going on with 2"):
        invert(model, [0, 1, 2, 3], batch_size=4)


def test_other_errors_are_not_taken_for_it(make_model: MakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_above(2, 8, monkeypatch, RuntimeError("CUDA error: an illegal memory access was encountered"))
    with pytest.raises(RuntimeError, match="illegal memory access"):
        invert(make_model(), batch_size=8)


def test_out_of_memory_of_a_driver_steps_down_too(make_model: MakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_above(4, 8, monkeypatch, RuntimeError("Triton Error [CUDA]: out of memory"))
    with pytest.warns(UserWarning, match="at a batch of 6, going on with 3"):
        invert(make_model(), [0, 1, 2, 3, 4, 0], batch_size=6)


def test_out_of_memory_ends_at_one_image(make_model: MakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_above(0, 8, monkeypatch)
    with pytest.warns(UserWarning, match="out of device memory"), pytest.raises(MemoryError, match="a smaller batch"):
        invert(make_model(), [0, 1], batch_size=2)


def test_reference_does_not_step_down(make_model: MakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_above(1, 8, monkeypatch)
    with pytest.raises(MemoryError, match="batch_size=2; a smaller batch"):
        Inverter(make_model(), with_preset("reference"), batch_size=2, impl="eager")([0, 1])


def begun(model: SparseViT, config: InversionConfig = CONFIG) -> State:
    state = fresh(model, config, [0, 1, 2, 3], [5, 6, 7, 8])
    with torch.no_grad():
        build_step(model, config)(state)
    return state


def test_rows_go_and_come_back(make_model: MakeModel) -> None:
    state = begun(make_model())
    state.spare = state.canvas.clone()
    before = state.clone()
    rows = state.rows(1, 2)
    assert torch.equal(rows.canvas, state.canvas[1:3])
    assert torch.equal(rows.jitter, state.jitter[1:3])
    target = state.rows(0, 2)
    pointer = target.canvas.data_ptr()
    target.load_rows(state, 1)
    assert target.canvas.data_ptr() == pointer
    for one, other in zip(target.tensors(), rows.tensors(), strict=True):
        assert torch.equal(one, other)
    for tensor in (rows.canvas, rows.exp_avg, rows.exp_avg_sq, rows.losses, rows.scores):
        tensor.add_(1)
    rows.failed_at.fill_(3)
    assert torch.equal(state.canvas, before.canvas), "rows are copies"
    rows.store_rows(state, 1)
    for name in ("canvas", "spare", "exp_avg", "exp_avg_sq", "losses", "scores"):
        value, old = getattr(state, name), getattr(before, name)
        assert torch.equal(value[1:3], old[1:3] + 1), name
        assert torch.equal(value[[0, 3]], old[[0, 3]]), name
    assert state.failed_at.tolist() == [-1, 3, 3, -1]


class NoHost(TorchDispatchMode):
    """Refuses what would make a host wait for its device."""

    WAITS = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "item", "unique", "masked_select")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.split("::")[1]
        assert name not in self.WAITS, f"{func} makes the host wait"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("preset", ["paper", "reference"])
def test_nothing_between_start_and_end_waits(make_model: MakeModel, preset: Any) -> None:
    model, config = make_model(torch.float32), with_preset(preset, l2_weight=0.1)
    state = begun(model, config)
    step = build_step(model, config)
    with torch.no_grad(), NoHost():
        runner = Runner(step, state, None)
        runner.load(state, 0)
        for _ in range(2):
            runner.advance(2)
        runner.store(state, 0)
        state = state.stopped(config.strategy, 8, 3)
        step(state)
    with pytest.raises(AssertionError, match="makes the host wait"), NoHost():
        float(state.losses.sum())


@pytest.mark.parametrize("deterministic", [False, True])
def test_the_same_bytes_each_time(make_model: MakeModel, deterministic: bool) -> None:
    model = make_model(torch.bfloat16)
    one, other = (invert(model, batch_size=4, deterministic=deterministic) for _ in range(2))
    for name in ("pixels", "keep", "confidence"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name
    assert not torch.are_deterministic_algorithms_enabled()


def test_deterministic_algorithms_fill_no_memory() -> None:
    assert torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    with deterministic_algorithms(True):
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    assert torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    with deterministic_algorithms(False):
        assert torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]


@pytest.mark.compiled
def test_inductor_compiles_a_bucket_once_and_dynamo_none(
    make_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    if why_not_compile("cpu"):
        pytest.skip(f"inductor does not work here: {why_not_compile('cpu')}")
    calls: list[int] = []
    real = torch._inductor.standalone_compile

    def counted(*args: Any, **options: Any) -> Any:
        calls.append(1)
        return real(*args, **options)

    monkeypatch.setattr(torch._inductor, "standalone_compile", counted)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = make_model(torch.float32, depth=1)
    config = InversionConfig(iterations=4, stops=(), jitter=0.3, seed=5)  # a bucket costs 15 s
    inverter = Inverter(model, config, batch_size=2, impl="compiled")
    one, other = inverter([0, 1, 2, 3]), inverter([0, 1, 2, 3])
    assert len(calls) == len(inverter.runners.met) == 1, "two batches of one shape, twice"
    assert inverter.stats.seconds_compile > 0
    assert not torch._dynamo.utils.counters["stats"], "no guards, no recompilation, no way back to eager"
    for name in ("pixels", "keep", "confidence"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name
    plain = Inverter(model, config, batch_size=2, impl="eager")([0, 1, 2, 3])
    assert torch.equal(one.keep, plain.keep)
    torch.testing.assert_close(one.pixels, plain.pixels, rtol=0, atol=1e-3)
