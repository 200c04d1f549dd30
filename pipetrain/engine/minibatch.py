"""The mini-batches of a run through a schedule: fetched when a rank comes to them, and cut into micro-batches."""

import time
from collections.abc import Callable
from typing import NamedTuple

from pipetrain.engine.loss import Tensors
from pipetrain.engine.microbatch import split
from pipetrain.errors import StageFailed


class MiniBatch(NamedTuple):
    """What a rank has of a mini-batch.

    Attributes:
        inputs: [batch, ...] each; needed on the first stage's rank only.
        targets: what the loss compares with, [batch, ...] each; needed on the last stage's rank only.
        total: valid tokens or samples of the whole mini-batch: the gradient is that of loss sum / total. Counts on the
            last stage's rank only.
    """

    inputs: Tensors | None
    targets: Tensors | None
    total: int = 0


class Pieces(NamedTuple):
    """A mini-batch, cut: what this rank needs of each micro-batch."""

    inputs: list[Tensors]
    targets: list[Tensors]


class MiniBatches:
    """Those that one rank is at.

    Attributes:
        totals: of each mini-batch that was fetched by the rank of the last stage.
        seconds: that fetching took.
    """

    def __init__(
        self,
        fetch: Callable[[int], MiniBatch],
        num_microbatches: int,
        *,
        first_step: int,
        is_first: bool,
        is_last: bool,
        trains: bool,
    ) -> None:
        """
        Args:
            fetch: gives a mini-batch by its number in the training.
            first_step: that number of the one that the schedule calls 0.
            is_first, is_last: whether this rank has that stage.
            trains: whether the loss will be divided by the totals.
        """
        self._fetch, self._num_microbatches, self._first_step = fetch, num_microbatches, first_step
        self._is_first, self._is_last, self._trains = is_first, is_last, trains
        self._pieces: dict[int, Pieces] = {}
        self.totals: dict[int, int] = {}
        self.seconds = 0.0

    def get(self, step: int) -> Pieces:
        """
        Raises:
            StageFailed: if there is nothing to divide the loss by.
        """
        if step not in self._pieces:
            start_s = time.perf_counter()
            inputs, targets, total = self._fetch(self._first_step + step)
            self.seconds += time.perf_counter() - start_s
            if self._is_last and self._trains:
                if total < 1:
                    raise StageFailed("the mini-batch has no valid target: the mean of its loss is not defined")
                self.totals[step] = total
            self._pieces[step] = Pieces(
                split(inputs, self._num_microbatches) if self._is_first and inputs is not None else [],
                split(targets, self._num_microbatches) if self._is_last and targets is not None else [],
            )
        return self._pieces[step]

    def forget(self, step: int) -> None:
        """Lets go of a mini-batch."""
        self._pieces.pop(step, None)
