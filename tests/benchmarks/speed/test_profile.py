"""The profile: every operation has a part, the parts add up to the whole, and their work is the engine's count."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks.speed import calls, profile
from benchmarks.speed.parts import Attribution, Bucket, Call, Part, linear_products, product_of, work_of_parts
from smi_fast.kernels.common.grid import Grid
from smi_fast.model.flops import iteration_flops
from smi_fast.model.sparse_vit import SparseViT
from smi_fast.model.spec import ViTShape
from smi_fast.storage.inductor import why_not_compile

MakeModel = Callable[..., SparseViT]
BATCH, KEPT, STEPS = 3, 7, 2
CEILINGS = profile.Ceilings(1e11, 5e10, 1e10)
DEIT = {
    "tiny": ViTShape(Grid(224, 224, 16), 192, 12, 3, 64, 768, 1, 1, 1000),
    "base": ViTShape(Grid(224, 224, 16), 768, 12, 12, 64, 3072, 1, 1, 1000),
    "distilled": ViTShape(Grid(224, 224, 16), 192, 12, 3, 64, 768, 2, 2, 1000),
    "mean of patches": ViTShape(Grid(32, 32, 4), 192, 6, 3, 64, 768, 1, 0, 10),
}


def profiled(model: SparseViT, impl: str) -> tuple[list[Call], Attribution]:
    fixed = profile.prepare(model, BATCH, KEPT, impl)
    found = calls.record(fixed.step, "cpu", STEPS)
    return found, Attribution(Bucket(model.shape, BATCH, KEPT, model.dtype), found, STEPS)


def check_table(found: list[Call], attribution: Attribution) -> dict[Part, profile.Line]:
    lines = profile.table_of(found, attribution, STEPS, CEILINGS)
    assert [line.part for line in lines] == list(Part)
    assert sum(line.ms for line in lines) * STEPS * 1e3 == pytest.approx(sum(call.us for call in found))
    assert sum(line.share for line in lines) == pytest.approx(1)
    assert all(line.calls > 0 for line in lines), {str(line.part): line.calls for line in lines}
    return {line.part: line for line in lines}


def linear_calls(lines: dict[Part, profile.Line]) -> dict[Part, float]:
    return {part: lines[part].calls for part in (Part.QKV, Part.PROJ, Part.FC1, Part.FC2)}


@pytest.mark.parametrize("shape", DEIT.values(), ids=DEIT)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_parts_have_all_the_work(shape: ViTShape, dtype: torch.dtype) -> None:
    work = work_of_parts(Bucket(shape, 5, 9, dtype))
    assert sum(one.flops for one in work.values()) == 5 * iteration_flops(shape, 9)
    assert all(work[part].bytes > 0 for part in Part if part not in (Part.OTHER, Part.LAST))
    assert (work[Part.LAST].bytes > 0) == (shape.reads > 0)
    assert work[Part.OTHER] == profile.Work()


def test_the_bytes_of_a_part() -> None:
    work = work_of_parts(Bucket(DEIT["tiny"], 2, 9, torch.bfloat16))
    values = 2 * 9 * 768
    assert work[Part.GATHER].bytes == values * (4 + 2)
    assert work[Part.UPDATE].bytes == values * (24 + 2)  # as kernels/adam_update.py counts
    rows = 2 * 10
    assert work[Part.FC1].bytes == 11 * 2 * (rows * 192 + 192 * 768 + rows * 768) * 2
    assert work[Part.GELU].bytes == 5 * 768 * (11 * rows + 2) * 2


@pytest.mark.parametrize("options", [{}, {"reg_tokens": 2}, {"global_pool": "avg", "fc_norm": True}], ids=str)
def test_eager_operations_find_their_parts(make_model: MakeModel, options: dict[str, Any]) -> None:
    model = make_model(torch.float32, depth=3, **options)
    found, attribution = profiled(model, "eager")
    blocks = 2 if model.shape.reads else 3
    if model.shape.reads:
        lines = check_table(found, attribution)
        assert lines[Part.LAST].work.flops > 0
        assert linear_calls(lines) == dict.fromkeys(linear_calls(lines), 2.0 * blocks)
    told = [part for part in attribution.products.values() if part is Part.FC1]
    assert len(told) >= 2 * blocks * STEPS
    assert Part.OTHER not in attribution.products.values()


def test_most_of_an_eager_step_is_told(make_model: MakeModel) -> None:
    """By operations, not by their time: but for trivial ones and the step itself, nothing is left over."""
    found, attribution = profiled(make_model(torch.float32), "eager")
    left = {call.name for call in found if attribution.part_of(call) is Part.OTHER}
    known = ("Backward", "AccumulateGrad", "detach", "one step", "aten::")
    assert all(any(word in name for word in known) for name in left), left
    heavy = {"aten::mm", "aten::addmm", "aten::bmm", "aten::gelu", "aten::_softmax", "aten::native_layer_norm"}
    assert not heavy & left


@pytest.mark.compiled
def test_compiled_kernels_find_their_parts(make_model: MakeModel) -> None:
    if why_not_compile("cpu"):  # asked here: at the import of this file it would use the user's own cache
        pytest.skip(f"inductor does not work here: {why_not_compile('cpu')}")
    found, attribution = profiled(make_model(torch.float32), "compiled")
    lines = check_table(found, attribution)
    assert linear_calls(lines) == dict.fromkeys(linear_calls(lines), 2.0)
    fused = {call.name: attribution.part_of(call) for call in found if "_fused_" in call.name}
    assert len(fused) > 10
    assert set(fused.values()) >= {Part.GELU, Part.NORM, Part.ATTENTION, Part.UPDATE}


def test_shared_shapes_are_told_by_their_order() -> None:
    bucket = Bucket(DEIT["tiny"], 2, 9, torch.float32)
    truth = linear_products(bucket) * STEPS
    ran = [Call("aten::mm", [(m, k), (k, n)], float(i), 1.0) for i, (_, (m, k, n)) in enumerate(truth)]
    told = Attribution(bucket, ran[::-1], STEPS)
    assert [told.part_of(call) for call in ran] == [part for part, _ in truth]
    # one call is missing: what its shape is shared by cannot be told, and is not guessed
    first = next(i for i, (part, _) in enumerate(truth) if part is Part.FC1)
    torn = Attribution(bucket, ran[:first] + ran[first + 1 :], STEPS)
    shared = [ran[i] for i, (_, sizes) in enumerate(truth) if sizes == truth[first][1] and i != first]
    assert {torn.part_of(call) for call in shared} == {Part.OTHER}
    assert torn.part_of(ran[1]) is Part.QKV


def test_our_own_operations_have_parts() -> None:
    x, rows = (2, 9, 192), 18
    assert product_of("smi_fast::mlp_hidden", [x, (768, 192), (768,)]) == (rows, 192, 768)
    assert product_of("smi_fast::mlp_hidden_backward", [x, (192, 768), (2, 9, 768)]) == (rows, 192, 768)
    told = Attribution(Bucket(DEIT["tiny"], 2, 8, torch.bfloat16), [], STEPS)
    for name, part in {
        "smi_fast::add_layer_norm": Part.NORM,
        "smi_fast::layer_norm": Part.NORM,
        "smi_fast::add_layer_norm_backward": Part.NORM,
        "smi_fast::packed_tile_attention": Part.ATTENTION,
        "smi_fast::first_failure": Part.STATE,
        "smi_fast::record_step": Part.STATE,
        "smi_fast::adam_update": Part.UPDATE,
    }.items():
        assert told.part_of(Call(name, [x], 0.0, 1.0)) is part, name


def test_attention_between_products_of_the_last_block_is_its_own() -> None:
    bucket = Bucket(DEIT["tiny"], 2, 9, torch.float32)
    truth = linear_products(bucket)
    ran = [Call("aten::mm", [(m, k), (k, n)], 10.0 * i, 1.0) for i, (_, (m, k, n)) in enumerate(truth)]
    told = Attribution(bucket, ran, 1)
    ((begin, end),) = told.windows
    parts = [told.part_of(Call("cpp_fused__softmax_3", [], start, 1.0)) for start in (begin - 5, begin + 5, end + 5)]
    assert parts == [Part.ATTENTION, Part.LAST, Part.ATTENTION]


@pytest.mark.parametrize(
    ("name", "shapes", "product"),
    [
        ("aten::mm", [(6, 4), (4, 5)], (6, 4, 5)),
        ("aten::addmm", [(5,), (6, 4), (4, 5)], (6, 4, 5)),
        ("mkldnn::_linear_pointwise", [(2, 3, 4), (5, 4), (5,)], (6, 4, 5)),
        ("aten::bmm", [(2, 6, 4), (2, 4, 5)], None),
    ],
)
def test_products_are_read_off_their_shapes(name: str, shapes: list[Any], product: Any) -> None:
    assert product_of(name, shapes) == product


class Event:
    """What `calls` reads of a profiler's event."""

    def __init__(self, name: str, device: Any, us: float = 0.0, **more: Any) -> None:
        self.name, self.device_type = name, device
        self.time_range = type("Range", (), {"start": 1.0, "end": 1.0 + us})
        self.cpu_parent = more.get("parent")
        self.kernels = [type("Kernel", (), {"name": n, "duration": d}) for n, d in more.get("kernels", ())]
        self.input_shapes = more.get("shapes", [])
        self.is_user_annotation = more.get("annotation", False)


