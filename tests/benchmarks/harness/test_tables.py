"""Tables in documents: found wherever they stand, and what is wrong with them is named."""

from pathlib import Path

import pytest

from benchmarks.experiment import Table
from benchmarks.harness.tables import begin_mark, measured_on, render

TABLES = {
    name: Table(name, f"{name}.csv", lambda rows, name=name: f"{name}: {len(rows)} rows\n") for name in ("one", "two")
}
END = "<!-- end of table -->\n"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "docs").mkdir()
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "one.csv").write_text("ms\n1\n2\n")
    (tmp_path / "README.md").write_text(f"# Title\n\n{begin_mark('one')}old\n{END}\nafter\n")
    # the command in a mark may be that of an earlier version
    (tmp_path / "docs" / "speed.md").write_text(f"<!-- table of two: another command -->\n{END}")
    return tmp_path


def test_tables_are_made_where_they_stand(root: Path) -> None:
    results = root / "results"
    stale = render(root, TABLES, False, results)
    assert [line.partition(" is")[0] for line in stale] == [
        "README.md: the table of one",
        "docs/speed.md: the table of two",
    ]
    assert (root / "README.md").read_text().count("old") == 1
    assert render(root, TABLES, True, results) == []
    assert (root / "README.md").read_text() == f"# Title\n\n{begin_mark('one')}one: 2 rows\n{END}\nafter\n"
    assert (root / "docs" / "speed.md").read_text() == f"{begin_mark('two')}Not measured yet.\n{END}"
    assert render(root, TABLES, False, results) == []


def test_what_is_wrong_is_named(root: Path) -> None:
    results = root / "results"
    render(root, TABLES, True, results)
    readme = root / "README.md"
    text = readme.read_text()
    (root / "docs" / "speed.md").unlink()
    assert render(root, TABLES, False, results) == ["the table of two stands in no document"]
    readme.write_text(text + begin_mark("two") + "no end\n" + begin_mark("three") + END)
    problems = render(root, TABLES, False, results)
    assert problems == [
        f"README.md: the table of two is without an end, {END.strip()}",
        "README.md: the table of three is made by no experiment",
        "the table of two stands in no document",
    ]
    assert render(root, TABLES, True, results) == problems, "nothing is written over what is not understood"
    assert readme.read_text().endswith(begin_mark("two") + "no end\n" + begin_mark("three") + END)


def test_where_a_row_was_measured() -> None:
    row = {"device_name": "CPU, 2 threads", "processor": "", "torch": "2.11", "triton": "3", "commit": "abc"}
    assert measured_on(row, "triton") == "CPU, 2 threads, torch 2.11, triton 3, commit abc"
    row["processor"] = "EPYC, no bf16 units"
    assert measured_on(row) == "CPU, 2 threads (EPYC, no bf16 units), torch 2.11, commit abc"
