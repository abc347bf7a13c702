"""The rows of the waterfall: each adds one technique to the row before it.

A `Bench` builds what a row runs, at every stage of the schedule, and holds it against the truth.
"""

import copy
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness.engine import (
    REFERENCE,
    FixedStep,
    Stage,
    StageRunners,
    choose_attention,
    invert,
    short_stops,
)
from benchmarks.harness.models import DTYPES, MEAN, STD, build_vit, demo_vit, fixed_keep, relative_error, sparse
from benchmarks.harness.timing import seconds_each
from benchmarks.systems.loops import PublishedLoop, TunedLoop
from smi_fast.config import InversionConfig
from smi_fast.kernels.common.dispatch import KERNELS_VARIABLE
from smi_fast.model import load_model
from smi_fast.model.flops import iteration_flops
from smi_fast.model.fold import fold
from smi_fast.model.fp8 import to_fp8, why_not_fp8
from smi_fast.model.sparse_vit import SparseViT, ViTOutput
from smi_fast.model.spec import Needs
from smi_fast.storage.environment import peak_memory_bytes

LIMITS = {"fp32": 1e-3, "bf16": 0.1, "fp8": 0.3}  # relative error of the gradient


@dataclass(frozen=True)
class Technique:
    """A row; what it adds is named, the rest it has from the rows before."""

    name: str
    system: str = "ours"  # published, tuned, ours
    dtype: str = "bf16"  # fp32, bf16, fp8
    cls_only: bool = True  # the last block for the tokens that the head reads alone
    compiled: bool = True
    kernels: str = "auto"  # as ``SMI_FAST_KERNELS`` has it
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


_BARE = Technique("+ kept-first patchify", cls_only=False, compiled=False, kernels="torch", graphs=False)
_CLS = replace(_BARE, name="+ CLS-only last block", cls_only=True)
_COMPILED = replace(_CLS, name="+ compile", compiled=True)
# the kernels of pixels and ids first; those of the blocks join one by one
_PIXELS = replace(
    _COMPILED,
    name="+ Triton kernels",
    kernels="auto -mlp -add_layer_norm -first_failure -record_step -tile_attention",
    needs="cuda",
)
_TILE = replace(_PIXELS, name="+ tile attention", kernels="auto -mlp -add_layer_norm -first_failure -record_step")
_NOTES = replace(_TILE, name="+ a step's notes in two launches", kernels="auto -mlp -add_layer_norm")
_NORMS = replace(_NOTES, name="+ norms with their sums", kernels="auto -mlp")
_TRITON = replace(_NORMS, name="+ GELU in the products", kernels="auto")
_GRAPHS = replace(_TRITON, name="+ CUDA graphs", graphs=True)
_FOLDED = replace(_GRAPHS, name="+ folding", folded=True, needs="cpu")
_ATTENTION = replace(_FOLDED, name="+ attention choice", measured_attention=True, needs="cuda")
_BATCHES = replace(_ATTENTION, name="+ batch per bucket", full_batches=True, needs="cpu")
WATERFALL = (
    Technique("published loop", system="published", dtype="fp32"),
    Technique("tuned eager", system="tuned"),
    *(_BARE, _CLS, _COMPILED, _PIXELS, _TILE, _NOTES, _NORMS, _TRITON, _GRAPHS, _FOLDED, _ATTENTION, _BATCHES),
    replace(_BATCHES, name="+ fp8", dtype="fp8", needs="fp8"),
)