def test_kernels_on_a_gpu_count_once_with_their_operations() -> None:
    """As the profiler hands them over: linked ones, one linked to nothing, and a range mirrored to the device."""
    cpu, cuda = calls.DeviceType.CPU, calls.DeviceType.CUDA
    outer = Event("smi_fast::patch_gather", cpu)
    events = [
        outer,
        Event("cudaLaunchKernel", cpu, parent=outer, kernels=[("gather_kernel", 4.0)]),
        Event("aten::addmm", cpu, shapes=[[9], [5, 4], [4, 9]], kernels=[("gemm", 10.0), ("range", 14.0)]),
        Event("gather_kernel", cuda, 4.0),
        Event("gemm", cuda, 10.0),
        Event("gemm", cuda, 6.0),
        Event("range", cuda, 20.0, annotation=True),
    ]
    found = calls.calls_on_gpu(events)
    kernels = [(call.name, call.us, call.parent and call.parent.name) for call in found if call.kernel]
    assert kernels == [
        ("gather_kernel", 4.0, "cudaLaunchKernel"),
        ("gemm", 10.0, "aten::addmm"),
        ("gemm", 6.0, None),
    ]
    assert sum(call.us for call in found) == 20
    told = Attribution(Bucket(DEIT["tiny"], 2, 9, torch.float32), found, 1)
    assert [told.part_of(call) for call in found if call.kernel] == [Part.GATHER, Part.OTHER, Part.OTHER]
    lines = {line.part: line for line in profile.table_of(found, told, 1, CEILINGS)}
    assert (lines[Part.GATHER].calls, lines[Part.OTHER].calls) == (1, 2)
    assert lines[Part.OTHER].ms == pytest.approx(16e-3)


