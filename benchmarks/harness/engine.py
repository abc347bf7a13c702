"""Our engine's insides, for timing single steps: nothing else in ``benchmarks/`` knows them."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness.timing import seconds_each
from smi_fast.config import InversionConfig
from smi_fast.device import current
from smi_fast.engine import Inverter
from smi_fast.engine.compiler import compile_step
from smi_fast.engine.randomness import draw
from smi_fast.engine.runner import UNROLLED, Runner, Runners, Source
from smi_fast.engine.state import State, new_state
from smi_fast.engine.step import build_step
from smi_fast.images import SparseImages
from smi_fast.kernels.patch_cells import put_patches_
from smi_fast.method.strategies.stops import PAPER_STOPS
from smi_fast.model.sparse_vit import SparseViT
from smi_fast.schedule import Stage, plan_stages
from smi_fast.tuning.attention import tune_attention

Run = Callable[[State], None]
PAPER_ITERATIONS = 4000
# what the yard-stick loops compute, with images that are not moved
REFERENCE = InversionConfig(preset="reference", jitter=0.0, flip=False)


def stages_of(patches: int, stops: Sequence[tuple[int, float]], iterations: int) -> tuple[Stage, ...]:
    """The stages of a schedule; raises ``ValueError`` where it breaks a rule."""
    return plan_stages(patches, tuple(stops), iterations)


def paper_stages(patches: int) -> tuple[Stage, ...]:
    """Those of the paper."""
    return stages_of(patches, PAPER_STOPS, PAPER_ITERATIONS)


def short_stops(iterations: int) -> tuple[tuple[int, float], ...]:
    """Four stops for a short run, at 1, 2, 4 and 6 eighths of it."""
    return tuple((iterations * eighths // 8, 0.3) for eighths in (1, 2, 4, 6))


def state_at(model: SparseViT, config: InversionConfig, keep: Tensor) -> State:
    """A fresh state as a stop leaves it that keeps ``keep [B, K]``; image ``b`` has label ``b`` (mod the classes)."""
    keep = keep.to(model.device)
    images = range(len(keep))
    draws = draw(config, images, model.grid)
    state = new_state(model, config, [b % model.shape.num_classes for b in images], draws)
    if keep.shape[1] < model.grid.patches:
        state.scores.scatter_(1, keep, 1.0)
        state = state.stopped(config.strategy, keep.shape[1], 0)
    return state


def still_at(model: SparseViT, config: InversionConfig, keep: Tensor, canvas: Tensor) -> State:
    """`state_at` with the pixels of ``canvas [B, 3, H, W]``, which are not moved."""
    state = state_at(model, config, keep)
    state.jitter.zero_()
    for target in (state.canvas, state.spare):
        if target is not None:
            target.copy_(canvas)
    return state


def gradient_of(state: State, config: InversionConfig) -> Tensor:
    """``[B, 3, H, W]``: what the first step after `still_at` found, 0 at patches that are not updated."""
    gradient = torch.zeros_like(state.canvas)
    put_patches_(gradient, state.updated, state.exp_avg / (1 - config.betas[0]))
    return gradient


def make_step(model: SparseViT, config: InversionConfig, state: State, impl: str) -> Run:
    """The step of a configuration, for the shapes of ``state`` where ``impl`` is "compiled"."""
    step = build_step(model, config)
    return compile_step(step, state) if impl == "compiled" else step


def advance(runner: Runner, steps: int) -> None:
    """So many iterations, as the inverter runs them; on a GPU they are launched, not waited for."""
    runner.state.iteration.zero_()  # the schedule's tables end some time
    with current(runner.state.canvas.device):
        while steps > 0:
            steps -= runner.advance(steps)


class FixedStep:
    """Our step at a fixed set of patches.

    Args:
        model, config: what it is the step of.
        keep: ``[B, K]`` int64, ascending ids.
        impl: "eager" or "compiled".
    """

    def __init__(self, model: SparseViT, config: InversionConfig, keep: Tensor, impl: str) -> None:
        self.model, self.config, self.keep = model, config, keep
        self.state = state_at(model, config, keep)
        self.run = make_step(model, config, self.state, impl)
        self._runner: Runner | None = None  # on CUDA, once it is timed

    @torch.no_grad()
    def step(self) -> None:
        """One iteration, launched operation by operation."""
        self.run(self.state)

    def seconds(self, steps: int) -> float:
        """Of one iteration over ``steps``, run as the inverter runs them.

        On CUDA these are whole captured graphs, so ``steps`` is rounded up to what they hold: launched one by one, the
        kernels of a step would measure the host. The first call captures.
        """
        if self.model.device.type == "cpu":
            return seconds_each(self.step, steps, "cpu")
        whole = -(-steps // UNROLLED) * UNROLLED
        return seconds_each(partial(self._replay, whole), 1, str(self.model.device)) / whole

    @torch.no_grad()
    def _replay(self, steps: int) -> None:
        if self._runner is None:
            with current(self.model.device):
                self._runner = Runner(self.run, self.state, torch.cuda.graph_pool_handle())
            self._runner.load(self.state, 0)
        advance(self._runner, steps)

    @torch.no_grad()
    def gradient(self, canvas: Tensor) -> Tensor:
        """``[B, 3, H, W]``: of the loss at that canvas, images not moved."""
        state = still_at(self.model, self.config, self.keep, canvas)
        self.run(state)
        return gradient_of(state, self.config)

    @torch.no_grad()
    def check(self) -> "FixedStep":
        """Hold the losses of one step on a copy of the state against the eager step's.

        Raises:
            AssertionError: a loss is not finite, or the two differ.
        """
        ours, eager = self.state.clone(), self.state.clone()
        self.run(ours)
        make_step(self.model, self.config, eager, "eager")(eager)
        assert bool(ours.losses.isfinite().all()), f"losses are not finite: {ours.losses.tolist()}"
        error = float((ours.losses - eager.losses).norm() / eager.losses.norm())
        limit = 3e-2 if self.model.dtype == torch.bfloat16 else 1e-4
        assert error < limit, f"losses differ from the eager step's by a share of {error:.2g}, limit {limit}"
        return self


class StageRunners:
    """The engine's own runners, those that the inverter uses: one a stage, each with images of its own.

    Args:
        model, config: what they run.
        keeps: ``[B, K]`` of each stage.
        compiled: by inductor.
        graphs: several iterations in a CUDA graph, where there is a GPU.
    """

    @torch.no_grad()
    def __init__(
        self, model: SparseViT, config: InversionConfig, keeps: Sequence[Tensor], compiled: bool, graphs: bool
    ) -> None:
        self.model, self.config, self.keeps = model, config, keeps
        runners = Runners(Source(model, config, compiled, graphs))
        self._runners = []
        for keep in keeps:
            state = state_at(model, config, keep)
            runner = runners.of(state, 0, len(keep))
            runner.load(state, 0)
            self._runners.append(runner)
        self.seconds_compile = runners.seconds_compile

    @torch.no_grad()
    def advance(self, stage: int, steps: int) -> None:
        """So many iterations of a stage; on a GPU they are launched, not waited for."""
        advance(self._runners[stage], steps)

    @torch.no_grad()
    def gradient(self, stage: int, canvas: Tensor) -> Tensor:
        """``[B, 3, H, W]``: of the loss at that canvas, images not moved; the stage goes on from there."""
        runner, state = self._runners[stage], still_at(self.model, self.config, self.keeps[stage], canvas)
        runner.load(state, 0)
        runner.advance(1)
        found = gradient_of(runner.state, self.config)
        runner.load(state, 0)
        return found


def choose_attention(model: SparseViT, batches: dict[int, int]) -> None:
    """Time the kinds of attention, and leave the model with the fastest; ``batches``: by number of tokens."""
    with torch.enable_grad():
        tune_attention(model, batches, 5, print)


def invert(
    model: SparseViT, config: InversionConfig, labels: Sequence[int], **options: Any
) -> tuple[SparseImages, float]:
    """Images of the labels, and the seconds they took without compilation; ``options`` of `Inverter`."""
    inverter = Inverter(model, config, **options)
    images = inverter(list(labels))
    return images, inverter.stats.seconds_run
