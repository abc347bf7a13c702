"""The systems of the engine's benchmark at a fixed set of patches: the yard-stick loops and our step."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness.engine import REFERENCE, FixedStep
from benchmarks.harness.models import DTYPES, MEAN, STD, build_model, build_vit, fixed_keep, sparse
from benchmarks.harness.timing import seconds_each
from benchmarks.systems.loops import InversionLoop, PublishedLoop, TunedLoop
from smi_fast.config import InversionConfig
from smi_fast.model.flops import iteration_flops
from smi_fast.storage.environment import peak_memory_bytes


@dataclass(frozen=True)
class System:
    """What is timed, in which compute dtype."""

    name: str  # published, tuned, eager, compiled
    dtype: str

    def __str__(self) -> str:
        return f"{self.name} {self.dtype}"


@dataclass(frozen=True)
class Setting:
    """What all systems have in common."""

    model: str
    batch: int
    device: str


class FixedSystem:
    """A system that is set up, and was timed once; it lives in a process of its own."""

    def __init__(self, system: System, setting: Setting, kept: int) -> None:
        self.setting, self.kept = setting, kept
        if system.name in ("published", "tuned"):
            vit = build_vit(setting.model, setting.device)
            loop = loop_of(system, vit, setting.batch)
            loop.set_keep(fixed_keep(setting.batch, loop.keep.shape[1], kept))
            self.runs: FixedStep | InversionLoop = loop
            self.judged: FixedStep | InversionLoop = loop
            self.shape = sparse(vit, setting.model).shape
        else:
            model = build_model(setting.model, setting.device, DTYPES[system.dtype])
            keep = fixed_keep(setting.batch, model.grid.patches, kept)
            self.runs = FixedStep(model, InversionConfig(), keep, system.name)
            # an eager row is compared with the yard-stick, a compiled one as it is timed
            self.judged = FixedStep(model, REFERENCE, keep, "eager") if system.name == "eager" else self.runs
            self.shape = model.shape
        self.time(1)

    def flops(self) -> int:
        """Of one image in one iteration."""
        return iteration_flops(self.shape, self.kept)

    def gradient(self, canvas: Any) -> Any:
        """``[B, 3, H, W]`` as NumPy arrays: of the loss at that canvas, images not moved."""
        return self.judged.gradient(torch.from_numpy(canvas).to(self.setting.device)).cpu().numpy()

    def time(self, steps: int) -> float:
        """Seconds of an iteration over ``steps``; ours runs as in the inverter, on CUDA in captured graphs."""
        if isinstance(self.runs, FixedStep):
            return self.runs.seconds(steps)
        return seconds_each(self.runs.step, steps, self.setting.device)

    def memory(self) -> int:
        """Most bytes so far."""
        return peak_memory_bytes(torch.device(self.setting.device))


def loop_of(system: System, vit: Any, batch: int) -> PublishedLoop | TunedLoop:
    """A yard-stick loop with a label an image."""
    labels = torch.arange(batch) % vit.num_classes
    if system.name == "published":
        return PublishedLoop(vit, labels, MEAN, STD, 0)
    return TunedLoop(vit, labels, MEAN, STD, 0, DTYPES[system.dtype])


def paper_gradient(setting: Setting, kept: int, canvas: Tensor) -> Tensor:
    """``[B, 3, H, W]`` on the host: what compiled rows must find, of the eager step in float32."""
    model = build_model(setting.model, setting.device, torch.float32)
    step = FixedStep(model, InversionConfig(), fixed_keep(setting.batch, model.grid.patches, kept), "eager")
    return step.gradient(canvas.to(setting.device)).cpu()
