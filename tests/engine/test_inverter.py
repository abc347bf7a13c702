"""Whole inversions: independence of the batch, streams, stops, failures, and one graph a bucket."""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import smi_fast.engine.inverter as inverter_module
import smi_fast.tuning.settings as settings_module
from smi_fast.config import InversionConfig
from smi_fast.engine import Inverter, Progress, Snapshots
from smi_fast.engine.observe import default_iterations
from smi_fast.engine.randomness import draw, jitter_table, start_canvas
from smi_fast.engine.state import learning_rates, rate_table
from smi_fast.images import SparseImages
from smi_fast.kernels.patch_cells import take_patches
from smi_fast.method.view import View
from smi_fast.model.sparse_vit import SparseViT
from smi_fast.model.spec import Needs
from smi_fast.plugins import register

MakeModel = Callable[..., SparseViT]
CONFIG = InversionConfig(iterations=9, stops=((3, 0.3), (6, 0.4)), jitter=0.3, seed=5)


def invert(model: SparseViT, labels: list[int], config: InversionConfig = CONFIG, **options: Any) -> SparseImages:
    ids = options.pop("image_ids", None)
    watching = {name: options.pop(name) for name in ("progress", "snapshots") if name in options}
    inverter = Inverter(model, config, impl="eager", **options)
    for name, value in watching.items():
        setattr(inverter, name, value)
    return inverter(labels, ids)


def assert_same(one: SparseImages, other: SparseImages, atol: float = 0.0) -> None:
    assert torch.equal(one.keep, other.keep)
    torch.testing.assert_close(one.pixels, other.pixels, rtol=0, atol=atol)
    torch.testing.assert_close(one.confidence, other.confidence, rtol=1e-5, atol=1e-6)


def test_an_image_does_not_depend_on_its_batch(make_model: MakeModel) -> None:
    model = make_model()
    labels = [0, 1, 2, 3, 4, 0, 1, 2]
    eight = invert(model, labels, batch_size=8)
    seven = invert(model, labels[:7], batch_size=7)
    alone = invert(model, [3], image_ids=[3])
    assert_same(eight[:7], seven, atol=1e-6)  # float64 inside, saved as float32
    assert_same(eight[3:4], alone, atol=1e-6)
    assert not torch.equal(eight.keep[0], eight.keep[5]), "different images keep different patches"


def test_a_prior_that_couples_is_no_secret_under_the_papers_preset(make_model: MakeModel) -> None:
    model = make_model()
    config = InversionConfig(iterations=6, stops=(), jitter=0.3, tv_norm="batch", tv_weight=0.1)
    alone, together = invert(model, [0], config, batch_size=1), invert(model, [0, 1, 2], config, batch_size=3)
    assert (alone.pixels - together.pixels[:1]).abs().max() > 1e-3, "so nothing may promise that it does not"
    with pytest.raises(ValueError, match=r"all stages must have one batch.*norm=batch, which couples"):
        Inverter(model, replace(config, strategy=CONFIG.strategy, iterations=9), batch_size=(1, 1, 2), impl="eager")
    inverter = Inverter(model, config, batch_size=2, impl="eager")
    assert len(inverter([0, 1, 2])) == 3
    assert {bucket.batch for bucket in inverter.runners.met} == {1, 2}, "the last batch is not filled up"


