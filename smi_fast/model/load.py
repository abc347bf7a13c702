"""`load_model`: a name to a `SparseViT`, with every refusal before any download."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import resources
from pathlib import Path
from typing import Any, TypedDict, Unpack

import timm
import torch
from timm.data import ImageNetInfo, resolve_model_data_config
from timm.models import get_arch_pretrained_cfgs
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from smi_fast.model.checkpoint import load_weights, read_state_dict
from smi_fast.model.fold import fold as fold_model
from smi_fast.model.fp8 import to_fp8, why_not_fp8
from smi_fast.model.from_timm import check_supported, from_timm, weights_sha256
from smi_fast.model.scaled_linear import FP8
from smi_fast.model.sparse_vit import SparseViT
from smi_fast.model.spec import ModelInfo

DEMO = "demo"
IMAGENET_CLASSES = 1000
DTYPES = (torch.float32, torch.bfloat16, torch.float64, FP8)


class Options(TypedDict, total=False):
    """What else `load_model` takes, by name."""

    num_classes: int | None  # None takes it from the weights; any other number must agree with them
    # pixels, a side or ``(height, width)``; None for the model's own. Position embeddings are resampled
    img_size: int | Sequence[int] | None
    fold: bool  # put norms and attention's scale into the linear layers, see `smi_fast.model.fold.fold`


@dataclass(frozen=True)
class _Request:
    """What `load_model` was asked for, the checkpoint read and the number of classes settled."""

    name: str
    pretrained: bool | None
    num_classes: int | None
    img_size: int | Sequence[int] | None
    checkpoint: str | Path | None
    state: dict[str, Tensor] | None


@dataclass(frozen=True)
class _Found:
    """A timm model with its weights, and what is known of its inputs and outputs."""

    vit: VisionTransformer
    mean: Sequence[float]
    std: Sequence[float]
    class_names: Sequence[str] | None


def load_model(
    name: str,
    *,
    pretrained: bool | None = None,
    checkpoint: str | Path | None = None,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    **options: Unpack[Options],
) -> SparseViT:
    """Load a frozen Vision Transformer.

    >>> load_model("deit_base_patch16_224", dtype=torch.bfloat16, device="cuda")

    Args:
        name: "demo" (a small CIFAR-10 teacher that comes with the package) or a timm model name, with or without a
            pretrained tag.
        pretrained: fetch timm's weights; None means True unless there is a ``checkpoint``. False without a checkpoint
            gives random weights.
        checkpoint: a file of weights, see `smi_fast.model.checkpoint.read_state_dict`.
        dtype: compute dtype, one of float32, bfloat16, float64; or float8_e4m3fn, for a model in bfloat16 whose
            blocks' linear layers run on 8-bit floats (CUDA devices of compute capability 8.9 and above).
        device: where the weights go.
        options: see `Options`.

    Returns:
        The model, frozen. With 1000 classes it is taken to know ImageNet-1k, and its classes are named so.

    Raises:
        ValueError: an argument breaks the rule that its message names, the model has an option that is not
            understood, or the checkpoint does not fit.
        FileNotFoundError: there is no such checkpoint.
        ConnectionError: the pretrained weights could not be fetched.
    """
    _check_target(dtype, device)
    if unknown := set(options) - set(Options.__annotations__):
        raise TypeError(f"load_model has no argument {sorted(unknown)}; known: {sorted(Options.__annotations__)}")
    if checkpoint is not None and pretrained:
        raise ValueError(f"pretrained=True and checkpoint={str(checkpoint)!r}: give one source of weights")
    state = None if checkpoint is None else read_state_dict(checkpoint)
    classes = _settle_classes(options.get("num_classes"), checkpoint, state)
    request = _Request(name, pretrained, classes, options.get("img_size"), checkpoint, state)
    found = _demo(request) if name == DEMO else _from_timm_name(request)
    info = ModelInfo(
        name=name,
        sha256=weights_sha256(found.vit),
        mean=_triple(found.mean),
        std=_triple(found.std),
        class_names=None if found.class_names is None else tuple(found.class_names),
    )
    model = from_timm(found.vit, info)
    if options.get("fold"):
        fold_model(model)
    if dtype is FP8:
        return to_fp8(model.with_dtype(torch.bfloat16)).to(device)
    return model.with_dtype(dtype).to(device)


def _triple(values: Sequence[float]) -> tuple[float, float, float]:
    red, green, blue = values
    return red, green, blue


def _check_target(dtype: torch.dtype, device: str | torch.device) -> None:
    if dtype not in DTYPES:
        note = " (float16 overflows in the gradients)" if dtype is torch.float16 else ""
        raise ValueError(f"dtype={dtype}: must be one of {', '.join(map(str, DTYPES))}{note}")
    try:
        where = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device={device!r}: {str(error).splitlines()[0]}") from error
    if where.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device={str(device)!r}: torch sees no CUDA device; use device='cpu'")
    if dtype is FP8 and (reason := why_not_fp8(where)):
        raise ValueError(f"dtype={dtype}: device={str(device)!r} has {reason}; use torch.bfloat16")


def _settle_classes(given: int | None, checkpoint: str | Path | None, state: dict[str, Tensor] | None) -> int | None:
    """The number of classes that was asked for, or that the checkpoint's head has."""
    if given is not None and given < 1:
        raise ValueError(f"num_classes={given}: must be at least 1")
    if state is None or "head.weight" not in state:
        return given
    found = len(state["head.weight"])
    if given not in (None, found):
        raise ValueError(f"num_classes={given}: the head in checkpoint={str(checkpoint)!r} has {found} classes")
    return found


