"""Turn the first half of a step into one compiled graph.

``make_fx`` records the step's ATen operations, those of ordinary autograd included, with static shapes; inductor
compiles the recorded graph as a whole. (``torch.func`` transforms inside ``torch.compile`` do not work with custom ops,
and compiling only the loss gives two graphs.) Dynamo has no part in it: there are no guards to check at each call, no
recompilation, and no way back to eager. What does not compile raises.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from smi_fast.engine.state import TENSORS, State
from smi_fast.engine.step import Found, Step
from smi_fast.storage.inductor import compile_graph


def trace_step(step: Step, state: State) -> torch.fx.GraphModule:
    """The first half of a step, as a graph over ``state.tensors()``; runs it once on a copy."""

    def on_tensors(*tensors: Tensor) -> Found:
        traced = state.alias()
        for name, tensor in zip(TENSORS, tensors, strict=True):
            setattr(traced, name, tensor)
        return tuple(step.compute(traced))

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
    compiled: Callable[..., Found]
    if backend == "inductor":
        compiled = compile_graph(graph, example)
    else:
        compiled = torch.compile(graph, fullgraph=True, dynamic=False, backend=backend)

    def run(state: State) -> None:
        with torch.no_grad():
            step.finish(state, compiled(*state.tensors()))

    run(state.clone())
    return run
