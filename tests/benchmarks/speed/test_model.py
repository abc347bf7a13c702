"""The speed model: its arithmetic against numbers worked by hand, its units, and a measured row beside an estimate."""

import csv
import itertools
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.harness.engine import paper_stages
from benchmarks.harness.results import ESTIMATE, PROVENANCE, RESULTS, read
from benchmarks.harness.tables import ROOT
from benchmarks.speed import model as speed_model
from benchmarks.speed.counts import launches, other_bytes, padding, pointwise_bytes
from benchmarks.speed.devices import DEVICES, Device
from benchmarks.speed.measured import Measured, Rate
from benchmarks.speed.model import Job, SpeedModel, filled, rows_of
from benchmarks.speed.parts import Bucket, Part, linear_products, product_work
from smi_fast.kernels.common.grid import Grid
from smi_fast.model.spec import ViTShape

BASE = ViTShape(Grid(224, 224, 16), 768, 12, 12, 64, 3072, 1, 1, 1000)
COUNTED = Bucket(BASE, 64, 46, torch.bfloat16)  # the step that was counted launch by launch
# two blocks, of which the last reads CLS alone; 4 patches of 48 values, 5 tokens of 2
TINY = Bucket(ViTShape(Grid(8, 8, 4), 2, 2, 1, 2, 4, 1, 1, 3), 1, 4, torch.bfloat16)
SLOW = Device("toy", sms=1, bf16=1e6, fp32=1e5, copy=1e9, source="made up")
JOB = Job("deit_base_patch16_224", BASE, "bf16", paper_stages(196), (64,) * 5)
TABLES = sorted((ROOT / "tests" / "offline_cuda" / "tables").glob("deit_base-torch-*.md"))


def test_the_counted_step() -> None:
    assert launches(COUNTED) == 190
    assert pointwise_bytes(COUNTED) == pytest.approx(1308e6, rel=0.01)
    flops = sum(product_work(part, sizes, COUNTED.dtype).flops for part, sizes in linear_products(COUNTED))
    assert flops == pytest.approx(0.960e12, rel=1e-3)


@pytest.mark.skipif(not TABLES, reason="there is no table of the offline tier here")
def test_the_table_of_the_offline_tier() -> None:
    """The step as it is launched today, on the newest torch; where it changes by much, `counts` changes with it."""
    newest = max(TABLES, key=lambda path: [int(number) for number in path.stem.rpartition("-")[2].split(".")])
    figures = dict(re.findall(r"^\| ([^|]+) \| ([\d.]+) \|$", newest.read_text(), re.MULTILINE))
    assert launches(COUNTED) == pytest.approx(int(figures["launches"]), rel=0.03)
    moved = float(figures["MB of it by norms, residuals, GELU and inductor"])
    assert pointwise_bytes(COUNTED) / 1e6 == pytest.approx(moved, rel=0.03)


def test_attention_of_many_tokens_is_flash() -> None:
    few, many = (Bucket(replace(BASE, grid=Grid(384, 384, 16)), 8, kept, torch.bfloat16) for kept in (255, 256))
    assert launches(many) - launches(few) == 11 * (5 - 2)
    assert launches(replace(few, dtype=torch.float32)) == launches(many) + 11 * 2, "and GELU in kernels of its own"
    # 256 tokens fill a tile; 257 leave most of the third one empty
    assert padding(few) == 1
    assert padding(many) == pytest.approx((3 * 128 / 257) ** 2)
    assert padding(COUNTED) == 64 * 64 / 47**2
    rows = 8 * 257 * 768 * 2
    grown = pointwise_bytes(many) - pointwise_bytes(few)
    assert grown - 11 * 6 * rows == pytest.approx(pointwise_bytes(few) / 256, rel=0.01)


