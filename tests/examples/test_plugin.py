"""The example package: found, used from the command line, recorded, made again; and missed with a clear message."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

from smi_fast import SparseImages, plugins
from smi_fast.cli import app

ROOT = Path(__file__).parent.parent.parent
PACKAGE = ROOT / "examples" / "smi_fast_example_plugin"
RECIPE = ["--prior", "total_variation", "--prior", "contrast:weight=0.2", "--strategy", "centre:stops=[[2,0.5]]"]
RUN = ["invert", "--iterations", "4", "--labels", "3,5", "--impl", "eager", "--quiet", *RECIPE]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds the package as pip would install it, its entry point included."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "smi_fast_example_plugin").symlink_to(PACKAGE / "smi_fast_example_plugin")
    info = folder / "smi_fast_example_plugin-0.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: smi-fast-example-plugin\nVersion: 0.1.0\n")
    declared = (PACKAGE / "pyproject.toml").read_text()
    assert '[project.entry-points."smi_fast.plugins"]\nexample = "smi_fast_example_plugin"\n' in declared
    (info / "entry_points.txt").write_text("[smi_fast.plugins]\nexample = smi_fast_example_plugin\n")
    return folder


def smi_fast(*arguments: str, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    """The command line in a process of its own, with a folder on its path."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *([str(path)] if path else [])])}
    command = [sys.executable, "-m", "smi_fast", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=ROOT)


@pytest.fixture(scope="module")
def run(installed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with both plug-ins, found through the entry point."""
    out = tmp_path_factory.mktemp("runs") / "one"
    done = smi_fast(*RUN, "--out", str(out), path=installed)
    assert done.returncode == 0, done.stderr
    return out


def test_they_are_recorded_and_make_the_same_images_again(installed: Path, run: Path, tmp_path: Path) -> None:
    report = json.loads((run / "report.json").read_text())
    contrast = report["recipe"]["priors"][1]
    assert contrast == {
        "name": "contrast",
        "version": 1,
        "parameters": {"weight": 0.2},
        "module": "smi_fast_example_plugin",
    }
    assert report["recipe"]["strategy"]["name"] == "centre"
    again = smi_fast(
        "invert", "--recipe", str(run / "report.json"), "--quiet", "--out", str(tmp_path / "o"), path=installed
    )
    assert again.returncode == 0, again.stderr
    one, other = (SparseImages.load(folder / "images.safetensors") for folder in (run, tmp_path / "o"))
    assert torch.equal(one.pixels, other.pixels)
    assert torch.equal(one.keep, other.keep)
    middle = (one.keep // 8 - 3.5).square() + (one.keep % 8 - 3.5).square()
    assert middle.max() < 4.7**2, "the corners are gone"


def test_without_the_package_images_load_and_the_message_names_it(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [("prior", "contrast"), ("strategy", "centre")]:  # another test may have loaded them
        monkeypatch.delitem(plugins._by_name, name, raising=False)
    shown = CliRunner().invoke(app, ["show", str(run), "--out", str(tmp_path)])  # loads the images and draws them
    assert shown.exit_code == 0, shown.stderr
    again = CliRunner().invoke(
        app, ["invert", "--recipe", str(run / "images.safetensors"), "--out", str(tmp_path / "o")]
    )
    assert isinstance(again.exception, ValueError)
    wanted = "it came from smi_fast_example_plugin: install that package, or load it with --plugin"
    assert wanted in str(again.exception)
    assert not (tmp_path / "o").exists()


def test_a_module_is_loaded_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(PACKAGE)
    plugins.load_plugin("smi_fast_example_plugin")
    assert "contrast" in plugins.names("prior")
    assert "centre" in plugins.names("strategy")


def test_contrast_is_that_of_the_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(PACKAGE)
    plugins.load_plugin("smi_fast_example_plugin")
    patches = torch.randn(2, 5, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    value = plugins.create("prior", "contrast", {})(SimpleNamespace(patches=patches))
    expected = [-sum(float(p[c].std(correction=0)) for p in image for c in range(3)) / 15 for image in patches.detach()]
    assert value.tolist() == pytest.approx(expected)
    (gradient,) = torch.autograd.grad(value.sum(), patches)
    assert gradient.abs().max() > 0
