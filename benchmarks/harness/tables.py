"""Tables in Markdown: how they are made, and how they get into the documents.

A table stands between two lines of a document, and is made anew from its CSV by `render`:

    <!-- table of NAME: python -m benchmarks render --write -->
    <!-- end of table -->

The documents are searched for these marks, so that a table may be moved from one to another.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from benchmarks.experiment import Row, Table
from benchmarks.harness.results import RESULTS, read

ROOT = Path(__file__).parents[2]
BEGIN = re.compile(r"^<!-- table of ([^:\n]+):.*-->\n", re.MULTILINE)
END = "<!-- end of table -->\n"
NOT_MEASURED = "Not measured yet.\n"


def markdown(about: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A paragraph, and a table under it."""
    lines = [about, "", f"| {' | '.join(columns)} |", "| --- " * len(columns) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)]) + "\n"


def measured_on(row: Row, *libraries: str) -> str:
    """Where and with what a row was measured; ``libraries``: columns of versions to be told besides torch."""
    processor = f" ({row['processor']})" if row.get("processor") else ""
    versions = [f"{name} {row[name]}" for name in ("torch", *libraries)]
    return f"{row['device_name']}{processor}, {', '.join(versions)}, commit {row['commit']}"


def documents(root: Path) -> list[Path]:
    """The files in which tables may stand."""
    found = [root / "README.md", root / "benchmarks" / "README.md", *sorted((root / "docs").rglob("*.md"))]
    return [path for path in found if path.exists()]


def begin_mark(name: str) -> str:
    """The line above a table."""
    return f"<!-- table of {name}: python -m benchmarks render --write -->\n"


def render(root: Path, tables: Mapping[str, Table], write: bool, results: Path = RESULTS) -> list[str]:
    """Make the tables of all documents anew.

    Args:
        root: of the repository.
        tables: by mark.
        write: into the documents; otherwise they are left as they are.
        results: the folder of the CSVs.

    Returns:
        What is wrong, a line each: marks that are unknown or have no end, tables that stand nowhere, and unless
        ``write`` those that are stale.
    """
    problems, met = [], set[str]()
    for path in documents(root):
        text, place = path.read_text(), path.relative_to(root)
        fresh, position = "", 0
        for mark in BEGIN.finditer(text):
            name, end = mark[1], text.find(END, mark.end())
            if name not in tables or end < 0 or BEGIN.search(text, mark.end(), end):
                reason = f"is without an end, {END.strip()}" if name in tables else "is made by no experiment"
                problems.append(f"{place}: the table of {name} {reason}")
                continue
            met.add(name)
            made = begin_mark(name) + make(tables[name], results)
            fresh += text[position : mark.start()] + made
            position = end
            if not write and text[mark.start() : end] != made:
                problems.append(f"{place}: the table of {name} is stale; python -m benchmarks render --write")
        fresh += text[position:]
        if write and fresh != text:
            path.write_text(fresh)
    return problems + [f"the table of {name} stands in no document" for name in tables if name not in met]


def make(table: Table, results: Path = RESULTS) -> str:
    """The text of a table."""
    rows = read(results / table.csv)
    return table.make(rows) if rows else NOT_MEASURED
