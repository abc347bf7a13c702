"""The custom ops: schema, fake and autograd registrations, and full-graph tracing."""

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from smi_fast.kernels import adam_update as adam_module
from smi_fast.kernels import add_layer_norm as norm_module
from smi_fast.kernels import cls_attention as attention_module
from smi_fast.kernels import mlp as mlp_module
from smi_fast.kernels import patch_cells as cells_module
from smi_fast.kernels import patch_gather as gather_module
from smi_fast.kernels import patch_mask as mask_module
from smi_fast.kernels import patch_ungather as ungather_module
from smi_fast.kernels import select_patches as select_module
from smi_fast.kernels import step_record as record_module
from smi_fast.kernels import tile_attention as tile_module
from smi_fast.kernels import total_variation as tv_module
from smi_fast.kernels.common.grid import Grid, Moves, slot_of_patch
from smi_fast.kernels.patch_gather import patch_gather
from smi_fast.kernels.patch_ungather import patch_ungather
from smi_fast.storage.inductor import why_not_compile

GRID = Grid(8, 12, 4)
KEEP = torch.tensor([[0, 3, 5], [1, 2, 4]])
SLOTS = slot_of_patch(KEEP, 6)
SHIFT = torch.tensor([[3, -2], [-5, 7]])
FLIP = torch.tensor([True, False])
MOVES = Moves(SHIFT, FLIP)


