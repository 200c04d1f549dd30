"""From pairs of sentences to files of token ids, once: with one vocabulary for all languages. Never imports torch."""

import hashlib
import itertools
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import sentencepiece

from pipetrain.data.finished import finished_folder, write_synced
from pipetrain.data.text import MODEL_FILE, token_dtype
from pipetrain.data.tokenizer import SENTENCEPIECE, read_model, train_joint
from pipetrain.data.translation.pairs import SPLITS, TRAIN, Found, Fractions, Pair, find_pairs
from pipetrain.data.translation.sampling import quotas
from pipetrain.errors import ConfigError
from pipetrain.suggest import one_of

FORMAT = 1  # raise it whenever the same pairs would give other files
_MOST_SPELLED = 0.01  # of the characters of a language, before it is said
TRAINING_PAIRS = 1_000_000  # a vocabulary is made of at most so many
# Whether a language is translated into the pivot, from it, or both ways.
INTO, FROM, BOTH = "into", "from", "both"
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PairFolder:
    """A finished folder of token files.

    Attributes:
        folder: absolute path; holds tokenizer.model, meta.json, and of each language and split the ids of both sides
            and where each sentence ends.
        pivot: the language that all are paired with.
        vocab_size: ids are 0 .. vocab_size - 1.
        counts: of each language the pairs in each split.
        empty: of each language the pairs that were left out since a side says nothing.
        too_long: likewise those that have more tokens than were asked for.
        coverage: of each language the share of the characters in its training sentences that are pieces; the others are
            spelled out in bytes.
    """

    folder: str
    pivot: str
    vocab_size: int
    counts: dict[str, dict[str, int]]
    empty: dict[str, int]
    too_long: dict[str, int]
    coverage: dict[str, float]

    @property
    def tokenizer(self) -> str:
        return str(Path(self.folder) / MODEL_FILE)

    def described(self) -> list[str]:
        """Lines for the console: what there is to train on, and what was left out."""
        number = sum(of_splits[TRAIN] for of_splits in self.counts.values())
        languages = f"{len(self.counts)} languages" if len(self.counts) > 1 else next(iter(self.counts))
        lines = [f"{number:,} pairs of {languages} and {self.pivot} to train on"]
        left_out = {"with an empty side": self.empty, "longer than data.max_tokens": self.too_long}
        said = [f"{sum(counts.values()):,} {why}" for why, counts in left_out.items() if any(counts.values())]
        if said:
            lines.append(f"left out: {', '.join(said)}")
        spelled = {language: 1 - share for language, share in self.coverage.items() if 1 - share > _MOST_SPELLED}
        if spelled:
            worst = sorted(spelled, key=lambda language: -spelled[language])[:8]
            listed = ", ".join(f"{language} {spelled[language]:.0%}" for language in worst)
            more = ", ..." if len(spelled) > len(worst) else ""
            lines.append(
                f"characters that are spelled in bytes, since the vocabulary lacks them: {listed}{more}; a larger "
                "data.vocab_size has more"
            )
        return lines

    def side(self, language: str, split: str, *, pivot: bool) -> "Sentences":
        """One side of the pairs of a language."""
        return Sentences(*_files(Path(self.folder), language, split, pivot), token_dtype(self.vocab_size))


