"""Where a graph may be cut into layers, and where it is.

The layers depend on the model alone, never on the number of stages: numbers are the same for every partitioning
because every partitioning runs the same layers.
"""

import inspect
import operator
from collections.abc import Sequence
from typing import Any

from torch import fx, nn

from pipetrain.models.slots import MODES, Slot

MAX_LAYERS = 32
_HEAVY = (
    *("matmul", "mm", "bmm", "baddbmm", "addmm", "einsum", "linear", "bilinear", "tensordot", "__matmul__"),
    *("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"),
    *("scaled_dot_product_attention", "multi_head_attention_forward"),
)
# Operations whose result may share memory with their first argument.
_VIEWS = (
    *("getitem", "view", "view_as", "reshape", "reshape_as", "transpose", "permute", "movedim", "t", "flatten"),
    *("unflatten", "squeeze", "unsqueeze", "expand", "expand_as", "narrow", "select", "diagonal", "unfold", "chunk"),
    *("split", "tensor_split", "unbind", "detach", "contiguous", "to", "type_as", "float", "swapaxes", "getattr"),
    *("__getitem__", "dropout", "dropout1d", "dropout2d", "dropout3d", "stochastic_depth", "pad", "real", "imag"),
)
_IN_PLACE_OPERATORS = (
    "setitem",
    "iadd",
    "isub",
    "imul",
    "itruediv",
    "ifloordiv",
    "imod",
    "ipow",
    "iand",
    "ior",
    "ixor",
)
_VIEW_MODULES = (nn.Identity, nn.Flatten, nn.Unflatten, nn.modules.dropout._DropoutNd)


