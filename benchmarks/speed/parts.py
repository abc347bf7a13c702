"""Which part of the step a profiled operation belongs to, and what work each part has.

Work is counted from the sizes alone: FLOPs as in ``smi_fast/model/flops.py``; bytes as the least that must move, every
input read once and every output written once (biases and index tables of a few bytes a token are left out).

An operation is told by what can be told most surely:

1. one of our custom ops, or anything inside one, by its name;
2. a linear layer's matrix product by its shape ``(M, K, N)``. Where two parts share a shape (the first product of the
   MLP, and the input gradient of its second), the order of calls decides: it is that of the step's arithmetic;
3. a kernel that inductor has fused, by the operations in its name. It may hold several: see `FUSED`;
4. any other operation by its name, or else by the shape of its input, or else by what called it;
5. attention's work that lies between two products of the last block is the last block's.

What remains is `Part.OTHER`.
"""

import enum
import math
import re
from collections import defaultdict
from dataclasses import dataclass

import torch

from benchmarks.speed.calls import Call, Dims
from smi_fast.model.spec import ViTShape

Product = tuple[int, int, int]  # M, K, N of [M, K] x [K, N]


class Part(enum.StrEnum):
    """Parts of a step, in its order."""

    GATHER = "gather"
    EMBED = "patch embedding"
    NORM = "LayerNorm, residual"
    QKV = "qkv"
    ATTENTION = "attention"
    PROJ = "projection"
    FC1 = "fc1"
    GELU = "GELU"
    FC2 = "fc2"
    LAST = "last block"
    HEAD = "head, loss"
    UPDATE = "TV, update"
    STATE = "indices, state copies"
    OTHER = "other, framework"


@dataclass(frozen=True)
class Work:
    """Of a part in one step on a batch."""

    flops: int = 0
    bytes: int = 0


@dataclass(frozen=True)
class Bucket:
    """One bucket's sizes, with the letters of ``smi_fast/model/sparse_vit.py``."""

    shape: ViTShape
    batch: int
    kept: int
    dtype: torch.dtype

    @property
    def tokens(self) -> int:
        """``N``."""
        return self.kept + self.shape.prefix

    @property
    def inner(self) -> int:
        """``H * d``."""
        return self.shape.heads * self.shape.head_width

    @property
    def full_blocks(self) -> int:
        """Blocks that compute all tokens."""
        return self.shape.depth - (self.shape.reads > 0)


def linear_products(b: Bucket) -> list[tuple[Part, Product]]:
    """The linear layers' products of one step in its order: forward, then the input gradients."""
    s, rows, read = b.shape, b.batch * b.tokens, b.batch * b.shape.reads
    block = [
        (Part.QKV, (rows, s.width, 3 * b.inner)),
        (Part.PROJ, (rows, b.inner, s.width)),
        (Part.FC1, (rows, s.width, s.mlp_width)),
        (Part.FC2, (rows, s.mlp_width, s.width)),
    ]
    last = [
        (Part.LAST, (read, s.width, b.inner)),
        (Part.LAST, (rows, s.width, 2 * b.inner)),
        (Part.LAST, (read, b.inner, s.width)),
        (Part.LAST, (read, s.width, s.mlp_width)),
        (Part.LAST, (read, s.mlp_width, s.width)),
    ]
    forward = [(Part.EMBED, (b.batch * b.kept, s.grid.patch_values, s.width)), *block * b.full_blocks]
    forward += last if s.reads else []
    forward += [(Part.HEAD, (b.batch, s.width, s.num_classes))] * max(s.reads, 1)
    return forward + [(part, (m, n, k)) for part, (m, k, n) in reversed(forward)]


def product_dtype(part: Part, dtype: torch.dtype) -> torch.dtype:
    """What a part multiplies in: the head in float32 at least."""
    return torch.promote_types(dtype, torch.float32) if part is Part.HEAD else dtype


def product_work(part: Part, product: Product, dtype: torch.dtype) -> Work:
    """Of one product: both factors read, the result written."""
    m, k, n = product
    return Work(2 * m * k * n, (m * k + k * n + m * n) * product_dtype(part, dtype).itemsize)


