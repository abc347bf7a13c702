"""What only a device can show: no host in the step, captured graphs, attention back ends, large shapes."""

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from smi_fast.config import InversionConfig
from smi_fast.engine import Inverter
from smi_fast.engine.compiler import compile_step
from smi_fast.engine.runner import UNROLLED, Runner
from smi_fast.engine.state import State, uses_kernels
from smi_fast.engine.step import build_step
from smi_fast.kernels.common.grid import Grid, Moves
from smi_fast.kernels.patch_gather import patch_gather
from smi_fast.model import load_model
from smi_fast.model.attention import NAMES, attention, packed_attention, parts_of, why_not
from smi_fast.model.sparse_vit import SparseViT
from smi_fast.tuning.settings import Impl
from tests.states import fresh

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
CONFIG = InversionConfig(iterations=40, stops=((4, 0.3), (8, 0.4)), jitter=0.3)
SANITIZER_SECONDS = 150
OUT_OF_TIME = (124, 137)  # of `timeout`, where the group ended at once and where it had to be killed
MakeModel = Callable[..., SparseViT]


def at_second_stage(model: SparseViT) -> State:
    """A state after the first stop."""
    state = fresh(model, CONFIG, [0, 3, 4], [7, 0, 2])
    step = build_step(model, CONFIG)
    for _ in range(4):
        step(state)
    return state.stopped(CONFIG.strategy, 8, 4)


@pytest.fixture
def model(make_model: MakeModel) -> SparseViT:
    found = make_model(torch.float32).to("cuda")
    assert uses_kernels(found)
    return found


@pytest.mark.parametrize("impl", ["eager", "compiled"])
@torch.no_grad()
def test_the_step_neither_waits_nor_allocates(model: SparseViT, impl: str) -> None:
    state = at_second_stage(model)
    built = build_step(model, CONFIG)
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
def test_captured_iterations_equal_single_ones(model: SparseViT, impl: str) -> None:
    # a capture freezes what depends on a host value (a shift, a rate, an iteration), and replays would differ
    group = at_second_stage(model)
    built = build_step(model, CONFIG)
    step = compile_step(built, group) if impl == "compiled" else built
    plain, captured = Runner(step, group, None), Runner(step, group, torch.cuda.graph_pool_handle())
    for runner in (plain, captured):
        runner.load(group, 0)
    for _ in range(2 * UNROLLED):
        plain.advance(1)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        assert [captured.advance(2 * UNROLLED), captured.advance(UNROLLED)] == [UNROLLED, UNROLLED]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    assert captured.state.iteration.item() == plain.state.iteration.item() == 4 + 2 * UNROLLED
    for name, one, other in zip(vars(group), plain.state.tensors(), captured.state.tensors(), strict=False):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("impl", ["eager", "compiled"])
def test_graphs_change_no_image(model: SparseViT, impl: Impl) -> None:
    config = InversionConfig(iterations=57, stops=((14, 0.3), (33, 0.4)), jitter=0.3)
    with_graphs, without = (
        Inverter(model, config, batch_size=(2, 4, 4), impl=impl, cuda_graphs=graphs)([0, 1, 2, 3])
        for graphs in (True, False)
    )
    assert torch.equal(with_graphs.keep, without.keep)
    torch.testing.assert_close(with_graphs.pixels, without.pixels, rtol=0, atol=1e-3)


def test_deterministic_mode_gives_the_same_bytes(model: SparseViT) -> None:
    one, other = (
        Inverter(model, CONFIG, batch_size=2, impl="eager", deterministic=True)([0, 1, 2, 3]) for _ in range(2)
    )
    assert torch.equal(one.pixels, other.pixels)


