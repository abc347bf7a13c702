"""The rows of the waterfall: each adds one technique to the row before it.

A `Bench` builds what a row runs, at every stage of the schedule, and holds it against the truth.
"""

import copy
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.baseline import InversionLoop, PublishedLoop, TunedLoop
from benchmarks.common import DTYPES, MEAN, STD, build_vit, demo_vit, fixed_keep, state_at, synchronize
from smi_fast.config import InversionConfig
from smi_fast.engine import Inverter
from smi_fast.engine.buckets import Buckets, Recipe
from smi_fast.engine.runner import Runner
from smi_fast.engine.state import State
from smi_fast.engine.step import build_step
from smi_fast.kernels.common.dispatch import KERNELS_VARIABLE
from smi_fast.model import load_model
from smi_fast.model.flops import iteration_flops
from smi_fast.model.fold import fold
from smi_fast.model.fp8 import to_fp8, why_not_fp8
from smi_fast.model.from_timm import from_timm
from smi_fast.model.sparse_vit import SparseViT
from smi_fast.model.spec import ModelInfo
from smi_fast.priors import priors_of
from smi_fast.schedule import Stage
from smi_fast.tuning.attention import tune_attention

LIMITS = {"fp32": 1e-3, "bf16": 0.1, "fp8": 0.3}  # relative error of the gradient


@dataclass(frozen=True)
class Technique:
    """A row; what it adds is named, the rest it has from the rows before."""

    name: str
    system: str = "ours"  # published, tuned, ours
    dtype: str = "bf16"  # fp32, bf16, fp8
    cls_only: bool = True  # the last block for the tokens that the head reads alone
    compiled: bool = True
    kernels: bool = True
    graphs: bool = True
    folded: bool = False
    measured_attention: bool = False
    full_batches: bool = False
    needs: str = "cpu"  # cuda, fp8: what the device must have

    def why_not(self, device: torch.device) -> str | None:
        """None where the row can be had on a device."""
        if self.needs == "cuda" and device.type != "cuda":
            return "needs a GPU"
        return why_not_fp8(device) if self.needs == "fp8" else None


_BARE = Technique("+ kept-first patchify", cls_only=False, compiled=False, kernels=False, graphs=False)
_CLS = replace(_BARE, name="+ CLS-only last block", cls_only=True)
_COMPILED = replace(_CLS, name="+ compile", compiled=True)
_TRITON = replace(_COMPILED, name="+ Triton kernels", kernels=True, needs="cuda")
_GRAPHS = replace(_TRITON, name="+ CUDA graphs", graphs=True)
_FOLDED = replace(_GRAPHS, name="+ folding", folded=True, needs="cpu")
_ATTENTION = replace(_FOLDED, name="+ attention choice", measured_attention=True, needs="cuda")
_BATCHES = replace(_ATTENTION, name="+ batch per bucket", full_batches=True, needs="cpu")
WATERFALL = (
    Technique("published loop", system="published", dtype="fp32"),
    Technique("tuned eager", system="tuned"),
    *(_BARE, _CLS, _COMPILED, _TRITON, _GRAPHS, _FOLDED, _ATTENTION, _BATCHES),
    replace(_BATCHES, name="+ fp8", dtype="fp8", needs="fp8"),
)


class WholeLastBlock(SparseViT):
    """A `SparseViT` without the cut in the last block."""

    def _last_block(self, x: Tensor, choice: str | None) -> tuple[Tensor, Tensor]:
        last: Any = self.blocks[-1]
        return last.forward_with_scores(x, self.shape.prefix, choice)


def full_batches(batch: int, stages: Sequence[Stage]) -> tuple[int, ...]:
    """For each stage the largest ``batch * 2^n`` that has no more tokens in work than the first stage has."""
    return tuple(batch * 2 ** int(math.log2(stages[0].kept / stage.kept)) for stage in stages)


