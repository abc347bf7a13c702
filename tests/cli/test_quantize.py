"""``smi-fast quantize`` as a user meets it."""

import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from smi_fast.cli import main
from smi_fast.images import SparseImages
from smi_fast.kernels.common.grid import Grid
from smi_fast.model import SparseViT, load_model
from smi_fast.quantize import load_quantized
from smi_fast.quantize.execute import LowBitViT
from tests.fakes import make_images


def run(*arguments: str, code: int = 0) -> None:
    """Run ``smi-fast quantize`` in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["smi-fast", "quantize", *arguments])
        with pytest.raises(SystemExit) as stopped:
            main()
    assert (stopped.value.code or 0) == code


@pytest.fixture(scope="module")
def demo() -> SparseViT:
    return load_model("demo")


@pytest.fixture
def images(demo: SparseViT) -> SparseImages:
    made = make_images(6, demo.grid, kept=9, names=None)
    info = demo.info
    origin = replace(made.provenance, mean=info.mean, std=info.std, model_sha256=info.sha256)
    return replace(made, provenance=origin)


def test_noise_end_to_end(tmp_path: Path, demo: SparseViT, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    run("--calibrate", "gaussian", "--out", str(out), "--weights", "8", "--seed", "3")
    told = capsys.readouterr()
    assert "demo, W8/A8 psaq minmax, calibrated on gaussian, 32 images, seed 3" in told.out
    assert "simulated: fake-quantized in float32, no faster than the original" in told.out
    assert "the worst 12 of 93 tensors" in told.out
    assert "ranges" in told.err
    report = json.loads((out / "report.json").read_text())
    assert set(report) == {
        "execution", "config", "calibration", "evaluation", "layers", "bytes", "seconds", "model", "device", "versions",
        "seed", "real",
    }  # fmt: skip
    assert report["calibration"] == {"name": "gaussian, 32 images, seed 3", "images": 32}
    assert len(report["layers"]) == 93
    assert report["bytes"]["quantized"] == (out / "quantized.safetensors").stat().st_size
    assert report["bytes"]["quantized"] < 0.28 * report["bytes"]["float32"]
    assert report["evaluation"] is None
    quantized = load_quantized(out / "quantized.safetensors")
    pixels = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    pixels = torch.nn.functional.interpolate(pixels, (demo.grid.height, demo.grid.width))
    truth = demo(pixels)[0]
    assert float((quantized(pixels) - truth).norm() / truth.norm()) < 0.2
    run("--calibrate", "gaussian", "--out", str(out), code=2)
    assert "is not empty" in capsys.readouterr().err


def test_a_run_of_images(images: SparseImages, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = replace(images, provenance=replace(images.provenance, model_sha256="1" * 64))
    other.save(tmp_path / "images.safetensors")
    common = (
        "--calibrate",
        str(tmp_path),
        "--count",
        "5",
        "--observer",
        "percentile",
        "--percentile",
        "99",
        "--seed",
        "4",
    )
    run(*common, "--out", str(tmp_path / "a"))
    told = capsys.readouterr()
    assert f"calibrated on {tmp_path}, 5 of 5 images, 86% of the patches dropped, seed 4" in told.out
    assert "with other weights than those of 'demo'" in told.err
    run(*common, "--out", str(tmp_path / "b"), "--quiet")
    told = capsys.readouterr()
    assert told.err == ""
    assert "the worst" not in told.out
    assert (tmp_path / "a/quantized.safetensors").read_bytes() == (tmp_path / "b/quantized.safetensors").read_bytes()


class FakeImages:
    """What the datasets hand out, as far as the command looks at it."""

    name, num_classes = "fake", 10

    def __init__(self, n: int = 12) -> None:
        self.labels: Tensor | None = torch.arange(n) % 10

    def __len__(self) -> int:
        return 12

    def batches(
        self, model: Any, batch_size: int, indices: Sequence[int] | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        draw = torch.Generator().manual_seed(0)
        assert self.labels is not None
        for rows in torch.tensor(list(range(12)) if indices is None else indices).split(batch_size):
            yield torch.randn(len(rows), 3, model.grid.height, model.grid.width, generator=draw), self.labels[rows]


def top1(
    run: Callable[[Tensor], Tensor], images: FakeImages, model: Any, limit: int | None = None, **more: Any
) -> float:
    right = [
        (run(pixels).argmax(1) == labels).float() for pixels, labels in images.batches(model, 12, range(limit or 12))
    ]
    more["progress"](limit or 12)
    return float(torch.cat(right).mean())


@pytest.fixture
def data(monkeypatch: pytest.MonkeyPatch) -> FakeImages:
    module, found = sys.modules["smi_fast.cli.quantize"], FakeImages()
    contents = {
        "open_dataset": lambda spec, train=False: found,
        "random_indices": lambda n, count, seed: list(range(seed, seed + count)),
        "top1": top1,
    }
    for name, value in contents.items():
        monkeypatch.setattr(module, name, value)
    return found


def test_real_images(data: FakeImages, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    specs = ("--calibrate", "cifar10:x", "--evaluate", "cifar10:x", "--count", "4", "--limit", "8", "--seed", "2")
    run(*specs, "--out", str(tmp_path / "out"))
    told = capsys.readouterr()
    assert "calibrated on fake, 4 images, seed 2" in told.out
    assert "in float32, on 8 images of fake" in told.out
    assert "top-1, quantized" in told.err
    evaluation = json.loads((tmp_path / "out/report.json").read_text())["evaluation"]
    assert (evaluation["data"], evaluation["images"], set(evaluation["top1"])) == ("fake", 8, {"float32", "quantized"})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--weights", "9"), r"--weights 9: must be an integer in 2\.\.8"),
        (("--activations", "1"), "--activations 1"),
        (("--scheme", "int"), "--scheme 'int'"),
        (("--observer", "max"), "--observer 'max'"),
        (("--count", "0"), "--count 0: must be an integer of at least 1"),
        (("--limit", "0"), "--limit 0: must be an integer of at least 1"),
        (("--calibrate", "nothing"), "--calibrate 'nothing': no such run; must be one, 'gaussian', or folder:PATH"),
        (("--calibrate", "cifar10:x", "--count", "13"), r"--count 13: must be in 1\.\.12"),
    ],
)
@pytest.mark.usefixtures("data")
def test_bad_input(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str
) -> None:
    out = tmp_path / "out"
    run("--calibrate", "gaussian", *arguments, "--out", str(out), code=2)
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert re.search(message, told)
    assert not out.exists(), "nothing is made before the input is good"


def test_bad_images(images: SparseImages, data: FakeImages, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images.save(tmp_path / "few.safetensors")
    make_images(40, Grid(16, 24, 4)).save(tmp_path / "small.safetensors")
    for name, told in (("few", "--count 32: there are 5 images that were finished"), ("small", "images of Grid(")):
        run("--calibrate", str(tmp_path / f"{name}.safetensors"), "--out", str(tmp_path / "out"), code=2)
        assert told in capsys.readouterr().err
    for name, value, told in (("num_classes", 7, "it has 7 classes"), ("labels", None, "have no labels")):
        setattr(data, name, value)
        run("--calibrate", "gaussian", "--evaluate", "cifar10:x", "--out", str(tmp_path / "out"), code=2)
        assert told in capsys.readouterr().err
        data.num_classes = 10


def test_execution_in_8_bits(data: FakeImages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, int]] = []

    def report(model: Any, low: LowBitViT, pixels: Tensor) -> dict[str, Any]:
        seen.append((low.mode, len(pixels)))
        return {"words": "Real execution"}

    monkeypatch.setattr(sys.modules["smi_fast.cli.real"], "real_report", report)
    out = tmp_path / "out"
    specs = ("--calibrate", "gaussian", "--count", "4", "--evaluate", "cifar10:x", "--limit", "8", "--real", "dynamic")
    run(*specs, "--device", "cpu", "--out", str(out))
    assert seen == [("dynamic", 64)]
    assert (out / "real.safetensors").exists()
    found = json.loads((out / "report.json").read_text())
    assert found["real"] == {"words": "Real execution"}
    assert set(found["evaluation"]["top1"]) == {"float32", "quantized", "real"}


def test_execution_that_is_not_to_be_had(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for mode, words in (("int4", "must be none, dynamic"), ("fp8", "'fp8'")):
        out = tmp_path / mode
        run("--calibrate", "gaussian", "--device", "cpu", "--real", mode, "--out", str(out), code=2)
        assert words in capsys.readouterr().err
        assert not out.exists()
