"""Samples that are made as they are needed: noise around a mean that tells the class. For tests and measurements."""

from collections.abc import Sequence

import torch

from pipetrain.data.batches import Batch
from pipetrain.data.share import WHOLE, Share
from pipetrain.errors import ConfigError
from pipetrain.seeds import derive_seed


class SyntheticBatches:
    """Batches of samples, each a pure function of (seed, split, its number).

    A sample of class c is standard normal noise plus c's own offset of each channel, the first size of `shape`; the
    offsets are the same in all splits, so what is learned from one can be tested on another. Every epoch has the same
    samples in the same order; of training what does not fill a batch is dropped, of other splits it is a smaller batch.

    Args:
        shape: sizes of one sample.
        samples: of one epoch.
        share: the rows that `batch` gives.
        split: 'train', 'valid' or 'test'.

    Raises:
        ConfigError: if there are fewer samples than one batch of training needs.
    """

    def __init__(
        self,
        shape: Sequence[int],
        classes: int,
        samples: int,
        split: str,
        *,
        batch_size: int,
        seed: int,
        share: Share = WHOLE,
    ) -> None:
        if split == "train" and samples < batch_size:
            raise ConfigError(
                f"data.samples={samples} do not fill one batch of batch_size={batch_size}; "
                f"use data.samples={batch_size} or more"
            )
        self._shape, self._classes, self._samples, self._split = tuple(shape), classes, samples, split
        self._batch_size, self._seed = batch_size, seed
        self.share = share

    @property
    def num_batches(self) -> int:
        """Batches of one epoch."""
        full = self._samples // self._batch_size
        return full if self._split == "train" else -(-self._samples // self._batch_size)

    def rows(self, index: int) -> int:
        """Samples in batch `index`, without making it."""
        return min(self._batch_size, self._samples - index % self.num_batches * self._batch_size)

    def batch(self, index: int) -> Batch:
        """Inputs float32 [rows, *shape] and class numbers int64 [rows] of the share of batch `index`."""
        samples = [self._sample(number) for number in self._numbers(index)[self.share.rows(self.rows(index))]]
        inputs = torch.stack([inputs for inputs, _ in samples]) if samples else torch.empty(0, *self._shape)
        return (inputs,), torch.tensor([target for _, target in samples], dtype=torch.int64)

    def targets(self, index: int) -> torch.Tensor:
        """Class numbers int64 [rows] of batch `index`."""
        return torch.tensor([self._target(number)[0] for number in self._numbers(index)])

    def _numbers(self, index: int) -> range:
        first = index % self.num_batches * self._batch_size
        return range(first, first + self.rows(index))

    def _target(self, number: int) -> tuple[int, torch.Generator]:
        """The class of a sample, and what the rest of it is drawn from."""
        draws = torch.Generator().manual_seed(derive_seed(self._seed, "data", self._split, number))
        return int(torch.randint(self._classes, (), generator=draws)), draws

    def _sample(self, number: int) -> tuple[torch.Tensor, int]:
        target, draws = self._target(number)
        offsets = torch.Generator().manual_seed(derive_seed(self._seed, "class", target))
        channels, *rest = self._shape
        offset = torch.randn(channels, generator=offsets).reshape(channels, *(1 for _ in rest))
        return torch.randn(self._shape, generator=draws) + offset, target
