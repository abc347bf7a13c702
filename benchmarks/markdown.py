"""Tables in Markdown from the CSVs in ``results/``."""

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks.common import RESULTS

Row = dict[str, str]
NOT_MEASURED = "Not measured: no machine with a GPU was at hand since this was written.\n"


def rows_of(name: str | Path) -> list[Row]:
    """The rows of a CSV, by its name in ``results/`` or its path; none where it was not measured."""
    path = RESULTS / name
    if not path.exists():
        return []
    with path.open() as file:
        return list(csv.DictReader(file))


def markdown(about: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A paragraph, and a table under it."""
    lines = [about, "", f"| {' | '.join(columns)} |", "| --- " * len(columns) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)]) + "\n"