def find_borders(root: nn.Module, slots: Sequence[Slot]) -> list[int]:
    """Where layers end: ascending places in `slots`, the last one its length.

    A layer takes at least 1/32 of the weight (a weight for every node with parameters or a large product) and less than
    2/32; within these it ends where the fewest values cross, at the earliest such weight. What weighs nothing, such as
    an activation function, is the end of a layer and not the beginning of the next one.
    """
    weights = [max(_weight(root, node) for node in slot.there) for slot in slots]
    least = -(-sum(weights) // MAX_LAYERS)
    crossing, closed = _crossing(slots), closed_places(root, slots)
    gives = last_uses(slots)
    borders: list[int] = []
    begin, weight, best, best_weight = 0, 0, None, 0
    left = sum(weights)
    for place in range(1, len(slots)):
        weight += weights[place - 1]
        left -= weights[place - 1]
        if best is not None and weight >= 2 * least:
            borders.append(best)
            begin, weight, best = best, sum(weights[best:place]), None
        useful = any(gives[i] >= place for i in range(begin, place))
        allowed = weight >= max(least, 1) and left > 0 and place not in closed and useful
        if allowed and (best is None or (crossing[place], weight) <= (crossing[best], best_weight)):
            best, best_weight = place, weight
    if best is not None:
        borders.append(best)
    return [*borders, len(slots)]


def _weight(root: nn.Module, node: fx.Node) -> int:
    if node.op == "call_module":
        return int(next(root.get_submodule(str(node.target)).parameters(), None) is not None)
    holds = any(source.op == "get_attr" and _is_parameter(root, str(source.target)) for source in node.all_input_nodes)
    return int(holds or _called(node) in _HEAVY)


def _is_parameter(root: nn.Module, path: str) -> bool:
    owner, _, name = path.rpartition(".")
    return isinstance(getattr(root.get_submodule(owner), name), nn.Parameter)


def _called(node: fx.Node) -> str:
    return str(node.target) if isinstance(node.target, str) else getattr(node.target, "__name__", "")


def last_uses(slots: Sequence[Slot]) -> list[int]:
    """For every slot the last slot that takes its value; the output of the model counts as one behind all."""
    place = {node: i for i, slot in enumerate(slots) for node in slot.there}
    return [
        max((place.get(user, len(slots)) for node in slot.there for user in node.users), default=-1) for slot in slots
    ]


def _crossing(slots: Sequence[Slot]) -> list[int]:
    """For every place the number of values that come from before it and are taken behind it."""
    counts = [0] * (len(slots) + 1)
    for i, last in enumerate(last_uses(slots)):
        for place in range(i + 1, min(last, len(slots) - 1) + 1):
            counts[place] += 1
    return counts


# ---- where there must be no border -----------------------------------------------------------------------------------


def closed_places(root: nn.Module, slots: Sequence[Slot]) -> set[int]:
    """The places at which a border would change the result.

    * Between two calls of a module whose buffers change, or a call and a read of one: both must see the same buffers.
    * Between the making of a value and an operation that changes it in place, when the old name is read again later:
      on another stage the reader would have a copy from before the change.
    """
    closed: set[int] = set()
    for first, last in _calls_with_state(root, slots):
        closed |= set(range(first + 1, last + 1))
    for mode in MODES:
        place = {slot.nodes[mode]: i for i, slot in enumerate(slots)}
        place.pop(None, None)
        for node in list(place):
            assert node is not None
            changed = changed_in_place(root, node)
            if changed is None:
                continue
            closed |= _closed_by_change(node, _sharing(root, changed, node), place, len(slots))
    return closed


def _closed_by_change(
    change: fx.Node, sharing: set[fx.Node], place: dict[fx.Node | None, int], behind: int
) -> set[int]:
    """The places that one change in place closes. `behind` is the place of the model's output, which reads too."""
    here = place[change]
    readers = [place.get(user, behind) for member in sharing for user in member.users if user is not change]
    if any(member not in place for member in sharing):  # an input or a buffer: every layer would take its own
        return set(range(min([here, *readers]) + 1, min(max([here, *readers]), behind - 1) + 1))
    if any(reader > here for reader in readers):
        return set(range(min(place[member] for member in sharing) + 1, here + 1))
    return set()


def _calls_with_state(root: nn.Module, slots: Sequence[Slot]) -> list[tuple[int, int]]:
    """(first, last) use of every module that must stay whole, if there are several: calls, and reads of its buffers."""
    uses: dict[str, list[int]] = {}
    for i, slot in enumerate(slots):
        for node in slot.there:
            if node.op == "call_module":
                uses.setdefault(str(node.target), []).append(i)
    for i, slot in enumerate(slots):
        for path in (str(s.target) for node in slot.there for s in node.all_input_nodes if s.op == "get_attr"):
            if not path.startswith("_tensor_constant") and not _is_parameter(root, path):
                for module in (module for module in uses if path.startswith(f"{module}.")):
                    uses[module].append(i)
    return [
        (min(places), max(places))
        for path, places in uses.items()
        if min(places) < max(places) and must_stay_whole(root.get_submodule(path))
    ]


def must_stay_whole(module: nn.Module) -> bool:
    """Whether all calls of a module must be in one layer.

    That is so for buffers that may change (one that is not saved is taken for a constant), and for parts that may
    draw: how many of their calls the layers before have made could not be told. (Attention draws by itself.)
    """
    names = {name for name, _ in module.named_buffers()}
    has_parts = next(module.children(), None) is not None and not isinstance(module, nn.MultiheadAttention)
    return has_parts or bool(names & set(module.state_dict()))


def changed_in_place(root: nn.Module, node: fx.Node) -> fx.Node | None:
    """The node whose value this one changes, or None."""
    name = _called(node)
    if node.op == "call_module":
        changes = bool(getattr(root.get_submodule(str(node.target)), "inplace", False))
    elif node.op == "call_method":
        changes = name.endswith("_") and not name.endswith("__")
    else:
        own = getattr(node.target, "__module__", None) == operator.add.__module__ and name in _IN_PLACE_OPERATORS
        changes = own or (name.endswith("_") and not name.endswith("__")) or bool(_argument(node, "inplace"))
    target = node.args[0] if node.args else None
    out = node.kwargs.get("out")
    if isinstance(out, fx.Node):
        return out
    return target if changes and isinstance(target, fx.Node) else None


def _argument(node: fx.Node, name: str) -> Any:
    if name in node.kwargs:
        return node.kwargs[name]
    try:
        parameters = list(inspect.signature(node.target).parameters)  # type: ignore[arg-type]
    except (TypeError, ValueError):  # built into torch: none of them has an argument `inplace`
        return None
    place = parameters.index(name) if name in parameters else len(node.args)
    return node.args[place] if place < len(node.args) else None


def _sharing(root: nn.Module, changed: fx.Node, by: fx.Node) -> set[fx.Node]:
    """The nodes that may share memory with `changed`, but for the result of the change and what comes from that."""
    group, found = {changed}, [changed]
    while found:
        node = found.pop()
        near = [user for user in node.users if user is not by and node in _shared_with(root, user)]
        for other in [*near, *_shared_with(root, node)]:
            if other not in group:
                group.add(other)
                found.append(other)
    return group


def _shared_with(root: nn.Module, node: fx.Node) -> list[fx.Node]:
    """The arguments that the result of a node may share memory with."""
    if (changed := changed_in_place(root, node)) is not None:
        return [changed]
    if node.op == "call_module":
        module = root.get_submodule(str(node.target))
        shares = isinstance(module, _VIEW_MODULES) or not type(module).__module__.startswith("torch.nn")
    else:
        shares = _called(node) in _VIEWS or not _is_torchs(node.target)
    return node.all_input_nodes[:1] if shares else []


def _is_torchs(function: Any) -> bool:
    """Whether it is a method, an operator, or a function of torch; of any other function nothing is known."""
    home = getattr(function, "__module__", None)
    return isinstance(function, str) or home is None or home.split(".")[0] in ("torch", operator.add.__module__)


__all__ = ["changed_in_place", "closed_places", "find_borders", "must_stay_whole"]
