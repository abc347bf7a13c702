import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from smi_fast.model.sparse_vit import SparseViT
from smi_fast.quantize import measure
from smi_fast.quantize.execute import to_low_bit
from smi_fast.quantize.measure import Timing, first_run, quantiles, real_report, signal_to_noise, take_turns

Make = Callable[..., SparseViT]


def test_the_report_says_what_was_measured(model: SparseViT, pixels: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    spent = {"eager float32": [1.0, 2.0, 3.0], "eager real": [2.0, 2.0, 2.0]}
    monkeypatch.setattr(measure, "take_turns", lambda systems, *_: spent)
    labels = model(pixels)[0].argmax(1)
    labels[0] = (labels[0] + 1) % 5
    low = to_low_bit(model, "static", [(pixels, None)])
    report = real_report(model, low, pixels, labels, Timing(3, compiled=False))
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    assert (report["execution"], report["mode"], len(report["layers"]["int8"])) == ("real", "static", 9)
    assert report["accuracy"]["float32"] == pytest.approx(5 / 6)
    assert report["speed"]["eager"]["times_faster"]["p50"] == 1.0
    assert report["speed"]["eager"]["float32_ms"]["p50"] == 2000.0
    assert report["bytes"]["ratio"] == report["bytes"]["float32"] / report["bytes"]["real"] > 1
    assert report["sqnr_db"] == pytest.approx(signal_to_noise(low(pixels), model(pixels)[0]), abs=1e-2)
    assert "Real execution, not simulated" in report["words"]
    assert "as fast as float32 (1.00 times" in report["words"]


@pytest.mark.parametrize(("real", "words"), [([2.0] * 3, "slower than float32 (0.50"), ([0.5] * 3, "faster than")])
def test_the_report_says_whether_it_is_faster(
    model: SparseViT, pixels: Tensor, monkeypatch: pytest.MonkeyPatch, real: list[float], words: str
) -> None:
    monkeypatch.setattr(measure, "take_turns", lambda *_: {"eager float32": [1.0] * 3, "eager real": real})
    assert words in real_report(model, to_low_bit(model, "dynamic"), pixels, timing=Timing(3, compiled=False))["words"]


def test_a_compiler_that_fails_is_reported(model: SparseViT, pixels: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> Any:
        raise RuntimeError("no compiler\nhere")

    monkeypatch.setattr(measure, "first_run", fail)
    report = real_report(model, to_low_bit(model, "dynamic"), pixels, timing=Timing(1))
    assert report["speed"]["compiled"] == {"why_not": "RuntimeError: no compiler"}
    assert "compiled it does not run (RuntimeError: no compiler)" in report["words"]


def test_systems_take_turns() -> None:
    calls: list[str] = []
    systems: dict[str, measure.Forward] = {
        name: lambda pixels, keep, name=name: calls.append(name) or pixels  # type: ignore[misc, func-returns-value]
        for name in "ab"
    }
    seconds = take_turns(systems, torch.zeros(1), None, 2)
    assert calls == ["a", "b"] * 3
    assert [len(values) for values in seconds.values()] == [2, 2]


def test_figures() -> None:
    assert quantiles([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]) == pytest.approx((2.0, 3.5, 5.0))
    assert signal_to_noise(torch.tensor([1.1, 0.0]), torch.tensor([1.0, 0.0])) == pytest.approx(20, abs=1e-4)
    with pytest.raises(ValueError, match="rounds=0"):
        Timing(rounds=0)


def test_other_precisions_are_refused(make_model: Make, pixels: Tensor) -> None:
    model = make_model(torch.bfloat16)
    low = to_low_bit(model, "dynamic")
    with pytest.raises(ValueError, match="model is bfloat16: must be float32"):
        real_report(model, low, pixels)


@pytest.mark.compiled
@torch.no_grad()
def test_a_compiled_layer_gives_what_the_eager_one_gives(model: SparseViT, pixels: Tensor) -> None:
    layer = to_low_bit(model, "static", [(pixels, None)]).model.patch_embed
    eager = layer(model.cut(pixels)[0])

    def embed(windows: Tensor, _: Tensor | None) -> Tensor:
        return layer(windows)

    found = first_run(embed, model.cut(pixels)[0])(model.cut(pixels)[0], None)
    torch.testing.assert_close(found, eager)
