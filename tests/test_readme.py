"""What the README says holds: its table and its Python; for the rest see tests/docs."""

import re
from pathlib import Path

import pytest

from benchmarks.experiment import TABLES, load_all
from benchmarks.harness.tables import ROOT, render
from smi_fast.model import load_model

README = ROOT / "README.md"
TEXT = README.read_text()


def test_the_tables_are_those_of_the_results() -> None:
    load_all()
    assert render(ROOT, TABLES, write=False) == []


def test_the_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", TEXT, re.S)
    monkeypatch.chdir(tmp_path)
    # the same words on a run of four iterations
    short = code.replace("iterations=400", "iterations=4").replace(
        "((50, 0.3), (100, 0.3), (200, 0.3), (300, 0.3))", "((1, 0.3), (2, 0.3))"
    )
    assert short.count("iterations=4,") == 1
    exec(short, {})
    assert (tmp_path / "images.safetensors").exists()


def test_the_card_of_the_teacher() -> None:
    import json
    from importlib import resources

    card = json.loads(resources.files("smi_fast.model").joinpath("assets/demo.json").read_text())
    weights = resources.files("smi_fast.model").joinpath("assets/demo.safetensors")
    assert card["top1"] >= 0.82
    assert len(weights.read_bytes()) < 8 * 2**20
    assert tuple(card["class_names"]) == load_model("demo").info.class_names
