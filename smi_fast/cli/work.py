"""The progress bar of commands that go through images."""

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class WorkBar:
    """Shows what is done and how long it will take; where there is no terminal, a line at each new piece of work.

    Args:
        console: where to draw.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self.bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self.what = ""

    def __enter__(self) -> "WorkBar":
        self.bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bars.stop()

    def __call__(self, what: str, done: int, total: int) -> None:
        """``done`` of ``total`` are behind us."""
        if what != self.what:
            self.what = what
            self.task = self.bars.add_task(what, total=total)
            if not self.console.is_terminal:
                self.console.print(what)
        self.bars.update(self.task, completed=done)