def test_numbers_are_drawn_ahead_in_another_thread(make_model: MakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[str] = []

    def watched(*arguments: Any) -> Any:
        threads.append(threading.current_thread().name)
        return draw(*arguments)

    monkeypatch.setattr(inverter_module, "draw", watched)
    images = invert(make_model(), [0, 1, 2, 3], batch_size=2)
    assert len(threads) == 2
    assert all(name.startswith("smi_fast draw") for name in threads)
    monkeypatch.undo()
    assert_same(images, invert(make_model(), [0, 1, 2, 3], batch_size=2))


def test_a_short_last_batch_is_filled_up(make_model: MakeModel) -> None:
    model = make_model()
    whole, inverter = invert(model, [0, 1, 2, 3, 4], batch_size=5), Inverter(model, CONFIG, batch_size=2, impl="eager")
    cut = inverter([0, 1, 2, 3, 4])
    assert {bucket.batch for bucket in inverter.runners.met} == {2}
    assert len(cut) == 5
    assert cut.image_ids.tolist() == [0, 1, 2, 3, 4]
    assert_same(whole, cut, atol=1e-6)


def test_reference_leaves_the_last_batch_short(make_model: MakeModel) -> None:
    config = InversionConfig(iterations=3, stops=(), preset="reference")
    inverter = Inverter(make_model(), config, batch_size=2, impl="eager")
    assert len(inverter([0, 1, 2])) == 3
    assert {bucket.batch for bucket in inverter.runners.met} == {1, 2}


def test_result_is_that_of_the_model_on_kept_tokens(make_model: MakeModel) -> None:
    model = make_model()
    images = invert(model, [0, 1, 2])
    logits, _ = model(images.pixels.double(), images.keep)
    assert torch.equal(images.predicted, logits.argmax(1))
    expected = logits.softmax(1).gather(1, images.labels[:, None])[:, 0].float()
    torch.testing.assert_close(images.confidence, expected, rtol=1e-4, atol=1e-5)
    assert images.keep.shape == (3, 4)
    assert (images.failed_at == -1).all()


def test_saved_keep_is_the_tracked_keep_and_stopped_pixels_stay(make_model: MakeModel) -> None:
    class Watch(Snapshots):
        def __init__(self, model: SparseViT) -> None:
            super().__init__(model, [])
            self.seen: dict[int, tuple[Tensor, Tensor]] = {}

        def offer(self, iteration: int, state: Any, image_ids: Any) -> None:
            self.seen[iteration] = (state.canvas.clone(), state.keep.clone())

    model = make_model()
    watch = Watch(model)
    images = invert(model, [0, 1, 2], snapshots=watch)
    assert torch.equal(images.keep, watch.seen[9][1])
    for stop in (3, 6):  # canvases as they were when the patches were stopped
        canvas, keep = watch.seen[stop]
        dropped = torch.ones(3, 12, dtype=torch.bool).scatter(1, keep, False)
        ids = torch.stack([row.nonzero().flatten() for row in dropped])
        old, new = (take_patches(c, ids, model.grid) for c in (canvas.float(), images.pixels))
        assert torch.equal(old, new)


def test_pixels_stay_in_the_range_of_colours(make_model: MakeModel) -> None:
    images = invert(make_model(), [0, 1], InversionConfig(iterations=5, stops=(), lr=3.0))
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (images.provenance.mean, images.provenance.std))
    colours = images.pixels * std + mean
    assert colours.min() > -1e-6
    assert colours.max() < 1 + 1e-6
    assert (colours < 1e-6).any(), "a rate of 3 reaches the limits"


@register("prior", "test_quiet")
@dataclass(frozen=True)
class Quiet:
    """Small features and small windows."""

    weight: float = 10.0
    needs = Needs(features=(0,))

    def __call__(self, view: View) -> Tensor:
        assert set(view.output.features) == {0}, "what is asked for, and no more"
        return view.output.features[0].square().mean((1, 2)) + view.windows.square().mean((1, 2))


def test_a_prior_may_look_at_features_and_windows(make_model: MakeModel) -> None:
    model = make_model()
    config = InversionConfig(iterations=30, stops=(), lr=0.02)

    def energy(images: SparseImages) -> float:
        return float(images.pixels.square().mean())

    quiet = replace(config, priors=(Quiet(),))
    assert energy(invert(model, [0, 1], quiet)) < 0.9 * energy(invert(model, [0, 1], config))


def test_stream_yields_while_the_next_batch_is_in_work(make_model: MakeModel) -> None:
    started: list[int] = []
    second_began = threading.Event()

    class Watch(Progress):
        def group_started(self, index: int, images: int) -> None:
            started.append(index)
            if index == 1:
                second_began.set()

    inverter = Inverter(make_model(), CONFIG, batch_size=2, impl="eager")
    inverter.progress = Watch()
    stream = inverter.stream(iter([0, 1, 2, 3]))
    first = next(stream)
    assert first.labels.tolist() == [0, 1]
    assert second_began.wait(10)
    assert [batch.labels.tolist() for batch in stream] == [[2, 3]]
    assert started == [0, 1]


def test_closing_a_stream_ends_the_work(make_model: MakeModel) -> None:
    config = InversionConfig(iterations=10**5, stops=())

    class First(Progress):
        def __init__(self) -> None:
            self.steps = 0

        def stepped(self, iteration: int, loss: float | None) -> None:
            self.steps += 1
            if self.steps == 3:
                raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        invert(make_model(), [0], config, progress=First())

    endless = Inverter(make_model(), InversionConfig(iterations=50, stops=()), batch_size=1, impl="eager")
    stream = endless.stream(iter(lambda: 1, 0))  # never runs out
    next(stream)
    begin = time.monotonic()
    stream.close()
    assert time.monotonic() - begin < 10
    assert not [t for t in threading.enumerate() if t.name.startswith("smi_fast")]


def test_seed_and_id_make_the_image(make_model: MakeModel) -> None:
    model = make_model()
    again, other_id = invert(model, [1], image_ids=[9]), invert(model, [1], image_ids=[10])
    assert_same(invert(model, [1], image_ids=[9]), again)
    assert not torch.equal(again.pixels, other_id.pixels)
    starts = [start_canvas(seed, [image_id], model.grid) for seed, image_id in ((1, 9), (2, 9), (1, 10))]
    assert not torch.equal(starts[0], starts[1])
    assert not torch.equal(starts[0], starts[2])


