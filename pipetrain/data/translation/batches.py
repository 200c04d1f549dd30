"""Batches of sentence pairs: of one length as far as possible, so that little of a batch is padding."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import sentencepiece
import torch

from pipetrain.data.batches import Batch
from pipetrain.data.order import permutation
from pipetrain.data.share import WHOLE, Share
from pipetrain.data.translation.pairs import TRAIN
from pipetrain.data.translation.prepare import BOTH, FROM, INTO, PairFolder, Sentences, symbol
from pipetrain.data.translation.sampling import quotas
from pipetrain.errors import ConfigError
from pipetrain.seeds import derive_seed

PADDING, BEGIN, END = 0, 2, 3  # of every vocabulary that `prepare` makes
_IGNORED = -100  # targets with this value are padding: no loss, not counted

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class _Way:
    """From one language into another one."""

    name: str
    source: Sentences
    target: Sentences
    prefix: int | None  # in front of the source, where it does not go without saying what the target is

    @cached_property
    def lengths(self) -> Ints:
        """[pairs, 2]: tokens of the longer side of each pair and of the other one, with all that belongs to them."""
        sides = np.stack([self.source.lengths + (self.prefix is not None), self.target.lengths], 1) + 1
        return -np.sort(-sides, axis=1)


class PairBatches:
    """Batch 0, 1, 2, ... of one split, going on over epochs; the same number always gives the same batch.

    A batch has `batch_size` pairs of `max_tokens` tokens, or as many more as are shorter: its rows times the tokens of
    its longest sentence are at most `batch_size * max_tokens`.

    * train: an epoch has as many pairs as there are, of each language a share of n^`sampling` (see `quotas`), each
      language in a random order that goes on from epoch to epoch. Pairs of similar lengths are put together, equal ones
      at random, and batches come in random order. All epochs are given as many batches as the first one: one that
      is left over is dropped, one that lacks is taken twice.
    * others: each pair exactly once; a batch has pairs of one language, and languages take turns.

    The model takes source ids [rows, S] and the target's ids behind a begin [rows, T]; it is compared with the target's
    ids up to their end [rows, T].
    """

    def __init__(
        self,
        pairs: PairFolder,
        split: str,
        *,
        direction: str,
        max_tokens: int,
        batch_size: int,
        sampling: float,
        seed: int,
        share: Share = WHOLE,
    ) -> None:
        """
        Args:
            direction: into | from the pivot, or both.
            share: the rows that `batch` gives.

        Raises:
            ConfigError: if the split is empty, or has fewer pairs to train on than a batch.
        """
        self.share = share
        self._split, self._seed, self._sampling = split, seed, sampling
        self._most, self._fewest = batch_size * max_tokens, batch_size
        self._ways = list(_ways(pairs, split, direction))
        self._plans: dict[int, list[Ints]] = {}
        self._counted, self._seen = 0, np.zeros(len(self._ways), dtype=np.int64)
        number = sum(len(way.lengths) for way in self._ways)
        if split == TRAIN and number < 2 * batch_size:
            raise ConfigError(
                f"batch_size={batch_size} needs at least {2 * batch_size} pairs to train on, and there are {number}; "
                f"use batch_size={max(1, number // 2)} or more pairs"
            )
        if not number:
            raise ConfigError(f"the pairs have none in their {split} split; use a larger data.{split}_fraction")

    @cached_property
    def num_batches(self) -> int:
        """Batches of one epoch."""
        return len(self._plan(0))

    def rows(self, index: int) -> int:
        """Pairs in batch `index`, without reading it."""
        return len(self._numbers(index))

    def batch(self, index: int) -> Batch:
        """Of the share of batch `index`."""
        numbers = self._numbers(index)
        rows = [self._pair(way, number) for way, number in numbers[self.share.rows(len(numbers))]]
        # As long as the whole batch: what a row is may not depend on who else is in its share.
        sources, targets = self._longest(numbers)
        source = torch.full((len(rows), sources), PADDING)
        begun, target = torch.full((len(rows), targets), PADDING), torch.full((len(rows), targets), _IGNORED)
        for row, (its_source, its_target) in enumerate(rows):
            source[row, : len(its_source)] = torch.from_numpy(its_source)
            begun[row, : len(its_target)] = torch.from_numpy(np.concatenate([[BEGIN], its_target[:-1]]))
            target[row, : len(its_target)] = torch.from_numpy(its_target)
        return (source, begun), target

    def targets(self, index: int) -> torch.Tensor:
        """Targets of batch `index`: int64 [rows, T]."""
        numbers = self._numbers(index)
        target = torch.full((len(numbers), self._longest(numbers)[1]), _IGNORED)
        for row, (way, number) in enumerate(numbers):
            its_target = self._pair(way, number)[1]
            target[row, : len(its_target)] = torch.from_numpy(its_target)
        return target

    # ---- one pair ------------------------------------------------------------------------------------------------

    def _pair(self, way: int, number: int) -> tuple[Ints, Ints]:
        its = self._ways[way]
        front = [] if its.prefix is None else [its.prefix]
        return np.concatenate([front, its.source[number], [END]]).astype(np.int64), np.append(its.target[number], END)

    def _longest(self, numbers: Ints) -> tuple[int, int]:
        """Tokens of the longest source and target of some pairs."""
        ways = [(self._ways[way], number) for way, number in numbers]
        sources = max(way.source.lengths[number] + (way.prefix is not None) for way, number in ways)
        return int(sources) + 1, int(max(way.target.lengths[number] for way, number in ways)) + 1

    # ---- which pairs ---------------------------------------------------------------------------------------------

    def way(self, index: int) -> str:
        """From which language into which one the first pair of batch `index` goes, such as de-en."""
        return self._ways[int(self._numbers(index)[0, 0])].name

    def seen(self, num_batches: int) -> dict[str, int]:
        """Pairs of each language in the first batches of the training, which has come so far."""
        while self._counted < num_batches:
            self._seen += np.bincount(self._numbers(self._counted)[:, 0], minlength=len(self._ways))
            self._counted += 1
        return {way.name: int(count) for way, count in zip(self._ways, self._seen, strict=True)}

    def _numbers(self, index: int) -> Ints:
        """[rows, 2]: the way and the number there of each pair in batch `index`."""
        epoch, position = divmod(index, self.num_batches)
        plan = self._plan(epoch)
        return plan[position % len(plan)]

    def _plan(self, epoch: int) -> list[Ints]:
        """The batches of an epoch."""
        if self._split != TRAIN:
            epoch = 0
        if epoch not in self._plans:
            first = {0: self._plans[0]} if 0 in self._plans else {}  # which says how many there are
            self._plans = {**first, epoch: list(self._made(epoch))}
        return self._plans[epoch]

    def _made(self, epoch: int) -> Iterator[Ints]:
        if self._split != TRAIN:
            for turn in itertools.zip_longest(*map(self._batches_of, range(len(self._ways)))):
                yield from (batch for batch in turn if batch is not None)
            return
        chosen = np.concatenate(list(self._chosen(epoch)))
        chosen = chosen[permutation(self._seed, "pairs", epoch, len(chosen))]
        batches = list(self._cut(chosen))
        lacking = self._fewest - len(batches[-1])
        if lacking > 0:  # the shortest pairs, which no epoch may leave out: others as short are taken twice
            batches[-1] = np.concatenate([batches[-2][-lacking:], batches[-1]])
        for number in permutation(self._seed, "batches", epoch, len(batches)):
            yield batches[number]

    def _batches_of(self, way: int) -> list[Ints]:
        """All of one way, in random order: the first ones are a sample."""
        numbers = np.arange(len(self._ways[way].lengths))
        batches = list(self._cut(np.stack([np.full(len(numbers), way), numbers], 1)))
        return [batches[place] for place in permutation(self._seed, self._split, way, len(batches))]

    def _numbered(self) -> Iterator[tuple[int, _Way]]:
        yield from enumerate(self._ways)

    def _chosen(self, epoch: int) -> Iterator[Ints]:
        """Of each way its share of an epoch: the next ones of its own order, which begins anew when it has ended."""
        counts = {str(i): len(way.lengths) for i, way in self._numbered()}
        for key, quota in quotas(counts, self._sampling).items():
            count = counts[key]
            places = epoch * quota + np.arange(quota)
            rounds, inside = np.divmod(places, count)
            numbers = np.empty(quota, dtype=np.int64)
            for turn in np.unique(rounds):
                order = permutation(derive_seed(self._seed, "way", int(key)), self._split, int(turn), count)
                numbers[rounds == turn] = order[inside[rounds == turn]]
            yield np.stack([np.full(quota, int(key)), numbers], 1)

    def _lengths(self, numbers: Ints) -> Ints:
        """[pairs, 2], see `_Way.lengths`."""
        found = np.empty_like(numbers)
        for i, way in self._numbered():
            of_way = numbers[:, 0] == i
            found[of_way] = way.lengths[numbers[of_way, 1]]
        return found

    def _cut(self, numbers: Ints) -> Iterator[Ints]:
        """Batches of pairs of similar length, long ones first, each with as many as its tokens allow but the last."""
        longer, shorter = self._lengths(numbers).T
        # The shorter side now falls and now rises: so it goes on where the longer one changes.
        order = np.lexsort((np.where(longer % 2, shorter, -shorter), -longer))
        start = 0
        while start < len(order):
            end = start + int(self._most // longer[order[start]])
            yield numbers[order[start:end]]
            start = end


def is_said(direction: str, num_languages: int) -> bool:
    """Whether a source says what it is to become."""
    return direction == BOTH or (direction == FROM and num_languages > 1)


def _ways(pairs: PairFolder, split: str, direction: str) -> Iterator[_Way]:
    """A source says what it is to become where that may be several languages."""
    processor = sentencepiece.SentencePieceProcessor(model_file=pairs.tokenizer)
    says = is_said(direction, len(pairs.counts))
    for language in pairs.counts:
        own, pivot = pairs.side(language, split, pivot=False), pairs.side(language, split, pivot=True)
        if direction in (INTO, BOTH):
            yield _Way(f"{language}-{pairs.pivot}", own, pivot, prefix(processor, pairs.pivot) if says else None)
        if direction in (FROM, BOTH):
            yield _Way(f"{pairs.pivot}-{language}", pivot, own, prefix(processor, language) if says else None)


def prefix(processor: Any, language: str) -> int:
    """The token in front of a source that is to be translated into a language.

    Raises:
        ConfigError: if the vocabulary has none.
    """
    token = int(processor.piece_to_id(symbol(language)))
    if processor.id_to_piece(token) != symbol(language):
        raise ConfigError(
            f"the vocabulary has no piece {symbol(language)}, which says that a sentence is to be translated into "
            f"{language}; use data.tokenizer=sentencepiece, which trains one that has it"
        )
    return token
