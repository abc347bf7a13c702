"""Groups of options that several commands share."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from rich.console import Console

from smi_fast.checks import check, one_of
from smi_fast.cli.recipe import Saved
from smi_fast.config import help_text
from smi_fast.model import SparseViT, load_model
from smi_fast.storage.folder import check_folder
from smi_fast.tuning.settings import IMPLS, Impl, decide_dtype

RECORDED_DTYPES = {"float32": "fp32", "bfloat16": "bf16", "fp8": "fp8"}  # as a report names them


@dataclass(frozen=True)
class Output:
    """Where results go."""

    PANEL: ClassVar[str] = "Output"

    out: Path = field(metadata=help_text("Folder for the results; must be new or empty."))
    overwrite: bool = field(
        default=False, metadata={"help": "Write into a folder that is not empty.", "flags": ("--overwrite",)}
    )
    quiet: bool = field(default=False, metadata={"help": "No progress, only the result.", "flags": ("--quiet",)})

    def check(self) -> None:
        """See `check_folder`."""
        check_folder(self.out, self.overwrite)

    def console(self, **options: Any) -> Console:
        """For progress and notes."""
        return Console(stderr=True, quiet=self.quiet, **options)


@dataclass(frozen=True)
class ModelOptions:
    """A frozen model."""

    PANEL: ClassVar[str] = "Model"

    model: str | None = field(
        default=None,
        metadata=help_text("'demo' (bundled), or the name of a timm ViT. [default: the recipe's, or demo]"),
    )
    checkpoint: Path | None = field(
        default=None, metadata=help_text("Weights for the model (.safetensors, or .pth of plain weights).")
    )
    pretrained: bool | None = field(
        default=None, metadata=help_text("Fetch timm's pretrained weights. [default: yes, if no --checkpoint]")
    )
    image_size: int | None = field(
        default=None, metadata=help_text("Side of the images in pixels. [default: the model's]")
    )

    def load(self, dtype: torch.dtype, device: torch.device, saved: Saved | None = None) -> SparseViT:
        """The model, by default that of a saved recipe.

        Raises:
            ValueError: what `load_model` refuses, or other weights than those of the recipe's own model.
        """
        own = saved is not None and self.model in (None, saved.model)
        name = self.model or (saved.model if saved is not None else None) or "demo"
        size = saved.image_size if own and saved is not None and self.image_size is None else self.image_size
        vit = load_model(
            name,
            pretrained=self.pretrained,
            checkpoint=self.checkpoint,
            dtype=dtype,
            device=device,
            img_size=size,
        )
        if own and saved is not None and saved.sha256 not in (None, vit.info.sha256):
            raise ValueError(
                f"--recipe: was made with weights of sha256 {saved.sha256}, this {name!r} has {vit.info.sha256}; give "
                "--checkpoint for the same weights, or --model to use the recipe on another model"
            )
        return vit


@dataclass(frozen=True)
class MachineOptions:
    """Where a recipe runs, and in which dtype; none of it changes an image but for rounding."""

    PANEL: ClassVar[str] = "Machine"

    dtype: str = field(
        default="auto",
        metadata=help_text("Compute dtype: fp32, bf16, fp8 (blocks' linear layers, on some GPUs), or 'auto': bf16 "
                           "where the device has units for it, else fp32."),
    )  # fmt: skip
    device: str = field(default="auto", metadata=help_text("'auto', 'cpu', 'cuda' or 'cuda:N'."))
    impl: str | None = field(default=None, metadata=help_text("compiled or eager. [default: compiled]"))

    def target(self) -> tuple[torch.dtype, torch.device]:
        """Compute dtype and device.

        Raises:
            ValueError: one of them, or ``impl``, is not known or not available.
        """
        check("impl", self.chosen_impl, one_of(self.chosen_impl, IMPLS))
        device = parse_device(self.device)
        return decide_dtype(self.dtype, device), device

    @property
    def chosen_impl(self) -> Impl:
        """With the default."""
        return "compiled" if self.impl is None else self.impl  # type: ignore[return-value]  # `target` checks it


@dataclass(frozen=True)
class RunOptions(MachineOptions):
    """The same, with the batch."""

    batch_size: str = field(
        default="auto",
        metadata=help_text("Images in work at a time: a number, one for each stage (each divides the largest, commas "
                           "between), or 'auto': as `smi-fast tune` chose, else 64."),
    )  # fmt: skip

    def like(self, saved: Saved) -> "RunOptions":
        """These options, by default those that a saved report names, so that rounding is the same too."""
        return RunOptions(
            self.dtype if self.dtype != "auto" or not saved.dtype else RECORDED_DTYPES.get(saved.dtype, "auto"),
            self.device,
            self.impl or saved.impl,
            self.batch_size if self.batch_size != "auto" or not saved.batch_size else _commas(saved.batch_size),
        )

    def batches(self) -> int | tuple[int, ...] | None:
        """What was asked for; None for ``auto``.

        Raises:
            ValueError: not a number of at least 1, or such numbers with commas between.
        """
        if self.batch_size == "auto":
            return None
        try:
            sizes = tuple(int(word) for word in self.batch_size.split(","))
        except ValueError:
            sizes = (0,)
        rule = "must be 'auto', a number of at least 1, or one for each stage with commas between"
        check("batch_size", self.batch_size, (min(sizes) >= 1, rule))
        return sizes if len(sizes) > 1 else sizes[0]


def _commas(sizes: tuple[int, ...]) -> str:
    """As ``--batch-size`` reads it; one number where all are equal, which fits any number of stages."""
    return ",".join(map(str, sizes if len(set(sizes)) > 1 else sizes[:1]))


def parse_device(text: str) -> torch.device:
    """``auto`` takes the GPU where there is one.

    Raises:
        ValueError: no such device on this machine.
    """
    if text == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(text)
    except RuntimeError:
        raise ValueError(f"--device {text!r}: must be 'auto', 'cpu', 'cuda' or 'cuda:N'") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device {text!r}: only cpu and cuda are supported")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device {text!r}: this machine has {torch.cuda.device_count()} CUDA devices")
    return device
