"""Turn the first half of a step into one compiled graph.

``make_fx`` records the step's ATen operations, those of ordinary autograd included, with static shapes; inductor
compiles the recorded graph as a whole. The weights are inputs of it, so that all buckets share them. (``torch.func``
transforms inside ``torch.compile`` do not work with custom ops, and compiling only the loss gives two graphs.) Dynamo
has no part in it: there are no guards to check at each call, no recompilation, and no way back to eager. What does
not compile raises.
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


def lift_weights(graph: torch.fx.GraphModule) -> tuple[torch.fx.GraphModule, list[Tensor]]:
    """Make inputs, behind those that are there, of the tensors that a traced graph holds.

    A back end copies what a graph holds, and each bucket has a graph: the weights would be in memory once for each. A
    tensor without a dimension stays where it is, since a captured graph cannot read one that lies on the host.

    Returns:
        The graph, and the tensors that it takes more, in their order; they share the memory of the model.
    """
    lifted: dict[int, tuple[Tensor, torch.fx.Node]] = {}
    nodes = list(graph.graph.nodes)
    last = next(node for node in reversed(nodes) if node.op == "placeholder")
    for node in nodes:
        held = getattr(graph, node.target) if node.op == "get_attr" else None
        if not isinstance(held, Tensor) or not held.ndim:
            continue
        if id(held) not in lifted:
            with graph.graph.inserting_after(last):
                last = graph.graph.placeholder(f"weight_{len(lifted)}")
            last.meta = node.meta
            lifted[id(held)] = held, last
        node.replace_all_uses_with(lifted[id(held)][1])
        graph.graph.erase_node(node)
    # a module of a graph takes over what the graph refers to, and nothing else
    return torch.fx.GraphModule(graph, graph.graph), [held for held, _ in lifted.values()]


def compile_step(step: Step, state: State, backend: str = "inductor") -> Callable[[State], None]:
    """Trace and compile for the shapes of ``state``; compiles now, and runs once on a copy of it.

    Args:
        step: its first half is compiled.
        state: whose shapes and strides later states must have.
        backend: "inductor", or a back end of ``torch.compile`` (for tests).

    Raises:
        Exception: whatever inductor raises where the graph does not compile; there is no way back to eager.
    """
    graph, weights = lift_weights(trace_step(step, state))
    compiled: Callable[..., Found]
    if backend == "inductor":
        compiled = compile_graph(graph, [*state.clone().tensors(), *weights])
    else:
        compiled = torch.compile(graph, fullgraph=True, dynamic=False, backend=backend)

    def run(state: State) -> None:
        with torch.no_grad():
            step.finish(state, compiled(*state.tensors(), *weights))

    run(state.clone())
    return run
