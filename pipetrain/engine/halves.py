"""A backward in two halves: the gradients of a layer's inputs now, those of its parameters later (I and W).

Autograd does the first half by itself when it is asked for the inputs' gradients only: it runs the nodes that lead to
an input. What is left for later are the branches that leave this path and end in parameters. So, while the first half
runs, the gradient that arrives at each node with such a branch is kept; the second half starts from there, and asks for
the parameters only. Nothing is computed twice but what single nodes compute for both (a normalisation's sums).

torch.distributed.pipelining does the same (its _backward.py) by cutting the graph between the two; here the nodes are
started again with their gradients: nothing in the graph changes, and hooks of parameters see what they always do.

Where a parameter is used on both sides of a node, its gradients cannot be told apart, and a function of the user's or
of torch.compile that takes a parameter would run twice: such a layer does all of its backward in the first half.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import GradientEdge

Node = Any  # torch.autograd.graph.Node; its subclasses have no common type


@dataclass
class _Branch:
    """Where parameters hang on the way to the inputs: a node, the gradients that arrived, and the parameters."""

    node: Node
    parameters: list[Tensor]
    gradients: tuple[Tensor | None, ...] = ()

    def keep(self, gradients: tuple[Tensor | None, ...]) -> None:
        self.gradients = gradients

    def run(self) -> None:
        there = [(GradientEdge(self.node, place), g) for place, g in enumerate(self.gradients) if g is not None]
        if there:
            edges, gradients = zip(*there, strict=True)
            # The graph is dropped as a whole, later: branches may share nodes.
            torch.autograd.backward(edges, gradients, retain_graph=True, inputs=self.parameters)


def backward_input(
    edges: Sequence[GradientEdge], gradients: Sequence[Tensor], inputs: Sequence[Tensor]
) -> Callable[[], None]:
    """Adds to the `.grad` of the inputs.

    Args:
        edges, gradients: the outputs and their gradients.
        inputs: leaves of the graph.

    Returns:
        The other half: it adds to the `.grad` of the parameters. It keeps the graph alive.
    """
    if not inputs:
        return lambda: torch.autograd.backward(edges, gradients)
    found = _branches([edge.node for edge in edges], inputs)
    if found is None:
        torch.autograd.backward(edges, gradients)
        return lambda: None
    branches, leads_to_input = found
    towards = [(edge, g) for edge, g in zip(edges, gradients, strict=True) if leads_to_input(edge.node)]
    apart = [(edge, g) for edge, g in zip(edges, gradients, strict=True) if not leads_to_input(edge.node)]
    if towards:
        hooks = [branch.node.register_prehook(branch.keep) for branch in branches]
        on_the_way, theirs = zip(*towards, strict=True)
        torch.autograd.backward(on_the_way, theirs, retain_graph=True, inputs=list(inputs))
        for hook in hooks:
            hook.remove()

    def backward_weight() -> None:
        if apart:
            elsewhere, theirs = zip(*apart, strict=True)
            torch.autograd.backward(elsewhere, theirs, retain_graph=True)
        for branch in branches:
            branch.run()

    return backward_weight


def _branches(roots: Sequence[Node], inputs: Sequence[Tensor]) -> tuple[list[_Branch], Callable[[Node], bool]] | None:
    """The nodes on the way to the inputs at which parameters hang, from the outputs on; None if they cannot be told
    apart or would run twice."""
    order = _children_first(roots)
    is_input = {id(x) for x in inputs}
    leads: dict[Node, bool] = {}
    below: dict[Node, int] = {}  # the parameters that hang under a node, a bit for each
    parameters: dict[int, tuple[int, Tensor]] = {}
    branches: list[_Branch] = []
    for node in order:
        leaf = getattr(node, "variable", None)
        if leaf is not None:
            leads[node] = id(leaf) in is_input
            bit, _ = parameters.setdefault(id(leaf), (1 << len(parameters), leaf))
            below[node] = 0 if leads[node] else bit
            continue
        children = [child for child, _ in node.next_functions if child is not None]
        leads[node] = any(leads[child] for child in children)
        aside = along = 0
        for child in children:
            if leads[child]:
                along |= below[child]
            else:
                aside |= below[child]
        below[node] = aside | along
        if leads[node] and type(node).__name__ == "CheckpointFunctionBackward":
            return None  # it reaches parameters that its graph does not show
        if leads[node] and aside:
            if aside & along or isinstance(node, BackwardCFunction):
                return None
            branches.append(_Branch(node, [leaf for bit, leaf in parameters.values() if bit & aside]))
    return branches[::-1], leads.__getitem__


def _children_first(roots: Sequence[Node]) -> list[Node]:
    """All nodes of the graph, each behind those it hands gradients to."""
    order: list[Node] = []
    seen: set[Node] = set()
    stack: list[tuple[Node, bool]] = [(node, False) for node in roots]
    while stack:
        node, is_done = stack.pop()
        if is_done:
            order.append(node)
        elif node not in seen:
            seen.add(node)
            stack.append((node, True))
            stack += [(child, False) for child, _ in node.next_functions if child is not None and child not in seen]
    return order
