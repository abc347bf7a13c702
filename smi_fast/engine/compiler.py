"""Turn a step into one compiled graph.

``make_fx`` records the step's ATen operations, those of ordinary autograd included, with static shapes; the recorded
graph is then compiled as a whole. (``torch.func`` transforms inside ``torch.compile`` do not work with custom ops, and
compiling only the loss gives two graphs.) Each bucket gets a graph module of its own: compiled calls of one function
share a cache of limited size, and fall back to eager when it is full.
"""

import functools
import warnings
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from smi_fast.engine.state import State
from smi_fast.engine.step import Differentiated, Step

Options = dict[str, str | int | bool | Callable[..., Any]] | None


def _state_of(tensors: tuple[Tensor, ...]) -> State:
    """The inverse of ``State.tensors``."""
    names = [field.name for field in fields(State)]
    return State(**dict(zip(names, tensors, strict=False)))


def trace_step(step: Step, state: State) -> torch.fx.GraphModule:
    """The part of a step that is to be compiled, as a graph over ``state.tensors()``; runs it once on a copy.

    That is all of it, or its first half where the update works in place.
    """

    def on_tensors(*tensors: Tensor) -> tuple[Tensor | None, ...] | None:
        state = _state_of(tensors)
        found = step.differentiate(state)
        if step.in_place:
            return tuple(found)
        step.update(state, found)
        return None

    with torch.no_grad():
        return make_fx(on_tensors)(*state.clone().tensors())


def compile_step(step: Step, state: State, backend: str = "inductor") -> Callable[[State], None]:
    """Trace and compile for the shapes of ``state``; compiles now, on a copy of it.

    Raises:
        torch._dynamo.exc.TorchDynamoException: the step does not compile as one graph.
    """
    on_cpu = state.canvas.device.type == "cpu"
    options: Options = {"freezing": True} if backend == "inductor" and on_cpu else None
    graph = trace_step(step, state)
    compiled = torch.compile(graph, fullgraph=True, dynamic=False, backend=backend, options=options)

    def run(state: State) -> None:
        with torch.no_grad():
            found = compiled(*state.tensors())
            if step.in_place:
                step.update(state, Differentiated(*found))

    run(state.clone())
    return run


@functools.cache
def why_not_compile(device_type: str) -> str | None:
    """None where inductor works on this machine, else the reason, in one line."""

    def probe(x: Tensor) -> Tensor:
        return (x * 2).relu()

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.compile(probe, fullgraph=True)(torch.ones(16, device=device_type))
    except Exception as error:
        # whatever breaks here (no compiler, no headers, a read-only cache) means the same: this machine cannot compile
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"
    return None
