"""Batches of token windows: each a pure function of its number, read from memory-mapped files."""

from functools import cached_property
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from pipetrain.data.order import permutation
from pipetrain.data.share import WHOLE, Share
from pipetrain.data.text import TokenFolder, token_dtype, too_short
from pipetrain.errors import ConfigError
from pipetrain.suggest import one_of

SHUFFLED = "shuffled"
CONTIGUOUS = "contiguous"
ONCE = "once"
ORDERS = (SHUFFLED, CONTIGUOUS, ONCE)


Batch = tuple[tuple[torch.Tensor, ...], torch.Tensor]  # what the model takes, and what the loss compares with


class Batches(Protocol):
    """Batch 0, 1, 2, ... of one split, going on over epochs; the same number always gives the same batch.

    Attributes:
        share: the rows that `batch` gives.
    """

    share: Share

    @property
    def num_batches(self) -> int:
        """Batches of one epoch."""

    def rows(self, index: int) -> int:
        """Samples in batch `index`, without reading it."""

    def batch(self, index: int) -> Batch:
        """Of the share of batch `index`."""

    def targets(self, index: int) -> torch.Tensor:
        """Targets of the whole batch `index`, as cheaply as they can be had: the last stage needs nothing else."""


class TextBatches:
    """Batch 0, 1, 2, ... of one split, going on over epochs; the same number always gives the same batch.

    A window is `seq_len + 1` tokens that start at a multiple of `seq_len`: its inputs and, one later, its targets.

    * shuffled: all windows in a new random order each epoch; what does not fill a batch at its end is dropped.
    * contiguous: the text lies in `batch_size` equal streams; row r of a batch goes on where row r of the batch before
      stopped. A new epoch starts over.
    * once: windows in the order of the text, each exactly once in an epoch; the last batch may have fewer rows.

    Nothing is read before the first `batch`, and then only its rows.

    Args:
        tokens: what `prepare_text` gave.
        split: 'train', 'valid' or 'test'.
        seq_len: tokens of one sample.
        batch_size: samples of one batch.
        order: 'shuffled', 'contiguous' or 'once'.
        seed: of the run; the order of epoch e comes from (seed, split, e).
        share: the rows that `batch` gives.

    Raises:
        ConfigError: if there is no such split or order, or the split does not fill one batch (one sample for 'once').
    """

    def __init__(
        self,
        tokens: TokenFolder,
        split: str,
        *,
        seq_len: int,
        batch_size: int,
        order: str,
        seed: int,
        share: Share = WHOLE,
    ) -> None:
        if order not in ORDERS:
            raise ConfigError(f"data.order={order}: no such choice. {one_of(order, ORDERS)}")
        if split not in tokens.num_tokens:
            raise ConfigError(f"split={split}: the text has no such split. {one_of(split, tuple(tokens.num_tokens))}")
        self.seq_len = seq_len
        self.batch_size = batch_size
        self.share = share
        self._tokens = tokens
        self._split = split
        self._order = order
        self._seed = seed
        self._num_targets = max(0, tokens.num_tokens[split] - 1)
        self._num_windows = self._num_targets // seq_len
        self._shuffled: tuple[int, npt.NDArray[np.int64]] | None = None
        self._check()

    @property
    def num_batches(self) -> int:
        """Batches of one epoch."""
        if self._order == ONCE:
            return -(-self._num_windows // self.batch_size)
        if self._order == CONTIGUOUS:
            return self._num_targets // self.batch_size // self.seq_len
        return self._num_windows // self.batch_size

    def rows(self, index: int) -> int:
        """Samples in batch `index`, without reading it."""
        if self._order != ONCE:
            return self.batch_size
        return min(self.batch_size, self._num_windows - index % self.num_batches * self.batch_size)

    def batch(self, index: int) -> Batch:
        """Inputs and targets of the share of batch `index`: int64 [rows, seq_len] each, targets one token later."""
        windows = self._windows(self._starts(index)[self.share.rows(self.rows(index))])
        return (windows[:, :-1].contiguous(),), windows[:, 1:].contiguous()

    def targets(self, index: int) -> torch.Tensor:
        """Targets of batch `index`: int64 [rows, seq_len]."""
        return self._windows(self._starts(index))[:, 1:].contiguous()

    def _windows(self, starts: npt.NDArray[np.int64]) -> torch.Tensor:
        return torch.from_numpy(np.asarray(self._ids[starts[:, None] + np.arange(self.seq_len + 1)], dtype=np.int64))

    @cached_property
    def _ids(self) -> np.memmap[tuple[int], np.dtype[np.unsignedinteger]]:
        return np.memmap(self._tokens.file(self._split), dtype=token_dtype(self._tokens.vocab_size), mode="r")

    def _starts(self, index: int) -> npt.NDArray[np.int64]:
        """Where each row of a batch begins in the text, in tokens: [rows]."""
        epoch, position = divmod(index, self.num_batches)
        rows = np.arange(self.rows(index))
        if self._order == CONTIGUOUS:
            return rows * (self._num_targets // self.batch_size) + position * self.seq_len
        windows = position * self.batch_size + rows
        return (self._permutation(epoch)[windows] if self._order == SHUFFLED else windows) * self.seq_len

    def _permutation(self, epoch: int) -> npt.NDArray[np.int64]:
        """The windows of one epoch in random order."""
        if self._shuffled is None or self._shuffled[0] != epoch:
            self._shuffled = epoch, permutation(self._seed, self._split, epoch, self._num_windows)
        return self._shuffled[1]

    def _check(self) -> None:
        if self._num_windows == 0:
            raise too_short(self._tokens, self._split, self.seq_len)
        if self._order != ONCE and self._num_windows < self.batch_size:
            shorter = self._num_targets // self.batch_size
            remedy = f" or data.seq_len={shorter}" if shorter else ""
            raise ConfigError(
                f"batch_size={self.batch_size} is more than the {self._num_windows} samples of "
                f"data.seq_len={self.seq_len} in the {self._split} split; "
                f"use batch_size={self._num_windows}{remedy}, or a longer text"
            )