def test_counts_by_hand() -> None:
    # embedding, four products of one whole block, five of the last one, head; as many again in the backward
    assert launches(TINY) == 2 * (1 + 4 + 5 + 1) + 4 + 2 + 22
    slope = 2 * 4 * (5 + 1) * 2
    norms = 5 * 2 * (16 + 15) * 2
    stacked = 5 * 2 * 4 * 2
    assert pointwise_bytes(TINY) == slope + norms + stacked == 796
    gelu = 5 * 4 * (5 + 1) * 4
    assert pointwise_bytes(replace(TINY, dtype=torch.float32)) == gelu + 2 * norms + 2 * (stacked + 5 * 2 * 6 * 2)
    values = 4 * 48
    gather, update, state = values * 6, values * 26, 4 * (2 * 8 + 4)
    assert other_bytes(TINY) == gather + update + state + 6 * 5 * 2 * 2 + 4 * 3 * 4


def test_waves_by_hand() -> None:
    assert filled((128, 7, 256), 1) == filled((256, 7, 128), 1) == filled((128, 7, 128), 1) == 1
    assert filled((1, 7, 1), 4) == 1 / (4 * 128 * 128)
    # the counted step on 132 multiprocessors. fc1: 24 x 16 tiles of 128 x 192 in 3 waves; 288 larger ones need 3 too
    assert filled((3008, 768, 3072), 132) == 3008 * 3072 / (3 * 132 * 128 * 192)
    # qkv: 24 x 9 of 128 x 256 in 2 waves; proj: 24 x 4 of 128 x 192 in one, of which a quarter has nothing to do
    assert filled((3008, 768, 2304), 132) == 3008 * 2304 / (2 * 132 * 128 * 256)
    assert filled((3008, 768, 768), 132) == 3008 * 768 / (132 * 128 * 192)
    # a whole wave of large tiles: 5632 rows of 768
    assert filled((5632, 768, 768), 132) == 1


def test_a_product_takes_its_flops_or_its_bytes() -> None:
    product = (128, 10, 256)
    model = SpeedModel(SLOW)
    assert model.product_seconds(Part.FC1, product, TINY) == pytest.approx(2 * 128 * 10 * 256 / 1e6)
    assert model.product_seconds(Part.HEAD, product, TINY) == pytest.approx(2 * 128 * 10 * 256 / 1e5), "in float32"
    thin = SpeedModel(replace(SLOW, copy=1e3))
    assert thin.product_seconds(Part.FC1, product, TINY) == pytest.approx((1280 + 2560 + 32768) * 2 / 1e3)


def test_an_iteration_by_hand() -> None:
    found = SpeedModel(SLOW).iteration(TINY)
    assert found.launches == pytest.approx(50e-6)
    assert found.traffic == pytest.approx((796 + other_bytes(TINY)) / 1e9)
    assert found.attention == pytest.approx(12 * 2 * 32 * 16 / 0.5e6), "32 queries and 16 keys for 5"
    assert SpeedModel(replace(SLOW, copy=1.0)).iteration(TINY).attention == 11 * 5 * 2 * 2
    assert found.total == found.products + found.attention + found.traffic + found.launches


def test_the_nearest_measured_product_gives_the_rate() -> None:
    # the measured ones fill 1 and a half of the device; both would reach 2e6 and 4e6 in whole waves
    rates = [Rate((128, 10, 256), 2e6), Rate((64, 1000, 128), 2e6)]
    model = SpeedModel(SLOW, rates)
    assert model.product_seconds(Part.FC1, (128, 12, 256), TINY) == pytest.approx(2 * 128 * 12 * 256 / 2e6)
    assert model.product_seconds(Part.FC1, (128, 1000, 128), TINY) == pytest.approx(2 * 128 * 1000 * 128 / 4e6)
    assert model.product_seconds(Part.HEAD, (128, 12, 256), TINY) == pytest.approx(2 * 128 * 12 * 256 / 1e5)


