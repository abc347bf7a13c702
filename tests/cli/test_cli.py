"""The command line as a user meets it."""

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from smi_fast import SparseImages, load_model
from smi_fast.cli import main
from smi_fast.cli.progress import BarProgress
from smi_fast.cli.recipe import parse_stops
from smi_fast.images import Process
from smi_fast.kernels.patch_cells import take_patches
from smi_fast.schedule import plan_stages

SMALL = ["--model", "demo", "--iterations", "6", "--stop", "2:0.3", "--stop", "4:0.3", "--impl", "eager", "--quiet"]


def run(*arguments: str, code: int = 0) -> None:
    """Run ``smi-fast`` in this process."""
    old, sys.argv = sys.argv, ["smi-fast", *arguments]
    try:
        with pytest.raises(SystemExit) as stopped:
            main()
        assert (stopped.value.code or 0) == code
    finally:
        sys.argv = old


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("cli") / "run"
    run("invert", *SMALL, "--labels", "cat,3,ship", "--count", "2", "--seed", "4", "--out", str(out))
    return out


def test_invert_writes_all_files(finished: Path) -> None:
    names = {path.name for path in finished.iterdir()}
    assert names == {"images.safetensors", "process.safetensors", "preview.png", "process.png", "report.json"}
    images = SparseImages.load(finished / "images.safetensors")
    assert images.labels.tolist() == [3, 3, 8, 3, 3, 8]
    assert images.keep.shape == (6, 30)
    assert Process.load(finished / "process.safetensors").iterations[0] == 0


def test_report(finished: Path) -> None:
    report = json.loads((finished / "report.json").read_text())
    images = SparseImages.load(finished / "images.safetensors")
    assert {
        "images", "iterations", "sparsity", "stages", "seconds_compile", "seconds_run", "seconds_per_image",
        "image_iterations_per_s", "flops", "peak_memory_bytes", "teacher_top1", "teacher_confidence", "recipe",
        "labels", "image_ids", "image_size", "processor",
        "model", "versions", "seed", "impl", "dtype", "device", "batch_size", "failed", "interrupted",
        "kernels", "kept_pixels", "batch_source",
    } == set(report)  # fmt: skip
    assert report["kernels"] == "torch"
    patches = take_patches(images.pixels, images.keep, images.grid)  # [B, K, 3, P, P]
    for channel in range(3):
        every = patches[:, :, channel].unbind(0)
        mean, std = (sum(float(f(x)) for x in every) / 6 for f in (torch.mean, lambda x: x.std(correction=0)))
        assert report["kept_pixels"]["mean"][channel] == pytest.approx(mean, rel=1e-4, abs=1e-5)
        assert report["kept_pixels"]["std"][channel] == pytest.approx(std, rel=1e-4)
    assert report["images"] == 6
    assert (report["batch_size"], report["batch_source"]) == ([6, 6, 6], "default")
    assert report["sparsity"] == pytest.approx(1 - 30 / 64)
    assert [(s["start"], s["end"], s["kept"], s["tokens"]) for s in report["stages"]] == [
        (0, 2, 64, 65), (2, 4, 44, 45), (4, 6, 30, 31),
    ]  # fmt: skip
    assert all(stage["seconds"] > 0 for stage in report["stages"])
    assert report["model"]["sha256"] == load_model("demo").info.sha256
    assert report["recipe"]["strategy"]["parameters"]["stops"] == [[2, 0.3], [4, 0.3]]
    assert report["seed"] == report["recipe"]["seed"] == 4
    model = load_model("demo")
    logits, _ = model(images.pixels, images.keep)
    assert report["teacher_top1"] == pytest.approx(float((logits.argmax(1) == images.labels).float().mean()))
    confidence = logits.softmax(1).gather(1, images.labels[:, None]).mean()
    assert report["teacher_confidence"] == pytest.approx(float(confidence), rel=1e-3)


