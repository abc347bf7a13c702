"""What the checks say of rows that are made up: no stand-in, no device."""

import pytest

from tests.offline_cuda.checks import empty_captures, faults_of_run, faults_of_step, live_graphs
from tests.offline_cuda.inductor import Watched
from tests.offline_cuda.recorder import Memory, Row
from tests.offline_cuda.table import kernels_of, table_of

KERNEL = Row("KERNEL", "triton_poi_fused_add_3", registers=32, spilled=0)
BEGIN, END = Row("CAPTURE", "begin", thread=7, capture=1), Row("CAPTURE", "end", thread=7, capture=1, nodes=1)


def test_a_clean_step_and_a_clean_run() -> None:
    step = [KERNEL, Row("PRODUCT", "GemmEx"), Row("COPY", "device to device"), Row("EVENT", "record")]
    assert faults_of_step(step) == []
    captured = Row("KERNEL", "adam_kernel", thread=7, capture=1)
    assert faults_of_run([BEGIN, captured, END, Row("WAIT", "cudaEventSynchronize", thread=7)], device=0) == []


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        (Row("WAIT", "cudaStreamSynchronize"), "cudaStreamSynchronize waits"),
        (Row("MALLOC", "cudaMalloc", bytes=512), "cudaMalloc in a step"),
        (Row("HOSTALLOC", "cudaHostAlloc"), "cudaHostAlloc in a step"),
        (Row("COPY", "pageable to device"), "copy pageable to device in a step"),
        (Row("KERNEL", "triton_red_fused_1", registers=255, spilled=48), "triton_red_fused_1 spills 48 bytes"),
        (Row("COMPLAINT", "grid or block out of range"), "grid or block out of range"),
    ],
    ids=lambda value: value.kind if isinstance(value, Row) else "",
)
def test_what_must_not_be_in_a_step(row: Row, fault: str) -> None:
    assert faults_of_step([KERNEL, row]) == [fault]


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        (Row("KERNEL", "adam_kernel", thread=7), "adam_kernel outside the capture of its thread"),
        (Row("WAIT", "cudaDeviceSynchronize", thread=7), "cudaDeviceSynchronize during a capture"),
        (Row("HOSTALLOC", "cudaHostAlloc", thread=7), "cudaHostAlloc during a capture"),
        (Row("MODULE", "cuModuleLoadData", thread=7), "cuModuleLoadData during a capture"),
        (Row("KERNEL", "adam_kernel", thread=7, capture=1, device=1), "KERNEL adam_kernel on device 1, not 0"),
        (Row("MALLOC", "cudaMalloc", thread=7, capture=1, device=1), "MALLOC cudaMalloc on device 1, not 0"),
        (Row("KERNEL", "big", thread=7, capture=1, spilled=16), "big spills 16 bytes"),
    ],
    ids=lambda value: value.kind if isinstance(value, Row) else "",
)
def test_what_must_not_be_in_a_run(row: Row, fault: str) -> None:
    assert faults_of_run([BEGIN, row, row, END], device=0) == [f"{fault} (2 times)"]


def test_other_threads_may_go_on_beside_a_capture() -> None:
    beside = [Row("KERNEL", "softmax", thread=8), Row("HOSTALLOC", "cudaHostAlloc", thread=8)]
    assert faults_of_run([BEGIN, *beside, END], device=0) == []


def test_graphs_are_counted_and_empty_captures_found() -> None:
    made, gone = Row("GRAPH", "instantiate"), Row("GRAPH", "destroy")
    assert live_graphs([made, made, Row("GRAPH", "launch"), gone]) == 1
    assert empty_captures([BEGIN, END]) == []
    assert empty_captures([BEGIN, Row("CAPTURE", "end", thread=7)]) == ["a capture of no launches"]


def test_the_numbers_in_names_make_no_difference() -> None:
    names = ("triton_poi_fused_add_3", "triton_poi_fused_add_11", "triton_poi_fused_mul_2")
    watched = Watched(bytes={names[0]: 1000, names[1]: 1000, names[2]: 1000})
    rows = [Row("KERNEL", name, registers=24, spilled=0) for name in names]
    found = {kernel.name: times for kernel, times in kernels_of(rows, watched).items()}
    assert found == {"triton_poi_fused_add": 2, "triton_poi_fused_mul": 1}
    memory = Memory(0, 0, 0)
    assert table_of("a step", rows, watched, memory) == table_of("a step", rows[::-1], watched, memory)


def test_a_spill_is_in_the_table() -> None:
    rows = [Row("KERNEL", "triton_red_fused_1", registers=255, spilled=48)]
    page = table_of("a step", rows, Watched(bytes={"triton_red_fused_1": 10**6}), Memory(0, 0, 0))
    assert "| bytes spilled | 48 |" in page
    assert "| `triton_red_fused` | 1 | 255 | 48 | 1.00 | 1.0 |" in page
