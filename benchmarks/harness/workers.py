"""Systems in processes of their own: each has its own peak memory, environment and compiler."""

import multiprocessing as mp
import time
from collections.abc import Callable
from typing import Any

import torch


class Worker:
    """An object that lives in another process; its methods are called from here.

    Args:
        name: for messages.
        threads: of torch, there.
        build: makes the object there; it and its arguments are pickled.

    Attributes:
        seconds_setup: what ``build`` took, once `ready` has returned.
    """

    def __init__(self, name: str, threads: int, build: Callable[..., Any], *arguments: Any) -> None:
        context = mp.get_context("spawn")
        self.name, self.seconds_setup = name, 0.0
        self._pipe, theirs = context.Pipe()
        details = (theirs, threads, build, arguments)
        self._process = context.Process(target=_serve, args=details, daemon=True)
        self._process.start()
        theirs.close()

    def ready(self) -> "Worker":
        """Wait until the object is made."""
        self.seconds_setup = self.answer()
        return self

    def ask(self, method: str, *arguments: Any) -> None:
        """Begin to call a method of the object; `answer` gives its result."""
        self._pipe.send((method, arguments))

    def answer(self) -> Any:
        """The result of the method that was asked for.

        Raises:
            RuntimeError: the process ended without an answer; its own error is on the terminal.
        """
        try:
            return self._pipe.recv()
        except EOFError:
            self._process.join()
            raise RuntimeError(f"{self.name}: its process ended with {self._process.exitcode}") from None

    def call(self, method: str, *arguments: Any) -> Any:
        """Call a method of the object, and wait."""
        self.ask(method, *arguments)
        return self.answer()

    def close(self) -> None:
        """End the process."""
        self._pipe.send(None)
        self._process.join()


def _serve(pipe: Any, threads: int, build: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(threads)
    begin = time.perf_counter()
    thing = build(*arguments)
    pipe.send(time.perf_counter() - begin)
    for method, details in iter(pipe.recv, None):
        pipe.send(getattr(thing, method)(*details))
