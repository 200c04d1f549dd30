"""Buffers that a module changes while it runs: the vectors of spectral norm, moving averages, counters.

A recompute must start from the buffers that its forward started from and leave no trace in them; and the graph of one
micro-batch must not see what the next one writes. So such a module gets new buffers for every forward, and a recompute
gets copies of the old ones. Which buffers change is seen in the first forward of training. (BatchNorm's statistics are
kept out of this by `batchnorm`.)
"""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from pipetrain.engine.structure import same_values
from pipetrain.errors import LayerError

SavedBuffers = list[tuple[nn.Module, str, Tensor]]


class OwnBuffers:
    """The buffers of one layer that its forward changes."""

    is_for_recompute_only = False

    def __init__(self, module: nn.Module, *, is_known: bool = False) -> None:
        """
        Args:
            is_known: that all forwards change the same ones (see `known`).
        """
        self._is_known = is_known
        self._places = [
            (part, name) for part in module.modules() for name, buffer in part._buffers.items() if buffer is not None
        ]
        self._constant: list[tuple[nn.Module, str]] = []  # those that the first forward left alone
        self._watched = False

    def __bool__(self) -> bool:
        """Whether there may be any."""
        return bool(self._places or self._constant)

    @contextmanager
    def renewed(self, saved: SavedBuffers) -> Iterator[None]:
        """For a forward: it writes into new buffers, which then stay; the old ones go into `saved`."""
        constant = self._constant_now()
        old = [(part, name, _get(part, name)) for part, name in self._places]
        new = [_put(part, name, buffer.clone()) for part, name, buffer in old]
        versions = [buffer._version for buffer in new]
        yield
        if not self._watched:
            self._watched = True
            is_changed = [
                part._buffers[name] is not buffer or buffer._version != version or not same_values(buffer, before)
                for (part, name, before), buffer, version in zip(old, new, versions, strict=True)
            ]
            for (part, name, buffer), changed in zip(old, is_changed, strict=True):
                if not changed:
                    _put(part, name, buffer)
            old = [place for place, changed in zip(old, is_changed, strict=True) if changed]
            changing = [(part, name) for part, name, _ in old]
            self._constant = [] if self._is_known else [place for place in self._places if place not in changing]
            self._places = changing
        # (Before the first forward it was not known yet which ones are constant: nothing to compare with then.)
        for (part, name), (before, version) in zip(self._constant, constant, strict=False):
            now = _get(part, name)
            if now is not before or now._version != version:
                raise LayerError(
                    f"buffer {name} of a {type(part).__name__} changed, which it did not do in the first forward: what "
                    "a recompute must start from is not known any more; change it in every forward, or never"
                )
        saved += old

    def _constant_now(self) -> list[tuple[Tensor, int]]:
        """Each of the constant buffers, and in which version it is."""
        buffers = [_get(part, name) for part, name in self._constant]
        return [(buffer, buffer._version) for buffer in buffers]

    @contextmanager
    def rewound(self, saved: SavedBuffers) -> Iterator[None]:
        """For a recompute: it sees the buffers that its forward saw, and changes none."""
        now = [(part, name, _get(part, name)) for part, name, _ in saved]
        for part, name, buffer in saved:
            _put(part, name, buffer.clone())
        yield
        for part, name, buffer in now:
            _put(part, name, buffer)


def _get(part: nn.Module, name: str) -> Tensor:
    buffer = part._buffers[name]
    assert buffer is not None
    return buffer


def _put(part: nn.Module, name: str, buffer: Tensor) -> Tensor:
    part._buffers[name] = buffer
    return buffer