def check_img_size(img_size: int | Sequence[int] | None, patch: int) -> tuple[int, int] | None:
    """``(height, width)`` of a side or a pair; raises ``ValueError`` on a side that is no multiple of the patch."""
    if img_size is None:
        return None
    size = tuple(img_size) if isinstance(img_size, Sequence) else (img_size, img_size)
    if len(size) != 2 or not all(isinstance(side, int) and side >= patch and side % patch == 0 for side in size):
        raise ValueError(f"img_size={img_size!r}: each side must be a positive multiple of the patch, {patch}")
    return size[0], size[1]


def _demo(request: _Request) -> _Found:
    assets = resources.files("smi_fast.model") / "assets"
    facts: dict[str, Any] = json.loads((assets / "demo.json").read_text())
    own = facts["architecture"]["num_classes"]
    classes = request.num_classes or own
    if request.state is None:
        if request.pretrained is False:
            raise ValueError("pretrained=False: 'demo' comes with its weights; give checkpoint=PATH for others")
        if classes != own:
            raise ValueError(f"num_classes={classes}: the weights of 'demo' have {own} classes")
    size = check_img_size(request.img_size, facts["architecture"]["patch_size"])
    architecture = facts["architecture"] | {"num_classes": classes}
    vit = VisionTransformer(**(architecture if size is None else architecture | {"img_size": size}))
    if request.state is None:
        with resources.as_file(assets / "demo.safetensors") as path:
            load_weights(vit, read_state_dict(path), path, DEMO)
    else:
        load_weights(vit, request.state, str(request.checkpoint), DEMO)
    return _Found(vit, facts["mean"], facts["std"], facts["class_names"] if classes == own else None)


def _from_timm_name(request: _Request) -> _Found:
    name = request.name
    check_name(name)
    vit = _create(name, num_classes=request.num_classes)
    check_supported(vit, name)  # before the hub is asked, and before arguments that other architectures do not take
    size = check_img_size(request.img_size, vit.patch_embed.patch_size[0])
    if request.pretrained is not False and request.state is None:
        vit = _fetch(request, size, vit.pretrained_cfg)
    elif size is not None:
        vit = _create(name, num_classes=request.num_classes, img_size=size)
    if request.state is not None:
        load_weights(vit, request.state, str(request.checkpoint), name)
    colours = resolve_model_data_config(vit)
    class_names = None
    if vit.num_classes == IMAGENET_CLASSES:
        imagenet = ImageNetInfo()
        class_names = [imagenet.index_to_description(index) for index in range(IMAGENET_CLASSES)]
    return _Found(vit, colours["mean"], colours["std"], class_names)


def _create(name: str, **options: Any) -> Any:
    """``timm.create_model``, whose own annotation knows nothing of the model's class."""
    return timm.create_model(name, **options)


def check_name(name: str) -> None:
    """Raises ``ValueError`` on a name that timm does not know, with those that are close to it."""
    if not timm.is_model(name):
        known, what = [DEMO, *timm.list_models()], "model"
    else:
        known, what = list(get_arch_pretrained_cfgs(name.partition(".")[0])), "pretrained tag"
        if "." not in name or name in known:
            return
    close = get_close_matches(name, known) or get_close_matches(name.partition(".")[0], known)
    hint = f"; did you mean {', '.join(close)}?" if close else ""
    raise ValueError(f"name={name!r}: neither 'demo' nor a {what} that timm {timm.__version__} knows{hint}")


def _fetch(request: _Request, size: tuple[int, int] | None, cfg: dict[str, Any]) -> VisionTransformer:
    """Timm's own weights, from its cache or the hub."""
    advice = "give checkpoint=PATH, or pretrained=False for random weights"
    if not (cfg.get("hf_hub_id") or cfg.get("url") or cfg.get("file")):
        raise ValueError(f"name={request.name!r}: timm has no pretrained weights for it; {advice}")
    if request.num_classes not in (None, cfg["num_classes"]):
        raise ValueError(
            f"num_classes={request.num_classes}: the pretrained weights of {request.name!r} have {cfg['num_classes']} "
            f"classes, another head would be random; {advice}"
        )
    try:
        return _create(request.name, pretrained=True, img_size=size)
    except OSError as error:
        reason = str(error).splitlines()[0]
        raise ConnectionError(
            f"name={request.name!r}: its pretrained weights could not be fetched ({reason}); {advice}"
        ) from error
