"""What inductor writes, seen while it writes it: the bytes that each kernel moves, and what ptxas made of it."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch._inductor.config as inductor_config
from torch._inductor.codegen.triton import TritonScheduling
from torch._inductor.runtime.triton_heuristics import CachingAutotuner


@dataclass(frozen=True)
class Candidate:
    """A launch configuration that inductor compiled."""

    config: str
    registers: int  # per thread
    spilled: int  # words per thread


@dataclass
class Watched:
    """By the name of a kernel."""

    bytes: dict[str, int] = field(default_factory=dict)  # read and written by one launch, each value once
    timed: dict[str, list[Candidate]] = field(default_factory=dict)  # where inductor would choose one by timing


@contextlib.contextmanager
def watch() -> Iterator[Watched]:
    """Note the kernels that inductor writes in the block, with all its caches off.

    Where it would time several configurations it takes the first: kernels take no time here.
    """
    watched = Watched()
    define = TritonScheduling.define_kernel

    def define_kernel(self: Any, code: str, nodes: Any, kernel: Any) -> str:
        name = define(self, code, nodes, kernel)
        # several in one launch are joined, where inductor does so
        parts = getattr(kernel, "sub_kernels", None) or [kernel]
        watched.bytes[name] = sum(int(part.estimate_kernel_num_bytes()) for part in parts)
        return name

    def take_first(self: Any, *_: Any, **__: Any) -> None:
        name = self.inductor_meta.get("kernel_name") or self.fn.__name__
        watched.timed[name] = [
            Candidate(str(each.config.kwargs), each.n_regs, each.n_spills) for each in self.launchers
        ]
        self.launchers = self.launchers[:1]

    with pytest.MonkeyPatch.context() as patch, inductor_config.patch(force_disable_caches=True):
        patch.setattr(TritonScheduling, "define_kernel", define_kernel)
        patch.setattr(CachingAutotuner, "autotune_to_one_config", take_first)
        yield watched
