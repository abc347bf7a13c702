"""`python -m benchmarks`: what it lists, runs and refuses, and that every command that is written down exists."""

import re
from pathlib import Path

import pytest

from benchmarks.__main__ import main
from benchmarks.experiment import EXPERIMENTS, FOLDERS, TABLES, experiment, load_all, table
from benchmarks.harness.tables import ROOT, documents, make

NAMED = re.compile(r"-m benchmarks run ([\w-]+)((?:\\\n|[^`\n])*)")  # a name, and the rest of the command
FILES = [*documents(ROOT), ROOT / "benchmarks" / "gpu.sh", *sorted((ROOT / "benchmarks").rglob("*.py"))]


def options_of(name: str, capsys: pytest.CaptureFixture[str]) -> set[str]:
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        main(["run", name, "--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert f"python -m benchmarks run {name}" in text
    return set(re.findall(r"--[\w-]+", text))


def test_the_list_has_a_line_for_each(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == sorted(EXPERIMENTS)
    assert len(lines) >= 10
    assert all(len(line) <= 120 for line in lines)


def test_what_is_run_gets_its_words(monkeypatch: pytest.MonkeyPatch) -> None:
    load_all()
    words: list[list[str]] = []
    monkeypatch.setitem(EXPERIMENTS, "some", type(EXPERIMENTS["engine"])("some", "", lambda w: words.append(list(w))))
    assert main(["run", "some", "--seconds", "3", "--help"]) == 0
    assert words == [["--seconds", "3", "--help"]]


@pytest.mark.parametrize("arguments", [["run", "engin"], ["run"], [], ["render"], ["render", "--check", "--write"]])
def test_nonsense_ends_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
    if arguments == ["run", "engin"]:
        assert "no such experiment; known: engine, equal-quality, int8" in capsys.readouterr().err


def test_names_are_taken_once() -> None:
    load_all()
    with pytest.raises(ValueError, match="experiment 'engine': the name is taken"):
        experiment("engine", "again")
    with pytest.raises(ValueError, match="table 'engine': the mark is taken"):
        table("engine", "engine.csv")


def test_tables_of_what_was_not_measured_say_so() -> None:
    load_all()
    missing = [one for one in TABLES.values() if not (ROOT / "benchmarks" / "results" / one.csv).exists()]
    assert all(make(one) == "Not measured yet.\n" for one in missing)
    assert len(TABLES) - len(missing) >= 8


def test_commands_that_are_written_down_exist(capsys: pytest.CaptureFixture[str]) -> None:
    load_all()
    known = {name: options_of(name, capsys) for name in EXPERIMENTS}
    found = []
    for path in FILES:
        for name, rest in NAMED.findall(path.read_text()):
            if name == "NAME":
                continue
            assert name in known, f"{path}: run {name}"
            unknown = set(re.findall(r"(?<=\s)--[\w-]+", rest)) - known[name]
            assert not unknown, f"{path}: run {name} {unknown}"
            found.append(name)
    assert set(found) >= set(EXPERIMENTS), "each is written down somewhere"


def test_experiments_stand_in_their_folders() -> None:
    load_all()
    modules = {one.main.__module__ for one in EXPERIMENTS.values()}
    assert {Path(name.replace(".", "/")).parts[1] for name in modules} == set(FOLDERS)