def test_gaps_floors_and_columns() -> None:
    work = profile.Work(flops=int(2e8), bytes=int(1e6))
    assert CEILINGS.floor(Part.FC1, work) == (pytest.approx(2.0), "FLOPs")
    assert CEILINGS.floor(Part.HEAD, work) == (pytest.approx(4.0), "FLOPs")
    assert CEILINGS.floor(Part.GATHER, profile.Work(bytes=int(1e7))) == (pytest.approx(1.0), "bytes")
    lines = [
        profile.Line(part, 1, ms, 0.1, work, floor, "FLOPs")
        for part, ms, floor in ((Part.FC1, 5, 2), (Part.QKV, 1, 2), (Part.UPDATE, 9, 3), (Part.OTHER, 4, 0))
    ]
    words = profile.largest_gaps(lines)
    assert [one.partition(":")[0] for one in words] == ["TV, update", "other, framework", "fc1"]
    assert "3.000 ms above its floor of 2.000 ms, which its FLOPs set" in words[2]
    row = lines[0].row()
    assert (row["gap_ms"], row["gflop_per_s"], row["gb_per_s"]) == (3.0, 40.0, 0.2)


def test_more_patches_than_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        profile.parse(["--kept", "197"])
    assert "argument --kept: 197: deit_tiny_patch16_224 has 196 patches" in capsys.readouterr().err


def test_the_last_stage_is_the_default() -> None:
    assert profile.parse([]).kept == 46
