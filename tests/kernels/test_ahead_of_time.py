"""What the kernels compile to for GPUs that are not there: registers, spills, 16-byte accesses.

The limits are what the pinned configurations gave when they were chosen (Triton 3.6 to 3.9), registers rounded up to
the next multiple of 8. A kernel that needs more, spills, or has lost its wide loads is slower than it was.
"""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, empty

from smi_fast.kernels.adam_update import AdamConstants, LossGradient, TVTerm, Updated, adam_launch
from smi_fast.kernels.dispatch import HAS_TRITON, INTERPRETED
from smi_fast.kernels.grid import Grid
from smi_fast.kernels.launch import Launch
from smi_fast.kernels.patch_gather import gather_launch, ungather_launch
from smi_fast.kernels.total_variation import TVNorm, tv_launch

if HAS_TRITON and not INTERPRETED:
    from tests.kernels.ahead_of_time import compile_for

pytestmark = pytest.mark.skipif(not HAS_TRITON or INTERPRETED, reason="Triton's compiler is not to be had")

BASE, SMALL, LARGE, WIDE = Grid(224, 224, 16), Grid(32, 32, 4), Grid(224, 224, 14), Grid(224, 224, 32)
BATCH = 128


@dataclass(frozen=True)
class Limit:
    """At most so many registers; at least so many 16-byte loads and stores; nothing spilled, unless said."""

    registers: int
    loads16: int
    stores16: int
    spills80: int = 0  # bytes, on sm_80


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
    def moves(self) -> tuple[Tensor, Tensor]:
        """Shift and flip."""
        shift = empty(BATCH, 2, dtype=torch.int64, device="meta")
        return shift, empty(BATCH, dtype=torch.bool, device="meta")

    @property
    def windows(self) -> Tensor:
        return empty(BATCH, self.kept, self.grid.patch_values, dtype=self.dtype, device="meta")

    @property
    def patches(self) -> Tensor:
        return empty(BATCH, self.kept, 3, self.grid.patch, self.grid.patch, device="meta")


def gather(i: Inputs) -> Launch:
    return gather_launch(i.canvas, i.ids, *i.moves, i.windows, i.grid.patch)


def ungather(i: Inputs) -> Launch:
    return ungather_launch(i.windows, (i.slots, i.ids, *i.moves), i.patches, i.grid)


def variation(i: Inputs, pixel: bool, sums: bool = False) -> Launch:
    inverse = empty(BATCH, 4, device="meta")
    tensors = {"canvas": i.canvas, "updated": i.ids, "moving": i.slots, "inverse": inverse, "gradient": i.patches}
    return tv_launch(tensors, i.grid, pixel, sums)[0]


def update(i: Inputs, norm: TVNorm | None = "pixel") -> Launch:
    target = Updated(i.canvas, i.canvas, i.patches, i.patches, i.ids, i.slots)
    limit = empty(3, 1, 1, device="meta")
    constants = AdamConstants(0.5, 0.99, 1e-8, limit, limit)
    steer = (empty(3, device="meta"), empty(BATCH, dtype=torch.bool, device="meta"))
    term = TVTerm(1e-4, norm) if norm else None
    return adam_launch(target, LossGradient(i.windows, i.slots, *i.moves), steer, constants, term)[0]


TABLE: list[tuple[str, Callable[[Inputs], Launch], Grid, torch.dtype, Limit]] = [
    ("patch_gather", gather, BASE, torch.bfloat16, Limit(32, 0, 3)),
    ("patch_gather", gather, BASE, torch.float32, Limit(40, 0, 6)),
    ("patch_gather", gather, SMALL, torch.bfloat16, Limit(32, 0, 3)),
    ("patch_gather", gather, LARGE, torch.bfloat16, Limit(40, 0, 0)),  # rows of 14 are not 16-byte aligned
    ("patch_ungather", ungather, BASE, torch.bfloat16, Limit(32, 0, 3)),
    ("patch_ungather", ungather, SMALL, torch.bfloat16, Limit(32, 0, 3)),
    ("total_variation pixel", lambda i: variation(i, True), BASE, torch.float32, Limit(112, 3, 3)),
    ("total_variation sums", lambda i: variation(i, False, True), BASE, torch.float32, Limit(112, 3, 0)),
    ("total_variation image", lambda i: variation(i, False), BASE, torch.float32, Limit(112, 3, 3)),
    ("adam_update pixel", update, BASE, torch.bfloat16, Limit(120, 9, 9)),
    # the assembler of Triton 3.9 squeezes it into 96 registers on sm_80, and spills two of them
    ("adam_update pixel", update, BASE, torch.float32, Limit(120, 9, 9, spills80=8)),
    ("adam_update pixel", update, WIDE, torch.bfloat16, Limit(120, 9, 9)),
    # a pixel a thread: rows of 4 and 14 pixels are too short for wide loads in all arrays
    ("adam_update pixel", update, SMALL, torch.bfloat16, Limit(56, 0, 0)),
    ("adam_update pixel", update, LARGE, torch.bfloat16, Limit(56, 0, 0)),
    ("adam_update image", lambda i: update(i, "image"), BASE, torch.bfloat16, Limit(120, 9, 9)),
    ("adam_update alone", lambda i: update(i, None), BASE, torch.bfloat16, Limit(72, 9, 9)),
]


@pytest.mark.parametrize("capability", [90, 80])
@pytest.mark.parametrize("row", TABLE, ids=lambda row: f"{row[0]}-P{row[2].patch}-{row[3]}")
def test_machine_code(row: tuple[str, Callable[[Inputs], Launch], Grid, torch.dtype, Limit], capability: int) -> None:
    _, build, grid, dtype, limit = row
    compiled = compile_for(build(Inputs(grid, dtype)), capability)
    assert compiled.spills <= (limit.spills80 if capability == 80 else 0), compiled
    assert compiled.registers <= limit.registers, compiled
    assert compiled.loads16 >= limit.loads16, compiled
    assert compiled.stores16 >= limit.stores16, compiled
