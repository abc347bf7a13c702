"""Turn the first half of a step into one compiled graph.

``make_fx`` records the step's ATen operations, those of ordinary autograd included, with static shapes; inductor
compiles the recorded graph as a whole. (``torch.func`` transforms inside ``torch.compile`` do not work with custom ops,
and compiling only the loss gives two graphs.) Dynamo has no part in it: there are no guards to check at each call, no
recompilation, and no way back to eager. What does not compile raises.
"""

import functools
import warnings
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from smi_fast.engine.state import State
from smi_fast.engine.step import Step
from smi_fast.storage.environment import use_private_cache


def _state_of(tensors: tuple[Tensor, ...]) -> State:
    """The inverse of ``State.tensors``."""
    names = [field.name for field in fields(State)]
    return State(**dict(zip(names, tensors, strict=False)))


def trace_step(step: Step, state: State) -> torch.fx.GraphModule:
    """The first half of a step, as a graph over ``state.tensors()``; runs it once on a copy."""

    def on_tensors(*tensors: Tensor) -> tuple[Tensor | None, ...]:
        return tuple(step.compute(_state_of(tensors)))

    with torch.no_grad():
        return make_fx(on_tensors)(*state.clone().tensors())


def compile_step(step: Step, state: State, backend: str = "inductor") -> Callable[[State], None]:
    """Trace and compile for the shapes of ``state``; compiles now, and runs once on a copy of it.

    Args:
        step: its first half is compiled.
        state: whose shapes and strides later states must have.
        backend: "inductor", or a back end of ``torch.compile`` (for tests).

    Raises:
        Exception: whatever inductor raises where the graph does not compile; there is no way back to eager.
    """
    graph, example = trace_step(step, state), state.clone().tensors()
    compiled: Callable[..., tuple[Tensor | None, ...]]
    if backend == "inductor":
        compiled = _inductor(graph, example)
    else:
        compiled = torch.compile(graph, fullgraph=True, dynamic=False, backend=backend)

    def run(state: State) -> None:
        with torch.no_grad():
            step.finish(state, compiled(*state.tensors()))

    run(state.clone())
    return run


def _inductor(graph: torch.fx.GraphModule, example: Sequence[Tensor]) -> Callable[..., Any]:
    """Compile a graph for the shapes of its inputs."""
    use_private_cache()
    with torch.no_grad():
        return torch._inductor.standalone_compile(graph, [*example], dynamic_shapes="from_example_inputs")


@functools.cache
def why_not_compile(device_type: str) -> str | None:
    """None where inductor works on this machine, else the reason, in one line."""

    def probe(x: Tensor) -> Tensor:
        return (x * 2).relu()

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ones = torch.ones(16, device=device_type)
            _inductor(make_fx(probe)(ones), (ones,))(ones)
    except Exception as error:
        # whatever breaks here (no compiler, no headers, a read-only cache) means the same: this machine cannot compile
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"
    return None
