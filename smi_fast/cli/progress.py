"""The progress bar of ``smi-fast invert``."""

import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Task, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars
from rich.text import Text

from smi_fast.engine import Progress
from smi_fast.schedule import Stage


class RateColumn(TextColumn):
    """Image-iterations a second, compilation left out."""

    def __init__(self) -> None:
        super().__init__("")

    def render(self, task: Task) -> Text:
        """The rate that the task carries."""
        rate = task.fields.get("rate")
        return Text("" if rate is None else f"{rate:,.0f} image-it/s")


class RemainingColumn(TextColumn):
    """Remaining time, from the FLOPs still to do at the rate of those done."""

    def __init__(self) -> None:
        super().__init__("")

    def render(self, task: Task) -> Text:
        """The estimate that the task carries."""
        left = task.fields.get("left")
        return Text("" if left is None else f"{int(left) // 60}:{int(left) % 60:02d} left")


class BarProgress(Progress):
    """Shows what the engine is doing, its loss, its speed and the time left.

    Args:
        console: where to draw; where it is no terminal, a line is printed at each new stage instead.
        images: of the whole run.
        stages: of the schedule.
        work: relative cost of one iteration of each stage, for the estimate.
    """

    def __init__(self, console: Console, images: int, stages: tuple[Stage, ...], work: list[float]) -> None:
        self.console, self.images, self.stages, self.work = console, images, stages, work
        self.bars = Bars(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%"),
            TextColumn("{task.fields[loss]}"),
            RateColumn(),
            TimeElapsedColumn(),
            RemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        total = images * sum(stage.length * cost for stage, cost in zip(stages, work, strict=True))
        self.task = self.bars.add_task("starting", total=total, loss="", rate=None, left=None)
        self.total, self.done, self.seconds = total, 0.0, 0.0
        self.batch_images, self.stage_index, self.images_done, self.batch_iterations = 0, 0, 0, 0
        self.image_iterations, self.resumed, self.compiling_kept = 0, time.perf_counter(), 0
        self.failures: list[tuple[int, int]] = []

    def __enter__(self) -> "BarProgress":
        self.bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bars.stop()

    def _describe(self, text: str) -> None:
        self.bars.update(self.task, description=text)
        if not self.console.is_terminal:
            self.console.print(text, highlight=False)

    def batch_started(self, index: int, images: int) -> None:
        """Remember how many images each step counts for."""
        self.batch_images = images
        self.resumed = time.perf_counter()

    def compiling(self, bucket: int, buckets: int, kept: int) -> None:
        """Say so: this is the time in which nothing else moves."""
        self.seconds += time.perf_counter() - self.resumed
        self._describe(f"compiling bucket {bucket} of {buckets} ({kept} patches)")

    def compiled(self, seconds: float) -> None:
        """Compilation does not count as running time."""
        self.console.print(f"  compiled in {seconds:.0f} s", highlight=False)
        self.resumed = time.perf_counter()

    def stage_started(self, index: int, stage: Stage) -> None:
        """Name the stage, and the images it is for."""
        self.stage_index = index
        first, last = self.images_done + 1, self.images_done + self.batch_images
        self._describe(
            f"images {first}-{last} of {self.images}, stage {index + 1} of {len(self.stages)} ({stage.kept} patches)"
        )

    def stepped(self, iteration: int, loss: float | None) -> None:
        """Advance by the cost of the step."""
        self.done += self.batch_images * self.work[self.stage_index]
        self.image_iterations += self.batch_images
        seconds = self.seconds + time.perf_counter() - self.resumed
        fields: dict[str, Any] = {
            "rate": self.image_iterations / seconds,
            "left": seconds / self.done * (self.total - self.done),
        }
        if loss is not None:
            fields["loss"] = f"loss {loss:.3f}"
        self.bars.update(self.task, completed=self.done, **fields)

    def image_failed(self, image_id: int, iteration: int) -> None:
        """Say it at once; the run goes on."""
        self.failures.append((image_id, iteration))
        self.console.print(
            f"[yellow]image {image_id}: a step was not finite at iteration {iteration}; the image was stopped there"
        )

    def batch_finished(self, index: int, images: int) -> None:
        """Bank the time of the batch."""
        self.seconds += time.perf_counter() - self.resumed
        self.resumed = time.perf_counter()
        self.images_done += images
