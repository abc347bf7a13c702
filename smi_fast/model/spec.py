"""What is known of a model besides its weights."""

from dataclasses import dataclass
from typing import Protocol

from smi_fast.kernels.common.grid import Grid


@dataclass(frozen=True)
class ViTShape:
    """The sizes of a Vision Transformer, enough to count its work."""

    grid: Grid
    width: int  # D
    depth: int  # blocks
    heads: int  # H
    head_width: int  # d
    mlp_width: int  # hidden width of the MLP
    prefix: int  # tokens that are not patches: CLS, distillation, registers
    reads: int  # prefix tokens the head reads; 0 where it averages the patches
    num_classes: int


@dataclass(frozen=True)
class ModelInfo:
    """Where a model comes from and how its inputs and outputs are to be understood."""

    name: str
    sha256: str  # of the weights, before any conversion
    mean: tuple[float, float, float]  # of the normalised colour space, RGB in 0..1
    std: tuple[float, float, float]
    class_names: tuple[str, ...] | None = None


class TakesImages(Protocol):
    """A model as a data set sees it: `SparseViT` and `Student` are such."""

    @property
    def info(self) -> ModelInfo:
        """Its name and its normalised colours."""

    @property
    def grid(self) -> Grid:
        """Its image size and patches."""
