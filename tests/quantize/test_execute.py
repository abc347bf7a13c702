import builtins
import errno
import importlib
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from smi_fast.model.sparse_vit import SparseViT
from smi_fast.quantize import execute
from smi_fast.quantize.execute import load_low_bit, save_low_bit, to_low_bit, why_not_real
from smi_fast.quantize.forward import forward_sites
from smi_fast.storage import files

Make = Callable[..., SparseViT]
INT8_MODES = ("dynamic", "static")


def ready(model: SparseViT, mode: str, pixels: Tensor) -> execute.LowBitViT:
    return to_low_bit(model, mode, [(pixels, None)])


@pytest.mark.parametrize("mode", INT8_MODES)
@torch.no_grad()
def test_every_layer_multiplies_codes(model: SparseViT, pixels: Tensor, mode: str) -> None:
    low = ready(model, mode, pixels)
    generator = torch.Generator().manual_seed(1)
    for name in low.layers:
        layer: Any = low.model.get_submodule(name)
        weight = layer.weight
        x = torch.randn(3, 13, layer.in_features, generator=generator)
        # the end of torchao's range, 127.5 steps, lies between two codes: positive, it is clipped to the lower one
        x[..., 0] = 5.0
        largest = x.abs().amax(-1, keepdim=True)
        step = largest / 127.5 if mode == "dynamic" else weight.act_quant_scale
        codes = (x / step).round().clamp(-128, 127).double()
        truth = (codes @ weight.qdata.double().mT) * step.double() * weight.scale.double().mT + layer.bias.double()
        # float32 takes part in scaling alone: two products and a sum; the sum over the codes is exact
        bound = 4 * torch.finfo(torch.float32).eps * (truth.abs() + layer.bias.abs())
        assert ((layer(x).double() - truth).abs() <= bound).all(), name


@pytest.mark.parametrize("keep", [None, torch.tensor([[0, 3, 4, 11]])])
@pytest.mark.parametrize("mode", INT8_MODES)
@torch.no_grad()
def test_logits_are_near_those_in_float32(model: SparseViT, pixels: Tensor, mode: str, keep: Tensor | None) -> None:
    keep = None if keep is None else keep.expand(len(pixels), -1)
    truth = forward_sites(model, pixels, keep)
    error = (to_low_bit(model, mode, [(pixels, keep)])(pixels, keep) - truth).norm() / truth.norm()
    # Weights, and inputs of nine layers, are rounded to steps of a 127th of the largest, which is about four times
    # the deviation: 4 / 127 / sqrt(12) of it each time, and the 18 errors add up in squares.
    assert 1e-4 < error < 2 * 18**0.5 * 4 / 127 / 12**0.5


@pytest.mark.parametrize("mode", INT8_MODES)
def test_the_weights_are_int8_and_the_model_stays_as_it_was(model: SparseViT, pixels: Tensor, mode: str) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    low = ready(model, mode, pixels)
    assert low.layers == ["patch_embed"] + [f"blocks.{i}.{n}" for i in (0, 1) for n in ("qkv", "proj", "fc1", "fc2")]
    for name in low.layers:
        weight: Any = low.model.get_submodule(name).weight
        assert weight.qdata.dtype == torch.int8
        scale = weight.scale
        assert scale.shape == (len(weight), 1)
        assert ((weight.qdata * scale - model.get_submodule(name).weight).abs() <= scale * 0.5001 + 1e-7).all()
    assert type(low.model.heads[0].weight) is torch.nn.Parameter
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_static_scales_are_of_kept_tokens_alone(model: SparseViT, pixels: Tensor) -> None:
    keep = torch.tensor([[1, 5, 6]]).expand(len(pixels), -1)
    loud = pixels.clone()
    loud[:, :, :8, :8] = 1e4  # patch 0, which is not kept
    scales = [
        low.model.patch_embed.weight.act_quant_scale  # type: ignore[union-attr]
        for low in (to_low_bit(model, "static", [(images, keep)]) for images in (pixels, loud))
    ]
    windows, _ = model.cut(pixels, keep)
    assert torch.equal(scales[0], scales[1])
    assert scales[0].shape == (1, 1, 1)
    torch.testing.assert_close(scales[0].squeeze(), windows.abs().max() / 127)


