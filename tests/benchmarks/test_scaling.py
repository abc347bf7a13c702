"""The scaling benchmark: its points, its fit, its rows, what it leaves out and what it refuses."""

import csv
import importlib.util
import math
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import common, markdown, scaling, table
from smi_fast.model.from_timm import from_timm
from smi_fast.model.sparse_vit import SparseViT
from smi_fast.model.spec import ModelInfo
from tests.conftest import build_vit

BASE = scaling.Point("deit_tiny_patch16_224", 224, 2, 46)
COLUMNS = {
    *("device_name", "torch", "commit", "dtype", "impl", "axis", "value", "model", "image", "batch", "kept", "rounds"),
    *("ms_p20", "ms_p50", "ms_p80", "image_iterations_per_s", "gflop_an_iteration", "true_gflop_per_s"),
}


def tiny(name: str, device: str, dtype: torch.dtype, image: int) -> SparseViT:
    """A model of that size of image, narrow and shallow; wider where the name says so."""
    width = 32 * (1 + ("small" in name) + 2 * ("base" in name) + 3 * ("large" in name))
    vit = build_vit(img_size=image, patch_size=16, embed_dim=width)
    return from_timm(vit, ModelInfo(name, "", common.MEAN, common.STD)).with_dtype(dtype)


def make_rows(monkeypatch: pytest.MonkeyPatch, axes: tuple[str, ...], seconds: float = 600) -> list[dict[str, Any]]:
    monkeypatch.setitem(scaling.BATCHES, "cpu", (1, 2, 3))
    monkeypatch.setattr(scaling, "IMAGES", (64, 96))
    monkeypatch.setattr(scaling, "MOST_ROUNDS", 3)
    return scaling.run(scaling.Bench(scaling.Plan("cpu", "fp32", "eager", 1, seconds), tiny), BASE, axes)


