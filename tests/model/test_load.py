"""`load_model` and checkpoints: what comes out, and that every wrong input is refused by name."""

import argparse
import json
import os
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import Tensor

from smi_fast.model import load_model
from smi_fast.model.checkpoint import read_state_dict
from smi_fast.model.labels import label_name, parse_labels

NAME = "vit_tiny_patch16_224"
CLASSES = 5
SIDE = 32

State = dict[str, Tensor]


@pytest.fixture(scope="module")
def state() -> State:
    """Weights of a five-class ViT-Tiny for 32 x 32 pixels, no two alike."""
    torch.manual_seed(0)
    vit = timm.create_model(NAME, num_classes=CLASSES, img_size=SIDE)
    return {name: torch.randn_like(tensor) * 0.2 for name, tensor in vit.state_dict().items()}


@pytest.fixture
def checkpoint(state: State, tmp_path: Path) -> Path:
    path = tmp_path / "weights.safetensors"
    save_file(state, path)
    return path


def timm_model(state: State, img_size: int | tuple[int, int] = SIDE) -> Any:
    vit: Any = timm.create_model(NAME, num_classes=CLASSES, img_size=img_size)
    vit.load_state_dict(checkpoint_filter_fn(state, vit, adapt_layer_scale=True))
    return vit.eval()


def images(height: int, width: int) -> Tensor:
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(1))


# --- good inputs


def as_safetensors(state: State, folder: Path) -> Path:
    save_file(state, folder / "a.safetensors")
    return folder / "a.safetensors"


def as_torch(wrap: Callable[[State], Any], suffix: str, state: State, folder: Path) -> Path:
    path = folder / f"a{suffix}"
    torch.save(wrap(state), path)
    return path


FORMS: dict[str, Callable[[State, Path], Path]] = {
    "safetensors": as_safetensors,
    "pth": lambda state, folder: as_torch(lambda s: s, ".pth", state, folder),
    "deit": lambda state, folder: as_torch(lambda s: {"model": s, "epoch": 3}, ".pt", state, folder),
    "lightning": lambda state, folder: as_torch(lambda s: {"state_dict": s}, ".pth.tar", state, folder),
}


@pytest.mark.parametrize("form", FORMS)
def test_checkpoint_round_trip(form: str, state: State, tmp_path: Path) -> None:
    model = load_model(NAME, checkpoint=FORMS[form](state, tmp_path), img_size=SIDE)
    assert model.shape.num_classes == CLASSES
    pixels = images(SIDE, SIDE)
    torch.testing.assert_close(model(pixels)[0], timm_model(state)(pixels), atol=1e-4, rtol=1e-4)


def test_half_precision_weights_are_cast_before_resampling(state: State, tmp_path: Path) -> None:
    half = {name: tensor.half() for name, tensor in state.items()}
    save_file(half, tmp_path / "half.safetensors")
    model = load_model(NAME, checkpoint=tmp_path / "half.safetensors", img_size=48)
    vit = timm_model({name: tensor.float() for name, tensor in half.items()}, 48)
    assert model.dtype == torch.float32
    assert torch.equal(model.pos_embed, vit.pos_embed[0, 1:])


@pytest.mark.parametrize("size", [48, (16, 64)])
def test_positions_are_resampled_as_timm_does(size: int | tuple[int, int], state: State, checkpoint: Path) -> None:
    model = load_model(NAME, checkpoint=checkpoint, img_size=size)
    vit = timm_model(state, size)
    assert (model.grid.height, model.grid.width) == ((size, size) if isinstance(size, int) else size)
    assert torch.equal(model.pos_embed, vit.pos_embed[0, 1:])
    pixels = images(model.grid.height, model.grid.width)
    torch.testing.assert_close(model(pixels)[0], vit(pixels), atol=1e-4, rtol=1e-4)