def prepare(model: SparseViT, technique: Technique) -> SparseViT:
    """The model as a row runs it, from one in float32."""
    if technique.folded:
        model = fold(model)
    model = model.with_dtype(DTYPES["fp32" if technique.dtype == "fp32" else "bf16"])
    if technique.dtype == "fp8":
        model = to_fp8(model)
    if not technique.cls_only:
        model.__class__ = WholeLastBlock
    return model


class Bench:
    """What a row runs, at each stage; used in a process of its own."""

    def __init__(self, technique: Technique, model: str, batch: int, device: str, stages: Sequence[Stage]) -> None:
        os.environ[KERNELS_VARIABLE] = "auto" if technique.kernels else "torch"
        self.technique, self.device, self.stages = technique, device, stages
        self.vit = build_vit(model, device)
        self.info = ModelInfo(model, "", MEAN, STD)
        self.truth = from_timm(self.vit, self.info)
        self.shape = self.truth.shape
        self.batches = full_batches(batch, stages) if technique.full_batches else (batch,) * len(stages)
        self.seconds_compile = 0.0
        self.advance: list[Callable[[int], None]] = []
        build = self._ours if technique.system == "ours" else self._loops
        build()

    def _loops(self) -> None:
        """The yard-stick loops."""
        self.loop = self._loop(self.vit, self.batches[0], MEAN, STD)
        for stage in self.stages:
            keep = fixed_keep(self.batches[0], self.shape.grid.patches, stage.kept)

            def advance(steps: int, keep: Tensor = keep) -> None:
                self.loop.set_keep(keep)
                for _ in range(steps):
                    self.loop.step()

            self.advance.append(advance)

    def _loop(self, vit: Any, batch: int, mean: Any, std: Any) -> InversionLoop:
        labels = torch.arange(batch) % vit.num_classes
        if self.technique.system == "published":
            return PublishedLoop(vit, labels, mean, std, 0)
        return TunedLoop(vit, labels, mean, std, 0, DTYPES[self.technique.dtype])

    @torch.no_grad()
    def _ours(self) -> None:
        """The engine's runners, as the inverter uses them."""
        technique, config = self.technique, InversionConfig()
        self.model = prepare(copy.deepcopy(self.truth), technique)
        if technique.measured_attention:
            tokens = [stage.kept + self.shape.prefix for stage in self.stages]
            with torch.enable_grad():
                tune_attention(self.model, dict(zip(tokens, self.batches, strict=True)), 5, print)
        recipe = Recipe(self.model, config, priors_of(config), technique.compiled, technique.graphs)
        buckets = Buckets(recipe)
        self.runners: list[Runner] = []
        for batch, stage in zip(self.batches, self.stages, strict=True):
            state = state_at(self.model, config, fixed_keep(batch, self.shape.grid.patches, stage.kept))
            runner = buckets.runner(state, 0, batch)
            runner.load(state, 0)
            self.runners.append(runner)
            self.advance.append(lambda steps, runner=runner: self._run(runner, steps))
        self.seconds_compile = buckets.seconds_compile

    @staticmethod
    @torch.no_grad()
    def _run(runner: Runner, steps: int) -> None:
        runner.state.iteration.zero_()  # the schedule's tables end some time
        while steps > 0:
            steps -= runner.advance(steps)

    def milliseconds(self, stage: int, steps: int) -> float:
        """Of one iteration of a stage."""
        begin = time.perf_counter()
        self.advance[stage](steps)
        synchronize(self.device)
        return (time.perf_counter() - begin) / steps * 1e3

    def flops(self, stage: int) -> int:
        """True FLOPs of one iteration of a stage on its whole batch."""
        return self.batches[stage] * iteration_flops(self.shape, self.stages[stage].kept)

    def check(self) -> float:
        """The gradient of the last stage against float32: relative error.

        Raises:
            AssertionError: it is larger than the dtype allows.
        """
        keep = fixed_keep(self.batches[-1], self.shape.grid.patches, self.stages[-1].kept)
        draw = torch.Generator().manual_seed(7)
        canvas = torch.randn(len(keep), 3, self.shape.grid.height, self.shape.grid.width, generator=draw)
        found, exact = self._gradients(keep.to(self.device), canvas.to(self.device))
        error = float((found - exact).norm() / exact.norm())
        limit = LIMITS[self.technique.dtype]
        assert error < limit, f"{self.technique.name}: relative error {error:.3g} of the gradient, limit {limit}"
        return error

    @torch.no_grad()
    def _gradients(self, keep: Tensor, canvas: Tensor) -> tuple[Tensor, Tensor]:
        """This row's and the true one, of the updated patches, images not moved."""
        if self.technique.system != "ours":
            config = InversionConfig(preset="reference", jitter=0.0, flip=False)
            exact = self._fresh(config, keep, canvas)
            build_step(self.truth, config, priors_of(config))(exact)
            self.loop.set_keep(keep)
            self.loop.canvas.copy_(canvas)
            with torch.enable_grad():
                self.loop.step(jitter=False)
            assert self.loop.canvas.grad is not None
            cells = self.loop.canvas.grad.unflatten(3, (-1, self.shape.grid.patch))
            cells = cells.unflatten(2, (-1, self.shape.grid.patch)).permute(0, 2, 4, 1, 3, 5).flatten(1, 2)
            return cells, exact.first / (1 - config.betas[0])
        config = InversionConfig()
        exact, ours = self._fresh(config, keep, canvas), self._fresh(config, keep, canvas)
        build_step(self.truth, config, priors_of(config))(exact)
        runner = self.runners[-1]
        runner.load(ours, 0)
        runner.advance(1)
        found = runner.state.first.clone()
        runner.load(ours, 0)
        return found, exact.first

    def _fresh(self, config: InversionConfig, keep: Tensor, canvas: Tensor) -> State:
        state = state_at(self.truth, config, keep)
        state.jitter.zero_()
        state.canvas.copy_(canvas)
        if state.spare is not None:
            state.spare.copy_(canvas)
        return state

    def quality(self, iterations: int) -> dict[str, float]:
        """A short inversion of the bundled teacher by the same means: final loss, and top-1 in float32."""
        stops = tuple((iterations * share // 8, 0.3) for share in (1, 2, 4, 6))
        teacher, labels = load_model("demo", device=self.device), list(range(10)) * 2
        if self.technique.system != "ours":
            canvas, keep = self._loop_images(labels, iterations, stops)
        else:
            config = InversionConfig(iterations=iterations, stops=stops, seed=0)
            model = prepare(copy.deepcopy(teacher), self.technique)
            inverter = Inverter(
                model,
                config,
                batch_size=20,
                impl="compiled" if self.technique.compiled else "eager",
                cuda_graphs=self.technique.graphs,
            )
            images = inverter(labels)
            canvas, keep = images.pixels.to(self.device), images.keep.to(self.device)
        with torch.no_grad():
            logits, _ = teacher(canvas, keep)
        targets = torch.tensor(labels, device=logits.device)
        loss = torch.nn.functional.cross_entropy(logits, targets)
        return {"final_loss": float(loss), "teacher_top1": float((logits.argmax(1) == targets).float().mean())}

    def _loop_images(self, labels: list[int], iterations: int, stops: Any) -> tuple[Tensor, Tensor]:
        vit, mean, std = demo_vit(self.device)
        loop = self._loop(vit, len(labels), mean, std)
        loop.labels = torch.tensor(labels, device=self.device)
        loop.run(iterations, stops)
        return loop.canvas.detach().float(), loop.keep

    def facts(self) -> dict[str, Any]:
        """For the report."""
        return {**asdict(self.technique), "batches": self.batches, "seconds_compile": self.seconds_compile}
