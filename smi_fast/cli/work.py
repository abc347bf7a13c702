"""The progress bar of commands that go through images."""

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from smi_fast.cli.bars import Bar


class WorkBar(Bar):
    """Shows what is done and how long it will take; where there is no terminal, a line at each new piece of work.

    Args:
        console: where to draw.
    """

    def __init__(self, console: Console) -> None:
        super().__init__(
            console,
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        self.what = ""

    def __call__(self, what: str, done: int, total: int) -> None:
        """``done`` of ``total`` are behind us."""
        if what != self.what:
            self.what = what
            self.task = self.bars.add_task(what, total=total)
            self.say(what)
        self.bars.update(self.task, completed=done)
