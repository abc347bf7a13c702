"""Students: trainable timm ``VisionTransformer`` models that can be shown kept patches alone.

A student stays timm's: its state dict loads with ``timm.create_model(..., checkpoint_path=...)``. Kept patches come in
through timm's own place for dropping them, the parameterless module ``patch_drop`` behind the position embedding.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import resolve_model_data_config
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from smi_fast.checks import check, count
from smi_fast.kernels.common.grid import Grid
from smi_fast.model.checkpoint import load_weights, read_state_dict
from smi_fast.model.from_timm import check_supported, weights_sha256
from smi_fast.model.load import DEMO, check_img_size, check_name
from smi_fast.model.spec import ModelInfo

HEAD = ("head.weight", "head.bias")


class KeptPatches(nn.Module):
    """Passes on the prefix tokens and those of the patches in ``keep``; everything, where that is None."""

    def __init__(self, prefix: int) -> None:
        super().__init__()
        self.prefix = prefix
        self.keep: Tensor | None = None  # [B, K] int64

    def forward(self, x: Tensor) -> Tensor:
        """``[B, prefix + L, D]`` to ``[B, prefix + K, D]``."""
        if self.keep is None:
            return x
        patches = x[:, self.prefix :].gather(1, self.keep[:, :, None].expand(-1, -1, x.shape[2]))
        return torch.cat([x[:, : self.prefix], patches], dim=1)


@dataclass(frozen=True, eq=False)
class Student:
    """A timm ViT with `KeptPatches` in it, and what is known of it.

    Raises:
        ValueError: a model or option that `check_supported` refuses, or a distilled model, which has two heads.
    """

    vit: Any  # a timm VisionTransformer; called on its own, it is dense
    info: ModelInfo  # colours; the hash is that of the weights it starts from

    def __post_init__(self) -> None:
        check_supported(self.vit, self.info.name)
        if type(self.vit) is not VisionTransformer:
            raise ValueError(f"student={self.info.name!r}: it has two heads; only models with one can be students")
        vit: Any = self.vit
        if not isinstance(vit.patch_drop, KeptPatches):
            vit.patch_drop = KeptPatches(vit.num_prefix_tokens)

    @property
    def grid(self) -> Grid:
        """The patch grid of the images it takes."""
        height, width = self.vit.patch_embed.img_size
        return Grid(height, width, self.vit.patch_embed.patch_size[0])

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.vit.head.weight.device

    def features(self, pixels: Tensor, keep: Tensor | None = None) -> Tensor:
        """What the head reads: ``[B, D]``, of the kept patches of ``pixels [B, 3, H, W]``."""
        drop = self.vit.patch_drop
        assert isinstance(drop, KeptPatches)
        drop.keep = keep
        try:
            return self.vit.forward_head(self.vit.forward_features(pixels), pre_logits=True)
        finally:
            drop.keep = None

    def logits(self, pixels: Tensor, keep: Tensor | None = None) -> Tensor:
        """``[B, C]`` of the kept patches (``keep [B, K]`` int64, or None for all) of ``pixels [B, 3, H, W]``."""
        return self.vit.head(self.features(pixels, keep))


@torch.no_grad()
def probe_features(student: Student, batches: Iterable[Tensor]) -> Tensor:
    """What the head reads of whole images, ``[n, D]`` on the student's device.

    Where the backbone is frozen (`DistillConfig.mode` "probe"), an evaluation need not run it again: apply
    ``vit.head`` to these.

    Args:
        student: in whatever mode; it is left so.
        batches: ``[b, 3, H, W]`` each, in the student's normalised colours.
    """
    training = student.vit.training
    student.vit.eval()
    features = torch.cat([student.features(pixels.to(student.device)) for pixels in batches])
    student.vit.train(training)
    return features


@dataclass(frozen=True)
class StudentWeights:
    """Where the weights of a student come from; by default from scratch.

    Raises:
        ValueError: both ``checkpoint`` and ``pretrained`` are given.
    """

    # a file, see `smi_fast.model.checkpoint.read_state_dict`; a backbone without a head gets a new one
    checkpoint: str | Path | None = None
    pretrained: bool = False  # fetch timm's weights; the head is new where the number of classes differs
    new_head: bool = False  # start the head from scratch, whatever the weights say
    seed: int = 0  # of every weight that starts from scratch

    def __post_init__(self) -> None:
        if self.pretrained and self.checkpoint is not None:
            raise ValueError(f"pretrained=True and checkpoint={str(self.checkpoint)!r}: give one source of weights")


SCRATCH = StudentWeights()


def build_student(
    name: str,
    num_classes: int,
    *,
    img_size: int | tuple[int, int] | None = None,
    weights: StudentWeights = SCRATCH,
    device: str | torch.device = "cpu",
) -> Student:
    """A student in float32, such as ``build_student("demo", 10, weights=StudentWeights(seed=3))``.

    Args:
        name: a timm name, or "demo": the architecture of the bundled teacher, with weights of its own.
        num_classes: of the teacher.
        img_size: pixels, a side or ``(height, width)``; None for the model's own. Position embeddings are resampled.
        weights: where they come from.
        device: where they go.

    Raises:
        ValueError: an unknown name, an option that is not understood, an argument that breaks the rule that its message
            names, or a checkpoint that does not fit.
        FileNotFoundError: there is no such checkpoint.
        ConnectionError: the pretrained weights could not be fetched.
    """
    if weights.pretrained and name == DEMO:
        raise ValueError("pretrained=True and name='demo': a student of that name starts from scratch or a checkpoint")
    check("num_classes", num_classes, count(num_classes))
    state = None if weights.checkpoint is None else read_state_dict(weights.checkpoint)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(weights.seed)
        fresh = _demo if name == DEMO else _from_timm_name
        vit, mean, std = fresh(name, num_classes, img_size, weights.pretrained)
        if weights.new_head and weights.pretrained:
            vit.reset_classifier(num_classes)
    if state is not None:
        if weights.new_head or HEAD[0] not in state:
            state = state | {key: vit.state_dict()[key] for key in HEAD}
        load_weights(vit, state, str(weights.checkpoint), name)
    info = ModelInfo(name, weights_sha256(vit), tuple(mean), tuple(std))
    student = Student(vit.to(device), info)
    if student.device.type == "cpu":
        # the backward of fused attention is slow there, see `smi_fast.model.attention`
        for block in vit.blocks:
            block.attn.fused_attn = False
    return student


def _demo(_: str, num_classes: int, img_size: Any, pretrained: bool) -> tuple[Any, Any, Any]:
    asset = resources.files("smi_fast.model") / "assets" / "demo.json"
    facts: dict[str, Any] = json.loads(asset.read_text())
    options = facts["architecture"] | {"num_classes": num_classes}
    size = check_img_size(img_size, options["patch_size"])
    vit = VisionTransformer(**(options if size is None else options | {"img_size": size}))
    return vit, facts["mean"], facts["std"]


def _from_timm_name(name: str, num_classes: int, img_size: Any, pretrained: bool) -> tuple[Any, Any, Any]:
    check_name(name)
    with torch.device("meta"):  # its options are looked at before its weights are made or fetched
        empty: Any = timm.create_model(name, num_classes=num_classes)
    check_supported(empty, name)
    size = check_img_size(img_size, empty.patch_embed.patch_size[0])
    try:
        options: dict[str, Any] = {} if size is None else {"img_size": size}
        vit: Any = timm.create_model(name, pretrained=pretrained, num_classes=num_classes, **options)
    except OSError as error:
        reason = str(error).splitlines()[0]
        raise ConnectionError(
            f"name={name!r}: its pretrained weights could not be fetched ({reason}); give checkpoint=PATH"
        ) from error
    except RuntimeError as error:  # timm's word for a model that has none
        raise ValueError(f"name={name!r}: {error}; give checkpoint=PATH") from error
    colours = resolve_model_data_config(vit)
    return vit, colours["mean"], colours["std"]
