"""The registry: what `python -m benchmarks` can run, and the tables that are made from what it measured."""

import importlib
import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass

FOLDERS = ("speed", "paper", "laboratory")  # whose modules are imported to fill the registry
Row = dict[str, str]
Main = Callable[[Sequence[str]], None]
Make = Callable[[list[Row]], str]


@dataclass(frozen=True)
class Experiment:
    """Something to run; ``main`` takes the words of the command line that follow its name."""

    name: str
    summary: str  # one line
    main: Main


@dataclass(frozen=True)
class Table:
    """A table that stands in a document behind the mark ``table of <mark>``, made from the rows of a CSV."""

    mark: str
    csv: str  # its name in results/
    make: Make


EXPERIMENTS: dict[str, Experiment] = {}
TABLES: dict[str, Table] = {}


def experiment(name: str, summary: str) -> Callable[[Main], Main]:
    """Register a function as an experiment.

    Raises:
        ValueError: the name is taken.
    """
    if name in EXPERIMENTS:
        raise ValueError(f"experiment {name!r}: the name is taken")

    def register(main: Main) -> Main:
        EXPERIMENTS[name] = Experiment(name, summary, main)
        return main

    return register


def table(mark: str, csv: str) -> Callable[[Make], Make]:
    """Register a function that makes a table of one row or more; it may be registered for several files.

    Raises:
        ValueError: the mark is taken, or has a character that ends a mark.
    """
    if mark in TABLES or ":" in mark:
        raise ValueError(f"table {mark!r}: the mark is taken, or has a colon in it")

    def register(make: Make) -> Make:
        TABLES[mark] = Table(mark, csv, make)
        return make

    return register


def load_all() -> None:
    """Import all that registers itself."""
    for folder in FOLDERS:
        package = importlib.import_module(f"benchmarks.{folder}")
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"benchmarks.{folder}.{module.name}")
