"""Result files: one schema, rows as they come."""

import csv
import json
from pathlib import Path

import pytest

from benchmarks.experiment import EXPERIMENTS, load_all
from benchmarks.harness.results import PROVENANCE, RESULTS, Results, read
from smi_fast.config import InversionConfig

FILES = sorted(RESULTS.glob("*.csv"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_file_has_the_schema(path: Path) -> None:
    load_all()
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert next(iter(rows[0])) == "experiment"
    assert tuple(list(rows[0])[-len(PROVENANCE) :]) == PROVENANCE
    assert {row["experiment"] for row in rows} <= set(EXPERIMENTS)
    assert all(row["device_name"] and row["torch"] and row["commit"] for row in rows)
    for row in rows:
        if row["recipe"]:
            InversionConfig.from_dict(json.loads(row["recipe"]))


def test_rows_are_there_as_soon_as_they_are_known(tmp_path: Path) -> None:
    path, recipe = tmp_path / "new" / "rows.csv", InversionConfig(iterations=7, stops=())
    results = Results(path, "some", "cpu")
    results.append({"what": "a, b", "ms": 1.5}, recipe)
    (row,) = read(path)
    assert list(row) == ["experiment", "what", "ms", *PROVENANCE]
    assert (row["experiment"], row["what"], row["ms"]) == ("some", "a, b", "1.5")
    assert all(row[name] for name in PROVENANCE)
    assert "bf16 units" in row["processor"]
    assert '"iterations":7' in row["recipe"]
    results.append({"ms": None, "what": 3})
    assert [(one["what"], one["ms"], one["recipe"]) for one in read(path)][1:] == [("3", "", "")]
    assert read(path) == results.rows
    with pytest.raises(ValueError, match="rows have the columns"):
        results.append({"what": "no time"})
    Results(path, "some", "cpu").append({"other": 1})
    assert len(read(path)) == 1, "a run that does not resume begins anew"


def test_rows_of_another_setting_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    Results(path, "some", "cpu").append({"top1": 0.5, "images": 200})
    results = Results(path, "some", "cpu")
    results.resume({"images": 200})
    assert results.has({"images": 200, "top1": 0.5})
    assert not results.has({"images": 200, "top1": 0.6})
    results.append({"images": 200, "top1": 0.6})
    assert [row["top1"] for row in read(path)] == ["0.5", "0.6"]
    for setting, told in (({"images": 100}, "images 200, this run has 100"), ({"teacher": "demo"}, "teacher None")):
        with pytest.raises(SystemExit, match=told):
            results.resume(setting)


def test_files_of_before_the_schema_are_read(tmp_path: Path) -> None:
    (tmp_path / "old.csv").write_text("ms,torch\n1,2.11\n")
    (row,) = read(tmp_path / "old.csv")
    assert (row["ms"], row["torch"], row["recipe"], row["experiment"]) == ("1", "2.11", "", "")
    assert read(tmp_path / "none.csv") == []
