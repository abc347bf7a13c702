"""`QuantizedViT`, its file and its report."""

import errno
import json
import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from smi_fast.model import SparseViT
from smi_fast.model.fold import fold
from smi_fast.quantize import (
    Calibration,
    QuantConfig,
    QuantizedViT,
    layer_report,
    load_quantized,
    quantize,
    save_quantized,
)
from smi_fast.quantize.files import pack, unpack
from smi_fast.quantize.forward import forward_sites, site_names
from smi_fast.quantize.layers import worst_first
from smi_fast.quantize.quantized import linears
from smi_fast.storage import files as image_files
from smi_fast.storage.files import METADATA_KEY

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "all_norms": {"qk_norm": True, "pre_norm": True, "fc_norm": True, "act_layer": "gelu_tanh"},
    "average": {"global_pool": "avg", "reg_tokens": 3, "init_values": 0.1},
    "bare": {"qkv_bias": False, "proj_bias": False, "final_norm": False, "act_layer": "quick_gelu"},
}
Make = Callable[..., SparseViT]


def noise(model: SparseViT, count: int = 8) -> Calibration:
    return Calibration.gaussian(model.grid, count, 5)


@pytest.mark.parametrize("scheme", ["paper", "psaq"])
def test_quantize(model: SparseViT, scheme: str) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config = QuantConfig(3, 5, scheme)
    quantized = quantize(model, noise(model), config)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items()), "the model changed"
    assert list(quantized.activations) == site_names(model)
    assert list(quantized.weights) == list(linears(model))
    assert {"patch_embed", "blocks.1.qkv", "blocks.1.fc2", "heads.0"} <= set(quantized.weights)
    for name, tensor in quantized.model.state_dict().items():
        layer = name.removesuffix(".weight")
        if layer in quantized.weights:
            levels = max(len(row.unique()) for row in (tensor if scheme == "psaq" else tensor[None]))
            assert 2 < levels <= 8, name
            assert torch.equal(tensor, quantized.weights[layer].fake(before[name]))
        else:
            assert torch.equal(tensor, before[name]), "biases, norms, tokens and positions stay as they are"


def test_every_activation_is_quantized(model: SparseViT) -> None:
    quantized = quantize(model, noise(model), QuantConfig(8, 4))
    ((pixels, _),) = noise(model).batches
    seen = {}

    def note(name: str, tensor: Tensor) -> Tensor:
        seen[name] = quantized.activations[name].fake(tensor)
        return seen[name]

    logits = forward_sites(quantized.model, pixels, None, note)
    assert torch.equal(quantized(pixels), logits)
    assert all(len(values.unique()) <= 16 for values in seen.values())
    assert len(logits.unique()) > 4


def test_more_bits_are_nearer(model: SparseViT) -> None:
    ((pixels, _),) = noise(model).batches
    keep = torch.arange(0, 12, 2).expand(len(pixels), -1)
    truth, _ = model(pixels, keep)

    def error(bits: int, scheme: str) -> float:
        quantized = quantize(model, noise(model), QuantConfig(bits, bits, scheme))
        return float((quantized(pixels, keep) - truth).norm() / truth.norm())

    for scheme in ("paper", "psaq"):
        assert error(8, scheme) < 0.1 < error(3, scheme)
        assert error(8, scheme) < error(5, scheme)


