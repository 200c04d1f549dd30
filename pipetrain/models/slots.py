"""The two graphs of a module, training and evaluation, as one list of places that layers are cut from.

Usually both graphs have the same nodes and differ in constants, such as the `training` argument of a dropout. Where
they differ in more (auxiliary heads while training), the list holds the nodes of both, each mode in its own order.
"""

from dataclasses import dataclass
from difflib import SequenceMatcher

from torch import fx

Graphs = tuple[fx.Graph, fx.Graph]  # training, evaluation
MODES = (0, 1)
_NO_SLOT = ("placeholder", "get_attr", "output")


@dataclass(frozen=True)
class Slot:
    """One operation: its node in the graph of either mode, or None where that mode has no such operation."""

    nodes: tuple[fx.Node | None, fx.Node | None]

    @property
    def there(self) -> list[fx.Node]:
        """The nodes that there are, training first."""
        return [node for node in self.nodes if node is not None]


def align(graphs: Graphs) -> list[Slot]:
    """All operations of both graphs; those of one mode stay in their order.

    Inputs, parameters and the output are no slots: a layer fetches the parameters that it needs by itself.
    """
    training, evaluation = ([node for node in graph.nodes if node.op not in _NO_SLOT] for graph in graphs)
    keys, others = ([(node.op, str(node.target)) for node in nodes] for nodes in (training, evaluation))
    if keys == others:
        return [Slot(pair) for pair in zip(training, evaluation, strict=True)]
    slots: list[Slot] = []
    for kind, a, b, c, d in SequenceMatcher(None, keys, others, autojunk=False).get_opcodes():
        if kind == "equal":
            slots += [Slot(pair) for pair in zip(training[a:b], evaluation[c:d], strict=True)]
        else:
            slots += [Slot((node, None)) for node in training[a:b]] + [Slot((None, node)) for node in evaluation[c:d]]
    return slots
