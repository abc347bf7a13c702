"""``--recipe``: a run made again from any file that holds its recipe, in a process of its own too."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from smi_fast import InversionConfig, Inverter, SparseImages, load_model, plugins
from smi_fast.cli.recipe import load_recipe
from smi_fast.method.priors import L2, TotalVariation
from smi_fast.model.sparse_vit import SparseViT
from smi_fast.storage.files import write_json
from tests.cli.test_cli import run
from tests.fakes import assert_same_images

ROOT = Path(__file__).parent.parent.parent
MAKE = ["--iterations", "6", "--stop", "2:0.3", "--stop", "4:0.3", "--impl", "eager", "--quiet", "--device", "cpu"]
OTHER = ["--prior", "l2:weight=0.02", "--prior", "total_variation:norm=image", "--lr-schedule", "cosine", "--no-flip"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("recipe") / "run"
    run("invert", *MAKE, *OTHER, "--labels", "cat,3,ship", "--seed", "4", "--batch-size", "2", "--out", str(out))
    return out


def images_of(folder: Path) -> SparseImages:
    return SparseImages.load(folder / "images.safetensors")


@pytest.mark.parametrize("name", ["report.json", "images.safetensors"])
def test_the_same_images_again(made: Path, tmp_path: Path, name: str) -> None:
    run(
        "invert",
        "--recipe",
        str(made / name),
        "--impl",
        "eager",
        "--batch-size",
        "2",
        "--quiet",
        "--out",
        str(tmp_path),
    )
    assert_same_images(images_of(made), images_of(tmp_path))


def test_a_recipe_alone_takes_labels_from_the_command_line(made: Path, tmp_path: Path) -> None:
    recipe = json.loads((made / "report.json").read_text())["recipe"]
    write_json(tmp_path / "recipe.json", recipe)
    again = ["--recipe", str(tmp_path / "recipe.json"), "--labels", "cat,3,ship", "--impl", "eager", "--quiet"]
    run("invert", *again, "--batch-size", "2", "--out", str(tmp_path / "o"))
    assert_same_images(images_of(made), images_of(tmp_path / "o"))


def test_some_of_the_images_again(made: Path, tmp_path: Path) -> None:
    some = images_of(made)[torch.tensor([2, 1])]
    some.save(tmp_path / "some.safetensors")
    again = ["--recipe", str(tmp_path / "some.safetensors"), "--impl", "eager", "--quiet"]
    run("invert", *again, "--batch-size", "2", "--out", str(tmp_path / "o"))
    found = images_of(tmp_path / "o")
    assert found.image_ids.tolist() == [2, 1], "an image's id is a key of its random numbers"
    # other batch-mates, and so perhaps other rounding
    torch.testing.assert_close(found.pixels, some.pixels, rtol=0, atol=1e-2)


def test_options_change_what_they_name(made: Path, tmp_path: Path) -> None:
    source = ["--recipe", str(made / "report.json"), "--quiet"]
    run("invert", *source, "--seed", "5", "--stop", "3:0.5", "--prior", "l2", "--labels", "0", "--out", str(tmp_path))
    before, after = (InversionConfig.from_dict(images_of(f).provenance.config) for f in (made, tmp_path))
    assert (after.seed, after.strategy.stages(64, 6)[1].kept, after.priors) == (5, 32, (L2(),))
    assert (after.lr_schedule, after.flip, after.loss) == (before.lr_schedule, before.flip, before.loss)
    assert images_of(tmp_path).labels.tolist() == [0]


def test_other_weights_are_refused(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = json.loads((made / "report.json").read_text())
    report["model"]["sha256"] = "0" * 64
    write_json(tmp_path / "report.json", report)
    run("invert", "--recipe", str(tmp_path / "report.json"), "--out", str(tmp_path / "o"), code=2)
    assert "was made with weights of sha256 000" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "is not JSON"),
        (b"[1]", "a list, must be a JSON object"),
        (b'{"recipe": {"iterations": 0}}', "iterations=0: must be"),
        (b'{"priors": [{"name": "gone", "module": "mine"}]}', "it came from mine: install that package"),
        (b'{"recipe": 5}', "a int, must be a JSON object"),
    ],
)
def test_files_refused(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "r.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"--recipe '.*r\.json'") as refused:
        load_recipe(tmp_path / "r.json")
    assert message in str(refused.value)


def sample(kind: Any, name: str) -> Any:
    """A plug-in of ours with parameters that fit six iterations."""
    return plugins.create(kind, name, {"stops": [[2, 0.3], [4, 0.3]]} if name == "stops" else {})


def is_ours(factory: type) -> bool:
    """Other tests register plug-ins of their own."""
    return factory.__module__.startswith("smi_fast.")


def all_recipes() -> list[InversionConfig]:
    """One for each prior and each strategy that is registered here."""
    fixed: dict[str, Any] = {"iterations": 6, "seed": 2}
    kinds: tuple[plugins.Kind, ...] = ("prior", "strategy")
    ours = {kind: [n for n in plugins.names(kind) if is_ours(plugins.lookup(kind, n).factory)] for kind in kinds}
    priors = [InversionConfig(stops=((2, 0.3),), priors=(sample("prior", n),), **fixed) for n in ours["prior"]]
    strategies = [InversionConfig(strategy=sample("strategy", n), **fixed) for n in ours["strategy"]]
    return [*priors, *strategies, InversionConfig(iterations=6, stops=(), preset="reference")]


def test_a_fresh_process_makes_the_same_bytes_from_every_recipe(tmp_path: Path) -> None:
    recipes = all_recipes()
    assert len(recipes) >= 4
    model = load_model("demo")
    for index, recipe in enumerate(recipes):
        Inverter(model, recipe, batch_size=2, impl="eager")([3, 5]).save(tmp_path / f"{index}.safetensors")
    script = """
import sys
from smi_fast import InversionConfig, Inverter, SparseImages, load_model
model = load_model("demo")
for path in sys.argv[1:]:
    saved = SparseImages.load(path)
    again = Inverter(model, InversionConfig.from_dict(saved.provenance.config), batch_size=2, impl="eager")
    again(saved.labels.tolist(), saved.image_ids.tolist()).save(path + ".again.safetensors")
"""
    paths = [str(tmp_path / f"{index}.safetensors") for index in range(len(recipes))]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(torch.get_num_threads())}
    subprocess.run([sys.executable, "-c", script, *paths], check=True, env=environment)
    for path in paths:
        assert Path(path).read_bytes() == Path(path + ".again.safetensors").read_bytes(), path


def test_two_runs_with_different_priors_claim_different_provenance(make_model: Callable[..., SparseViT]) -> None:
    model = make_model(torch.float32)
    configs = [InversionConfig(iterations=2, stops=(), priors=p) for p in ((TotalVariation(0.5),), (L2(0.5),))]
    one, other = (Inverter(model, config, impl="eager")([0]) for config in configs)
    assert not torch.equal(one.pixels, other.pixels)
    assert one.provenance != other.provenance
    assert one.provenance.config["priors"] != other.provenance.config["priors"]
