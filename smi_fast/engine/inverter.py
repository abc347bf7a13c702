"""`Inverter`: labels in, sparse images out."""

import itertools
import operator
import threading
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from smi_fast.config import InversionConfig
from smi_fast.device import current, out_of_memory
from smi_fast.engine.batches import Batches, Group, cut_groups
from smi_fast.engine.observe import LossReader, Progress, Snapshots
from smi_fast.engine.randomness import Draws, deterministic_algorithms, draw
from smi_fast.engine.runner import Bucket, Runner, Runners, Source
from smi_fast.engine.state import State, new_state
from smi_fast.images import Provenance, SparseImages
from smi_fast.model.sparse_vit import SparseViT
from smi_fast.storage.environment import versions
from smi_fast.tuning.settings import BatchSize, Impl, Target, decide


class Interrupted(Exception):
    """Raised inside the engine's thread when the caller has gone away."""


@dataclass
class Stats:
    """What an `Inverter` has done since it was made."""

    images: int = 0
    seconds_compile: float = 0.0
    seconds_run: float = 0.0  # whole groups without compilation
    stage_seconds: list[float] = field(default_factory=list)


class Inverter:
    """Inverts a frozen model: synthesises images that it recognises as given labels.

    Args:
        model: from `smi_fast.load_model`; its dtype is the compute dtype, its device is where the work is done.
        config: the recipe.
        batch_size: images in work at a time; or one number for each stage, of which each divides the largest. As many
            images as the largest go through the stages as a group, each stage cut into batches of its own, so that late
            stages, which have few patches, can run on more images than early ones. None takes what ``smi-fast tune``
            stored for this machine, else 64. The last group is filled up with spare images, so that every batch runs on
            the same graphs; where images depend on their batch-mates, it is left short.
        impl: "compiled" (one graph a bucket) or "eager". Where the machine cannot compile, a warning says why, and
            ``impl`` reads "eager" from then on.
        cuda_graphs: on CUDA, launch many iterations at once as a captured graph; priors must be fit for it.
        deterministic: the same seed, device and versions give the same bytes. On CUDA this turns on
            ``torch.use_deterministic_algorithms`` while the engine works, which some operations pay for; elsewhere it
            is so anyway.

    Attributes:
        progress: told of the work as it goes on; set it before the work starts.
        snapshots: collects canvases of the first batch on the way, or None; see `Snapshots`.
        stats: what was done so far.

    Where a batch does not fit into device memory, its stage goes on with half of it, and `Progress.out_of_memory` is
    told; nothing that was done is lost. (Not where images depend on their batch-mates.)

    >>> Inverter(load_model("demo"), InversionConfig(iterations=400, stops=((50, 0.3),)))(labels=[3, 5])

    Raises:
        ValueError: a batch size or an ``impl`` that breaks a rule, a strategy that does not fit the model's grid, or a
            prior that needs a block which the model does not have.
    """

    def __init__(
        self,
        model: SparseViT,
        config: InversionConfig,
        *,
        batch_size: BatchSize | None = None,
        impl: Impl = "compiled",
        cuda_graphs: bool = True,
        deterministic: bool = False,
    ) -> None:
        self.model, self.config = model, config
        self.stages = config.stages(model.grid.patches)
        settings = decide(Target.of(model), config, batch_size=batch_size, impl=impl)
        settings.apply(model)
        if settings.impl != impl:
            warnings.warn(settings.notes[0], stacklevel=2)
        self.impl, self.batch_source = settings.impl, settings.source
        self.progress: Progress = Progress()
        self.snapshots: Snapshots | None = None
        self.deterministic = deterministic
        self.stats = Stats(stage_seconds=[0.0] * len(self.stages))
        self.runners = Runners(Source(model, config, self.impl == "compiled", cuda_graphs))
        self._batches = Batches(settings.batches, config.couples_batch)

    @property
    def _switches_determinism(self) -> bool:
        return self.deterministic and self.model.device.type == "cuda"

    @property
    def batches(self) -> tuple[int, ...]:
        """The largest batch of each stage; lower than what was asked for, where memory ran out."""
        return self._batches.limits

    def __call__(self, labels: Iterable[int], image_ids: Sequence[int] | None = None) -> SparseImages:
        """Invert one image for each label.

        Args:
            labels: class indices.
            image_ids: with the seed, the key of each image's random stream; None counts from 0.

        Raises:
            ValueError: no labels, a label that the model does not know, ids that do not match the labels.
        """
        labels = list(labels)
        if not labels:
            raise ValueError("labels is empty: give at least one class index")
        for label in labels:
            self._class_index(label)
        if image_ids is not None and (len(image_ids) != len(labels) or len(set(image_ids)) != len(labels)):
            raise ValueError(f"image_ids: {len(image_ids)} for {len(labels)} labels; must be one each, all distinct")
        return SparseImages.cat(list(self.stream(labels, image_ids)))

    def stream(self, labels: Iterable[int], image_ids: Iterable[int] | None = None) -> Iterator[SparseImages]:
        """Yield finished groups of a label stream, of any length, while the next group is in work.

        Groups come in the order of the labels. Closing the iterator (or an interrupt) stops the work after the
        current step and drops the unfinished groups.

        >>> for images in inverter.stream(itertools.cycle(range(10))):
        ...     train(images)

        Raises:
            ValueError: a label that the model does not know, or an id that is no integer of 0 or more, when the
                stream comes to its group.
            MemoryError: not even a single image fits into device memory, or the group as a whole does not.
        """
        gone = threading.Event()
        ids = itertools.count() if image_ids is None else image_ids
        groups = cut_groups(zip(labels, ids, strict=False), self._batches.group_size, gone)
        pending: Future[SparseImages] | None = None
        with (
            ThreadPoolExecutor(1, thread_name_prefix="smi_fast draw") as draws,
            ThreadPoolExecutor(1, thread_name_prefix="smi_fast") as engine,
        ):
            try:
                for group in groups:
                    # while the device still works on the group before
                    drawn = draws.submit(self._draw, group)
                    following = engine.submit(self._invert, group, drawn)
                    if pending is not None:
                        yield pending.result()
                    pending = following
                if pending is not None:
                    yield pending.result()
            finally:
                gone.set()

    def _class_index(self, label: Any) -> int:
        """A label as an int; numpy integers and 0-d tensors will do."""
        classes = self.model.shape.num_classes
        try:
            index = operator.index(label)
        except TypeError:
            index = -1
        if isinstance(label, bool) or not 0 <= index < classes:
            raise ValueError(f"labels: {label!r}: must be a class index in 0..{classes - 1}")
        return index

    def _draw(self, group: Group) -> Draws:
        """The random numbers of a group; runs in a thread of its own."""
        with current(self.model.device):  # pinned memory belongs to a device
            return draw(self.config, group.image_ids, self.model.grid, self.model.device.type == "cuda")

    @torch.no_grad()
    def _invert(self, group: Group, drawn: Future[Draws]) -> SparseImages:
        """One group from start to finish; runs in the engine's thread."""
        self.progress.group_started(group.index, len(group))
        size, batches = self._batches.of(group)
        begin, compiled_before = time.perf_counter(), self.runners.seconds_compile
        try:
            with current(self.model.device), deterministic_algorithms(self._switches_determinism):
                state = self._run_stages(self._start(group, drawn.result(), size), group, batches)
                images = self._finish(state, group, batches[-1])
                stage_seconds = group.clock.seconds()
        except Exception as error:
            if not out_of_memory(error):
                raise
            limits = self.batches if len(set(self.batches)) > 1 else self.batches[0]
            raise MemoryError(
                f"out of device memory at batch_size={limits}; a smaller batch size needs less: {error}"
            ) from error
        for number, seconds in stage_seconds:
            self.stats.stage_seconds[number] += seconds
        self.stats.seconds_compile = self.runners.seconds_compile
        self.stats.seconds_run += time.perf_counter() - begin - (self.stats.seconds_compile - compiled_before)
        self.stats.images += len(group)
        self.progress.group_finished(group.index, len(group))
        return images

    def _start(self, group: Group, drawn: Draws, size: int) -> State:
        """The state of a group before its first step, filled up with copies of its last image."""
        labels = [self._class_index(label) for label in group.labels]
        spare = size - len(group)
        if spare:
            drawn = Draws(*(torch.cat([part, part[-1:].expand(spare, *part.shape[1:])]) for part in drawn))
        return new_state(self.model, self.config, labels + labels[-1:] * spare, drawn)

    def _run_stages(self, state: State, group: Group, batches: list[int]) -> State:
        """From the start of a group to its last step."""
        for number, stage in enumerate(self.stages):
            if number:
                state = state.stopped(self.config.strategy, stage.kept, stage.start)
            start = 0
            while start < len(group):  # batches that only fill up are left out
                start += self._run_batch(state, start, number, (group, batches))
            state.iteration.fill_(stage.end)
        return state

    def _run_batch(self, state: State, start: int, number: int, work: tuple[Group, list[int]]) -> int:
        """All iterations of a stage for the images from ``start`` on; returns how many those are."""
        batches = work[1]
        while not self._fits(state, start, number, work):
            # here, where nothing of the failed attempt is alive any more
            self.runners.drop(Bucket(batches[number], state.keep.shape[1]))
            smaller = self._batches.lower(number, batches[number])
            self.progress.out_of_memory(number, batches[number], smaller)
            batches[number] = smaller
        return batches[number]

    def _fits(self, state: State, start: int, number: int, work: tuple[Group, list[int]]) -> bool:
        """Run a batch; False where it does not fit into memory and a smaller one may, ``state`` being as it was."""
        group, batches = work
        try:
            runner = self._runner(state, start, number, batches[number])
            runner.load(state, start)
            with group.clock.stage(number, self.model.device):
                self._iterate(runner, start, number, work)
        except Exception as error:
            if not out_of_memory(error) or batches[number] == 1 or self.config.couples_batch:
                raise
            return False
        runner.store(state, start)
        return True

    def _runner(self, state: State, start: int, number: int, batch: int) -> Runner:
        """The runner of a batch."""
        bucket = Bucket(batch, state.keep.shape[1])
        waits = self.impl == "compiled" and not self.runners.has(bucket)
        begin = time.perf_counter()
        if waits:
            self.progress.compiling(number + 1, len(self.stages), bucket.kept)
        runner = self.runners.of(state, start, batch)
        if waits:
            self.progress.compiled(time.perf_counter() - begin)
        return runner

    def _iterate(self, runner: Runner, start: int, number: int, work: tuple[Group, list[int]]) -> None:
        """All iterations of a stage on what the runner has loaded."""
        group, batches = work
        stage = self.stages[number]
        snapshots = self.snapshots if group.index == 0 and start == 0 else None
        shown = group.image_ids[: min(len(group), *batches)]
        reader, iteration = LossReader(runner.state), stage.start
        self.progress.stage_started(number, stage, start, min(batches[number], len(group) - start))
        while iteration < stage.end:
            if group.gone.is_set():
                raise Interrupted
            until = stage.end
            if snapshots is not None:
                snapshots.offer(iteration, runner.state, shown)
                until = snapshots.next_after(iteration, stage.end)
            iteration += runner.advance(until - iteration)
            self.progress.stepped(iteration, reader.poll())
        if snapshots is not None and stage.end == self.config.iterations:
            snapshots.offer(stage.end, runner.state, shown)

    def _finish(self, state: State, group: Group, batch: int) -> SparseImages:
        """Ask the model what it sees in the kept patches, and hand the images over on the host."""
        rows = zip(state.canvas.split(batch), state.keep.split(batch), strict=True)
        probabilities = torch.cat([self.model(canvas, keep)[0].softmax(1) for canvas, keep in rows])
        confidence = probabilities.gather(1, state.labels[:, None])[:, 0]

        def host(tensor: Tensor) -> Tensor:
            return tensor[: len(group)].detach().to("cpu", copy=True)

        images = SparseImages(
            pixels=host(state.canvas).float(),
            keep=host(state.keep),
            labels=host(state.labels),
            image_ids=torch.tensor(group.image_ids, dtype=torch.int64),
            confidence=host(confidence).float(),
            predicted=host(probabilities.argmax(1)),
            failed_at=host(state.failed_at),
            provenance=self.provenance(),
        )
        for image_id, iteration in zip(images.image_ids.tolist(), images.failed_at.tolist(), strict=True):
            if iteration >= 0:
                self.progress.image_failed(image_id, iteration)
        return images

    def provenance(self) -> Provenance:
        """What goes with every image."""
        info = self.model.info
        return Provenance(
            config=self.config.to_dict(),
            model_name=info.name,
            model_sha256=info.sha256,
            mean=info.mean,
            std=info.std,
            patch=self.model.grid.patch,
            class_names=info.class_names,
            seed=self.config.seed,
            versions=versions(),
        )