class Sentences:
    """Token ids of many sentences, read from the disk as they are wanted."""

    def __init__(self, ids: Path, ends: Path, dtype: npt.DTypeLike) -> None:
        self._ends = np.fromfile(ends, dtype=np.int64)
        self._starts = np.concatenate([[0], self._ends[:-1]])
        has_any = len(self._ends) > 0 and self._ends[-1] > 0
        self._ids = np.memmap(ids, dtype=dtype, mode="r") if has_any else np.zeros(0, dtype)

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Tokens of each."""
        lengths: npt.NDArray[np.int64] = self._ends - self._starts
        return lengths

    def __getitem__(self, number: int) -> npt.NDArray[np.int64]:
        return np.asarray(self._ids[self._starts[number] : self._ends[number]], dtype=np.int64)


def symbol(language: str) -> str:
    """The piece in front of a sentence that is to be translated into a language.

    >>> symbol("de")
    '<2de>'
    """
    return f"<2{language}>"


def prepare_pairs(
    *,
    path: str | None,
    languages: Sequence[str] | None,
    pivot: str,
    tokenizer: str,
    vocab_size: int,
    max_tokens: int,
    sampling: float,
    valid_fraction: float,
    test_fraction: float,
    cache_dir: str,
) -> PairFolder:
    """Finds and tokenises pairs of sentences, or finds that this was done before.

    Args:
        path: see `pairs.find_pairs`.
        languages: those that are wanted; None is all that are there.
        tokenizer: 'sentencepiece', which is trained on languages as often as they will be seen, or the path of a model
            that was made here before.
        vocab_size: pieces of the one that is trained.
        max_tokens: longer sentences are left out, with those that they are paired with.
        sampling: the power of `quotas`.
        cache_dir: where token folders are kept.

    Raises:
        ConfigError: if the pairs, the tokenizer, the vocabulary's size or the cache folder cannot be used.
    """
    model = None if tokenizer == SENTENCEPIECE else _checked(read_model(tokenizer), tokenizer)
    found = find_pairs(path, pivot, Fractions(valid_fraction, test_fraction))
    pairs = _wanted(found, languages, path)
    vocabulary = vocab_size if model is None else hashlib.sha256(model).hexdigest()
    settings = {"pivot": pivot, "vocab_size": vocabulary, "max_tokens": max_tokens, "sampling": sampling}
    root = Path(os.path.abspath(os.path.expanduser(cache_dir))) / "translation"
    folder = root / _key(pairs, settings)
    empty = {language: found.empty[language] for language in pairs}
    try:
        return finished_folder(
            folder, _load, lambda aside: _fill(aside, pairs, empty, pivot, model, vocab_size, max_tokens, sampling)
        )
    except OSError as error:
        reason = error.strerror or str(error)
        raise ConfigError(
            f"data.cache_dir={cache_dir} cannot be used ({reason}); give a folder that you may write to"
        ) from error


def _checked(model: bytes, name: str) -> bytes:
    """
    Raises:
        ConfigError: if it is no vocabulary for translation.
    """
    processor, problem = sentencepiece.SentencePieceProcessor(), ""
    try:
        processor.LoadFromSerializedProto(model)
    except RuntimeError as error:
        problem = f"it is no sentencepiece model ({error})"
    if not problem and [processor.pad_id(), processor.unk_id(), processor.bos_id(), processor.eos_id()] != [0, 1, 2, 3]:
        problem = "its first pieces are not padding, unknown, begin and end"
    elif not problem and not processor.is_byte(processor.piece_to_id("<0x00>")):
        problem = "it has no pieces for bytes, so characters that it lacks would be lost"
    if problem:
        raise ConfigError(
            f"data.tokenizer={name} cannot be used for translation: {problem}; give the tokenizer.model of a run with "
            f"data=translation, or data.tokenizer={SENTENCEPIECE} to train one"
        )
    return model


def _wanted(found: Found, languages: Sequence[str] | None, path: str | None) -> dict[str, dict[str, list[Pair]]]:
    for language in languages or ():
        if language not in found.pairs:
            known = tuple(sorted(found.pairs))
            raise ConfigError(f"data.languages has {language}, of which there are no pairs. {one_of(language, known)}")
    wanted = {language: found.pairs[language] for language in sorted(languages or found.pairs)}
    for language, splits in wanted.items():
        if not splits[TRAIN]:
            others = ",".join(other for other in wanted if wanted[other][TRAIN]) or "..."
            raise ConfigError(
                f"data.path={path} has no pairs to train {language} on ({found.empty[language]} have an empty side); "
                f"leave it out: data.languages=[{others}]"
            )
    return wanted


def _key(pairs: Mapping[str, Mapping[str, Sequence[Pair]]], settings: Mapping[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps({"format": FORMAT, **settings}, sort_keys=True).encode())
    for language, splits in pairs.items():
        for split in SPLITS:
            digest.update(f"{language} {split} {len(splits[split])}\0".encode())
            for pair in splits[split]:
                digest.update("\0".join(pair).encode() + b"\n")
    return digest.hexdigest()[:32]


def _files(folder: Path, language: str, split: str, pivot: bool) -> tuple[Path, Path]:
    name = f"{split}.{language}.{'pivot' if pivot else 'own'}"
    return folder / f"{name}.ids", folder / f"{name}.ends"


def _fill(
    aside: Path,
    pairs: Mapping[str, Mapping[str, Sequence[Pair]]],
    empty: Mapping[str, int],
    pivot: str,
    model: bytes | None,
    vocab_size: int,
    max_tokens: int,
    sampling: float,
) -> None:
    if model is None:
        log.info("training a vocabulary of %d pieces for %d languages (once)", vocab_size, len(pairs))
        model = train_joint(_sampled(pairs, sampling), vocab_size, [symbol(language) for language in (*pairs, pivot)])
    write_synced(aside / MODEL_FILE, model)
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    vocab_size = int(processor.get_piece_size())
    counts: dict[str, dict[str, int]] = {}
    too_long: dict[str, int] = {}
    for language, splits in pairs.items():
        counts[language], too_long[language] = {}, 0
        for split in SPLITS:
            kept = list(_tokenised(processor, splits[split], max_tokens))
            counts[language][split] = len(kept)
            too_long[language] += len(splits[split]) - len(kept)
            for side, is_pivot in ((0, False), (1, True)):
                _write(aside, language, split, is_pivot, [pair[side] for pair in kept], token_dtype(vocab_size))
    meta = {
        "pivot": pivot,
        "vocab_size": vocab_size,
        "counts": counts,
        "empty": dict(empty),
        "too_long": too_long,
        "coverage": {language: _coverage(processor, splits[TRAIN]) for language, splits in pairs.items()},
        "sizes": {file.name: file.stat().st_size for file in sorted(aside.iterdir())},
    }
    write_synced(aside / "meta.json", json.dumps(meta, indent=2).encode())


def _sampled(pairs: Mapping[str, Mapping[str, Sequence[Pair]]], sampling: float) -> Iterator[str]:
    """Both sides of pairs, of each language as many as an epoch has."""
    wanted = quotas({language: len(splits[TRAIN]) for language, splits in pairs.items()}, sampling)
    shrink = min(1.0, TRAINING_PAIRS / sum(wanted.values()))
    for language, number in wanted.items():
        some = itertools.islice(itertools.cycle(pairs[language][TRAIN]), max(1, round(shrink * number)))
        for pair in some:
            yield from pair


def _tokenised(processor: Any, pairs: Sequence[Pair], max_tokens: int) -> Iterator[tuple[Sequence[int], Sequence[int]]]:
    """Of the pairs that are short enough: with its end and what may stand in front a sentence has two tokens more."""
    sides = [processor.encode([pair[side] for pair in pairs]) for side in (0, 1)]
    return (pair for pair in zip(*sides, strict=True) if max(map(len, pair)) + 2 <= max_tokens)


def _write(
    aside: Path, language: str, split: str, pivot: bool, sentences: Sequence[Sequence[int]], dtype: npt.DTypeLike
) -> None:
    ids, ends = _files(aside, language, split, pivot)
    write_synced(ids, np.fromiter(itertools.chain.from_iterable(sentences), dtype=dtype).tobytes())
    write_synced(ends, np.cumsum([len(sentence) for sentence in sentences], dtype=np.int64).tobytes())


def _coverage(processor: Any, pairs: Sequence[Pair]) -> float:
    characters: dict[str, int] = {}
    for own, _ in pairs:
        for character in own:
            characters[character] = characters.get(character, 0) + 1
    known = {processor.id_to_piece(number) for number in range(processor.get_piece_size())}
    covered = sum(n for character, n in characters.items() if character.replace(" ", "\u2581") in known)
    return covered / max(1, sum(characters.values()))


def _load(folder: Path) -> PairFolder | None:
    """The finished folder; None where there is none or a file in it is missing or cut off."""
    try:
        meta = json.loads((folder / "meta.json").read_text())
        sizes = meta.pop("sizes")
        if any((folder / name).stat().st_size != size for name, size in sizes.items()):
            return None
        return PairFolder(folder=str(folder), **meta)
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None