def test_the_rows_of_a_device(tmp_path: Path) -> None:
    rows = rows_of("h100", JOB, tmp_path)
    *stages, whole = rows
    assert [row["kept"] for row in stages] == [196, 137, 95, 66, 46]
    assert [row["iterations"] for row in stages] == [50, 50, 100, 100, 3700]
    last = stages[-1]
    spent = [last[f"{name}_ms"] for name in ("products", "attention", "traffic", "launches")]
    assert last["ms"] == pytest.approx(sum(spent), abs=1e-3)
    assert last["launches_ms"] == pytest.approx(0.19)
    assert 1.21 < last["products_ms"] < 2.4, "between the rate of a large product and half of it"
    assert last["image_iterations_per_s"] == pytest.approx(64 / last["ms"] * 1e3, rel=1e-3)
    seconds = sum(row["iterations"] * row["ms"] / 1e3 / 64 for row in stages)
    assert whole["seconds_an_image"] == pytest.approx(seconds, rel=1e-3)
    assert whole["image_iterations_per_s"] == pytest.approx(4000 / seconds, rel=1e-3)
    assert whole["seconds_an_image"] == pytest.approx(sum(row["seconds_an_image"] for row in stages), abs=1e-4)
    assert {row["measured_ms"] for row in rows} == {None}
    assert "790 TFLOP/s" in last["rates"]


def put_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    about = dict.fromkeys(PROVENANCE, "") | {"device_name": "NVIDIA H100 80GB HBM3", "commit": "abc"}
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["experiment", *rows[0], *about])
        writer.writeheader()
        writer.writerows({"experiment": path.stem} | row | about for row in rows)


def waterfall_row(name: str, dtype: str, ms: dict[int, float]) -> dict[str, Any]:
    row: dict[str, Any] = {"model": JOB.model, "row": name, "dtype": dtype, "batches": "64 64 64 64 64"}
    for index, stage in enumerate(JOB.stages):
        row |= {f"patches_{index}": stage.kept, f"ms_{index}_p50": ms.get(stage.kept, "")}
    return row | {"matmul_tflop_per_s": 800, "copy_gb_per_s": 2500}


def test_a_measured_stage_stands_beside(tmp_path: Path) -> None:
    measured = {196: 9.0, 137: 7.0, 95: 5.0, 66: 4.0, 46: 3.0}
    rows = [waterfall_row("+ compile", "bf16", dict.fromkeys(measured, 1.0))]
    put_rows(tmp_path / "waterfall.csv", [*rows, waterfall_row("+ CUDA graphs", "bf16", measured)])
    *stages, whole = rows_of("h100", JOB, tmp_path)
    assert {row["kept"]: row["measured_ms"] for row in stages} == measured
    seconds = (50 * 9 + 50 * 7 + 100 * 5 + 100 * 4 + 3700 * 3) / 64e3
    assert whole["measured_seconds_an_image"] == pytest.approx(seconds, abs=1e-5)
    assert stages[0]["measured_in"] == "waterfall, commit abc"
    assert stages[0]["rates"].startswith("products and copies as measured here")
    # the estimate itself goes by what was measured of copies and products
    plain = rows_of("h100", JOB, tmp_path / "none")[0]
    assert stages[0]["traffic_ms"] == pytest.approx(plain["traffic_ms"] * 3.0 / 2.5, rel=1e-3)
    assert stages[0]["products_ms"] < plain["products_ms"]
    # another device, another dtype and another batch were not measured
    others = [rows_of("a100", JOB, tmp_path), rows_of("h100", replace(JOB, dtype="fp32"), tmp_path)]
    others.append(rows_of("h100", replace(JOB, batches=(32,) * 5), tmp_path))
    assert {row["measured_ms"] for rows in others for row in rows} == {None}


def test_steps_of_other_experiments_are_found(tmp_path: Path) -> None:
    about = {"model": JOB.model, "dtype": "bf16", "batch": 64}
    put_rows(
        tmp_path / "engine.csv", [about | {"system": s, "patches": 46, "ms_p50": 4.5} for s in ("eager", "compiled")]
    )
    scaled = [
        about | {"impl": "compiled", "kept": 46, "image": image, "ms_p50": ms} for image, ms in ((448, 1), (224, 4))
    ]
    put_rows(tmp_path / "scaling.csv", scaled)
    qkv = about | {"impl": "compiled", "kept": 46, "part": "qkv", "ms": 0.3, "gflop_per_s": 5e5, "ms_alone": 4.2}
    put_rows(tmp_path / "profile.csv", [qkv, qkv | {"part": "GELU"}])
    measured = Measured(tmp_path, "H100")
    found = measured.step(JOB.model, COUNTED)
    assert found is not None
    assert (found.ms, found.source) == (4.0, "scaling, commit abc")
    assert measured.step("another", COUNTED) is None
    rates = measured.rates(JOB.model, replace(COUNTED, batch=1, kept=196))
    assert {rate.product for rate in rates} == {(3008, 768, 2304), (3008, 2304, 768)}
    assert {rate.flops_per_s for rate in rates} == {5e14}


