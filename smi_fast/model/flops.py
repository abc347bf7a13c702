"""Work of an inversion, counted two ways.

``true``: floating point operations (two a multiply-add) of the matrix products that are really computed in an
iteration on ``K`` patches: forward and gradient of the input (no weight gradients), attention products included, the
last block for the tokens the head reads. Pointwise work is left out.

``paper``: how the published figures count: multiply-adds of all linear layers on the tokens of the last stage, times
three (forward and both gradients), without attention products. The whole run is taken to be at that stage.
"""

from dataclasses import dataclass

from smi_fast.model.spec import ViTShape
from smi_fast.schedule import Stage


@dataclass(frozen=True)
class Flops:
    """Both conventions, for one image over the whole run."""

    true: float
    paper: float


def iteration_flops(shape: ViTShape, kept: int) -> int:
    """``true`` FLOPs of one image in one iteration on ``kept`` patches."""
    tokens, inner = kept + shape.prefix, shape.heads * shape.head_width
    linears, attention = _block_linears(shape, tokens), _attention(inner, tokens, tokens)
    last_linears, last_attention = linears, attention
    if shape.reads:
        keys_values = 2 * tokens * shape.width * 2 * inner
        read = 2 * shape.reads * (2 * shape.width * inner + 2 * shape.width * shape.mlp_width)
        last_linears, last_attention = keys_values + read, _attention(inner, shape.reads, tokens)
    embed = 2 * kept * shape.grid.patch_values * shape.width
    head = 2 * max(shape.reads, 1) * shape.width * shape.num_classes
    linears = (shape.depth - 1) * linears + last_linears + embed + head
    attention = (shape.depth - 1) * attention + last_attention
    # a linear layer's input gradient is one more product of the same size, attention's backward is four for two
    return 2 * linears + 3 * attention


def _block_linears(shape: ViTShape, tokens: int) -> int:
    """Forward FLOPs of a block's four linear layers."""
    inner = shape.heads * shape.head_width
    return 2 * tokens * (4 * shape.width * inner + 2 * shape.width * shape.mlp_width)


def _attention(inner: int, queries: int, keys: int) -> int:
    """Forward FLOPs of ``q k^T`` and ``p v``."""
    return 2 * 2 * queries * keys * inner


def paper_iteration_flops(shape: ViTShape, kept: int) -> int:
    """``paper`` count of one image in one iteration on ``kept`` patches."""
    tokens = kept + shape.prefix
    embed = kept * shape.grid.patch_values * shape.width
    return 3 * (shape.depth * _block_linears(shape, tokens) // 2 + embed + shape.width * shape.num_classes)


def run_flops(shape: ViTShape, stages: tuple[Stage, ...]) -> Flops:
    """Of one image over all stages."""
    true = sum(stage.length * iteration_flops(shape, stage.kept) for stage in stages)
    return Flops(true=float(true), paper=float(stages[-1].end * paper_iteration_flops(shape, stages[-1].kept)))