@pytest.mark.parametrize("count", [1, 2, 7, 8])
def test_packing(count: int) -> None:
    codes = torch.randint(0, 16, (1, count), generator=torch.Generator().manual_seed(count), dtype=torch.uint8)
    packed = pack(codes)
    assert packed.shape == ((count + 1) // 2,)
    assert torch.equal(unpack(packed, (1, count)), codes)
    if count > 1:
        assert int(packed[0]) == int(codes[0, 0]) + 16 * int(codes[0, 1])
    with pytest.raises(ValueError, match="packed codes"):
        unpack(packed, (3, count))


@pytest.mark.parametrize("case", [*OPTIONS, "folded"])
@pytest.mark.parametrize(("weight_bits", "scheme"), [(4, "psaq"), (8, "paper"), (2, "paper"), (5, "psaq")])
def test_round_trip(make_model: Make, tmp_path: Path, case: str, weight_bits: int, scheme: str) -> None:
    model = make_model(torch.float32, **OPTIONS.get(case, {}))
    if case == "folded":
        fold(model)
    quantized = quantize(model, noise(model), QuantConfig(weight_bits, 6, scheme))
    path = tmp_path / "quantized.safetensors"
    save_quantized(quantized, path)
    again = load_quantized(path)
    ((pixels, _),) = noise(model).batches
    assert torch.equal(again(pixels), quantized(pixels))
    keep = torch.tensor([[1, 4, 11]]).expand(len(pixels), -1)
    assert torch.equal(again(pixels, keep), quantized(pixels, keep))
    assert (again.config, again.calibration) == (quantized.config, quantized.calibration)
    assert (again.model.info, again.model.shape) == (model.info, model.shape)
    save_quantized(again, tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == path.read_bytes()


@pytest.fixture
def saved(model: SparseViT, tmp_path: Path) -> tuple[QuantizedViT, Path]:
    quantized = quantize(model, noise(model, 2))
    path = tmp_path / "quantized.safetensors"
    save_quantized(quantized, path)
    return quantized, path


def test_the_file_is_small_and_is_kept(saved: tuple[QuantizedViT, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    quantized, path = saved
    before = path.read_bytes()
    with pytest.raises(FileExistsError):
        save_quantized(quantized, path)

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(image_files, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        save_quantized(quantized, path, overwrite=True)
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_damaged_files(saved: tuple[QuantizedViT, Path], tmp_path: Path) -> None:
    from safetensors import safe_open
    from safetensors.torch import save_file

    _, path = saved
    with pytest.raises(FileNotFoundError):
        load_quantized(tmp_path / "none")
    (tmp_path / "short").write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"short.*not a whole smi_fast.quantized/1 file"):
        load_quantized(tmp_path / "short")
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        metadata = json.loads(file.metadata()[METADATA_KEY])
    blocks = metadata["structure"] | {"blocks": metadata["structure"]["blocks"][:1]}
    for change, told in (
        ({"codes/blocks.0.qkv": tensors["codes/blocks.0.qkv"][1:]}, "packed codes"),
        ({"scale/blocks.0.qkv": torch.ones(3)}, r"scale/blocks.0.qkv is \[3\]"),
        ({"zero_point/heads.0": torch.zeros(5)}, "zero_point/heads.0 is .*float32"),
        ({"activations/scale": torch.ones(2)}, r"activations/scale is \[2\]"),
        ({"float/norm.weight": torch.ones(7)}, "norm.weight"),
        ({"float/other": torch.ones(7)}, "other"),
        ({"structure": blocks}, "blocks.1"),
        ({"sites": metadata["sites"][1:]}, "activations/scale"),
        ({"config": metadata["config"] | {"weight_bits": 8}}, "codes/"),
        ({"config": metadata["config"] | {"weight_bits": 2}}, "must be at most 3"),
        ({"format": "smi_fast.quantized/9"}, "its format is"),
    ):
        arrays = tensors | {name: x for name, x in change.items() if isinstance(x, Tensor)}
        entry = metadata | {name: x for name, x in change.items() if not isinstance(x, Tensor)}
        save_file(arrays, tmp_path / "bad", {METADATA_KEY: json.dumps(entry)})
        with pytest.raises(ValueError, match=told):
            load_quantized(tmp_path / "bad")


def test_layer_report(model: SparseViT) -> None:
    calibration = noise(model)
    quantized = quantize(model, calibration, QuantConfig(4, 4))
    rows = layer_report(model, quantized, calibration, sensitivity=True)
    assert [row.name for row in rows] == [*quantized.weights, *quantized.activations]
    assert json.loads(json.dumps([asdict(row) for row in rows]))[0]["name"] == "patch_embed"
    ((pixels, _),) = calibration.batches
    truth: dict[str, Tensor] = {}
    logits = forward_sites(model, pixels, None, lambda name, x: truth.setdefault(name, x))
    for row in rows:
        weight = row.kind == "weight"
        x = linears(model)[row.name].weight if weight else truth[row.name]
        affine = (quantized.weights if weight else quantized.activations)[row.name]
        value = affine.fake(x)
        assert (row.low, row.high) == (float(x.min()), float(x.max()))
        ratio = float(x.double().square().sum() / (x - value).double().square().sum())
        assert row.sqnr_db == pytest.approx(10 * math.log10(ratio), rel=1e-4)
        shape = (-1, *[1] * (x.ndim - 1)) if affine.scale.ndim else ()
        least = (affine.qmin - affine.zero_point - 0.5).reshape(shape) * affine.scale.reshape(shape)
        most = (affine.qmax - affine.zero_point + 0.5).reshape(shape) * affine.scale.reshape(shape)
        assert row.clipped == pytest.approx(float(((x < least) | (x > most)).double().mean()), abs=0.02)
    row = next(row for row in rows if row.name == "blocks.0.gelu")
    only = forward_sites(model, pixels, None, lambda name, x: quantized.site(name, x) if name == "blocks.0.gelu" else x)
    ratio = float(logits.square().sum() / (only - logits).square().sum())
    assert row.logits_sqnr_db == pytest.approx(10 * math.log10(ratio), rel=1e-3)
    assert all(row.logits_sqnr_db is not None for row in rows)
    order = worst_first(rows)
    assert order[0].logits_sqnr_db == min(row.logits_sqnr_db for row in rows if row.logits_sqnr_db is not None)


def test_exact_values_have_no_ratio(model: SparseViT) -> None:
    model.heads[0].weight.fill_(0.5)
    calibration = noise(model)
    rows = layer_report(model, quantize(model, calibration, QuantConfig(4, 8, "paper")), calibration)
    row = next(row for row in rows if row.name == "heads.0")
    assert (row.sqnr_db, row.clipped) == (None, 0)
    assert all(row.logits_sqnr_db is None for row in rows)
    assert worst_first(rows)[-1].sqnr_db is None