def test_layer_scale_names_are_adapted(tmp_path: Path) -> None:
    vit = timm.create_model("deit3_small_patch16_224", num_classes=CLASSES, img_size=SIDE)
    names = {name.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2"): name for name in vit.state_dict()}
    assert any("gamma_1" in name for name in names)
    save_file({published: vit.state_dict()[name] for published, name in names.items()}, tmp_path / "d.safetensors")
    model = load_model("deit3_small_patch16_224", checkpoint=tmp_path / "d.safetensors", img_size=SIDE)
    pixels = images(SIDE, SIDE)
    torch.testing.assert_close(model(pixels)[0], vit.eval()(pixels), atol=1e-4, rtol=1e-4)


def test_random_weights_of_a_timm_model() -> None:
    model = load_model("deit_tiny_patch16_224", pretrained=False, img_size=(32, 64), dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    assert model.heads[0].weight.dtype == torch.float32
    assert model.info.mean == pytest.approx((0.485, 0.456, 0.406))
    assert model.info.std == pytest.approx((0.229, 0.224, 0.225))
    assert model.info.class_names is not None
    assert len(model.info.class_names) == model.shape.num_classes == 1000
    assert parse_labels(["tench", "Goldfish", "hen", 999], model.info, 1000) == [0, 1, 8, 999]
    assert label_name(0, model.info) == "tench, Tinca tinca"


def test_colours_are_the_models_own() -> None:
    model = load_model("vit_tiny_patch16_224", pretrained=False, img_size=32, num_classes=3)
    assert model.info.mean == model.info.std == (0.5, 0.5, 0.5)
    assert model.info.class_names is None


def test_the_hash_follows_the_weights(state: State, tmp_path: Path) -> None:
    hashes = []
    for change in (0.0, 0.0, 1.0):
        changed = state | {"head.bias": state["head.bias"] + change}
        save_file(changed, tmp_path / "h.safetensors")
        hashes.append(load_model(NAME, checkpoint=tmp_path / "h.safetensors", img_size=SIDE).info.sha256)
    assert hashes[0] == hashes[1] != hashes[2]


# --- the demo model


def demo_file(name: str) -> Any:
    return resources.files("smi_fast.model") / "assets" / name


def test_demo() -> None:
    facts = json.loads(demo_file("demo.json").read_text())
    model = load_model("demo")
    assert model.info.class_names == tuple(facts["class_names"])
    assert model.info.mean == tuple(facts["mean"])
    assert model.shape.num_classes == len(facts["class_names"])
    vit = timm.models.vision_transformer.VisionTransformer(**facts["architecture"]).eval()
    vit.load_state_dict({name: t.float() for name, t in load_file(str(demo_file("demo.safetensors"))).items()})
    pixels = images(model.grid.height, model.grid.width)
    torch.testing.assert_close(model(pixels)[0], vit(pixels), atol=1e-4, rtol=1e-4)
    assert parse_labels("Cat,dog", model.info, model.shape.num_classes) == [3, 5]


def test_demo_at_another_size_in_float64() -> None:
    model = load_model("demo", img_size=(24, 40), dtype=torch.float64)
    assert model(images(24, 40).double())[0].dtype == torch.float64


def test_demo_architecture_with_another_checkpoint(tmp_path: Path) -> None:
    weights = read_state_dict(str(demo_file("demo.safetensors")))
    weights["head.weight"], weights["head.bias"] = weights["head.weight"][:4].clone(), weights["head.bias"][:4].clone()
    save_file(weights, tmp_path / "four.safetensors")
    model = load_model("demo", checkpoint=tmp_path / "four.safetensors")
    assert model.shape.num_classes == 4
    assert model.info.class_names is None


# --- refused arguments


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("deit_tny_patch16_224", {}, "name='deit_tny_patch16_224': .* did you mean deit_tiny_patch16_224"),
        ("deit_tiny_patch16_224.fb_in1", {}, "pretrained tag .* did you mean deit_tiny_patch16_224.fb_in1k"),
        ("dem", {}, "did you mean demo"),
        ("vit_medium_patch16_gap_240", {}, "model='vit_medium_patch16_gap_240': it has no CLS token"),
        ("swin_tiny_patch4_window7_224", {}, "model='swin_tiny_patch4_window7_224': it is a SwinTransformer"),
        ("convnext_atto", {"img_size": 65}, "model='convnext_atto': it is a ConvNeXt"),
        ("vit_small_patch14_dinov2", {}, "num_classes=0"),
        (NAME, {"img_size": 40}, "img_size=40: .* multiple of the patch, 16"),
        (NAME, {"img_size": (32, 40)}, r"img_size=\(32, 40\): .* multiple of the patch, 16"),
        (NAME, {"img_size": (32, 32, 32)}, r"img_size=\(32, 32, 32\)"),
        (NAME, {"img_size": 32.0}, r"img_size=32.0"),
        (NAME, {"img_size": 0}, "img_size=0"),
        (NAME, {"num_classes": 0, "pretrained": False}, "num_classes=0: must be at least 1"),
        (NAME, {"num_classes": 7}, "num_classes=7: the pretrained weights of .* another head would be random"),
        ("test_vit2.untrained", {}, "neither 'demo' nor a pretrained tag"),
        ("demo", {"img_size": 30}, "img_size=30: .* multiple of the patch, 4"),
        ("demo", {"num_classes": 3}, "num_classes=3: the weights of 'demo' have 10 classes"),
        ("demo", {"pretrained": False}, "pretrained=False: 'demo' comes with its weights"),
        ("demo", {"dtype": torch.float16}, "dtype=torch.float16: .*float32.* overflows in the gradients"),
        ("demo", {"dtype": torch.int8}, r"dtype=torch.int8: must be one of [^(]*$"),
        ("demo", {"device": "cud"}, "device='cud'"),
    ],
)
def test_argument_refused(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_model(name, **options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_a_device() -> None:
    with pytest.raises(ValueError, match="device='cuda': torch sees no CUDA device"):
        load_model("demo", device="cuda")


def test_model_without_published_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    vit: Any = timm.create_model(NAME)
    vit.pretrained_cfg = {"num_classes": 1000}
    monkeypatch.setattr("smi_fast.model.load._create", lambda name, **options: vit)
    with pytest.raises(ValueError, match=f"name='{NAME}': timm has no pretrained weights for it; give checkpoint"):
        load_model(NAME)


def test_hub_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ConnectionError, match=r"could not be fetched .*checkpoint=PATH, or pretrained=False"):
        load_model(NAME)


# --- refused checkpoints


def test_checkpoint_and_pretrained(checkpoint: Path) -> None:
    with pytest.raises(ValueError, match=r"pretrained=True and checkpoint='.*': give one source of weights"):
        load_model(NAME, checkpoint=checkpoint, pretrained=True)


def test_checkpoint_of_another_number_of_classes(checkpoint: Path) -> None:
    with pytest.raises(ValueError, match=f"num_classes=3: the head in checkpoint='.*' has {CLASSES} classes"):
        load_model(NAME, checkpoint=checkpoint, num_classes=3)


def test_missing_file(tmp_path: Path) -> None:
    for path in (tmp_path / "none.safetensors", tmp_path):
        with pytest.raises(FileNotFoundError, match=f"checkpoint='{path}': no such file"):
            load_model("demo", checkpoint=path)


def test_unknown_suffix(tmp_path: Path) -> None:
    (tmp_path / "weights.npz").write_bytes(b"")
    with pytest.raises(ValueError, match=r"weights.npz': unknown suffix '.npz', must be .safetensors or one of"):
        read_state_dict(tmp_path / "weights.npz")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("share", [0.0, 0.1, 0.6, 0.999])
def test_truncated_file(form: str, share: float, state: State, tmp_path: Path) -> None:
    path = FORMS[form](state, tmp_path)
    os.truncate(path, int(path.stat().st_size * share))
    with pytest.raises(ValueError, match=rf"checkpoint='{path}': truncated or corrupt \(\w+"):
        load_model(NAME, checkpoint=path)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_file_of_something_else(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"page{suffix}"
    path.write_text("<html>404 not found</html>" * 9)
    with pytest.raises(ValueError, match=f"checkpoint='{path}': .*corrupt|damaged"):
        read_state_dict(path)


class Code:
    """A pickle of this runs a command when it is opened."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_pickle_with_code_is_refused(state: State, tmp_path: Path) -> None:
    for number, extra in enumerate((Code(tmp_path / "ran"), argparse.Namespace(lr=1))):
        path = tmp_path / f"{number}.pth"
        torch.save({"model": state, "args": extra}, path)
        with pytest.raises(ValueError, match=f"checkpoint='{path}': refused, because only plain weights are") as info:
            load_model(NAME, checkpoint=path)
        assert "GLOBAL" in str(info.value)
        assert "weights_only" not in str(info.value), "torch's advice to load it unsafely must not be passed on"
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(value: float, state: State, tmp_path: Path) -> None:
    tensor = state["blocks.3.mlp.fc1.weight"].clone()
    tensor[5, 7] = value
    save_file(state | {"blocks.3.mlp.fc1.weight": tensor}, tmp_path / "bad.safetensors")
    with pytest.raises(ValueError, match=r"'blocks.3.mlp.fc1.weight' holds NaN or infinite values"):
        load_model(NAME, checkpoint=tmp_path / "bad.safetensors")


@pytest.mark.parametrize(
    ("content", "message"),
    [([1, 2], "holds a list, not a state dict"), ({"epoch": 3}, "'epoch' is a int, not a tensor")],
)
def test_content_that_is_no_state_dict(content: Any, message: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "c.pth")
    with pytest.raises(ValueError, match=message):
        read_state_dict(tmp_path / "c.pth")


def refuse_state(state: State, folder: Path, message: str) -> None:
    path = folder / "other.safetensors"
    save_file(state, path)
    with pytest.raises(ValueError, match=f"checkpoint='{path}' does not fit model='{NAME}': {message}"):
        load_model(NAME, checkpoint=path, img_size=SIDE)


def test_checkpoint_with_missing_and_unknown_tensors(state: State, tmp_path: Path) -> None:
    renamed = {"module." + name if name == "norm.bias" else name: tensor for name, tensor in state.items()}
    refuse_state(renamed, tmp_path, r"norm.bias \(192,\) is missing; module.norm.bias \(192,\) is not in the model$")


def test_checkpoint_of_other_shapes(state: State, tmp_path: Path) -> None:
    wider = {name: torch.ones([2 * n if n == 192 else n for n in t.shape]) for name, t in state.items()}
    refuse_state(wider, tmp_path, r"cls_token is \(1, 1, 384\), the model's is \(1, 1, 192\); pos_embed .* more$")


def test_checkpoint_of_another_patch_size(state: State, tmp_path: Path) -> None:
    other = state | {"patch_embed.proj.weight": torch.ones(192, 3, 8, 8)}
    refuse_state(other, tmp_path, r"patch_embed.proj.weight is \(192, 3, 8, 8\), the model's is \(192, 3, 16, 16\)$")


def test_checkpoint_that_timm_cannot_convert(state: State, tmp_path: Path) -> None:
    refuse_state(state | {"patch_embed.proj.weight": torch.ones(192, 100)}, tmp_path, r"timm cannot convert it \(\w+")
