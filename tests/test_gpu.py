"""What only a device can show: no host in the step, captured graphs, attention back ends, large shapes."""

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from smi_fast.config import InversionConfig
from smi_fast.engine import Inverter
from smi_fast.engine.compiler import compile_step
from smi_fast.engine.state import State, new_state, stop_patches, uses_kernels
from smi_fast.engine.step import build_step
from smi_fast.kernels.grid import Grid
from smi_fast.kernels.patch_gather import patch_gather
from smi_fast.model import load_model
from smi_fast.model.attention import CUDA_BACKENDS, attention
from smi_fast.model.sparse_vit import SparseViT
from smi_fast.priors import priors_of

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
CONFIG = InversionConfig(iterations=40, stops=((4, 0.3), (8, 0.4)), jitter=0.3)
MakeModel = Callable[..., SparseViT]


def at_second_stage(model: SparseViT) -> State:
    """A state after the first stop."""
    state = new_state(model, CONFIG, [0, 3, 4], [7, 0, 2], len(priors_of(CONFIG)))
    step = build_step(model, CONFIG, priors_of(CONFIG))
    for _ in range(4):
        step(state)
    return stop_patches(state, 8, True)


@pytest.fixture
def model(make_model: MakeModel) -> SparseViT:
    found = make_model(torch.float32).to("cuda")
    assert uses_kernels(found)
    return found


@pytest.mark.parametrize("impl", ["eager", "compiled"])
@torch.no_grad()
def test_the_step_neither_waits_nor_allocates(model: SparseViT, impl: str) -> None:
    state = at_second_stage(model)
    built = build_step(model, CONFIG, priors_of(CONFIG))
    step = compile_step(built, state) if impl == "compiled" else built
    for _ in range(4):
        step(state)
    torch.cuda.synchronize()
    before, held = torch.cuda.memory_stats(), torch.cuda.memory_allocated()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(6):
            step(state)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    after = torch.cuda.memory_stats()
    for key in ("segment.all.allocated", "num_alloc_retries", "reserved_bytes.all.current"):
        assert after[key] == before[key], key
    assert torch.cuda.memory_allocated() == held


@pytest.mark.parametrize("impl", ["eager", "compiled"])
@torch.no_grad()
def test_a_captured_step_equals_the_step(model: SparseViT, impl: str) -> None:
    # what hangs on a host value (a shift, a rate, an iteration) would be frozen in a capture, and replays would differ
    state = at_second_stage(model)
    built = build_step(model, CONFIG, priors_of(CONFIG))
    step = compile_step(built, state) if impl == "compiled" else built
    plain, captured = state.clone(), state.clone()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):  # two steps, after which the canvases are back in their places
            step(state)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(captured)
        step(captured)
    for _ in range(5):
        graph.replay()
    for _ in range(10):
        step(plain)
    torch.cuda.synchronize()
    assert captured.iteration.item() == plain.iteration.item() == 14
    for name, one, other in zip(vars(plain), plain.tensors(), captured.tensors(), strict=False):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("backend", CUDA_BACKENDS, ids=lambda backend: backend.name)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tokens", [47, 64, 67, 96, 138, 192, 197])
def test_attention_back_ends(tokens: int, dtype: torch.dtype, backend: SDPBackend) -> None:
    draw = torch.Generator("cuda").manual_seed(tokens)
    three = [torch.randn(4, 3, tokens, 64, generator=draw, device="cuda").to(dtype) for _ in range(3)]
    three[0] = three[0] * 40
    three[1] = three[1] - 8  # logits down to several thousand below zero, and far apart
    leaves = [tensor.requires_grad_() for tensor in three]
    truth = torch.nn.functional.scaled_dot_product_attention(*(tensor.detach().double() for tensor in leaves))
    with sdpa_kernel(backend):
        out = torch.nn.functional.scaled_dot_product_attention(*leaves)
        gradients = torch.autograd.grad(out.float().sum(), leaves)
    assert (out.double() - truth).norm() <= 0.1 * truth.norm()
    for gradient in gradients:
        assert torch.isfinite(gradient).all()
    assert torch.isfinite(attention(*leaves)).all()


def test_large_shapes_are_exact() -> None:
    grid, batch, kept = Grid(224, 224, 16), 479, 46
    draw = torch.Generator("cuda").manual_seed(0)
    canvas = torch.randn(batch, 3, 224, 224, generator=draw, device="cuda")
    keep = torch.rand(batch, grid.patches, generator=draw, device="cuda").argsort(1)[:, :kept].sort(1).values
    shift = torch.randint(-28, 29, (batch, 2), generator=draw, device="cuda")
    flip = torch.rand(batch, generator=draw, device="cuda") < 0.5
    args = (canvas, keep, shift, flip, 16, torch.bfloat16)
    assert torch.equal(patch_gather(*args), patch_gather(*args, impl="torch"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_teacher_recognises_what_was_made(dtype: torch.dtype) -> None:
    model = load_model("demo", dtype=dtype, device="cuda")
    config = InversionConfig(iterations=400, stops=((50, 0.3), (100, 0.3), (200, 0.3), (300, 0.3)), seed=0)
    images = Inverter(model, config, batch_size=20, impl="eager")(list(range(10)) * 2)
    assert images.top1 >= 0.9
    assert torch.isfinite(images.pixels).all()


def test_sanitizer_finds_nothing() -> None:
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        pytest.skip("compute-sanitizer is not installed")
    root = Path(__file__).parent.parent
    tests = ["-m", "kernel", "tests/kernels", "-k", "8x12p4 or test_select_is_exact", "-p", "no:cacheprovider"]
    command = [tool, "--error-exitcode", "9", sys.executable, "-m", "pytest", *tests]
    try:
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=150, check=False)
    except subprocess.TimeoutExpired:
        pytest.skip("not done within 150 s")
    assert done.returncode == 0, done.stdout[-3000:]
