"""What is known of a model besides its weights."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, Protocol

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


Blocks = tuple[int, ...] | Literal["all"]


@dataclass(frozen=True)
class Needs:
    """What a forward must hand over besides logits and CLS scores.

    Blocks are counted from 0; negative numbers count from the last one. The last block runs for the tokens that the
    head reads alone, unless it is named here.
    """

    features: Blocks = ()  # outputs of these blocks, [B, N, D]
    attention: Blocks = ()  # attention maps of these blocks, after the softmax, [B, H, N, N]

    def of(self, depth: int) -> "Needs":
        """The same with plain block numbers, ascending, for a model of ``depth`` blocks.

        Raises:
            ValueError: a block that the model does not have.
        """
        return Needs(_numbers("features", self.features, depth), _numbers("attention", self.attention, depth))

    @staticmethod
    def union(parts: Iterable["Needs"], depth: int) -> "Needs":
        """All that any of the parts needs; raises as `of`."""
        resolved = [part.of(depth) for part in parts]
        features = {block for part in resolved for block in part.features}
        attention = {block for part in resolved for block in part.attention}
        return Needs(tuple(sorted(features)), tuple(sorted(attention)))  # type: ignore[arg-type]  # numbers by now


def _numbers(what: str, blocks: Blocks, depth: int) -> tuple[int, ...]:
    if blocks == "all":
        return tuple(range(depth))
    for block in blocks:
        if not -depth <= block < depth:
            raise ValueError(f"needs.{what}={blocks!r}: the model has no block {block}, only 0..{depth - 1}")
    return tuple(sorted({block % depth for block in blocks}))


class TakesImages(Protocol):
    """A model as a data set sees it: `SparseViT` and `Student` are such."""

    @property
    def info(self) -> ModelInfo:
        """Its name and its normalised colours."""

    @property
    def grid(self) -> Grid:
        """Its image size and patches."""