@pytest.mark.parametrize("mode", INT8_MODES)
@torch.no_grad()
def test_a_saved_model_gives_the_same_logits(
    model: SparseViT, make_model: Make, pixels: Tensor, mode: str, tmp_path: Path
) -> None:
    low, path = ready(model, mode, pixels), tmp_path / "low.safetensors"
    save_low_bit(path, low)
    other = make_model(torch.float32)
    for parameter in other.parameters():  # none of its numbers may be used
        parameter.fill_(0.5)
    found = load_low_bit(path, other)
    assert (found.mode, found.layers) == (mode, low.layers)
    assert torch.equal(found(pixels), low(pixels))
    assert path.stat().st_size == len(execute.low_bit_bytes(low)) < len(execute.float32_bytes(model))


def test_a_file_is_never_lost(
    model: SparseViT, pixels: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    low, path = ready(model, "dynamic", pixels), tmp_path / "low.safetensors"
    path.write_bytes(b"old")
    with pytest.raises(FileExistsError, match="overwrite"):
        save_low_bit(path, low)

    def full_disk(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save_low_bit(path, low, overwrite=True)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {"low.safetensors": b"old"}


def test_files_that_do_not_fit_are_refused(model: SparseViT, make_model: Make, pixels: Tensor, tmp_path: Path) -> None:
    path = tmp_path / "low.safetensors"
    save_low_bit(path, ready(model, "dynamic", pixels))
    with pytest.raises(FileNotFoundError):
        load_low_bit(tmp_path / "none", model)
    with pytest.raises(ValueError, match="not those of tiny in bfloat16"):
        load_low_bit(path, make_model(torch.bfloat16))
    with pytest.raises(ValueError, match="not those of tiny in float32"):
        load_low_bit(path, make_model(torch.float32, depth=1))
    model.info = replace(model.info, sha256="1" * 64)
    with pytest.raises(ValueError, match="made of tiny with other weights"):
        load_low_bit(path, model)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match="not a whole smi_fast low-bit model"):
        load_low_bit(path, model)


def test_bad_input_is_refused(model: SparseViT, make_model: Make, pixels: Tensor) -> None:
    with pytest.raises(ValueError, match="mode='int4': must be one of dynamic, static, fp8"):
        to_low_bit(model, "int4")
    with pytest.raises(ValueError, match="mode='fp8': cpu has no fp8 units"):
        to_low_bit(model, "fp8")
    with pytest.raises(ValueError, match="batches is empty: mode='static'"):
        to_low_bit(model, "static")
    with pytest.raises(ValueError, match="largest input of patch_embed is nan"):
        to_low_bit(model, "static", [(pixels * torch.nan, None)])
    with pytest.raises(ValueError, match="model is float64"):
        to_low_bit(make_model(torch.float64), "dynamic")
    with pytest.raises(ValueError, match="multiples of 16"):
        to_low_bit(make_model(torch.float32, embed_dim=24), "dynamic")
    assert "not for meta" in str(why_not_real("dynamic", torch.device("meta")))


def test_a_missing_torchao_is_named(model: SparseViT, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(execute, "import_module", missing)
    with pytest.raises(ValueError, match=r"torchao is not installed or too old: pip install 'torchao>=0.18'"):
        to_low_bit(model, "dynamic")


def test_importing_the_package_needs_no_torchao(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def refuse(name: str, *rest: Any) -> Any:
        assert not name.startswith("torchao"), "torchao is imported by importing smi_fast"
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", refuse)
    importlib.reload(execute)