def work_of_parts(b: Bucket) -> dict[Part, Work]:
    """FLOPs and least bytes of every part in one step."""
    s, size = b.shape, b.dtype.itemsize
    exact = max(size, 4)  # of canvas, moments, final norm and head
    flops: dict[Part, int] = defaultdict(int)
    moved: dict[Part, int] = defaultdict(int)
    for part, product in linear_products(b):
        work = product_work(part, product, b.dtype)
        flops[part] += work.flops
        moved[part] += work.bytes
    rows, read, values = b.batch * b.tokens, b.batch * s.reads, b.batch * b.kept * s.grid.patch_values
    # forward and backward: two products and four of the same size
    flops[Part.ATTENTION] = b.full_blocks * 12 * rows * b.tokens * b.inner
    flops[Part.LAST] += 12 * read * b.tokens * b.inner
    # forward: q, k, v, out; backward: q, k, v and the gradients of all four. Of one CLS row only k and v count
    moved[Part.ATTENTION] = b.full_blocks * 11 * rows * b.inner * size
    moved[Part.LAST] += 6 * rows * b.inner * size if s.reads else 0
    # forward: read x and a branch, write x and its norm; backward: two gradients and x read, one written
    norms = (2 * b.full_blocks + (s.reads > 0)) * rows + read
    moved[Part.NORM] = 8 * s.width * (norms * size + (read or rows) * exact)
    # forward: in and out; backward: the input and the gradient read, one written
    moved[Part.GELU] = 5 * s.mlp_width * (b.full_blocks * rows + read) * size
    moved[Part.EMBED] += s.grid.patches * s.width * size
    moved[Part.HEAD] += 4 * b.batch * s.num_classes * exact
    moved[Part.GATHER] = values * (exact + size)
    moved[Part.UPDATE] = values * (6 * exact + size)
    moved[Part.STATE] = b.batch * b.kept * (2 * 8 + exact)  # ids, cells, scores
    return {part: Work(flops[part], moved[part]) for part in Part}


# Names of operations and kernels; the first pattern that is found counts.
OPS = (
    (r"smi_fast::patch_gather", Part.GATHER),
    (r"smi_fast::cls_attention", Part.LAST),
    (r"smi_fast::(select_patches|remap|first_failure|record_step)", Part.STATE),
    (r"smi_fast::(add_)?layer_norm", Part.NORM),
    (r"smi_fast::(packed_)?tile_attention", Part.ATTENTION),
    (r"smi_fast::|TotalVariation", Part.UPDATE),
)
NAMES = (
    (r"isfinite|aten::all|index_select", Part.STATE),
    (r"log_?softmax|nll_?loss|cross_entropy", Part.HEAD),
    (r"gelu", Part.GELU),
    (r"layer_?norm", Part.NORM),
    (r"softmax|scaled_dot_product|flash|efficient_attention", Part.ATTENTION),
)
# A fused kernel that holds work of several parts goes to the one that touches most bytes: pixels before tokens, hidden
# width before width, and a norm with the layout of heads around it to the norm.
FUSED = (
    (r"put_patches|patch_ungather|take_halo|take_patches|pow.*sqrt|vector_norm", Part.UPDATE),
    (r"patch_gather", Part.GATHER),
    (r"gelu", Part.GELU),
    (r"log_softmax|nll_loss", Part.HEAD),
    (r"_cat_", Part.EMBED),
    (r"(?<!_to)_copy__|index_select|bitwise|isfinite", Part.STATE),
    (r"layer_norm", Part.NORM),
    (r"softmax|bmm|permute|transpose|unbind|stack", Part.ATTENTION),
    (r"fused_(_?unsafe_view_|_to_copy_)*add(_|$)", Part.NORM),
)
# `mlp`'s two products with GELU in their epilogues count as products
PRODUCTS = {"aten::mm", "aten::addmm", "aten::_addmm_activation", "mkldnn::_linear_pointwise"}
PRODUCTS |= {"smi_fast::mlp_hidden", "smi_fast::mlp_hidden_backward"}
WRAPPERS = re.compile(r"aten::linear|aten::matmul|(Addmm|Mm)Backward")


def first_match(patterns: tuple[tuple[str, Part], ...], name: str) -> Part | None:
    """The part of the first pattern that a name holds."""
    return next((part for pattern, part in patterns if re.search(pattern, name, re.IGNORECASE)), None)


def product_of(name: str, shapes: list[Dims]) -> Product | None:
    """``(M, K, N)`` of a linear layer's product, None for anything else."""
    if name not in PRODUCTS:
        return None
    left, right = shapes[1:3] if "addmm" in name else shapes[:2]
    rows, inner = math.prod(left[:-1]), left[-1]
    return rows, inner, math.prod(right) // inner  # oneDNN's weights are [N, K]


