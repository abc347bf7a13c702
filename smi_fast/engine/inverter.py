"""`Inverter`: labels in, sparse images out."""

import itertools
import operator
import threading
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from smi_fast.config import InversionConfig
from smi_fast.engine.batches import halved, lowered, stage_batches
from smi_fast.engine.buckets import Bucket, Buckets, Recipe
from smi_fast.engine.compiler import why_not_compile
from smi_fast.engine.determinism import deterministic_algorithms
from smi_fast.engine.groups import Group, cut_groups
from smi_fast.engine.losses import LossReader
from smi_fast.engine.progress import Progress
from smi_fast.engine.runner import Runner
from smi_fast.engine.snapshots import Snapshots
from smi_fast.engine.state import State, new_state, stop_patches
from smi_fast.images import Provenance, SparseImages
from smi_fast.model.sparse_vit import SparseViT
from smi_fast.priors import Prior, priors_of
from smi_fast.schedule import plan_stages
from smi_fast.storage.environment import versions

Impl = Literal["eager", "compiled"]


class Interrupted(Exception):
    """Raised inside the engine's thread when the caller has gone away."""


@dataclass
class Stats:
    """What an `Inverter` has done since it was made."""

    images: int = 0
    seconds_compile: float = 0.0
    seconds_run: float = 0.0  # whole batches without compilation
    stage_seconds: list[float] = field(default_factory=list)


