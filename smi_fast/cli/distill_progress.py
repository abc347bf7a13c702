"""The progress bar of ``smi-fast distill``."""

import time

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars

from smi_fast.cli.progress import LOG_SECONDS
from smi_fast.distill import CurveRow, Progress


class TrainingBar(Progress):
    """Shows what the training is doing, loss, accuracy and the time left.

    Args:
        console: where to draw; where it is no terminal, a line is printed at each new row of the curve, at each
            inversion, and once a minute.
        steps: of the whole run.
    """

    def __init__(self, console: Console, steps: int) -> None:
        self.console, self.steps = console, steps
        self.bars = Bars(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed}/{task.total} steps"),
            TextColumn("{task.fields[loss]}"),
            TextColumn("{task.fields[accuracy]}"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self.task = self.bars.add_task("starting", total=steps, loss="", accuracy="", left="")
        self.training = False  # rather than inverting, preparing or evaluating
        self.begun, self.first = time.perf_counter(), -1
        self.logged = self.begun

    def __enter__(self) -> "TrainingBar":
        self.bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bars.stop()

    def _describe(self, text: str, training: bool = False) -> None:
        self.training = training
        self.bars.update(self.task, description=text)
        if not self.console.is_terminal and not training:
            self.console.print(text, highlight=False)

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
        now = time.perf_counter()
        left = (now - self.begun) / (step - self.first) * (self.steps - step)
        fields = {"left": f"{int(left) // 60}:{int(left) % 60:02d} left"}
        if loss is not None:
            fields["loss"] = f"loss {loss:.4g}"
        self.bars.update(self.task, completed=step, **fields)  # type: ignore[arg-type]  # fields are free
        if not self.console.is_terminal and now - self.logged > LOG_SECONDS:
            self.logged = now
            self.console.print(f"step {step} of {self.steps}  {'  '.join(fields.values())}", highlight=False)

    def evaluated(self, row: CurveRow) -> None:
        """Show the new point of the curve."""
        accuracy = "" if row.accuracy is None else f"accuracy {row.accuracy:.4f}"
        self.bars.update(self.task, accuracy=accuracy)
        if not self.console.is_terminal:
            line = f"step {row.step}: {row.images} images, {row.seconds:.1f} s, loss {row.loss:.4g} {accuracy}"
            self.console.print(line, highlight=False)
