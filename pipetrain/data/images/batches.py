"""Batches of images, made ahead of time by processes of their own."""

import itertools
import os
import signal
import threading
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pipetrain.data.batches import Batch
from pipetrain.data.images.augment import Augmentation
from pipetrain.data.images.read import Images, Unreadable
from pipetrain.data.images.sets import KINDS, TRAIN, ImageSet, open_images
from pipetrain.data.order import permutation
from pipetrain.data.share import WHOLE, Share
from pipetrain.errors import ConfigError, DataError
from pipetrain.processes import SIGNALS, die_with_parent
from pipetrain.seeds import derive_seed, seeded

_AHEAD = 4  # batches that each process has ready


class _Samples(Dataset[Any]):
    """Item i is the share's images of batch i. It holds no stream of its own, so that it can be handed to processes."""

    def __init__(
        self, images: ImageSet, split: str, batch_size: int, seed: int, augment: Sequence[str], share: Share
    ) -> None:
        self.share = share
        self._set, self._split, self._batch_size, self._seed = images, split, batch_size, seed
        self._augment = tuple(augment) if split == TRAIN else ()
        self._num_images = images.num_images[split]
        self._order: tuple[int, Any] | None = None  # of one epoch

    @property
    def num_batches(self) -> int:
        full = self._num_images // self._batch_size
        return full if self._split == TRAIN else -(-self._num_images // self._batch_size)

    def numbers(self, index: int) -> Any:
        """The numbers of the images of batch `index`."""
        epoch, position = divmod(index, self.num_batches)
        first = position * self._batch_size
        last = min(first + self._batch_size, self._num_images)
        if self._split != TRAIN:
            return range(first, last)
        if self._order is None or self._order[0] != epoch:
            self._order = epoch, permutation(self._seed, self._split, epoch, self._num_images)
        return self._order[1][first:last]

    @cached_property
    def images(self) -> Images:
        return open_images(self._set, self._split)

    @cached_property
    def augmentation(self) -> Augmentation:
        kind, is_folder = KINDS[self._set.kind], self._set.index is not None
        return Augmentation(self._augment, self._set.size, self._set.channels, kind.mean, kind.std, zoom=is_folder)

    def __getitem__(self, index: int) -> Tensor | str:
        """Images of batch `index`, or what is wrong with one."""
        epoch, made, numbers = index // self.num_batches, [], self.numbers(index)
        with seeded(0):
            for number in map(int, numbers[self.share.rows(len(numbers))]):
                # One generator takes a microsecond; torch.manual_seed would take as long as the image.
                torch.default_generator.manual_seed(derive_seed(self._seed, "augment", self._split, epoch, number))
                try:
                    made.append(self.augmentation(self.images.image(number)))
                except Unreadable as error:
                    return str(error)
        size = self._set.size
        images = torch.stack(made) if made else torch.empty(0, self._set.channels, size, size, dtype=torch.uint8)
        return self.augmentation.standardised(images)


class ImageBatches:
    """Batch 0, 1, 2, ... of one split, going on over epochs; the same number always gives the same batch.

    Training images come in a new random order each epoch and are augmented, each by draws from (seed, epoch, image): so
    the number of processes changes nothing. What does not fill a batch is dropped in training; in other splits, which
    come as they are, it is a smaller batch.

    Nothing is read before the first `batch`; then processes go on with the batches that follow.
    """

    def __init__(
        self,
        images: ImageSet,
        split: str,
        *,
        batch_size: int,
        seed: int,
        augment: Sequence[str],
        workers: int,
        share: Share = WHOLE,
    ) -> None:
        """
        Args:
            split: train or valid.
            augment: of the training images: names that `Augmentation` knows.
            workers: processes that read ahead; 0 reads in this one, when a batch is asked for.
            share: the rows that `batch` gives.

        Raises:
            ConfigError: if the split does not fill one batch (in training) or has no image.
        """
        self._samples = _Samples(images, split, batch_size, seed, augment, share)
        self.share = share
        self._trains, self._workers = split == TRAIN, workers
        self._ahead: tuple[int, Iterator[Tensor | str]] | None = None  # the next batch's number, and the stream
        if self._trains and images.num_images[split] < batch_size:
            raise ConfigError(
                f"batch_size={batch_size} is more than the {images.num_images[split]} training images; use "
                f"batch_size={images.num_images[split]} or less"
            )
        if not images.num_images[split]:
            raise ConfigError("there are no images for validation; use a larger data.valid_fraction")

    @property
    def num_batches(self) -> int:
        """Batches of one epoch."""
        return self._samples.num_batches

    def rows(self, index: int) -> int:
        """Images in batch `index`, without reading it."""
        return len(self._samples.numbers(index))

    def targets(self, index: int) -> Tensor:
        """Class numbers int64 [rows], without looking at an image."""
        return torch.from_numpy(self._samples.images.labels[self._samples.numbers(index)])

    def batch(self, index: int) -> Batch:
        """Of the share of batch `index`: images float32 [rows, channels, size, size], standardised, and class numbers
        int64 [rows].

        Raises:
            DataError: naming an image that cannot be read.
        """
        is_new_epoch = not self._trains and index % self.num_batches == 0
        if self._ahead is None or self._ahead[0] != index or is_new_epoch:
            self._ahead = index, iter(self._loader(index))
        stream = self._ahead[1]
        made = next(stream)
        self._ahead = index + 1, stream
        if isinstance(made, str):
            raise DataError(f"{made}; replace it, or leave such images out: data.on_error=skip")
        return (made,), self.targets(index)[self.share.rows(self.rows(index))]

    def _loader(self, first: int) -> Iterable[Tensor | str]:
        """All batches from one on, in training without an end; each worker makes whole batches."""
        end_of_epoch = (first // self.num_batches + 1) * self.num_batches
        samples = self._samples
        samples.images, samples.augmentation  # noqa: B018 - before the workers fork, so that they share the memory
        return DataLoader(
            samples,
            batch_size=None,
            sampler=itertools.count(first) if self._trains else range(first, end_of_epoch),
            num_workers=self._workers,
            prefetch_factor=_AHEAD if self._workers else None,
            multiprocessing_context="fork" if self._workers else None,
            worker_init_fn=partial(_leave_the_group, threading.current_thread() is threading.main_thread()),
            generator=torch.Generator(),  # the base seed, which nothing here uses, is not drawn from the user's
            pin_memory=torch.cuda.is_available(),
        )


def _leave_the_group(is_made_by_main_thread: bool, worker: int) -> None:
    """A signal to the whole group must not end those that read: the run goes on until it has saved.

    They die with the thread that made them, so it must be one that lives as long as the process.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    os.setpgrp()
    if is_made_by_main_thread:
        die_with_parent()