@given(
    key=st.sampled_from(sorted(DEVICES)),
    batch=st.integers(1, 300),
    kept=st.integers(1, 196),
    more=st.integers(1, 100),
    faster=st.floats(1, 10),
)
def test_more_work_takes_no_less_time(key: str, batch: int, kept: int, more: int, faster: float) -> None:
    bucket, device = Bucket(BASE, batch, kept, torch.bfloat16), DEVICES[key]
    base = SpeedModel(device).iteration(bucket).total
    assert base > 0
    assert SpeedModel(device).iteration(replace(bucket, batch=batch + more)).total >= base
    grown = min(196, kept + more)
    assert SpeedModel(device).iteration(replace(bucket, kept=grown)).total >= base * (1 - 1e-9)
    assert SpeedModel(device).iteration(replace(bucket, dtype=torch.float32)).total > base
    quick = replace(device, copy=device.copy * faster, bf16=device.bf16 * faster, fp32=device.fp32 * faster)
    assert base / faster * (1 - 1e-9) <= SpeedModel(quick).iteration(bucket).total <= base * (1 + 1e-9)
    assert launches(bucket) == launches(replace(bucket, batch=batch + more))


def test_rates_are_in_range() -> None:
    """Between what is plausible for any of these: a slip of a thousand shows."""
    for device in DEVICES.values():
        assert 1e14 < device.bf16 < 1e15
        assert 1e13 < device.fp32 < 1e14
        assert 5e11 < device.copy < 5e12
    speeds = [rows_of(key, JOB, Path("none"))[-1]["image_iterations_per_s"] for key in ("h200", "h100", "a100", "4090")]
    assert all(one > other for one, other in itertools.pairwise(speeds))


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "model.csv"
    words = ["--device", "a100", "4090", "--model", "deit_tiny_patch16_224", "--batch", "8", "8", "16", "16", "32"]
    speed_model.main([*words, "--out", str(out)])
    printed = capsys.readouterr().out
    rows = read(out)
    assert len(rows) == 2 * 6
    assert {row["device_name"] for row in rows} == {ESTIMATE}
    assert {row["device"] for row in rows} == {"a100", "4090"}
    assert [row["batch"] for row in rows[:6]] == ["8", "8", "16", "16", "32", "8 8 16 16 32"]
    assert "An estimate, not a measurement: deit_tiny_patch16_224" in printed
    assert all(line in printed for line in speed_model.ASSUMPTIONS)
    assert speed_model.model_table(rows).count("not measured") == 2
    table = speed_model.stage_table(rows)
    assert len([line for line in table.splitlines() if line.startswith("|")]) == 2 + 2 * 6


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--device", "v100"], "argument --device: invalid choice: 'v100'"),
        (["--batch", "8", "16"], "argument --batch: batch_size=[8, 16]: 2 numbers for 5 stages"),
        (["--batch", "0"], "argument --batch: '0': must be an integer of at least 1"),
        (["--dtype", "fp8"], "argument --dtype: invalid choice: 'fp8'"),
    ],
)
def test_nonsense_is_refused(words: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        speed_model.main(["--model", "deit_tiny_patch16_224", *words])
    assert end.value.code == 2
    assert told in capsys.readouterr().err


def test_the_estimates_in_the_repository_are_those_of_today() -> None:
    rows = read(RESULTS / "model-estimates.csv")
    assert list(dict.fromkeys(row["device"] for row in rows)) == list(DEVICES)
    found = [row for key in DEVICES for row in rows_of(key, JOB, RESULTS)]
    for row, new in zip(rows, found, strict=True):
        mine = {name: "" if value is None else str(value) for name, value in new.items()}
        assert {name: row[name] for name in mine} == mine, "python -m benchmarks run model --device h100 h200 a100 4090"
