"""What the progress bars of all commands share."""

import time
from typing import Self

from rich.console import Console
from rich.progress import Progress, ProgressColumn

LOG_SECONDS = 60  # between two lines where there is no terminal


class Bar:
    """A bar on a terminal, lines elsewhere; use it as a context.

    Args:
        console: where to draw.
        columns: of the bar.
    """

    def __init__(self, console: Console, *columns: ProgressColumn) -> None:
        self.console = console
        self.bars = Progress(*columns, console=console, disable=not console.is_terminal)
        self.logged = time.perf_counter()

    def __enter__(self) -> Self:
        self.bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bars.stop()

    def say(self, text: str) -> None:
        """A line, where there is no terminal."""
        if not self.console.is_terminal:
            self.console.print(text, highlight=False)

    def say_now_and_then(self, text: str) -> None:
        """The same, at most once in `LOG_SECONDS`."""
        now = time.perf_counter()
        if now - self.logged > LOG_SECONDS:
            self.logged = now
            self.say(text)


def minutes_left(seconds: float) -> str:
    """``"3:05 left"``."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d} left"
