"""What the kernels compile to for GPUs that are not there: registers, spills, 16-byte accesses.

The limits are what the pinned configurations gave when they were chosen (Triton 3.6 to 3.9), registers rounded up to
the next multiple of 8. A kernel that needs more, spills, or has lost its wide loads is slower than it was.
"""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, empty

from smi_fast.kernels.adam_update import AdamConstants, LossGradient, MeasuredTV, TVTerm, Updated, adam_launch
from smi_fast.kernels.add_layer_norm import norm_backward_launch, norm_launch
from smi_fast.kernels.cls_attention import attention_backward_launch, attention_launch, token_major
from smi_fast.kernels.common.dispatch import HAS_TRITON, INTERPRETED
from smi_fast.kernels.common.grid import Grid, Moves
from smi_fast.kernels.common.launch import Launch
from smi_fast.kernels.mlp import hidden_backward_launch, hidden_launch
from smi_fast.kernels.patch_gather import gather_launch
from smi_fast.kernels.patch_mask import composite_launch, mask_launch, statistics_launch
from smi_fast.kernels.patch_ungather import scatter_launch, ungather_launch
from smi_fast.kernels.select_patches import remap_launch, select_launch
from smi_fast.kernels.step_record import Column, Record, failure_launch, record_launch
from smi_fast.kernels.tile_attention import parts_of, tile_backward_launch, tile_launch
from smi_fast.kernels.total_variation import TVNorm, tv_launch

if HAS_TRITON and not INTERPRETED:
    from tests.kernels.ahead_of_time import compile_for

pytestmark = pytest.mark.skipif(not HAS_TRITON or INTERPRETED, reason="Triton's compiler is not available")

BASE, SMALL, LARGE, WIDE = Grid(224, 224, 16), Grid(32, 32, 4), Grid(224, 224, 14), Grid(224, 224, 32)
BATCH = 128


@dataclass(frozen=True)
class Limit:
    """At most so many registers; at least so many 16-byte accesses and products; nothing spilled, unless said."""

    registers: int
    loads16: int
    stores16: int
    spills80: int = 0  # bytes, on sm_80
    products: int = 0  # instructions for tensor cores, a matrix product each at least
    registers80: int | None = None  # on sm_80, where these are more


@dataclass(frozen=True)
class Inputs:
    """Tensors without data, of a run's shapes after four stops."""

    grid: Grid
    dtype: torch.dtype

    @property
    def kept(self) -> int:
        return int(self.grid.patches * 0.7**4)

    @property
    def canvas(self) -> Tensor:
        return empty(BATCH, 3, self.grid.height, self.grid.width, device="meta")

    @property
    def ids(self) -> Tensor:
        return empty(BATCH, self.kept, dtype=torch.int64, device="meta")

    @property
    def slots(self) -> Tensor:
        return empty(BATCH, self.grid.patches, dtype=torch.int32, device="meta")

    @property
    def moves(self) -> Moves:
        shift = empty(BATCH, 2, dtype=torch.int64, device="meta")
        return Moves(shift, empty(BATCH, dtype=torch.bool, device="meta"))

    @property
    def windows(self) -> Tensor:
        return empty(BATCH, self.kept, self.grid.patch_values, dtype=self.dtype, device="meta")

    @property
    def patches(self) -> Tensor:
        return empty(BATCH, self.kept, 3, self.grid.patch, self.grid.patch, device="meta")


def gather(i: Inputs) -> Launch:
    return gather_launch(i.canvas, i.ids, i.moves, i.grid.patch, i.dtype)[0]


def ungather(i: Inputs) -> Launch:
    return ungather_launch(i.windows, i.slots, i.ids, i.moves, i.grid)[0]


def scatter(i: Inputs) -> Launch:
    return scatter_launch(i.windows, i.slots, i.moves, i.grid)[0]


def variation(i: Inputs, pixel: bool, sums: bool = False) -> Launch:
    inverse = empty(BATCH, 4, device="meta")
    tensors = {"canvas": i.canvas, "updated": i.ids, "moving": i.slots, "inverse": inverse, "gradient": i.patches}
    return tv_launch(tensors, i.grid, pixel, sums)[0]


def update(i: Inputs, norm: TVNorm | None = "pixel") -> Launch:
    target = Updated(i.canvas, i.canvas, i.patches, i.patches, i.ids, i.slots)
    limit = empty(3, 1, 1, device="meta")
    constants = AdamConstants(0.5, 0.99, 1e-8, limit, limit)
    gradient = LossGradient(i.windows, i.slots, i.moves, i.moves.flip)
    term = MeasuredTV(TVTerm(1e-4, norm)) if norm else None
    return adam_launch(target, gradient, empty(3, device="meta"), constants, term)[0]


