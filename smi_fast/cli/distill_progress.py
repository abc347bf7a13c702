"""The progress bar of ``smi-fast distill``."""

import time

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn

from smi_fast.cli.bars import Bar, minutes_left
from smi_fast.distill import CurveRow, Progress


class TrainingBar(Bar, Progress):
    """Shows what the training is doing, loss, accuracy and the time left.

    Args:
        console: where to draw; where it is no terminal, a line is printed at each new row of the curve, at each
            inversion, and once a minute.
        steps: of the whole run.
    """

    def __init__(self, console: Console, steps: int) -> None:
        super().__init__(
            console,
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed}/{task.total} steps"),
            TextColumn("{task.fields[loss]}"),
            TextColumn("{task.fields[accuracy]}"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
        )
        self.steps = steps
        self.task = self.bars.add_task("starting", total=steps, loss="", accuracy="", left="")
        self.training = False  # rather than inverting, preparing or evaluating
        self.begun, self.first = time.perf_counter(), -1

    def _describe(self, text: str, training: bool = False) -> None:
        self.training = training
        self.bars.update(self.task, description=text)
        if not training:
            self.say(text)

    def inverting(self, number: int, images: int) -> None:
        """Say so: no step is done meanwhile."""
        self._describe(f"inverting {images} images, round {number + 1}")

    def preparing(self, images: int) -> None:
        """Say so: no step is done meanwhile."""
        self._describe(f"asking the teacher about {images} images")

    def evaluating(self, step: int) -> None:
        """Say so: no step is done meanwhile."""
        self._describe(f"evaluating after step {step}")

    def stepped(self, step: int, loss: float | None) -> None:
        """Advance; the time left is that of the steps so far, with all that lay between them."""
        if self.first < 0:
            self.first = step - 1
        if not self.training:
            self._describe("training", training=True)
        each = (time.perf_counter() - self.begun) / (step - self.first)
        fields = {"left": minutes_left(each * (self.steps - step))}
        if loss is not None:
            fields["loss"] = f"loss {loss:.4g}"
        self.bars.update(self.task, completed=step, **fields)  # type: ignore[arg-type]  # fields are free
        self.say_now_and_then(f"step {step} of {self.steps}  {'  '.join(fields.values())}")

    def evaluated(self, row: CurveRow) -> None:
        """Show the new point of the curve."""
        accuracy = "" if row.accuracy is None else f"accuracy {row.accuracy:.4f}"
        self.bars.update(self.task, accuracy=accuracy)
        self.say(f"step {row.step}: {row.images} images, {row.seconds:.1f} s, loss {row.loss:.4g} {accuracy}")
