"""`Trainer`: train a student on what a frozen teacher says of a pool of images."""

import hashlib
import json
import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from smi_fast.distill.checkpoint import Marks, restore
from smi_fast.distill.config import DistillConfig
from smi_fast.distill.curves import CurveRow
from smi_fast.distill.folder import BEST, RunFolder
from smi_fast.distill.loss import distillation_loss
from smi_fast.distill.pair import Pair
from smi_fast.distill.pool import ImageSet, Pool, draw
from smi_fast.distill.progress import Progress
from smi_fast.distill.rounds import Alternating, Rounds
from smi_fast.images import SparseImages
from smi_fast.model.from_timm import weights_sha256

LOSS_EVERY = 10  # steps between two looks at the loss, each of which waits for the device


@dataclass(frozen=True)
class DistillResult:
    """What a training came to."""

    steps: int
    images: int
    seconds: float  # training and inversion
    best: float | None  # accuracy
    interrupted: bool
    curve: tuple[CurveRow, ...]


class Trainer:
    """Knowledge transfer by Eq. 6 of the paper; teacher and student see kept patches alone.

    What frozen models say of an image does not change, so it is worked out once an image and kept
    (`DistillConfig.cache`): the teacher's logits, and in mode "probe" what the student's head reads.

    Args:
        pair: of a teacher from `smi_fast.load_model` and a student from `build_student`, which is trained in place.
        config: the training.
        source: a saved set, or real images as an `ImageSet` (offline); or `Alternating`.
        evaluate: gets the student's timm model in eval mode, which sees whole images, and gives an accuracy. In mode
            "probe" it may apply ``vit.head`` to `probe_features` that it keeps.
        folder: for checkpoints, curve and students; None writes nothing.
        progress: told of the work as it goes on.

    Killed at any moment after the start and resumed, it ends with the same student, on a CPU bit for bit.

    Raises:
        ValueError: images that do not fit the teacher.
    """

    def __init__(
        self,
        pair: Pair,
        config: DistillConfig,
        source: SparseImages | ImageSet | Alternating,
        *,
        evaluate: Callable[[nn.Module], float] | None = None,
        folder: RunFolder | None = None,
        progress: Progress | None = None,
    ) -> None:
        self.pair, self.student, self.config, teacher = pair, pair.student, config, pair.teacher
        self.evaluate, self.folder, self.progress = evaluate, folder, progress or Progress()
        self.marks, self.curve = Marks(), list[CurveRow]()
        self.rounds: Rounds | None = None
        self.fixed: ImageSet | None = None
        if isinstance(source, Alternating):
            classes = teacher.shape.num_classes
            self.rounds = Rounds(source, classes, None if folder is None else folder.rounds)
        else:
            self.fixed = self.pair.usable(source) if isinstance(source, SparseImages) else source
            self.pair.check(self.fixed)
        self.pool = Pool(None if self.rounds is None else config.pool, teacher.grid)
        self.added = 0  # rounds
        self.cached = self._saves_work() if config.cache is None else config.cache
        self.updating = False
        self.fingerprint = self._fingerprint()

    @property
    def _probe(self) -> bool:
        return self.config.mode == "probe"

    def run(self, stop: threading.Event | None = None) -> DistillResult:
        """Train to the end, or until ``stop`` is set or an interrupt comes, which leaves a checkpoint.

        Raises:
            ValueError: the checkpoint is of another training, images of a round do not fit, or the loss is not finite.
            OSError: a file could not be written; the checkpoint before it is whole.
            KeyboardInterrupt: one came in the middle of an update; the checkpoint before it stands.
        """
        interrupted = False
        self._begin()
        try:
            if self.fixed is not None:
                self._add(self.fixed, counted=self.marks.step == 0)
            while self._turn():
                if stop is not None and stop.is_set():
                    interrupted = True
                    break
                self._grow()
                self._step()
        except KeyboardInterrupt:
            if self.updating:
                raise
            interrupted = True
        finally:
            if self.folder is not None and self.folder.writer is not None:
                self.folder.close()
        if interrupted:
            self._save()
        marks = self.marks
        return DistillResult(marks.step, self._images(), self._seconds(), marks.best, interrupted, tuple(self.curve))

    def _begin(self) -> None:
        """Set up what is trained, and go on from the checkpoint if there is one."""
        vit, c = self.student.vit, self.config
        vit.train(not self._probe)
        for name, parameter in vit.named_parameters():
            parameter.requires_grad_(not self._probe or name.startswith("head."))
        weights = [parameter for parameter in vit.parameters() if parameter.requires_grad]
        self.optimizer: torch.optim.Optimizer
        if c.optimizer == "sgd":
            self.optimizer = torch.optim.SGD(weights, c.lr, c.momentum, weight_decay=c.weight_decay)
        else:
            self.optimizer = torch.optim.AdamW(weights, c.lr, weight_decay=c.weight_decay)
        found = None if self.folder is None else self.folder.begin(self.fingerprint)
        if found is not None and self.folder is not None:
            tensors, self.marks = found
            restore(tensors, vit, self.optimizer)
            self.curve = list(self.folder.curve)
        else:
            self._save()  # from here on there is something to resume from

    def _turn(self) -> bool:
        """What is due between two steps; False where that was the last."""
        c, step = self.config, self.marks.step
        last = self.curve[-1].step if self.curve else 0
        if step > last and (step % c.eval_every == 0 or step == c.steps):
            self._row()
        elif step and step % c.checkpoint_every == 0:
            self._save()
        return step < c.steps

    def _grow(self) -> None:
        """Add the rounds of images that the next step is to have; after a resume, those that the pool had."""
        if self.rounds is None:
            return
        needed = self.marks.step // self.rounds.source.steps_per_round
        if needed < self.added:
            return
        sets: list[ImageSet] = []
        for number in range(needed, self.added - 1, -1):
            if not self.rounds.stored(number):
                self.progress.inverting(number, self.rounds.source.images_per_round)
            sets.insert(0, self.pair.usable(self.rounds.images(number)))
            if sum(map(len, sets)) >= self.config.pool:
                break  # what is older has left
        for images in sets:
            self._add(images, counted=images is sets[-1])
        self.added = needed + 1

    def _add(self, images: ImageSet, counted: bool) -> None:
        """Add images to the pool; their preparation counts as training but where it only repeats it."""
        begin, known = time.perf_counter(), None
        if self.cached:
            self.progress.preparing(len(images))
            known = self.pair.known(images, self.config.views, self._probe)
        self.pool.add(images, known)
        if counted:
            self.marks.seconds += time.perf_counter() - begin

    def _step(self) -> None:
        """One update."""
        c, marks, begin = self.config, self.marks, time.perf_counter()
        for group in self.optimizer.param_groups:
            group["lr"] = c.lr_at(marks.step)
        devices = [self.student.device] if self.student.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            # for a student that drops something at random
            torch.manual_seed((c.seed * 1_000_003 + marks.step) % 2**63)
            loss = distillation_loss(*self._logits(), c.temperature, c.scale_by_t2)
            self.optimizer.zero_grad()
            loss.backward()
        self.updating = True
        self.optimizer.step()
        marks.step += 1
        self.updating = False
        due = marks.step % LOSS_EVERY == 0 or marks.step % c.eval_every == 0 or marks.step == c.steps
        if due or marks.step % c.checkpoint_every == 0:
            marks.loss = float(loss.detach())
            if not math.isfinite(marks.loss):
                raise ValueError(f"lr={c.lr}: the loss is {marks.loss} after step {marks.step}; a smaller one may help")
        marks.seconds += time.perf_counter() - begin
        self.progress.stepped(marks.step, marks.loss if due else None)

    def _logits(self) -> tuple[Tensor, Tensor]:
        """Of the next batch, ``[B, C]`` each: the teacher's and the student's."""
        c, pool = self.config, self.pool
        positions, flips = draw(c.seed, self.marks.step, len(pool), c.batch_size, c.flip)
        teacher = None if pool.logits is None else pool.logits[positions, flips.long()]
        if teacher is not None and pool.features is not None:
            return teacher, self.student.vit.head(pool.features[positions, flips.long()])
        rows, goals, logits = [], [], []
        for batch in pool.take(positions, flips):
            images = self.pair.to_device(batch.images)
            rows.append(batch.rows)
            goals.append(self.pair.teacher_logits(images) if teacher is None else teacher[batch.rows])
            logits.append(self.pair.student_logits(images))
        return torch.cat(goals), torch.cat(logits)

    def _row(self) -> None:
        """Evaluate, and add a row to the curve."""
        accuracy = None
        if self.evaluate is not None:
            self.progress.evaluating(self.marks.step)
            self.student.vit.eval()
            with torch.no_grad():
                accuracy = float(self.evaluate(self.student.vit))
            self.student.vit.train(not self._probe)
        row = CurveRow(self.marks.step, self._images(), self._seconds(), self.marks.loss, accuracy)
        self.curve.append(row)
        if self.folder is not None:
            self.folder.add_row(row)
        self.marks.rows += 1
        if accuracy is not None and (self.marks.best is None or accuracy > self.marks.best):
            self.marks.best = accuracy
            if self.folder is not None:
                self.folder.save_student(BEST, self.student, self.marks)
        self._save()
        self.progress.evaluated(row)

    def _save(self) -> None:
        if self.folder is not None:
            self.folder.save(self.student, self.optimizer, self.marks, self.fingerprint)

    def _images(self) -> int:
        if self.fixed is not None:
            return len(self.fixed)
        assert self.rounds is not None
        return self.added * self.rounds.source.images_per_round

    def _seconds(self) -> float:
        return self.marks.seconds + (0.0 if self.rounds is None else self.rounds.seconds_until(self.added))

    def _saves_work(self) -> bool:
        """Are more images shown than there are to be looked at once?"""
        c = self.config
        if self.fixed is not None:
            images = len(self.fixed)
        else:
            assert self.rounds is not None
            source = self.rounds.source
            images = math.ceil(c.steps / source.steps_per_round) * source.images_per_round
        return c.steps * c.batch_size >= images * c.views

    def _fingerprint(self) -> dict[str, Any]:
        """What a resumed training must have in common with the one that left the checkpoint."""
        images: dict[str, Any]
        if self.fixed is not None:
            images = {"images": len(self.fixed), "sha256": _sha256(self.fixed)}
        else:
            assert self.rounds is not None
            source = self.rounds.source
            numbers = {"images_per_round": source.images_per_round, "steps_per_round": source.steps_per_round}
            images = numbers | dict(source.identity)
        whole = {
            **self.config.to_dict(),
            "teacher": self.pair.teacher.info.sha256,
            "teacher_precision": self.pair.teacher.precision,
            "student": self.student.info.name,
            "student_sha256": weights_sha256(self.student.vit),
            "source": images,
        }
        return json.loads(json.dumps(whole))


def _sha256(images: ImageSet) -> str:
    digest = hashlib.sha256()
    for tensor in (images.pixels, images.keep):
        if tensor is not None:
            digest.update(tensor.cpu().contiguous().numpy().data)
    return digest.hexdigest()