def attention(i: Inputs, tokens: int, queries: int = 1, width: int = 64, backward: bool = False) -> Launch:
    """On views of projections, as the model hands them over."""
    query = empty(BATCH, queries, 12, width, dtype=i.dtype, device="meta").transpose(1, 2)
    both = empty(BATCH, tokens, 2, 12, width, dtype=i.dtype, device="meta")
    key, value = both.permute(2, 0, 3, 1, 4).unbind(0)
    if not backward:
        return attention_launch(query, key, value, queries)[0]
    d_rows = empty(BATCH, 12, tokens - queries, device="meta")
    return attention_backward_launch((query, key, value), token_major(query, queries), d_rows)[0]


def tile(i: Inputs, tokens: int, backward: bool = False) -> Launch:
    """On views of a projection, as the model hands them over."""
    query, key, value = parts_of(empty(BATCH, tokens, 3, 12, 64, dtype=i.dtype, device="meta"))
    if not backward:
        return tile_launch(query, key, value)[0]
    return tile_backward_launch(query, key, value, token_major(query, tokens))[0]


def norm(i: Inputs, width: int, branch: bool = True) -> Launch:
    """With weight and bias."""
    x, weight = (empty(*shape, dtype=i.dtype, device="meta") for shape in ((BATCH * (i.kept + 1), width), (width,)))
    return norm_launch(x, x if branch else None, weight, weight, 1e-6)[0]


def norm_backward(i: Inputs, width: int, d_sum: bool = True) -> Launch:
    x, weight = (empty(*shape, dtype=i.dtype, device="meta") for shape in ((BATCH * (i.kept + 1), width), (width,)))
    statistics = (empty(len(x), device="meta"), empty(len(x), device="meta"))
    return norm_backward_launch(x, statistics, weight, x, x if d_sum else None)[0]


def mlp(i: Inputs, width: int, backward: bool = False) -> Launch:
    """With four times as many hidden values."""
    x, weight1, weight2, bias, slope = (
        empty(*shape, dtype=i.dtype, device="meta")
        for shape in (
            (BATCH * (i.kept + 1), width), (4 * width, width), (width, 4 * width), (4 * width,),
            (BATCH * (i.kept + 1), 4 * width),
        )
    )  # fmt: skip
    return hidden_backward_launch(x, weight2, slope)[0] if backward else hidden_launch(x, weight1, bias)[0]


def selection(i: Inputs) -> Launch:
    return select_launch(empty(BATCH, i.grid.patches, device="meta"), i.ids)


def remapping(i: Inputs) -> Launch:
    state = empty(BATCH, i.grid.patches, 3, i.grid.patch, i.grid.patch, dtype=i.dtype, device="meta")
    return remap_launch(state, i.ids, empty(*i.ids.shape, *state.shape[2:], dtype=i.dtype, device="meta"))


def mask(i: Inputs) -> Launch:
    return mask_launch(i.slots, empty(BATCH, i.grid.height, i.grid.width, dtype=torch.bool, device="meta"), i.grid)


def composition(i: Inputs, colour: bool) -> Launch:
    pixels = i.canvas.to(i.dtype)
    fill = pixels[0, :, :1, :1].expand_as(pixels) if colour else pixels
    return composite_launch(pixels, i.slots, fill, pixels, i.grid)


def statistics(i: Inputs) -> Launch:
    return statistics_launch(i.canvas.to(i.dtype), i.ids, i.grid)[0]


def failure(i: Inputs) -> Launch:
    failed_at = empty(BATCH, dtype=torch.int64, device="meta")
    return failure_launch(failed_at, failed_at[:1], empty(BATCH, 2, device="meta"), i.windows, None)[0]


def recording(i: Inputs) -> Launch:
    failed_at, losses = empty(BATCH, dtype=torch.int64, device="meta"), empty(BATCH, 2, device="meta")
    record = Record(failed_at, losses, empty(BATCH, i.kept, device="meta"))
    return record_launch(record, failed_at[:1], record, Column(1, losses[:, 0].contiguous(), 0.1))


