"""Command lines: the arguments that experiments have in common, and what is refused."""

import argparse
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch


def positive(text: str) -> int:
    """An argument that counts something; argparse names it where it is wrong."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: must be an integer of at least 1")
    return int(text)


def inversion_length(text: str) -> int:
    """Iterations of an inversion with four stops."""
    if positive(text) < 8:
        raise argparse.ArgumentTypeError(f"{text!r}: must be at least 8, the schedule has four stops")
    return int(text)


def model_name(text: str) -> str:
    """An argument that names a model which timm can build."""
    if not timm.is_model(text.partition(".")[0]):
        raise argparse.ArgumentTypeError(f"{text!r}: timm knows no such model")
    return text


def device_argument(text: str) -> str:
    """An argument that names a device which is there."""
    kind, _, index = text.partition(":")
    if kind not in ("cpu", "cuda") or (index and (kind == "cpu" or not index.isdecimal())):
        raise argparse.ArgumentTypeError(f"{text!r}: must be cpu, cuda or cuda:N")
    if kind == "cuda" and int(index or 0) >= torch.cuda.device_count():
        raise argparse.ArgumentTypeError(f"{text!r}: no such CUDA device here")
    return text


SHARED: dict[str, dict[str, Any]] = {
    "device": {"type": device_argument, "default": "cpu"},
    "model": {"type": model_name, "default": "deit_tiny_patch16_224"},
    "batch": {"type": positive, "default": 8},
    "rounds": {"type": positive},
    "steps": {"type": positive, "help": "iterations in a round"},
    "threads": {"type": positive, "help": "of torch"},
    "out": {"type": Path, "help": "CSV [default: in benchmarks/results/]"},
}


class Parser(argparse.ArgumentParser):
    """The command line of an experiment; nonsense ends in a message that names the argument."""

    def __init__(self, name: str, doc: str | None) -> None:
        super().__init__(
            prog=f"python -m benchmarks run {name}",
            description=doc,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    def share(self, name: str, **changes: Any) -> None:
        """Add one of `SHARED`, with changes of its own."""
        self.add_argument(f"--{name}", **(SHARED[name] | changes))

    def parse(self, arguments: Sequence[str]) -> argparse.Namespace:
        """Parse, refuse a plot that cannot be drawn, and put the number of threads into force."""
        args = self.parse_args(arguments)
        if getattr(args, "plot", None) and importlib.util.find_spec("matplotlib") is None:
            self.error("argument --plot: matplotlib is not installed: pip install 'smi-fast[plots]'")
        if hasattr(args, "threads"):
            args.threads = args.threads or torch.get_num_threads()
            torch.set_num_threads(args.threads)
        return args
