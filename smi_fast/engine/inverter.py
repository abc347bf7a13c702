"""`Inverter`: labels in, sparse images out."""

import itertools
import operator
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from smi_fast.config import InversionConfig
from smi_fast.engine.compiler import compile_step, why_not_compile
from smi_fast.engine.losses import LossReader
from smi_fast.engine.progress import Progress
from smi_fast.engine.snapshots import Snapshots
from smi_fast.engine.state import State, new_state, stop_patches
from smi_fast.engine.step import build_step
from smi_fast.images import Provenance, SparseImages
from smi_fast.model.sparse_vit import SparseViT
from smi_fast.priors import Prior, priors_of
from smi_fast.schedule import Stage, plan_stages
from smi_fast.versions import versions

Impl = Literal["eager", "compiled"]


class Bucket(NamedTuple):
    """The static shapes of one stage."""

    batch: int
    kept: int


class Interrupted(Exception):
    """Raised inside the engine's thread when the caller has gone away."""


@dataclass(frozen=True)
class _Batch:
    """One batch on its way through the stages; images after the first ``wanted`` fill it up."""

    index: int
    labels: list[int]
    image_ids: list[int]
    wanted: int
    gone: threading.Event


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
        batch_size: images in work at a time. Under ``paper`` the last batch is filled up with spare images, so that
            every batch runs on the same graphs; under ``reference``, where batch-mates matter, it is left short.
        impl: "compiled" (one graph a bucket) or "eager". Where the machine cannot compile, a warning says why, and
            ``impl`` reads "eager" from then on.
        priors: terms of the loss besides cross-entropy; None takes those that the configuration names.
        progress: told of the work as it goes on.
        snapshots: collects canvases of the first batch on the way, see `Snapshots`.

    Raises:
        ValueError: a batch size below 1, an unknown ``impl``, a schedule that does not fit the model's grid.
    """

    def __init__(
        self,
        model: SparseViT,
        config: InversionConfig,
        *,
        batch_size: int = 8,
        impl: Impl = "compiled",
        priors: Sequence[Prior] | None = None,
        progress: Progress | None = None,
        snapshots: Snapshots | None = None,
    ) -> None:
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"batch_size={batch_size!r}: must be an integer of at least 1")
        if impl not in ("eager", "compiled"):
            raise ValueError(f"impl={impl!r}: must be 'eager' or 'compiled'")
        self.model, self.config, self.batch_size = model, config, batch_size
        self.stages = plan_stages(model.grid.patches, config.stops, config.iterations)
        self.priors = priors_of(config) if priors is None else tuple(priors)
        self.progress = progress or Progress()
        self.snapshots = snapshots
        self.stats = Stats(stage_seconds=[0.0] * len(self.stages))
        self.impl: Impl = self._usable(impl)
        self._steps: dict[Bucket, Callable[[State], None]] = {}

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
        """Yield finished batches of a label stream, of any length, while the next batch is in work.

        Batches come in the order of the labels. Closing the iterator (or an interrupt) stops the work after the
        current step and drops the unfinished batches.

        Raises:
            ValueError: a label that the model does not know, or an id that is no integer of 0 or more, when the
                stream comes to its batch.
            MemoryError: the batch does not fit into device memory.
        """
        gone = threading.Event()
        batches = self._batches(labels, itertools.count() if image_ids is None else image_ids, gone)
        with ThreadPoolExecutor(1, thread_name_prefix="smi_fast") as pool:
            pending: Future[SparseImages] | None = None
            try:
                for batch in batches:
                    following = pool.submit(self._invert, batch)
                    if pending is not None:
                        yield pending.result()
                    pending = following
                if pending is not None:
                    yield pending.result()
            finally:
                gone.set()

    def _batches(self, labels: Iterable[int], image_ids: Iterable[int], gone: threading.Event) -> Iterator[_Batch]:
        """Cut the stream; see ``batch_size`` for the last one."""
        pairs = zip(labels, image_ids, strict=False)
        for index in itertools.count():
            chunk = list(itertools.islice(pairs, self.batch_size))
            if not chunk:
                return
            wanted = len(chunk)
            if self.config.rules.stop_updates and index > 0:
                chunk += chunk[-1:] * (self.batch_size - wanted)
            yield _Batch(index, [label for label, _ in chunk], [i for _, i in chunk], wanted, gone)

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
    def _invert(self, batch: _Batch) -> SparseImages:
        """One batch from start to finish; runs in the engine's thread."""
        self.progress.batch_started(batch.index, batch.wanted)
        begin, compiled_before = time.perf_counter(), self.stats.seconds_compile
        try:
            images = self._finish(self._run_stages(batch), batch)
        except torch.OutOfMemoryError as error:
            raise MemoryError(
                f"out of device memory at batch_size={self.batch_size}; a smaller batch size needs less: {error}"
            ) from error
        compiling = self.stats.seconds_compile - compiled_before
        self.stats.seconds_run += time.perf_counter() - begin - compiling
        self.stats.images += batch.wanted
        self.progress.batch_finished(batch.index, batch.wanted)
        return images

    def _run_stages(self, batch: _Batch) -> State:
        """From the start of a batch to its last step."""
        labels = [self._class_index(label) for label in batch.labels]
        state = new_state(self.model, self.config, labels, batch.image_ids, len(self.priors))
        reader = LossReader(state)
        for number, stage in enumerate(self.stages):
            if number:
                state = stop_patches(state, stage.kept, self.config.rules.stop_updates)
            step = self._step(state)
            self.progress.stage_started(number, stage)
            begin = time.perf_counter()
            self._run_stage(step, state, (stage, batch, reader))
            self.stats.stage_seconds[number] += time.perf_counter() - begin
        return state

    def _run_stage(self, step: Callable[[State], None], state: State, work: tuple[Stage, _Batch, LossReader]) -> None:
        """All iterations of a stage, and the wait for the device at its end."""
        stage, batch, reader = work
        snapshots = self.snapshots if batch.index == 0 else None
        real = batch.image_ids[: batch.wanted]
        for iteration in range(stage.start, stage.end):
            if batch.gone.is_set():
                raise Interrupted
            if snapshots is not None:
                snapshots.offer(iteration, state, real)
            step(state)
            self.progress.stepped(iteration + 1, reader.poll())
        if snapshots is not None and stage.end == self.config.iterations:
            snapshots.offer(stage.end, state, real)
        if state.canvas.is_cuda:
            torch.cuda.synchronize(state.canvas.device)

    def _step(self, state: State) -> Callable[[State], None]:
        """The step of a bucket, compiled when it is met first."""
        bucket = Bucket(*state.keep.shape)
        if bucket not in self._steps:
            # a fresh function a bucket, see compiler.py
            built = build_step(self.model, self.config, self.priors)
            step: Callable[[State], None] = built
            if self.impl == "compiled":
                begin = time.perf_counter()
                place = [stage.kept for stage in self.stages].index(bucket.kept)
                self.progress.compiling(place + 1, len(self.stages), bucket.kept)
                step = compile_step(built, state)
                seconds = time.perf_counter() - begin
                self.stats.seconds_compile += seconds
                self.progress.compiled(seconds)
            self._steps[bucket] = step
        return self._steps[bucket]

    def _finish(self, state: State, batch: _Batch) -> SparseImages:
        """Ask the model what it sees in the kept patches, and hand the images over on the host."""
        logits, _ = self.model(state.canvas, state.keep)
        probabilities = logits.softmax(1)
        confidence = probabilities.gather(1, state.labels[:, None])[:, 0]

        def host(tensor: Tensor) -> Tensor:
            return tensor[: batch.wanted].detach().to("cpu", copy=True)

        images = SparseImages(
            pixels=host(state.canvas).float(),
            keep=host(state.keep),
            labels=host(state.labels),
            image_ids=torch.tensor(batch.image_ids[: batch.wanted], dtype=torch.int64),
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
