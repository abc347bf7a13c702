"""Result files: one CSV an experiment and setting, one schema, one writer, one reader.

Every row begins with the name of its experiment and ends with the columns of `PROVENANCE`; what was measured stands
between. A cell is empty where something was not measured, or not recorded when the row was written.
"""

import csv
import io
import json
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from benchmarks.experiment import Row
from smi_fast.config import InversionConfig
from smi_fast.storage.environment import device_name, processor, versions
from smi_fast.storage.files import write_atomically

RESULTS = Path(__file__).parents[1] / "results"
# device, processor and whether it has bf16 units, versions, commit of the checkout, UTC date, threads of torch, and the
# recipe as JSON where the row rests on one
PROVENANCE = ("device_name", "processor", "torch", "triton", "commit", "date", "threads", "recipe")


ESTIMATE = "estimate"  # stands in the place of a device, in rows that were computed and not measured


def commit() -> str:
    """Of the checkout, with a mark where it has uncommitted changes."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=10"]
    found = subprocess.run(command, capture_output=True, text=True, check=False, cwd=RESULTS)
    return found.stdout.strip() or "unknown"


def provenance(device: str, recipe: InversionConfig | None = None) -> dict[str, str]:
    """The columns `PROVENANCE` of a row that is made here and now; ``device``: where it is measured, or `ESTIMATE`."""
    found, measured = versions(), device != ESTIMATE
    return {
        "device_name": device_name(torch.device(device)) if measured else ESTIMATE,
        "processor": processor() if measured else "",
        "torch": found["torch"],
        "triton": found.get("triton", ""),
        "commit": commit(),
        "date": datetime.now(UTC).date().isoformat(),
        "threads": str(torch.get_num_threads()) if measured else "",
        "recipe": as_json(recipe),
    }


def as_json(recipe: InversionConfig | None) -> str:
    """Compact, and empty for None."""
    return "" if recipe is None else json.dumps(recipe.to_dict(), separators=(",", ":"))


def read(path: Path) -> list[Row]:
    """The rows of a CSV, with empty cells for columns of the schema that it lacks; none where there is no file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    return [{"experiment": "", **row, **{name: row.get(name, "") for name in PROVENANCE}} for row in rows]


class Results:
    """A CSV that gets its rows as they come: a run that is cut off keeps what it has.

    Args:
        path: the file. What it held is replaced with the first row.
        experiment: its name.
        device: that the rows are measured on, or `ESTIMATE`.

    Attributes:
        rows: those of the file, as `read` gives them.
    """

    def __init__(self, path: Path, experiment: str, device: str) -> None:
        self.path, self.experiment = path, experiment
        self.rows: list[Row] = []
        self._about = provenance(device)

    def resume(self, setting: Mapping[str, Any]) -> None:
        """Go on with the rows that are in the file already.

        Raises:
            SystemExit: they were measured in another setting.
        """
        self.rows = read(self.path)
        for row in self.rows:
            for name, value in setting.items():
                if row.get(name) != str(value):
                    raise SystemExit(
                        f"--out {self.path}: holds rows of {name} {row.get(name)}, this run has {value}; name another"
                    )
        if self.rows:
            print(f"{len(self.rows)} rows are in {self.path} already, and are not measured again", flush=True)

    def has(self, what: Mapping[str, Any]) -> bool:
        """Is there a row with these values?"""
        return any(all(row.get(name) == str(value) for name, value in what.items()) for row in self.rows)

    def append(self, row: Mapping[str, Any], recipe: InversionConfig | None = None) -> None:
        """Write one row; ``recipe``: what it rests on.

        Raises:
            ValueError: it has other columns than the rows before it.
        """
        self.put(len(self.rows), row, recipe)

    def put(self, index: int, row: Mapping[str, Any], recipe: InversionConfig | None = None) -> None:
        """Write row number ``index``: behind the last, or in the place of what was known of it before.

        The file holds either what it held or what it is to hold, whenever the run is cut off.

        Raises:
            ValueError: it has other columns than the first row.
        """
        cells = {"experiment": self.experiment, **row, **self._about, "recipe": as_json(recipe)}
        line = {name: "" if value is None else str(value) for name, value in cells.items()}
        columns = list(self.rows[0]) if self.rows else list(line)
        if set(columns) != set(line):
            raise ValueError(f"{self.path}: rows have the columns {columns}, this one has {list(line)}")
        if not self.rows:
            print(f"rows go to {self.path}", flush=True)
        self.rows[index : index + 1] = [line]
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        write_atomically(self.path, text.getvalue().encode(), overwrite=True)