def test_show_draws_the_same_pictures(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("show", str(finished), "--out", str(tmp_path), "--pngs")
    for name in ("preview.png", "process.png"):
        assert (tmp_path / name).read_bytes() == (finished / name).read_bytes()
    assert len(list((tmp_path / "pngs").iterdir())) == 6
    run("show", str(finished), code=2)
    assert "preview.png exists" in capsys.readouterr().err


def test_output_is_not_overwritten(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (finished / "images.safetensors").read_bytes()
    run("invert", *SMALL, "--out", str(finished), code=2)
    assert "is not empty" in capsys.readouterr().err
    assert (finished / "images.safetensors").read_bytes() == before


def test_overwrite(finished: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("kept")
    run("invert", *SMALL, "--labels", "0", "--out", str(tmp_path), "--overwrite")
    assert len(SparseImages.load(tmp_path / "images.safetensors")) == 1
    assert (tmp_path / "mine.txt").read_text() == "kept"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "deit_tinny_patch16_224"], "deit_tinny_patch16_224"),
        (["--model", "swin_tiny_patch4_window7_224", "--no-pretrained"], "SwinTransformer"),
        (["--model", "vit_base_patch16_siglip_224", "--no-pretrained"], "no CLS token"),
        (["--labels", "10"], "10"),
        (["--labels", "kat"], "kat"),
        (["--labels", ""], "label='': an empty label"),
        (["--count", "0"], "--count 0: must be an integer of at least 1"),
        (["--checkpoint", "missing.safetensors"], "missing.safetensors"),
        (["--image-size", "30"], "30"),
        (["--stop", "6:0.3"], "must come before the last iteration"),
        (["--stop", "5-0.3"], "must be ITERATION:RATIO"),
        (["--stop", "4:0.5"], "is named twice"),
        (["--stop", "3:0.3"], "stops must ascend"),
        (["--dense"], "--dense and --stop exclude each other"),
        (["--strategy", "stops"], "stops=((2, 0.3), (4, 0.3)): is shorthand for a part of strategy"),
        (["--strategy", "nothing"], "--strategy 'nothing': strategy 'nothing': is not registered; known: stops"),
        (["--prior", "l2:wait=1"], "--prior 'l2:wait=1': prior 'l2': has no parameter wait; known: weight"),
        (["--prior", "l2:weight"], "must be NAME or NAME:key=value,..."),
        (["--prior", "l2", "--tv-weight", "1"], "--tv-weight 1.0: is shorthand for a part of priors"),
        (["--plugin", "no.such.module"], "--plugin 'no.such.module': cannot be imported"),
        (["--recipe", "missing.json"], "--recipe 'missing.json': no such file"),
        (["--preset", "papers"], "--preset 'papers'"),
        (["--tv-weight", "nan"], "--tv-weight nan"),
        (["--lr", "-1"], "--lr -1.0"),
        (["--jitter", "2"], "--jitter 2.0"),
        (["--dtype", "int8"], "--dtype 'int8': must be one of auto, fp32, bf16, fp8"),
        (["--dtype", "fp8", "--device", "cpu"], "--dtype 'fp8': device 'cpu' has no fp8 units; use bf16"),
        (["--device", "cuda:99"], "cuda:99"),
        (["--device", "gpu"], "gpu"),
        (["--impl", "fast"], "--impl 'fast'"),
        (["--batch-size", "0"], "--batch-size '0': must be 'auto', a number of at least 1"),
        (["--batch-size", "many"], "--batch-size 'many': must be 'auto'"),
        (["--batch-size", "4,"], "--batch-size '4,': must be 'auto'"),
        (["--batch-size", "2,4"], "--batch-size (2, 4): 2 numbers for 3 stages"),
        (["--batch-size", "2,3,4"], "--batch-size (2, 3, 4): each must divide the largest, 4; 3 does not"),
        (
            ["--batch-size", "2,2,4", "--preset", "reference"],
            "--batch-size (2, 2, 4): all stages must have one batch",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_named_before_any_work(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new"
    run("invert", *SMALL, *arguments, "--out", str(out), code=2)
    error = capsys.readouterr().err
    assert error.startswith("smi-fast: ")
    assert message in error
    assert "Traceback" not in error
    assert not out.exists(), "nothing is made before the arguments hold"


def test_folders_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "file"
    file.write_text("")
    run("invert", *SMALL, "--out", str(file), code=2)
    assert "is a file, not a folder" in capsys.readouterr().err
    run("invert", *SMALL, "--out", str(file / "below"), code=2)
    assert "cannot be made" in capsys.readouterr().err
    if os.geteuid() != 0:
        tmp_path.chmod(0o500)
        run("invert", *SMALL, "--out", str(tmp_path / "new"), code=2)
        assert "cannot be made" in capsys.readouterr().err


def test_show_of_nonsense(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("show", str(tmp_path / "nothing"), code=2)
    broken = tmp_path / "images.safetensors"
    broken.write_bytes(b"not a tensor file")
    run("show", str(tmp_path), code=2)
    assert str(broken) in capsys.readouterr().err


def test_plan(capsys: pytest.CaptureFixture[str]) -> None:
    run("plan", "--model", "deit_tiny_patch16_224", "--images", "1000", "--batch-size", "8")
    printed = capsys.readouterr().out
    for expected in ("196", "137", "95", "66", "46", "300..3999", "0.765", "GiB", "per image"):
        assert expected in printed
    run("plan", "--images", "0", code=2)
    small = ("--iterations", "9", "--stop", "5:0.5", "--images", "48")
    run("plan", *small, "--batch-size", "12,24")
    rows = [line.split("│") for line in capsys.readouterr().out.splitlines() if "│" in line]
    assert [row[5].strip() for row in rows] == ["12", "24"]
    run("plan", *small, "--batch-size", "5,24", code=2)
    assert "--batch-size (5, 24): each must divide the largest, 24; 5 does not" in capsys.readouterr().err


def test_doctor(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    run("doctor")
    printed = capsys.readouterr().out
    version = torch.__version__.partition("+")[0]
    works = ("kernels", "fp8", "CUDA graphs", "compile cache")
    for expected in ("torch", version, *works, "graphs, ", "0 schedules on this device"):
        assert expected in printed


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    run("--version")
    run("--help")
    printed = capsys.readouterr().out
    assert "smi-fast 0." in printed
    assert "invert" in printed


@contextlib.contextmanager
def started(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    """``smi-fast invert`` in a process of its own, gone at the end."""
    process = subprocess.Popen(
        [sys.executable, "-m", "smi_fast", "invert", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # a test run that a shell put in the background ignores SIGINT, and would hand that down
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def interrupt_at(process: subprocess.Popen[str], text: str) -> tuple[str, str]:
    """Press Ctrl-C when stderr has come to ``text``; what it prints from there on."""
    assert process.stderr is not None
    assert any(text in line for line in process.stderr)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 130
    assert "Traceback" not in errors
    return output, errors


def test_interrupt_keeps_finished_batches(tmp_path: Path) -> None:
    out = tmp_path / "run"
    with started(
        *("--labels", "0", "--count", "1000", "--batch-size", "1", "--iterations", "30", "--dense"),
        *("--impl", "eager", "--out", str(out)),
    ) as process:
        # third batch begun: the first is done and handed over
        output, errors = interrupt_at(process, "images 3-3 of 1000")
    assert "finished; they are kept" in errors
    images = SparseImages.load(out / "images.safetensors")
    assert 1 <= len(images) < 1000
    assert f"{len(images)} images" in output
    report = json.loads((out / "report.json").read_text())
    assert report["interrupted"]
    assert report["batch_source"] == "given"
    assert report["images"] == len(images)


def test_interrupt_before_the_first_batch(tmp_path: Path) -> None:
    endless = ("--labels", "0", "--iterations", "100000", "--dense", "--impl", "eager")
    with started(*endless, "--out", str(tmp_path)) as process:
        _, errors = interrupt_at(process, "stage 1")
    assert "0 of 1 images were finished" in errors
    assert not list(tmp_path.iterdir())


def test_stops() -> None:
    assert parse_stops(["5:0.5", "9:0.25"], False) == ((5, 0.5), (9, 0.25))
    assert parse_stops(None, True) == ()
    assert parse_stops(None, False) is None


def test_nan_weights_in_a_checkpoint(tmp_path: Path, capsys: Any) -> None:
    from safetensors.torch import load_file, save_file

    import smi_fast.model

    source = Path(smi_fast.model.__file__).parent / "assets" / "demo.safetensors"
    weights = load_file(source)
    weights["head.weight"][0, 0] = float("nan")
    save_file(weights, tmp_path / "nan.safetensors")
    run("invert", *SMALL, "--checkpoint", str(tmp_path / "nan.safetensors"), "--out", str(tmp_path / "o"), code=2)
    assert "head.weight" in capsys.readouterr().err


def test_progress_without_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("smi_fast.cli.bars.LOG_SECONDS", -1)
    written = io.StringIO()
    stages = plan_stages(64, ((2, 0.5),), 4)
    progress = BarProgress(Console(file=written, width=200), images=2, stages=stages, work=[2.0, 1.0])
    progress.group_started(0, 2)
    progress.compiling(1, 2, 64)
    progress.compiled(3.4)
    progress.stage_started(0, stages[0], 0, 2)
    for iteration in (1, 2):
        progress.stepped(iteration, 1.5)
    progress.stage_started(1, stages[1], 0, 2)
    progress.stepped(3, None)
    progress.image_failed(1, 2)
    lines = written.getvalue().splitlines()
    assert lines[0] == "compiling bucket 1 of 2 (64 patches)"
    assert lines[1].strip() == "compiled in 3 s"
    assert lines[2] == "images 1-2 of 2, stage 1 of 2 (64 patches)"
    assert [line.split("%")[0].strip() for line in lines if "image-it/s" in line] == ["33", "67", "83"]
    assert "loss 1.500" in lines[3]
    assert "0:00 left" in lines[3]
    assert "image 1: a step was not finite at iteration 2" in lines[-1]
