"""The data of a run: prepared once by the launcher, opened by every rank that needs a part of it."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pipetrain.config import Config, ImagesConfig, SyntheticConfig, TextConfig, TranslationConfig
from pipetrain.data.batches import CONTIGUOUS, ONCE, Batch, Batches, TextBatches
from pipetrain.data.images.batches import ImageBatches
from pipetrain.data.images.sets import KINDS, ImageSet, prepare_images
from pipetrain.data.share import WHOLE, Share
from pipetrain.data.synthetic import SyntheticBatches
from pipetrain.data.text import TokenFolder, prepare_text
from pipetrain.data.translation.batches import END, PairBatches
from pipetrain.data.translation.prepare import PairFolder, prepare_pairs
from pipetrain.derived import num_microbatches, num_replicas, remembers
from pipetrain.engine.loss import Tensors

Prepared = TokenFolder | ImageSet | PairFolder  # what is known of the data before a worker starts


def prepare_data(cfg: Config, say: Callable[[str], None]) -> Prepared | None:
    """Looks at the data and makes of them what workers read fast; None for those that are made up.

    Args:
        say: takes a line for the user.

    Raises:
        ConfigError: if the data are not there or not whole.
    """
    data = cfg.data
    if isinstance(data, TextConfig):
        return prepare_text(
            path=data.path,
            tokenizer=data.tokenizer,
            vocab_size=data.vocab_size,
            valid_fraction=data.valid_fraction,
            test_fraction=data.test_fraction,
            cache_dir=data.cache_dir,
        )
    if isinstance(data, ImagesConfig):
        return prepare_images(
            data.set,
            data.path,
            size=data.size,
            channels=data.channels,
            valid_fraction=data.valid_fraction,
            on_error=data.on_error,
            cache_dir=data.cache_dir,
            say=say,
        )
    if isinstance(data, TranslationConfig):
        pairs = prepare_pairs(
            path=data.path,
            languages=data.languages,
            pivot=data.pivot,
            tokenizer=data.tokenizer,
            vocab_size=data.vocab_size,
            max_tokens=data.max_tokens,
            sampling=data.sampling,
            valid_fraction=data.valid_fraction,
            test_fraction=data.test_fraction,
            cache_dir=data.cache_dir,
        )
        for line in pairs.described():
            say(line)
        return pairs
    return None


def open_data(cfg: Config, prepared: Prepared | None, split: str, share: Share = WHOLE) -> Batches:
    """One split of the data, in the order of the settings for training and each sample once for the others.

    Args:
        share: the part of each batch that is wanted.
    """
    data = cfg.data
    if isinstance(data, SyntheticConfig):
        samples = data.samples if split == "train" else max(1, data.samples // 10)
        return SyntheticBatches(
            data.shape, data.classes, samples, split, batch_size=cfg.batch_size, seed=cfg.seed, share=share
        )
    if isinstance(data, ImagesConfig):
        assert isinstance(prepared, ImageSet)
        augment = KINDS[data.set].augment if data.augment is None else data.augment
        return ImageBatches(
            prepared,
            split,
            batch_size=cfg.batch_size,
            seed=cfg.seed,
            augment=augment,
            workers=data.workers,
            share=share,
        )
    if isinstance(data, TranslationConfig):
        assert isinstance(prepared, PairFolder)
        return PairBatches(
            prepared,
            split,
            direction=data.direction,
            max_tokens=data.max_tokens,
            batch_size=cfg.batch_size,
            sampling=data.sampling,
            seed=cfg.seed,
            share=share,
        )
    assert isinstance(data, TextConfig)
    assert isinstance(prepared, TokenFolder)
    # What remembers reads every split in rows that go on.
    order = data.order if split == "train" else CONTIGUOUS if remembers(cfg) else ONCE
    return TextBatches(
        prepared,
        split,
        seq_len=data.seq_len,
        batch_size=cfg.batch_size,
        order=order,
        seed=cfg.seed,
        share=share,
    )


def group_in(data: Batches) -> Callable[[int], str]:
    """Of each batch the group of samples that it belongs to: of pairs of sentences the languages."""
    return data.way if isinstance(data, PairBatches) else lambda index: ""


def full_batch(cfg: Config, prepared: Prepared | None) -> Batch:
    """A batch as large as any: where batches differ, plans are made for that one."""
    if not isinstance(cfg.data, TranslationConfig):
        return open_data(cfg, prepared, "train").batch(0)
    ids = torch.full((cfg.batch_size, cfg.data.max_tokens), END)
    return (ids, ids), ids


def share_of(cfg: Config, replica: int) -> Share:
    """What a replica has of each batch."""
    return Share(replica, num_replicas(cfg), num_microbatches(cfg))


def to_device(tensor: Tensor, cfg: Config, device: torch.device) -> Tensor:
    """A tensor of a batch where the model takes it: on its device and, where it is floating, in its precision."""
    dtype = torch.float64 if cfg.precision == "fp64" and tensor.is_floating_point() else None
    return tensor.to(device, dtype, non_blocking=tensor.is_pinned())


def part_of_batch(
    cfg: Config, device: torch.device, data: Batches, index: int, *, first: bool, last: bool
) -> tuple[Tensors | None, Tensors | None]:
    """What a rank needs of its share of a batch: the first stage the inputs, the last one the targets."""
    inputs, targets = data.batch(index) if first else (None, own_targets(data, index) if last else None)
    return (
        tuple(to_device(tensor, cfg, device) for tensor in inputs) if inputs is not None else None,
        (to_device(targets, cfg, device),) if targets is not None and last else None,
    )


def own_targets(data: Batches, index: int) -> Tensor:
    """Those of the share of batch `index`."""
    targets = data.targets(index)
    return targets[data.share.rows(len(targets))]


class ImageFacts(NamedTuple):
    """What a model of images must know of the data: `image_size` is (height, width)."""

    channels: int
    image_size: tuple[int, int]
    num_classes: int


def image_facts(cfg: Config, prepared: Prepared | None) -> ImageFacts:
    """Of data=images or of data=synthetic with the shape of an image."""
    if isinstance(cfg.data, SyntheticConfig):
        channels, height, width = cfg.data.shape
        return ImageFacts(channels, (height, width), cfg.data.classes)
    assert isinstance(prepared, ImageSet)
    return ImageFacts(prepared.channels, (prepared.size, prepared.size), len(prepared.classes))


def fingerprint(cfg: Config, prepared: Prepared | None) -> str:
    """Changes whenever the data, their split or what is made of them change."""
    if isinstance(prepared, TokenFolder | PairFolder):
        return Path(prepared.folder).name
    return prepared.fingerprint if prepared is not None else cfg.data.name


def prepared_from(cfg: Config, raw: dict[str, Any] | None) -> Prepared | None:
    """The inverse of `dataclasses.asdict`, after a way through JSON."""
    if raw is None:
        return None
    if isinstance(cfg.data, TextConfig):
        return TokenFolder(**raw)
    if isinstance(cfg.data, TranslationConfig):
        return PairFolder(**raw)
    return dataclasses.replace(ImageSet(**raw), classes=tuple(raw["classes"]))