def test_jitter_table(make_model: MakeModel) -> None:
    config = InversionConfig(iterations=4000, jitter=0.125, stops=((50, 0.3), (60, 0.3)))
    table = jitter_table(config, [3, 4], make_model().grid)
    assert table.shape == (2, 4000, 3)
    assert torch.equal(table[1], jitter_table(config, [4], make_model().grid)[0])
    assert not table[:, [49, 59]].any(), "scores are read from iterations that do not move the image"
    assert [int(table[..., axis].min()) for axis in range(3)] == [-3, -4, 0]
    assert [int(table[..., axis].max()) for axis in range(3)] == [3, 4, 1]
    assert table[..., :2].double().mean().abs() < 0.1
    assert 0.45 < table[..., 2].double().mean() < 0.55
    longer = jitter_table(InversionConfig(iterations=4100, stops=config.strategy.stops), [3, 4], make_model().grid)
    assert torch.equal(longer[:, :4000], table), "a longer run begins like a shorter one"
    reference = InversionConfig(stops=((50, 0.3),), preset="reference")
    assert reference.strategy.still_iterations(4000) == {49, 50}


def test_rates() -> None:
    config = InversionConfig(iterations=4, stops=(), lr=0.5, lr_schedule="cosine", betas=(0.5, 0.9))
    assert learning_rates(config) == pytest.approx([0.5, 0.4267767, 0.25, 0.0732233])
    table = rate_table(config)
    assert table[:, 1].tolist() == pytest.approx([0.5, 0.75, 0.875, 0.9375])
    assert table[:, 2].tolist() == pytest.approx([0.1, 0.19, 0.271, 0.3439])


def test_without_a_compiler_it_says_so_and_runs_eager(make_model: MakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings_module, "why_not_compile", lambda device: "no C++ compiler")
    with pytest.warns(UserWarning, match="running eager: no C\\+\\+ compiler"):
        inverter = Inverter(make_model(), CONFIG, impl="compiled")
    assert inverter.impl == "eager"
    assert len(inverter([1])) == 1


def test_snapshots(make_model: MakeModel) -> None:
    model = make_model()
    assert default_iterations(CONFIG.stages(12), columns=6) == [0, 3, 6, 7, 8, 9]
    snapshots = Snapshots(model, default_iterations(CONFIG.stages(12), 6), rows=2)
    images = invert(model, [0, 1, 2], snapshots=snapshots)
    process = snapshots.process()
    assert process.iterations == (0, 3, 6, 7, 8, 9)
    assert process.kept.sum(2).tolist() == [[12, 12], [8, 8], [4, 4], [4, 4], [4, 4], [4, 4]]
    assert torch.equal(process.pixels[-1], images[:2].to_uint8())
    assert process.image_ids.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size=0"),
        ({"batch_size": True}, "batch_size=True"),
        ({"impl": "fast"}, "impl='fast'"),
    ],
)
def test_arguments_refused(make_model: MakeModel, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Inverter(make_model(), CONFIG, **({"impl": "eager"} | options))


@pytest.mark.parametrize(
    ("labels", "ids", "message"),
    [
        ([], None, "labels is empty"),
        ([5], None, r"labels: 5: must be a class index in 0\.\.4"),
        ([-1], None, "labels: -1"),
        ([1.5], None, "labels: 1.5"),
        ([1, 2], [3], "image_ids: 1 for 2 labels"),
        ([1, 2], [3, 3], "all distinct"),
        ([1, 2], [3, -1], "image_ids: -1"),
        ([True], None, "labels: True"),
    ],
)
def test_labels_refused(make_model: MakeModel, labels: list[Any], ids: list[int] | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Inverter(make_model(), CONFIG, impl="eager")(labels, ids)


def test_labels_may_be_numpy_or_tensors(make_model: MakeModel) -> None:
    for labels in (np.array([1, 4]), torch.tensor([1, 4])):
        assert invert(make_model(), labels).labels.tolist() == [1, 4]  # type: ignore[arg-type]


def test_a_bad_label_in_a_stream_leaves_earlier_batches(make_model: MakeModel) -> None:
    stream = Inverter(make_model(), CONFIG, batch_size=1, impl="eager").stream([0, 1, 9])
    assert [next(stream).labels.tolist(), next(stream).labels.tolist()] == [[0], [1]]
    with pytest.raises(ValueError, match="labels: 9"):
        next(stream)


def test_out_of_memory_says_what_to_do(make_model: MakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(inverter_module, "new_state", full)
    with pytest.raises(MemoryError, match="batch_size=3; a smaller batch size"):
        invert(make_model(), [0, 1], batch_size=3)


def test_schedule_that_does_not_fit_the_grid(make_model: MakeModel) -> None:
    with pytest.raises(ValueError, match="leaves no patch"):
        Inverter(make_model(), InversionConfig(iterations=9, stops=((3, 0.95),)), impl="eager")