def test_memory_runs_out_and_the_run_goes_on(model: SparseViT, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Inverter(model, CONFIG, batch_size=4, impl="eager")([0, 1, 2, 3])
    advance = Runner.advance

    def greedy(self: Runner, most: int) -> int:
        if len(self.state.keep) > 2:  # a real failure of the allocator, and what it leaves behind
            torch.empty(2**50, dtype=torch.uint8, device="cuda")
        return advance(self, most)

    monkeypatch.setattr(Runner, "advance", greedy)
    with pytest.warns(UserWarning, match="out of device memory"):
        halves = Inverter(model, CONFIG, batch_size=4, impl="eager")([0, 1, 2, 3])
    torch.testing.assert_close(halves.pixels, whole.pixels, rtol=0, atol=1e-3)


@pytest.mark.parametrize("choice", ["flash", "efficient", "math"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tokens", [47, 64, 67, 96, 138, 192, 197])
def test_attention_at_large_logits(tokens: int, dtype: torch.dtype, choice: str) -> None:
    draw = torch.Generator("cuda").manual_seed(tokens)
    three = [torch.randn(4, 3, tokens, 64, generator=draw, device="cuda").to(dtype) for _ in range(3)]
    three[0] = three[0] * 40
    three[1] = three[1] - 8  # logits down to several thousand below zero, and far apart
    leaves = [tensor.requires_grad_() for tensor in three]
    truth = torch.nn.functional.scaled_dot_product_attention(*(tensor.detach().double() for tensor in leaves))
    out = attention(*leaves, choice=choice)
    gradients = torch.autograd.grad(out.float().sum(), leaves)
    assert (out.double() - truth).norm() <= 0.1 * truth.norm()
    for gradient in gradients:
        assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("choice", [*NAMES, None])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("tokens", [47, 67, 96, 138, 197, 577])
def test_attention_choices(tokens: int, dtype: torch.dtype, choice: str | None) -> None:
    draw = torch.Generator("cuda").manual_seed(tokens)
    packed = 2 * torch.randn(4, tokens, 3, 3, 64, generator=draw, device="cuda").to(dtype)
    if choice is not None and (reason := why_not(choice, parts_of(packed)[0])):
        with pytest.raises(ValueError, match="cannot run"):
            packed_attention(packed, choice=choice)
        pytest.skip(reason)
    weights = torch.randn(4, 3, tokens, 64, generator=draw, device="cuda", dtype=torch.float64)

    def both_ways(packed: torch.Tensor, choice: str | None) -> tuple[torch.Tensor, torch.Tensor]:
        leaf = packed.detach().requires_grad_()
        out = packed_attention(leaf, choice=choice, scale=0.3)
        return out.detach(), torch.autograd.grad(out, leaf, weights.to(out.dtype))[0]

    truth, plain, found = both_ways(packed.double(), "plain"), both_ways(packed, "plain"), both_ways(packed, choice)
    for exact, eager, ours in zip(truth, plain, found, strict=True):
        assert ours.dtype == dtype
        error, allowed = (ours - exact).norm(), (eager - exact).norm()
        # sums in another order, of products in float32
        assert error <= 2 * allowed + 64 * torch.finfo(torch.float32).eps * exact.norm(), (error, allowed)


def test_large_shapes_are_exact() -> None:
    grid, batch, kept = Grid(224, 224, 16), 479, 46
    draw = torch.Generator("cuda").manual_seed(0)
    canvas = torch.randn(batch, 3, 224, 224, generator=draw, device="cuda")
    keep = torch.rand(batch, grid.patches, generator=draw, device="cuda").argsort(1)[:, :kept].sort(1).values
    shift = torch.randint(-28, 29, (batch, 2), generator=draw, device="cuda")
    flip = torch.rand(batch, generator=draw, device="cuda") < 0.5
    args = (canvas, keep, Moves(shift, flip), 16, torch.bfloat16)
    assert torch.equal(patch_gather(*args), patch_gather(*args, impl="torch"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_teacher_recognises_what_was_made(dtype: torch.dtype) -> None:
    model = load_model("demo", dtype=dtype, device="cuda")
    config = InversionConfig(iterations=400, stops=((50, 0.3), (100, 0.3), (200, 0.3), (300, 0.3)), seed=0)
    images = Inverter(model, config, batch_size=20, impl="eager")(list(range(10)) * 2)
    assert images.top1 >= 0.9
    assert torch.isfinite(images.pixels).all()


@pytest.mark.sanitizer
def test_sanitizer_finds_nothing() -> None:
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        pytest.skip("compute-sanitizer is not installed")
    root = Path(__file__).parent.parent
    tests = ["-m", "kernel", "tests/kernels", "-k", "8x12p4 or test_select_is_exact", "-p", "no:cacheprovider"]
    # a program of its own keeps the time: it ends the whole group, of which the sanitizer's own child is one
    limit = ["timeout", "--kill-after=5", str(SANITIZER_SECONDS)]
    command = [*limit, tool, "--error-exitcode", "9", sys.executable, "-m", "pytest", *tests]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    if done.returncode in OUT_OF_TIME:
        pytest.skip(f"not done within {SANITIZER_SECONDS} s")
    assert done.returncode == 0, done.stdout[-3000:]