Row = tuple[str, Callable[[Inputs], Launch], Grid, torch.dtype, Limit]
TABLE: list[Row] = [
    ("patch_gather", gather, BASE, torch.bfloat16, Limit(32, 0, 3)),
    ("patch_gather", gather, BASE, torch.float32, Limit(40, 0, 6)),
    ("patch_gather", gather, SMALL, torch.bfloat16, Limit(32, 0, 3)),
    ("patch_gather", gather, LARGE, torch.bfloat16, Limit(40, 0, 0)),  # rows of 14 are not 16-byte aligned
    ("patch_ungather", ungather, BASE, torch.bfloat16, Limit(32, 0, 3)),
    ("patch_ungather", ungather, SMALL, torch.bfloat16, Limit(32, 0, 3)),
    ("patch_scatter", scatter, BASE, torch.bfloat16, Limit(32, 0, 3)),
    ("patch_scatter", scatter, SMALL, torch.bfloat16, Limit(32, 0, 3)),
    ("total_variation pixel", lambda i: variation(i, True), BASE, torch.float32, Limit(112, 3, 3)),
    ("total_variation sums", lambda i: variation(i, False, True), BASE, torch.float32, Limit(112, 3, 0)),
    ("total_variation image", lambda i: variation(i, False), BASE, torch.float32, Limit(112, 3, 3)),
    ("adam_update pixel", update, BASE, torch.bfloat16, Limit(120, 9, 9)),
    # the assemblers of Triton 3.9 and 3.6 squeeze one of these each into 96 registers on sm_80, and spill two of them
    ("adam_update pixel", update, BASE, torch.float32, Limit(120, 9, 9, spills80=8)),
    ("adam_update pixel", update, WIDE, torch.bfloat16, Limit(120, 9, 9, spills80=8)),
    # a pixel a thread: rows of 4 and 14 pixels are too short for wide loads in all arrays
    ("adam_update pixel", update, SMALL, torch.bfloat16, Limit(56, 0, 0)),
    ("adam_update pixel", update, LARGE, torch.bfloat16, Limit(56, 0, 0)),
    ("adam_update image", lambda i: update(i, "image"), BASE, torch.bfloat16, Limit(120, 9, 9)),
    ("adam_update alone", lambda i: update(i, None), BASE, torch.bfloat16, Limit(72, 9, 9)),
    # keys and values once each in 16-byte pieces, and the query
    ("cls_attention N47", lambda i: attention(i, 47), BASE, torch.bfloat16, Limit(40, 9, 0)),
    ("cls_attention N197", lambda i: attention(i, 197), BASE, torch.bfloat16, Limit(64, 17, 0)),
    ("cls_attention N197", lambda i: attention(i, 197), BASE, torch.float32, Limit(96, 33, 0)),
    ("cls_attention N577 M2", lambda i: attention(i, 577, 2), BASE, torch.bfloat16, Limit(255, 28, 0)),
    ("cls_attention N197 d80", lambda i: attention(i, 197, 1, 80), BASE, torch.bfloat16, Limit(96, 33, 0)),
    ("backward N47", lambda i: attention(i, 47, backward=True), BASE, torch.bfloat16, Limit(80, 10, 8)),
    ("backward N197", lambda i: attention(i, 197, backward=True), BASE, torch.bfloat16, Limit(96, 10, 8)),
    ("backward N197 M2", lambda i: attention(i, 197, 2, backward=True), BASE, torch.bfloat16, Limit(128, 12, 8)),
    ("backward N577", lambda i: attention(i, 577, backward=True), BASE, torch.bfloat16, Limit(128, 20, 8)),
    # 4 tiles of 64 tokens in 16-byte pieces; two products forward, five backward. 47 tokens compile to the code of 64,
    # and forward 138 to that of 197
    ("tile N64", lambda i: tile(i, 64), BASE, torch.bfloat16, Limit(112, 12, 4, products=8)),
    ("tile N96", lambda i: tile(i, 96), BASE, torch.bfloat16, Limit(232, 20, 4, products=12)),
    ("tile N197", lambda i: tile(i, 197), BASE, torch.bfloat16, Limit(80, 17, 1, products=64)),
    ("tile N47", lambda i: tile(i, 47), BASE, torch.float32, Limit(40, 9, 1)),
    ("tile backward N64", lambda i: tile(i, 64, True), BASE, torch.bfloat16, Limit(208, 16, 12, products=20)),
    ("tile backward N96", lambda i: tile(i, 96, True), BASE, torch.bfloat16, Limit(176, 10, 9, products=52)),
    ("tile backward N138", lambda i: tile(i, 138, True), BASE, torch.bfloat16, Limit(255, 18, 17, products=104)),
    ("tile backward N197", lambda i: tile(i, 197, True), BASE, torch.bfloat16, Limit(255, 18, 17, products=104)),
    # a warp a row: each tensor in pieces of 16 bytes a thread
    ("add_layer_norm D768", lambda i: norm(i, 768), BASE, torch.bfloat16, Limit(64, 16, 8)),
    ("add_layer_norm D768", lambda i: norm(i, 768), BASE, torch.float32, Limit(72, 32, 16)),
    ("add_layer_norm D768 alone", lambda i: norm(i, 768, False), BASE, torch.bfloat16, Limit(64, 12, 4)),
    ("add_layer_norm D192", lambda i: norm(i, 192), BASE, torch.bfloat16, Limit(40, 4, 2)),
    ("add_layer_norm D1280", lambda i: norm(i, 1280), BASE, torch.bfloat16, Limit(32, 4, 2)),
    ("norm backward D768", lambda i: norm_backward(i, 768), BASE, torch.bfloat16, Limit(88, 16, 4)),
    ("norm backward D768", lambda i: norm_backward(i, 768), BASE, torch.float32, Limit(80, 32, 8)),
    ("norm backward D768 alone", lambda i: norm_backward(i, 768, False), BASE, torch.bfloat16, Limit(72, 12, 4)),
    ("norm backward D192", lambda i: norm_backward(i, 192), BASE, torch.bfloat16, Limit(56, 4, 1)),
    # 128 registers: two programs of 256 threads on a multiprocessor. Operands come by asynchronous copies, not by loads
    ("mlp D768", lambda i: mlp(i, 768), BASE, torch.bfloat16, Limit(128, 0, 16, products=4, registers80=144)),
    ("mlp D192", lambda i: mlp(i, 192), BASE, torch.bfloat16, Limit(128, 0, 16, products=4, registers80=144)),
    (
        "mlp back D768",
        lambda i: mlp(i, 768, True),
        BASE,
        torch.bfloat16,
        Limit(128, 8, 8, products=4, registers80=184),
    ),
    (
        "mlp back D192",
        lambda i: mlp(i, 192, True),
        BASE,
        torch.bfloat16,
        Limit(128, 8, 8, products=4, registers80=184),
    ),
    ("select_patches", selection, BASE, torch.float32, Limit(48, 0, 0)),
    ("remap", remapping, BASE, torch.float32, Limit(24, 2, 2)),
    ("remap", remapping, BASE, torch.bfloat16, Limit(16, 1, 1)),
    ("first_failure", failure, BASE, torch.bfloat16, Limit(40, 2, 0)),
    ("record_step", recording, BASE, torch.float32, Limit(32, 0, 0)),
    ("patch_mask", mask, BASE, torch.float32, Limit(16, 0, 0)),
    ("composite image", lambda i: composition(i, False), BASE, torch.float32, Limit(32, 4, 2)),
    ("composite image", lambda i: composition(i, False), BASE, torch.bfloat16, Limit(32, 2, 1)),
    ("composite colour", lambda i: composition(i, True), BASE, torch.float32, Limit(32, 2, 2)),
    ("kept_statistics", statistics, BASE, torch.float32, Limit(32, 2, 0)),
    ("kept_statistics", statistics, BASE, torch.bfloat16, Limit(32, 1, 0)),
]


def devices(row: Row) -> tuple[int, ...]:
    """sm_90, and sm_80 for kernels that multiply matrices or may spill.

    How wide accesses are is settled before Triton looks at the device, and 64 registers are a quarter of what there is.
    """
    return (90, 80) if row[-1].registers > 64 or row[-1].products else (90,)


@pytest.mark.parametrize(
    ("row", "capability"),
    [(row, capability) for row in TABLE for capability in devices(row)],
    ids=lambda value: f"{value[0]}-P{value[2].patch}-{value[3]}" if isinstance(value, tuple) else str(value),
)
def test_machine_code(row: Row, capability: int) -> None:
    _, build, grid, dtype, limit = row
    compiled = compile_for(build(Inputs(grid, dtype)), capability)
    assert compiled.spills <= (limit.spills80 if capability == 80 else 0), compiled
    most = limit.registers80 if capability == 80 and limit.registers80 else limit.registers
    assert compiled.registers <= most, compiled
    assert compiled.loads16 >= limit.loads16, compiled
    assert compiled.stores16 >= limit.stores16, compiled
    assert compiled.products >= limit.products, compiled
