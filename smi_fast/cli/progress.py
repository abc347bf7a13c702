"""The progress bar of ``smi-fast invert``."""

import time

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn

from smi_fast.cli.bars import Bar, minutes_left
from smi_fast.engine import Progress
from smi_fast.schedule import Stage


class BarProgress(Bar, Progress):
    """Shows what the engine is doing, its loss, its speed and the time left.

    Args:
        console: where to draw; where it is no terminal, a line is printed at each new stage and once a minute.
        images: of the whole run.
        stages: of the schedule.
        work: relative cost of one iteration of each stage, for the estimate.
    """

    def __init__(self, console: Console, images: int, stages: tuple[Stage, ...], work: list[float]) -> None:
        super().__init__(
            console,
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%"),
            TextColumn("{task.fields[loss]}"),
            TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
        )
        self.images, self.stages, self.work = images, stages, work
        self.total = images * sum(stage.length * cost for stage, cost in zip(stages, work, strict=True))
        self.task = self.bars.add_task("starting", total=self.total, loss="", rate="", left="")
        self.done = 0.0  # work, in the unit of ``work``
        self.seconds, self.resumed = 0.0, time.perf_counter()  # running time so far, and since when it runs again
        self.images_done, self.image_iterations = 0, 0
        self.batch_images, self.stage_index, self.iteration = 0, 0, 0

    def _describe(self, text: str) -> None:
        self.bars.update(self.task, description=text)
        self.say(text)

    def group_started(self, index: int, images: int) -> None:
        """The clock runs again."""
        self.resumed = time.perf_counter()

    def compiling(self, bucket: int, buckets: int, kept: int) -> None:
        """Say so: this is the time in which nothing else moves."""
        self.seconds += time.perf_counter() - self.resumed
        self._describe(f"compiling bucket {bucket} of {buckets} ({kept} patches)")

    def compiled(self, seconds: float) -> None:
        """Compilation does not count as running time."""
        self.console.print(f"  compiled in {seconds:.0f} s", highlight=False)
        self.resumed = time.perf_counter()

    def stage_started(self, index: int, stage: Stage, first: int, images: int) -> None:
        """Name the stage, and the images it is for."""
        self.stage_index, self.iteration, self.batch_images = index, stage.start, images
        first, last = self.images_done + first + 1, self.images_done + first + images
        self._describe(
            f"images {first}-{last} of {self.images}, stage {index + 1} of {len(self.stages)} ({stage.kept} patches)"
        )

    def stepped(self, iteration: int, loss: float | None) -> None:
        """Advance by the cost of the steps."""
        steps, self.iteration = iteration - self.iteration, iteration
        self.done += steps * self.batch_images * self.work[self.stage_index]
        self.image_iterations += steps * self.batch_images
        seconds = self.seconds + time.perf_counter() - self.resumed
        fields = {
            "rate": f"{self.image_iterations / seconds:,.0f} image-it/s",
            "left": minutes_left(seconds / self.done * (self.total - self.done)),
        }
        if loss is not None:
            fields["loss"] = f"loss {loss:.3f}"
        self.bars.update(self.task, completed=self.done, **fields)  # type: ignore[arg-type]  # fields are free
        self.say_now_and_then(f"{self.done / self.total:4.0%}  {'  '.join(fields.values())}")

    def image_failed(self, image_id: int, iteration: int) -> None:
        """Say it at once; the run goes on."""
        self.console.print(
            f"[yellow]image {image_id}: a step was not finite at iteration {iteration}; the image was stopped there"
        )

    def out_of_memory(self, index: int, batch: int, smaller: int) -> None:
        """Say it; the run goes on."""
        self.console.print(
            f"[yellow]stage {index + 1}: out of device memory at a batch of {batch}, going on with {smaller}"
        )

    def group_finished(self, index: int, images: int) -> None:
        """Bank the time of the group."""
        self.seconds += time.perf_counter() - self.resumed
        self.resumed = time.perf_counter()
        self.images_done += images
