"""A kernel launch as a value: what runs, on which arguments, in which configuration.

Launchers build a `Launch`; the op runs it. Since it is a value, the ahead-of-time tests compile exactly what an op
would launch, from tensors without data and on a machine without a GPU.
"""

import contextlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Arguments = dict[str, Tensor | int | float | None]


@dataclass(frozen=True)
class Config:
    """How a kernel is cut up: ``block`` elements per program (see each kernel), ``warps`` of 32 threads."""

    block: int
    warps: int


@dataclass(frozen=True)
class ProductConfig(Config):
    """Of a matrix product: a program computes ``block`` rows and ``columns`` of it, ``depth`` terms in a step.

    ``stages`` steps are in flight.
    """

    columns: int
    depth: int
    stages: int

    @property
    def shared(self) -> int:
        """Bytes of shared memory that hold the operands in flight, of 16 bits."""
        return 2 * self.stages * self.depth * (self.block + self.columns)


@dataclass(frozen=True)
class Launch:
    """One launch; ``arguments`` and ``constants`` (``tl.constexpr``) by the kernel's parameter names."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: Arguments
    constants: dict[str, Any]
    warps: int

    @property
    def device(self) -> torch.device:
        """Where the arguments are."""
        return next(a.device for a in self.arguments.values() if isinstance(a, Tensor))

    def run(self) -> None:
        """Launch on the device of the arguments."""
        guard = torch.cuda.device(self.device) if self.device.type == "cuda" else contextlib.nullcontext()
        with guard:
            self.kernel[self.grid](**self.arguments, **self.constants, **self.options())

    def options(self) -> dict[str, Any]:
        """Compiler options; fused multiply-add is named, since Triton's default for it is about to change."""
        return {"num_warps": self.warps, "enable_fp_fusion": True}
