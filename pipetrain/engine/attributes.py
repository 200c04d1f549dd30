"""Plain attributes that a module changes while it runs: a counter, the last mask, a list of what it has seen.

They are treated as buffers are (`buffers`): a recompute sees what its forward saw and leaves no trace. They are looked
at in every forward, since what is a cache may change at any time; torch's own modules have none.
"""

import copy
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from pipetrain.engine.known import is_torchs_own

_OF_EVERY_MODULE = frozenset(nn.Module().__dict__)
_CONTAINERS = (list, dict, set, deque)
_MISSING = object()

SavedAttributes = list[tuple[nn.Module, str, Any]]


class OwnAttributes:
    """The attributes of one layer's modules that its forward changes.

    Containers count as changed when one of their elements is another object; what is inside of other objects is not
    looked at.
    """

    is_for_recompute_only = True

    def __init__(self, module: nn.Module) -> None:
        self._parts = [part for part in module.modules() if not is_torchs_own(part)]

    def __bool__(self) -> bool:
        """Whether there may be any."""
        return bool(self._parts)

    @contextmanager
    def renewed(self, saved: SavedAttributes) -> Iterator[None]:
        """For a forward: the values that it changes go into `saved` as they were."""
        before = [_snapshot(part) for part in self._parts]
        yield
        for part, old in zip(self._parts, before, strict=True):
            now = {name: value for name, value in part.__dict__.items() if name not in _OF_EVERY_MODULE}
            for name in {**old, **now}:
                value, kept = old.get(name, (_MISSING, _MISSING))
                if value is not now.get(name, _MISSING) or not _same_elements(kept, value):
                    saved.append((part, name, kept))

    @contextmanager
    def rewound(self, saved: SavedAttributes) -> Iterator[None]:
        """For a recompute: it sees the attributes that its forward saw, and changes none."""
        now = [(part, name, part.__dict__.get(name, _MISSING)) for part, name, _ in saved]
        for part, name, value in saved:
            _put(part, name, _copied(value))
        yield
        for part, name, value in now:
            _put(part, name, value)


def _snapshot(part: nn.Module) -> dict[str, tuple[Any, Any]]:
    """Every attribute, and of containers a copy of what is in them."""
    return {name: (v, _copied(v)) for name, v in part.__dict__.items() if name not in _OF_EVERY_MODULE}


def _copied(value: Any) -> Any:
    return copy.copy(value) if isinstance(value, _CONTAINERS) else value


def _same_elements(old: Any, new: Any) -> bool:
    """Whether a container and its copy still hold the same objects; all else is compared by identity elsewhere."""
    if not isinstance(new, _CONTAINERS):
        return True
    if isinstance(new, dict):
        return list(map(id, old)) == list(map(id, new)) and list(map(id, old.values())) == list(map(id, new.values()))
    if isinstance(new, set):
        return bool(old == new)
    return list(map(id, old)) == list(map(id, new))


def _put(part: nn.Module, name: str, value: Any) -> None:
    if value is _MISSING:
        part.__dict__.pop(name, None)
    else:
        part.__dict__[name] = value
