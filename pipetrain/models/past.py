"""What layers remember of a text while it is generated a piece at a time. Off, as in training, they remember nothing.

`inference.incremental` switches these on; a layer that has them gives for each piece what it would give for the same
tokens of the whole text. (`SegmentMemory` does the same for text that goes on from mini-batch to mini-batch.)
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn


class _Remembers(nn.Module):
    """
    Attributes:
        is_on: whether it remembers.
        state: nothing, or keys and values: [rows, heads, tokens, width] each.
    """

    def __init__(self) -> None:
        super().__init__()
        self.is_on = False
        self.state: tuple[Tensor, ...] = ()

    def begin(self) -> None:
        """Switches it on, or starts anew."""
        self.is_on, self.state = True, ()

    def end(self) -> None:
        """Switches it off."""
        self.is_on, self.state = False, ()

    def select(self, rows: Tensor) -> None:
        """Goes on with some rows, any number of times each."""
        self.state = tuple(part[rows] for part in self.state)


class Past(_Remembers):
    """Of an attention to the text itself: more for each piece."""

    def forward(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Those of all tokens so far, from those of the next ones."""
        if not self.is_on:
            return key, value
        if self.state:
            key, value = (torch.cat(parts, dim=2) for parts in zip(self.state, (key, value), strict=True))
        self.state = key, value
        return key, value


class Kept(_Remembers):
    """Of an attention to what is all there from the beginning: made once, for the first piece."""

    def forward(self, make: Callable[[], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        if not self.is_on:
            return make()
        if not self.state:
            self.state = make()
        key, value = self.state
        return key, value


class Place(nn.Module):
    """How many tokens there were before, the same number in all rows.

    Attributes:
        is_on: whether it counts.
        state: the number.
    """

    def __init__(self) -> None:
        super().__init__()
        self.is_on, self.state = False, 0

    def begin(self) -> None:
        """Switches it on, or starts anew."""
        self.is_on, self.state = True, 0

    def end(self) -> None:
        """Switches it off."""
        self.is_on, self.state = False, 0

    def select(self, rows: Tensor) -> None:
        """All rows have come as far."""

    def forward(self, number: int) -> slice:
        """The places of so many more tokens in the text."""
        start = self.state
        if self.is_on:
            self.state += number
        return slice(start, start + number)


def causal_mask(query: Tensor, key: Tensor) -> Tensor | None:
    """[queries, keys], True where one of the last tokens may look: at itself and those before it. None: at all of them.

    Args:
        query, key: [..., tokens, width], of the same text; the queries are its end.
    """
    queries, keys = query.shape[-2], key.shape[-2]
    if queries == 1:
        return None
    return torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril(keys - queries)
