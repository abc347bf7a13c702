"""What kernels move, seen while inductor writes its own and we launch ours; and what ptxas made of inductor's."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pytest
import torch._inductor.config as inductor_config
from torch import Tensor
from torch._inductor.codegen.triton import TritonScheduling
from torch._inductor.runtime.triton_heuristics import CachingAutotuner

from smi_fast.kernels.common.launch import Launch


@dataclass(frozen=True)
class Candidate:
    """A launch configuration that inductor compiled."""

    config: str
    registers: int  # per thread
    spilled: int  # words per thread


class Work(NamedTuple):
    """What one of our launches does."""

    bytes: int  # of its tensors, each read or written once; the operands and the result of a product are left out
    flops: int  # of a product, else 0


@dataclass
class Watched:
    """By the name of a kernel."""

    bytes: dict[str, int] = field(default_factory=dict)  # read and written by one launch, each value once
    launched: dict[str, list[Work]] = field(default_factory=dict)  # each launch of ours
    timed: dict[str, list[Candidate]] = field(default_factory=dict)  # where inductor would choose one by timing


OPERANDS = ("x", "d_out", "weight", "bias", "hidden", "d_hidden")


def work_of(launch: Launch) -> Work:
    """From its arguments; those that say how many steps of a product there are belong to a product."""
    constants, product = launch.constants, "STEPS" in launch.constants
    tensors = {name: value for name, value in launch.arguments.items() if isinstance(value, Tensor)}
    moved = sum(tensor.nbytes for name, tensor in tensors.items() if not (product and name in OPERANDS))
    rows = launch.arguments["rows"] if product else 0
    assert isinstance(rows, int)
    return Work(moved, 2 * rows * constants["K"] * constants["N"] if product else 0)


@contextlib.contextmanager
def watch() -> Iterator[Watched]:
    """Note the kernels that inductor writes in the block, with all its caches off, and the launches of our own.

    Where it would time several configurations it takes the first: kernels take no time here.
    """
    watched, launch = Watched(), Launch.run
    define = TritonScheduling.define_kernel

    def define_kernel(self: Any, code: str, nodes: Any, kernel: Any) -> str:
        name = define(self, code, nodes, kernel)
        # several in one launch are joined, where inductor does so
        parts = getattr(kernel, "sub_kernels", None) or [kernel]
        watched.bytes[name] = sum(int(part.estimate_kernel_num_bytes()) for part in parts)
        return name

    def run(self: Launch) -> None:
        watched.launched.setdefault(self.kernel.__name__, []).append(work_of(self))
        launch(self)

    def take_first(self: Any, *_: Any, **__: Any) -> None:
        name = self.inductor_meta.get("kernel_name") or self.fn.__name__
        watched.timed[name] = [
            Candidate(str(each.config.kwargs), each.n_regs, each.n_spills) for each in self.launchers
        ]
        self.launchers = self.launchers[:1]

    with pytest.MonkeyPatch.context() as patch, inductor_config.patch(force_disable_caches=True):
        patch.setattr(TritonScheduling, "define_kernel", define_kernel)
        patch.setattr(Launch, "run", run)
        patch.setattr(CachingAutotuner, "autotune_to_one_config", take_first)
        yield watched