def part_of_shape(b: Bucket, dims: Dims) -> Part | None:
    """The part whose tensors have such a shape; None for a shape that says nothing."""
    s, grid = b.shape, b.shape.grid
    if len(dims) >= 4 and (dims[-2:] == (grid.patch, grid.patch) or len(dims) > 5):
        return Part.UPDATE  # [B, A, 3, P, P], or the canvas cut into patches
    if dims == (b.batch, 3, grid.height, grid.width):
        return Part.UPDATE
    if (len(dims) in (4, 5) and s.heads in dims) or (len(dims) == 3 and dims[0] == b.batch * s.heads):
        return _part_of_heads(b, dims)
    rows, last = math.prod(dims[:-1]), dims[-1] if dims else 0
    by_width = {
        s.width: {b.batch * b.tokens: Part.NORM, b.batch * s.reads: Part.NORM, b.batch * b.kept: Part.EMBED},
        grid.patch_values: {b.batch * b.kept: Part.EMBED},
        s.num_classes: {b.batch: Part.HEAD, b.batch * max(s.reads, 1): Part.HEAD},
        3 * b.inner: {b.batch * b.tokens: Part.ATTENTION},  # a view on its way to the heads
        2 * b.inner: {b.batch * b.tokens: Part.LAST},
        s.mlp_width: {b.batch * b.tokens: Part.GELU, b.batch * s.reads: Part.GELU},
    }
    if dims == (grid.patches, s.width):
        return Part.EMBED
    if rows in by_width.get(last, {}):
        return by_width[last][rows]
    return Part.STATE if dims and math.prod(dims) <= b.batch * grid.patches else None


def _part_of_heads(b: Bucket, dims: Dims) -> Part | None:
    """Of ``[B, H, N, *]`` in any order of the sides, or ``[B * H, N, *]``."""
    if b.tokens not in dims:
        return Part.LAST if b.shape.reads in dims else None
    if len(dims) == 5:  # [p, B, H, N, d] or [B, N, p, H, d]: keys and values alone are the last block's
        return Part.LAST if 2 in (dims[0], dims[2]) and 3 not in (dims[0], dims[2]) else Part.ATTENTION
    return Part.LAST if b.shape.reads in dims[-3:] else Part.ATTENTION


class Attribution:
    """The parts of a bucket's calls, see the module's docstring; ``calls`` holds whole steps."""

    def __init__(self, bucket: Bucket, calls: list[Call], steps: int) -> None:
        self.bucket = bucket
        self.products: dict[Call, Part] = {}
        self.windows: list[tuple[float, float]] = []
        self._tell_products(calls, steps)

    def _tell_products(self, calls: list[Call], steps: int) -> None:
        """Give every linear layer's product its part, and note when the last block's begin and end."""
        known: dict[Product, list[Part]] = defaultdict(list)
        for part, sizes in linear_products(self.bucket):
            known[sizes].append(part)
        found: dict[Product, list[Call]] = defaultdict(list)
        for call in sorted(calls, key=lambda call: call.start):
            product = product_of(call.name, call.shapes)
            if (
                product is not None
                and product in known
                and not any(outer.name in PRODUCTS for outer in call.chain()[1:])
            ):
                found[product].append(call)
        for sizes, same in found.items():
            parts = known[sizes]
            if len(set(parts)) > 1 and len(same) != steps * len(parts):
                parts = [Part.OTHER]  # the order says nothing
            for index, call in enumerate(same):
                self._mark(call, parts[index % len(parts)])
        self._find_windows()

    def _mark(self, call: Call, part: Part) -> None:
        """A product, and what only leads to it."""
        self.products[call] = part
        if call.parent is not None and WRAPPERS.search(call.parent.name):
            self._mark(call.parent, part)

    def _find_windows(self) -> None:
        """From the first to the last of each run of products of the last block, the head's among them."""
        inside = False
        for call in sorted(self.products, key=lambda call: call.start):
            if self.products[call] not in (Part.LAST, Part.HEAD):
                inside = False
            elif inside:
                self.windows[-1] = (self.windows[-1][0], call.start)
            else:
                self.windows.append((call.start, call.start))
                inside = True

    def part_of(self, call: Call) -> Part:
        """The part of one call."""
        part = self._part_of(call)
        last = part is Part.ATTENTION and any(begin <= call.start <= end for begin, end in self.windows)
        return Part.LAST if last else part

    def _part_of(self, call: Call) -> Part:
        chain = call.chain()
        for one in chain:
            if (part := first_match(OPS, one.name)) is not None:
                return part
        for one in chain:
            if one in self.products:
                return self.products[one]
            if one.name in PRODUCTS:
                return Part.OTHER  # of no layer that is known
        for one in chain:
            if "_fused_" in one.name:
                return first_match(FUSED, one.name) or Part.OTHER
        return self._part_of_operation(chain)

    def _part_of_operation(self, chain: list[Call]) -> Part:
        """By name, by shape, by what joins tensors without recording their shapes."""
        for one in chain:
            if (part := first_match(NAMES, one.name)) is not None:
                return part
        for one in chain:
            for dims in one.shapes[:1]:
                if (part := part_of_shape(self.bucket, dims)) is not None:
                    return part
        names = {one.name for one in chain}
        if "aten::stack" in names:
            return Part.STATE
        return Part.EMBED if "aten::cat" in names else Part.OTHER