def test_every_axis_has_rows_and_exponents(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = make_rows(monkeypatch, scaling.AXES)
    assert all(set(row) == COLUMNS and row["rounds"] == 3 for row in rows)
    values = {axis: [row["value"] for row in rows if row["axis"] == axis] for axis in scaling.AXES}
    assert values["sparsity"] == ["46", "66", "95", "137", "196"]
    assert values["batch"] == ["1", "2", "3"]
    assert values["resolution"] == ["64", "96"]
    assert len(values["model"]) == 4
    assert all(0 < row["ms_p20"] <= row["ms_p50"] <= row["ms_p80"] for row in rows)
    for row in rows:
        rate = row["gflop_an_iteration"] / row["ms_p50"] * 1e3
        assert row["true_gflop_per_s"] == pytest.approx(rate, abs=0.1, rel=0.01)
    fits = scaling.exponents(rows)
    assert set(fits) == set(scaling.AXES)
    assert fits["batch"][1] == pytest.approx(1, abs=0.01)
    assert 1 < fits["sparsity"][1] < 2
    scaling.report(rows)
    assert capsys.readouterr().out.count("cost grows with exponent") == 4

    common.write_csv(rows, tmp_path / "scaling-cpu.csv")
    with (tmp_path / "scaling-cpu.csv").open() as file:
        again = list(csv.DictReader(file))
    assert scaling.exponents(again) == fits
    monkeypatch.setattr(markdown, "RESULTS", tmp_path)
    lines = table.scaling_table("cpu").splitlines()
    assert len([line for line in lines if line.startswith("|")]) == 2 + 4
    assert f"| {fits['sparsity'][0]:.2f} | {fits['sparsity'][1]:.2f} |" in next(x for x in lines if "| sparsity" in x)
    assert table.scaling_table("cuda").startswith("Not measured")


def test_what_does_not_fit_is_left_out(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    rows = make_rows(monkeypatch, ("sparsity",), seconds=0)
    assert [row["value"] for row in rows] == ["46", "196"]  # what a fit needs is measured all the same
    assert all(row["rounds"] == 2 for row in rows)
    assert capsys.readouterr().out.count("left out for want of time") == 3


def test_points_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling, "MOST_ROUNDS", 2)
    order: list[int] = []
    bench = scaling.Bench(scaling.Plan("cpu", "fp32", "eager", 2, 1), tiny)
    monkeypatch.setattr(bench, "set_up", lambda axis, p: scaling.Timed(p, p.kept, 1, lambda: order.append(p.kept)))
    bench.measure("sparsity", scaling.make_axis("sparsity", BASE, "cpu")[:2], time.monotonic() + 60)
    assert order == [196, 196, 46, 46] * 3


def test_only_the_base_model_is_kept_from_axis_to_axis(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling, "MOST_ROUNDS", 1)
    monkeypatch.setattr(scaling, "IMAGES", (64, 96))
    bench = scaling.Bench(scaling.Plan("cpu", "fp32", "eager", 1, 60), tiny)
    scaling.run(bench, BASE, ("sparsity", "resolution"))
    assert list(bench.models) == [(BASE.model, 224)]


def test_the_points_of_an_axis() -> None:
    assert [point.kept for point in scaling.make_axis("sparsity", BASE, "cpu")] == [196, 46, 137, 66, 95]
    assert {point.batch for point in scaling.make_axis("batch", BASE, "cuda:1")} == set(scaling.BATCHES["cuda"])
    assert {(p.image, p.kept) for p in scaling.make_axis("resolution", BASE, "cpu")} == {
        (224, 46),
        (384, 137),
        (448, 187),
    }
    other = scaling.Point("vit_base_patch16_224", 224, 2, 46)
    assert {point.model for point in scaling.make_axis("model", other, "cpu")} == {*scaling.MODELS, other.model}
    for axis in scaling.AXES:  # what is not the axis stays as in the base point
        for point in scaling.make_axis(axis, BASE, "cpu"):
            assert axis == "model" or point.model == BASE.model
            assert axis == "batch" or point.batch == BASE.batch
            assert axis == "resolution" or point.image == BASE.image


@given(
    values=st.lists(st.floats(0.5, 1e4), min_size=2, max_size=8, unique_by=lambda value: round(math.log(value), 2)),
    slope=st.floats(-3, 3),
    scale=st.floats(1e-3, 1e3),
)
def test_the_fit_finds_a_power_law(values: list[float], slope: float, scale: float) -> None:
    costs = [scale * value**slope for value in values]
    assert scaling.exponent(values, costs) == pytest.approx(slope, abs=1e-6)
    # one factor on all costs, or on all values, does not move it
    moved = scaling.exponent([7 * value for value in values], [cost / 3 for cost in costs])
    assert moved == pytest.approx(slope, abs=1e-6)


def test_the_fit_is_that_of_least_squares() -> None:
    # log2: (0, 0), (1, 2), (2, 2): slope 1
    assert scaling.exponent([1, 2, 4], [1, 4, 4]) == pytest.approx(1)


@pytest.mark.parametrize(("values", "costs"), [([2.0], [1.0]), ([2.0, 2.0], [1.0, 3.0]), ([1.0, 2.0], [0.0, 3.0])])
def test_the_fit_refuses(values: list[float], costs: list[float]) -> None:
    with pytest.raises(ValueError, match="needs two different points, all positive"):
        scaling.exponent(values, costs)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch", "0"], "argument --batch: '0': must be an integer of at least 1"),
        (["--seconds", "-1"], "argument --seconds"),
        (["--axes", "depth"], "argument --axes"),
        (["--impl", "fast"], "argument --impl"),
        (["--device", "cuda:99"], "argument --device: 'cuda:99': no such CUDA device here"),
        (["--model", "deit_of_nobody"], "argument --model: 'deit_of_nobody': timm knows no such model"),
    ],
)
def test_nonsense_is_refused(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        scaling.parse(arguments)
    assert message in capsys.readouterr().err


def test_a_plot_without_matplotlib_is_refused_before_the_work(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        scaling.parse(["--plot", "scaling.png"])
    assert "argument --plot: matplotlib is not installed: pip install 'smi-fast[plots]'" in capsys.readouterr().err


def test_a_plot(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    scaling.plot(make_rows(monkeypatch, ("batch", "resolution")), tmp_path / "new" / "scaling.png")
    assert (tmp_path / "new" / "scaling.png").read_bytes()[:4] == b"\x89PNG"


def test_defaults_follow_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    args = scaling.parse([])
    assert (args.batch, args.impl, args.seconds, args.steps) == (8, "eager", 420, 1)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    args = scaling.parse(["--device", "cuda"])
    assert (args.batch, args.impl, args.seconds, args.steps) == (64, "compiled", 220, 10)