class Inverter:
    """Inverts a frozen model: synthesises images that it recognises as given labels.

    Args:
        model: from `smi_fast.load_model`; its dtype is the compute dtype, its device is where the work is done.
        config: the inversion.
        batch_size: images in work at a time; or one number for each stage, of which each divides the largest. As many
            images as the largest go through the stages as a group, each stage cut into batches of its own, so that late
            stages, which have few patches, can run on more images than early ones. Under ``paper`` the last group is
            filled up with spare images, so that every batch runs on the same graphs; under ``reference``, where
            batch-mates matter, all stages have one batch, and the last is left short.
        impl: "compiled" (one graph a bucket) or "eager". Where the machine cannot compile, a warning says why, and
            ``impl`` reads "eager" from then on.
        priors: terms of the loss besides cross-entropy; None takes those that the configuration names.
        progress: told of the work as it goes on.
        snapshots: collects canvases of the first batch on the way, see `Snapshots`.
        cuda_graphs: on CUDA, launch many iterations at once as a captured graph; priors must be fit for it.
        deterministic: the same seed, device and versions give the same bytes. On CUDA this turns on
            ``torch.use_deterministic_algorithms`` while the engine works, which some operations pay for; elsewhere it
            is so anyway.

    Where a batch of ``paper`` does not fit into device memory, its stage goes on with half of it, and
    `Progress.out_of_memory` is told; nothing that was done is lost.

    Raises:
        ValueError: a batch size below 1 or that does not divide the largest, an unknown ``impl``, a schedule that does
            not fit the model's grid.
    """

    def __init__(
        self,
        model: SparseViT,
        config: InversionConfig,
        *,
        batch_size: int | Sequence[int] = 8,
        impl: Impl = "compiled",
        priors: Sequence[Prior] | None = None,
        progress: Progress | None = None,
        snapshots: Snapshots | None = None,
        cuda_graphs: bool = True,
        deterministic: bool = False,
    ) -> None:
        if impl not in ("eager", "compiled"):
            raise ValueError(f"impl={impl!r}: must be 'eager' or 'compiled'")
        self.model, self.config = model, config
        self.stages = plan_stages(model.grid.patches, config.stops, config.iterations)
        self.batches = stage_batches(batch_size, len(self.stages), config.rules.stop_updates)
        self.priors = priors_of(config) if priors is None else tuple(priors)
        self.progress = progress or Progress()
        self.snapshots = snapshots
        self.deterministic = deterministic
        self.stats = Stats(stage_seconds=[0.0] * len(self.stages))
        self.impl: Impl = self._usable(impl)
        self.buckets = Buckets(Recipe(model, config, self.priors, self.impl == "compiled", cuda_graphs))

    def _usable(self, impl: Impl) -> Impl:
        reason = why_not_compile(self.model.device.type) if impl == "compiled" else None
        if reason is None:
            return impl
        warnings.warn(f"impl='compiled' is not to be had here, running eager: {reason}", stacklevel=3)
        return "eager"

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

        Raises:
            ValueError: a label that the model does not know, or an id that is no integer of 0 or more, when the
                stream comes to its group.
            MemoryError: not even a single image fits into device memory, or the group as a whole does not.
        """
        gone = threading.Event()
        ids = itertools.count() if image_ids is None else image_ids
        groups = cut_groups(zip(labels, ids, strict=False), lambda: self.batches, self.config.rules.stop_updates, gone)
        with ThreadPoolExecutor(1, thread_name_prefix="smi_fast") as pool:
            pending: Future[SparseImages] | None = None
            try:
                for group in groups:
                    following = pool.submit(self._invert, group)
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

    @torch.no_grad()
    def _invert(self, group: Group) -> SparseImages:
        """One group from start to finish; runs in the engine's thread."""
        self.progress.group_started(group.index, group.wanted)
        for number, limit in enumerate(self.batches):  # the group may have been cut before memory ran out
            if group.batches[number] % limit == 0:
                group.batches[number] = limit
        begin, compiled_before = time.perf_counter(), self.buckets.seconds_compile
        try:
            with deterministic_algorithms(self.deterministic and self.model.device.type == "cuda"):
                images = self._finish(self._run_stages(group), group)
        except torch.OutOfMemoryError as error:
            batches = self.batches if len(set(self.batches)) > 1 else self.batches[0]
            raise MemoryError(
                f"out of device memory at batch_size={batches}; a smaller batch size needs less: {error}"
            ) from error
        for number, seconds in group.clock.seconds():
            self.stats.stage_seconds[number] += seconds
        self.stats.seconds_compile = self.buckets.seconds_compile
        self.stats.seconds_run += time.perf_counter() - begin - (self.stats.seconds_compile - compiled_before)
        self.stats.images += group.wanted
        self.progress.group_finished(group.index, group.wanted)
        return images

    def _run_stages(self, group: Group) -> State:
        """From the start of a group to its last step."""
        labels = [self._class_index(label) for label in group.labels]
        state = new_state(self.model, self.config, labels, group.image_ids, len(self.priors))
        for number, stage in enumerate(self.stages):
            if number:
                state = stop_patches(state, stage.kept, self.config.rules.stop_updates)
            start = 0
            while start < group.wanted:  # batches that only fill up are left out
                start += self._run_batch(state, start, number, group)
            state.iteration.fill_(stage.end)
        return state

    def _run_batch(self, state: State, start: int, number: int, group: Group) -> int:
        """All iterations of a stage for the images from ``start`` on; returns how many those are."""
        while not self._fits(state, start, number, group):
            batch = group.batches[number]
            smaller = halved(batch)
            # here, where nothing of the failed attempt is alive any more
            self.buckets.drop(Bucket(batch, state.keep.shape[1]))
            group.batches[number] = smaller
            self.batches = lowered(self.batches, number, smaller)
            self.progress.out_of_memory(number, batch, smaller)
        return group.batches[number]

    def _fits(self, state: State, start: int, number: int, group: Group) -> bool:
        """Run a batch; False where it does not fit into memory and a smaller one may, ``state`` being as it was."""
        batch = group.batches[number]
        try:
            runner = self._runner(state, start, number, batch)
            runner.load(state, start)
            with group.clock.stage(number, self.model.device):
                self._iterate(runner, start, number, group)
        except torch.OutOfMemoryError:
            if batch == 1 or not self.config.rules.stop_updates:
                raise
            return False
        runner.store(state, start)
        return True

    def _runner(self, state: State, start: int, number: int, batch: int) -> Runner:
        """The runner of a batch."""
        bucket = Bucket(batch, state.keep.shape[1])
        waits = self.impl == "compiled" and not self.buckets.has(bucket)
        begin = time.perf_counter()
        if waits:
            self.progress.compiling(number + 1, len(self.stages), bucket.kept)
        runner = self.buckets.runner(state, start, batch)
        if waits:
            self.progress.compiled(time.perf_counter() - begin)
        return runner

    def _iterate(self, runner: Runner, start: int, number: int, group: Group) -> None:
        """All iterations of a stage on what the runner has loaded."""
        stage = self.stages[number]
        snapshots = self.snapshots if group.index == 0 and start == 0 else None
        shown = group.image_ids[: min(group.wanted, *group.batches)]
        reader, iteration = LossReader(runner.state), stage.start
        self.progress.stage_started(number, stage, start, min(group.batches[number], group.wanted - start))
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

    def _finish(self, state: State, group: Group) -> SparseImages:
        """Ask the model what it sees in the kept patches, and hand the images over on the host."""
        batch = group.batches[-1]
        rows = zip(state.canvas.split(batch), state.keep.split(batch), strict=True)
        probabilities = torch.cat([self.model(canvas, keep)[0].softmax(1) for canvas, keep in rows])
        confidence = probabilities.gather(1, state.labels[:, None])[:, 0]

        def host(tensor: Tensor) -> Tensor:
            return tensor[: group.wanted].detach().to("cpu", copy=True)

        images = SparseImages(
            pixels=host(state.canvas).float(),
            keep=host(state.keep),
            labels=host(state.labels),
            image_ids=torch.tensor(group.image_ids[: group.wanted], dtype=torch.int64),
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
