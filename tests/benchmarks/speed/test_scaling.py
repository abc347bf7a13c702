"""The scaling benchmark: its points, its fit, its rows, what it leaves out and what it refuses."""

import functools
import importlib.util
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.experiment import Row
from benchmarks.harness import models
from benchmarks.harness.results import PROVENANCE, Results, read
from benchmarks.speed import scaling
from smi_fast.model.sparse_vit import SparseViT
from tests.conftest import build_vit

BASE = scaling.Point("deit_tiny_patch16_224", 224, 2, 46)
COLUMNS = {
    *("experiment", *PROVENANCE, "dtype", "impl", "axis", "value", "model", "image", "batch", "kept", "rounds"),
    *("ms_p20", "ms_p50", "ms_p80", "image_iterations_per_s", "gflop_an_iteration", "true_gflop_per_s"),
}


def tiny(name: str, device: str, dtype: torch.dtype, image: int) -> SparseViT:
    """A model of that size of image, narrow and shallow; wider where the name says so."""
    width = 32 * (1 + ("small" in name) + 2 * ("base" in name) + 3 * ("large" in name))
    vit = build_vit(img_size=image, patch_size=16, embed_dim=width)
    return models.sparse(vit, name).with_dtype(dtype)


@pytest.fixture
def make_rows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., list[Row]]:
    """Runs some axes of small models."""
    monkeypatch.setitem(scaling.BATCHES, "cpu", (1, 2, 3))
    monkeypatch.setattr(scaling, "IMAGES", (64, 96))
    monkeypatch.setattr(scaling, "MOST_ROUNDS", 3)

    def make(axes: Sequence[str], seconds: float = 600) -> list[Row]:
        results = Results(tmp_path / "scaling.csv", "scaling", "cpu")
        scaling.run(scaling.Bench(scaling.Plan("cpu", "fp32", "eager", 1, seconds), tiny), BASE, axes, results)
        assert read(tmp_path / "scaling.csv") == results.rows
        return results.rows

    return make


def test_every_axis_has_rows_and_exponents(
    make_rows: Callable[..., list[Row]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = make_rows(scaling.AXES)
    assert all(set(row) == COLUMNS and row["rounds"] == "3" for row in rows)
    values = {axis: [row["value"] for row in rows if row["axis"] == axis] for axis in scaling.AXES}
    assert values["sparsity"] == ["46", "66", "95", "137", "196"]
    assert values["batch"] == ["1", "2", "3"]
    assert values["resolution"] == ["64", "96"]
    assert len(values["model"]) == 4
    for row in rows:
        assert 0 < float(row["ms_p20"]) <= float(row["ms_p50"]) <= float(row["ms_p80"])
        rate = float(row["gflop_an_iteration"]) / float(row["ms_p50"]) * 1e3
        assert float(row["true_gflop_per_s"]) == pytest.approx(rate, abs=0.1, rel=0.01)
    fits = scaling.exponents(rows)
    assert set(fits) == set(scaling.AXES)
    assert fits["batch"][1] == pytest.approx(1, abs=0.01)
    assert 1 < fits["sparsity"][1] < 2
    scaling.report(rows)
    assert capsys.readouterr().out.count("cost grows with exponent") == 4
    lines = scaling.scaling_table(rows).splitlines()
    assert len([line for line in lines if line.startswith("|")]) == 2 + 4
    assert f"| {fits['sparsity'][0]:.2f} | {fits['sparsity'][1]:.2f} |" in next(x for x in lines if "| sparsity" in x)
    if importlib.util.find_spec("matplotlib"):
        scaling.plot(rows, tmp_path / "new" / "scaling.png")
        assert (tmp_path / "new" / "scaling.png").read_bytes()[:4] == b"\x89PNG"


def test_what_does_not_fit_is_left_out(make_rows: Callable[..., list[Row]], capsys: pytest.CaptureFixture[str]) -> None:
    rows = make_rows(("sparsity",), seconds=0)
    assert [row["value"] for row in rows] == ["46", "196"]  # what a fit needs is measured all the same
    assert all(row["rounds"] == "2" for row in rows)
    assert capsys.readouterr().out.count("left out for want of time") == 3


def test_points_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling, "MOST_ROUNDS", 2)
    order: list[int] = []
    bench = scaling.Bench(scaling.Plan("cpu", "fp32", "eager", 2, 1), tiny)

    def clock(point: scaling.Point) -> float:
        order.append(point.kept)
        return point.kept / 100

    monkeypatch.setattr(bench, "set_up", lambda axis, p: scaling.Timed(p, p.kept, 1, functools.partial(clock, p)))
    found = bench.measure("sparsity", scaling.make_axis("sparsity", BASE, "cpu")[:2], time.monotonic() + 60)
    assert order == [196, 46] * 3
    assert [one.seconds for one in found] == [[0.46, 0.46], [1.96, 1.96]]


def test_only_the_base_model_is_kept_from_axis_to_axis(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    bench = scaling.Bench(scaling.Plan("cpu", "fp32", "eager", 1, 60), tiny)
    monkeypatch.setattr(bench, "measure", lambda axis, points, until: [bench.model(point) for point in points][:0])
    scaling.run(bench, BASE, ("sparsity", "resolution"), Results(tmp_path / "scaling.csv", "scaling", "cpu"))
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


def test_defaults_follow_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    args = scaling.parse([])
    assert (args.batch, args.impl, args.seconds, args.steps) == (8, "eager", 420, 1)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    args = scaling.parse(["--device", "cuda"])
    assert (args.batch, args.impl, args.seconds, args.steps) == (64, "compiled", 220, 10)