def canvas(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(2, 3, 8, 12, dtype=dtype, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_opcheck(dtype: torch.dtype) -> None:
    pixels = canvas(torch.float64 if dtype == torch.float64 else torch.float32)
    opcheck(gather_module._gather, (pixels.requires_grad_(), KEEP, SHIFT, FLIP, 4, dtype, "torch"))
    pixels = pixels.detach()
    windows = patch_gather(pixels, KEEP, MOVES, 4, dtype)
    opcheck(ungather_module._ungather, (windows, SLOTS, KEEP, SHIFT, FLIP, [8, 12, 4], "torch"))
    opcheck(ungather_module._scatter, (windows, SLOTS, SHIFT, FLIP, [8, 12, 4], "torch"))
    opcheck(cells_module._take, (pixels, KEEP, 4))
    opcheck(tv_module._take_halo, (pixels, tv_module.halo_of(KEEP, Grid(8, 12, 4), pixels.dtype).index, 4))
    for norm in ("pixel", "image", "batch"):
        opcheck(tv_module._tv_op, (pixels, KEEP, 4, norm))


@pytest.mark.parametrize("norm", ["", "pixel", "batch"])
def test_opcheck_of_the_update(norm: str) -> None:
    moments = torch.rand(2, 3, 3, 4, 4, dtype=torch.float64)
    windows = torch.randn(2, 3, 48, dtype=torch.float64)
    limit = torch.full((3, 1, 1), 2.0, dtype=torch.float64)
    args = (
        canvas(), canvas() * 0, moments, moments.clone(), KEEP, SLOTS, windows, SLOTS.clone(), SHIFT, FLIP,
        torch.tensor([True, False]), None, torch.tensor([0.25, 0.5, 0.01], dtype=torch.float64), -limit, limit,
        [0.5, 0.99, 1e-8], 0.1, norm,
    )  # fmt: skip
    opcheck(adam_module._adam_op, args)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_opcheck_of_attention(dtype: torch.dtype) -> None:
    both = canvas(dtype).reshape(2, 8, 2, 3, 6)
    key, value = (part.detach().requires_grad_() for part in both.permute(2, 0, 3, 1, 4).unbind(0))
    query = key.detach()[:, :, 2:4].requires_grad_()
    exact = {"atol": 1e-2, "rtol": 1e-2} if dtype == torch.bfloat16 else {}
    opcheck(attention_module._attend, (query, key, value, 2, 0.3), **exact)
    opcheck(attention_module._attend, (query.detach(), key.detach(), value, 2, 0.3), **exact)
    tensors = tuple(tensor.detach() for tensor in (query, key, value, query))
    rows = torch.randn(2, 3, 6, dtype=torch.promote_types(dtype, torch.float32))
    opcheck(attention_module._attend_backward, (*tensors, rows, 0.3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_opcheck_of_tile_attention(dtype: torch.dtype) -> None:
    packed = canvas(dtype).reshape(2, 8, 3, 2, 6)
    parts = tile_module.parts_of(packed)
    leaves = tuple(part.detach().requires_grad_() for part in parts)
    exact = {"atol": 1e-2, "rtol": 1e-2} if dtype == torch.bfloat16 else {}
    opcheck(tile_module._attend, (*leaves, 0.3), **exact)
    opcheck(tile_module._attend, (leaves[0].detach(), leaves[1].detach(), leaves[2], 0.3), **exact)
    opcheck(tile_module._attend_backward, (*parts, parts[0].flip(2), 0.3))
    opcheck(tile_module._attend_packed, (packed.detach().requires_grad_(), 0.3), **exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_opcheck_of_add_layer_norm(dtype: torch.dtype) -> None:
    rows = canvas(dtype)[:, :, 0]  # [B, 3, 12], strided
    branch, weight, statistics = canvas(dtype)[:, :, 1], canvas(dtype)[0, 0, 2], norm_module.statistics_reference
    exact = {"atol": 1e-2, "rtol": 1e-2} if dtype == torch.bfloat16 else {}
    for affine in ((weight, weight.flip(0)), (None, None)):
        leaves = rows.detach().requires_grad_(), branch.detach().requires_grad_()
        opcheck(norm_module._add_norm, (*leaves, *affine, 1e-5), **exact)
        opcheck(norm_module._add_norm, (rows, leaves[1], *affine, 1e-5), **exact)
        opcheck(norm_module._norm, (leaves[0], *affine, 1e-5), **exact)
        for d_sum in (branch.flip(1), None):
            arguments = (rows, *statistics(rows, 1e-5), affine[0], branch, d_sum)
            opcheck(norm_module._norm_backward, arguments, **exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_opcheck_of_mlp(dtype: torch.dtype) -> None:
    rows = canvas(dtype)[:, :, 0]  # [B, 3, 12], strided
    weight, bias = canvas(dtype)[0, 1], canvas(dtype)[1, 2, :, 3]  # [8, 12] and [8]
    for b in (bias, None):
        opcheck(mlp_module._hidden, (rows, weight, b))
    slope = mlp_module._hidden(rows, weight, bias)[1]
    opcheck(mlp_module._hidden_backward, (rows, weight.t().contiguous(), slope))


def test_opcheck_of_selection_and_masks() -> None:
    pixels, scores = canvas(torch.float32), canvas(torch.float32)[:, 0, 0]
    opcheck(select_module._select, (scores, 5))
    for state in (scores, KEEP.repeat(1, 4), pixels.reshape(2, 12, 6, 4)):
        opcheck(select_module._remap, (state, KEEP))
    opcheck(mask_module._mask, (KEEP.int(), [8, 12, 4]))
    for dtype in (torch.float32, torch.float64, torch.uint8):
        opcheck(mask_module._composite, (pixels.to(dtype), KEEP, torch.zeros(3, 1, 1), 4))
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        opcheck(mask_module._statistics, (pixels.to(dtype), KEEP, 4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_opcheck_of_the_record(dtype: torch.dtype) -> None:
    failed_at, losses, windows = torch.tensor([-1, 4]), canvas(dtype)[:, 0, 0], canvas(dtype)[:, :, 0]
    scores = canvas(dtype)[:, 1, 1]
    opcheck(record_module._failure, (failed_at, failed_at[1:], losses, windows, canvas(dtype)[:, None]))
    opcheck(record_module._failure, (failed_at, failed_at[1:], losses, windows, None))
    for value in (None, losses[:, 0].clone()):
        written = (failed_at.clone(), losses.clone(), scores.clone(), torch.tensor([7]))
        opcheck(record_module._record, (*written, failed_at, losses, scores, value, 0.5, 1))


def test_gradient_of_the_attention_op_is_that_of_autograd() -> None:
    tensors = [canvas()[:, :, : 2 if i == 0 else 8].detach().requires_grad_() for i in range(3)]
    tensors[2] = canvas().flip(2).requires_grad_()
    found, wanted = (
        torch.autograd.grad(sum(((result * (1 + result)).sum() for result in results), start=torch.zeros(())), tensors)
        for results in (
            attention_module._attend(*tensors, 2, 0.3)[:2],
            attention_module.rows_reference(*tensors, 2, 0.3),
        )
    )
    torch.testing.assert_close(found, wanted)


def test_gradcheck() -> None:
    pixels = canvas().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: patch_gather(x, KEEP, MOVES, 4, torch.float64), (pixels,))


def test_gradcheck_of_the_attention_op() -> None:
    draw = torch.Generator().manual_seed(0)
    leaves = [torch.randn(2, 3, n, 5, dtype=torch.float64, generator=draw).requires_grad_() for n in (2, 7, 7)]
    assert torch.autograd.gradcheck(lambda *three: attention_module._attend(*three, 2, 0.3), leaves)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.compiled)])
def test_full_graph_of_all_ops(backend: str) -> None:
    """The ops as they stand in a graph on a GPU, on their CPU bodies."""
    if backend == "inductor" and why_not_compile("cpu"):
        pytest.skip(f"inductor does not work here: {why_not_compile('cpu')}")
    pixels, draw = canvas(torch.float32), torch.Generator().manual_seed(1)
    query, key, value = (torch.randn(2, 3, n, 8, generator=draw) for n in (1, 7, 7))

    def everything(pixels: Tensor, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        windows = gather_module._gather(pixels, KEEP, SHIFT, FLIP, 4, torch.float32, "torch")
        amount, slope = tv_module._tv_op(pixels, KEEP, 4, "image")
        out, rows = attention_module._attend(query, key, value, 1, 0.3)
        slots = select_module._select(rows.mean(1), 3)
        kept = select_module._remap(rows.mean(1), slots)
        mean, deviation = mask_module._statistics(pixels, KEEP, 4)
        tile = tile_module._attend(key, key, value, 0.3)
        normed = norm_module._add_norm(key, tile, None, None, 1e-6)[1]
        mlp = mlp_module._Mlp.apply(normed, normed[0, 0], None, normed[0, 0].t(), None)
        return windows.sum() + amount.sum(), slope, out, kept, mean, deviation, mlp

    arguments = (pixels, query, key, value)
    compiled = torch.compile(everything, fullgraph=True, backend=backend)
    torch.testing.assert_close(compiled(*arguments), everything(*arguments))


def test_full_graph() -> None:
    def there_and_back(pixels: Tensor) -> Tensor:
        windows = patch_gather(pixels, KEEP, MOVES, 4, torch.float32)
        return patch_ungather(windows * 2, SLOTS, KEEP, MOVES, GRID)

    pixels = canvas(torch.float32)
    compiled = torch.compile(there_and_back, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(pixels), there_and_back(pixels))


def test_sides_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="height=9"):
        patch_gather(torch.zeros(2, 3, 9, 12), KEEP, MOVES, 4, torch.float32)