class WholeLastBlock(SparseViT):
    """A `SparseViT` without the cut in the last block."""

    def forward_patches(self, windows: Tensor, cells: Tensor, needs: Needs = Needs()) -> ViTOutput:  # noqa: B008 - frozen
        """With the outputs of the last block, which makes it run for all tokens."""
        return super().forward_patches(windows, cells, Needs((self.shape.depth - 1,)))


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
    """What a row runs, at each stage; lives in a process of its own, since it sets an environment variable."""

    def __init__(self, technique: Technique, model: str, batch: int, device: str, stages: Sequence[Stage]) -> None:
        os.environ[KERNELS_VARIABLE] = technique.kernels
        self.technique, self.device, self.stages = technique, device, stages
        self.vit = build_vit(model, device)
        self.truth = sparse(self.vit, model)
        self.shape = self.truth.shape
        self.batches = full_batches(batch, stages) if technique.full_batches else (batch,) * len(stages)
        self.keeps = [
            fixed_keep(batch, self.shape.grid.patches, stage.kept)
            for batch, stage in zip(self.batches, stages, strict=True)
        ]
        self.seconds_compile, self.error = 0.0, math.nan  # relative, of the gradient, once it is checked
        self.advance: Callable[[int, int], None] = self._ours() if technique.system == "ours" else self._yard_stick()

    def _yard_stick(self) -> Callable[[int, int], None]:
        """Builds one of the loops; returns what runs so many steps of a stage."""
        self.loop = self._loop(self.vit, self.batches[0], MEAN, STD)

        def advance(stage: int, steps: int) -> None:
            self.loop.set_keep(self.keeps[stage])
            for _ in range(steps):
                self.loop.step()

        return advance

    def _loop(self, vit: Any, batch: int, mean: Any, std: Any) -> PublishedLoop | TunedLoop:
        labels = torch.arange(batch) % vit.num_classes
        if self.technique.system == "published":
            return PublishedLoop(vit, labels, mean, std, 0)
        return TunedLoop(vit, labels, mean, std, 0, DTYPES[self.technique.dtype])

    def _ours(self) -> Callable[[int, int], None]:
        """Builds the engine's runners, as the inverter uses them; returns what runs so many steps of a stage."""
        technique = self.technique
        self.model = prepare(copy.deepcopy(self.truth), technique)
        if technique.measured_attention:
            tokens = [stage.kept + self.shape.prefix for stage in self.stages]
            choose_attention(self.model, dict(zip(tokens, self.batches, strict=True)))
        self.runners = StageRunners(self.model, InversionConfig(), self.keeps, technique.compiled, technique.graphs)
        self.seconds_compile = self.runners.seconds_compile
        return self.runners.advance

    def warm_up(self) -> None:
        """Two iterations of each stage."""
        for stage in range(len(self.stages)):
            self.seconds(stage, 2)

    def seconds(self, stage: int, steps: int) -> float:
        """Of one iteration of a stage."""
        return seconds_each(lambda: self.advance(stage, steps), 1, self.device) / steps

    def flops(self) -> list[int]:
        """True FLOPs of one iteration of each stage on its whole batch."""
        each = (iteration_flops(self.shape, stage.kept) for stage in self.stages)
        return [batch * flops for batch, flops in zip(self.batches, each, strict=True)]

    def memory(self) -> int:
        """Most bytes so far."""
        return peak_memory_bytes(torch.device(self.device))

    def check(self) -> float:
        """The gradient of the last stage, images not moved, against float32: relative error.

        Raises:
            AssertionError: it is larger than the dtype allows.
        """
        keep = self.keeps[-1].to(self.device)
        draw = torch.Generator().manual_seed(7)
        canvas = torch.randn(len(keep), 3, self.shape.grid.height, self.shape.grid.width, generator=draw)
        canvas = canvas.to(self.device)
        if self.technique.system == "ours":
            config, found = InversionConfig(), self.runners.gradient(len(self.stages) - 1, canvas)
        else:
            self.loop.set_keep(keep)
            config, found = REFERENCE, self.loop.gradient(canvas)
        error = relative_error(found, FixedStep(self.truth, config, keep, "eager").gradient(canvas))
        limit = LIMITS[self.technique.dtype]
        assert error < limit, f"{self.technique.name}: relative error {error:.3g} of the gradient, limit {limit}"
        self.error = error
        return error

    def quality(self, iterations: int) -> dict[str, float]:
        """A short inversion of the bundled teacher by the same means: final loss, and top-1 in float32."""
        stops, labels = short_stops(iterations), list(range(10)) * 2
        teacher = load_model("demo", device=self.device)
        if self.technique.system == "ours":
            config = InversionConfig(iterations=iterations, stops=stops, seed=0)
            model = prepare(copy.deepcopy(teacher), self.technique)
            how = {"impl": "compiled" if self.technique.compiled else "eager", "cuda_graphs": self.technique.graphs}
            images, _ = invert(model, config, labels, batch_size=20, **how)
            canvas, keep = images.pixels.to(self.device), images.keep.to(self.device)
        else:
            canvas, keep = self._loop_images(labels, iterations, stops)
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
        return {
            "batches": self.batches,
            "flops": self.flops(),
            "error": self.error,
            "seconds_compile": self.seconds_compile,
        }
