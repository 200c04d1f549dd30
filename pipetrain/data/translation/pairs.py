"""Finds pairs of sentences: aligned line files, tables, and gettext catalogues.

    train.en-de.de  train.en-de.en    one sentence a line, aligned; any number of languages
    train.de  train.en                the same, of one language
    de.tsv                            a language and the pivot, with a tab between; a folder of them, or one file
    de.po  locale/de/LC_MESSAGES/*.mo catalogues: what stands in the program, which is in English, and its translation

All pairs are of some language and one common to all, the pivot; that of catalogues is English. Tables and catalogues
have no splits, and line files may lack some: there a pair's split follows from what it says in the pivot, so that a
sentence is in one split in all languages.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from pipetrain.errors import ConfigError

TRAIN, VALID, TEST = SPLITS = ("train", "valid", "test")
Pair = tuple[str, str]  # in the language, and in the pivot
_ALIGNED = re.compile(r"(train|valid|test)(?:\.([\w@-]+))?\.([\w@-]+)")
_LANGUAGE_FOLDER, _PROGRAMS = "LC_MESSAGES", "en"


@dataclass
class Found:
    """The pairs of each language and split, without those that say nothing.

    Attributes:
        empty: pairs of each language in which a side is empty: they were left out.
    """

    pairs: dict[str, dict[str, list[Pair]]] = field(default_factory=dict)
    empty: Counter[str] = field(default_factory=Counter)

    def add(self, language: str, split: str, pairs: Iterable[Pair]) -> None:
        kept = self.pairs.setdefault(language, {each: [] for each in SPLITS})[split]
        for one, other in pairs:
            if one.strip() and other.strip():
                kept.append((one.strip(), other.strip()))
            else:
                self.empty[language] += 1


@dataclass(frozen=True)
class Fractions:
    """What is held out where files have no splits."""

    valid: float
    test: float

    @property
    def shares(self) -> dict[str, float]:
        return {VALID: self.valid, TEST: self.test}

    def split_of(self, text: str) -> str:
        place = int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big") / 2**48
        return TEST if place < self.test else VALID if place < self.test + self.valid else TRAIN


def find_pairs(path: str | None, pivot: str, fractions: Fractions) -> Found:
    """
    Args:
        path: a folder, a table or a catalogue; None is Django's catalogues.

    Raises:
        ConfigError: if there are none, or a file is damaged: what is wrong, with the file and the line.
    """
    root = _djangos() if path is None else Path(path).expanduser()
    found = Found()
    if root.is_dir():
        files = sorted(file for file in root.rglob("*") if file.is_file())
    elif root.is_file():
        files = [root]
    else:
        raise ConfigError(f"data.path={path} is neither a file nor a folder")
    _add_aligned(found, files, pivot, fractions)
    for file in files:
        if file.suffix == ".tsv":
            _add_undivided(found, file.stem, _table(file), fractions)
    _add_catalogues(found, files, pivot, fractions)
    if pivot in found.pairs:
        raise ConfigError(
            f"data.pivot={pivot} is also a language of data.path={path}, whose files are paired with another one; use "
            "that one as data.pivot (en for catalogues)"
        )
    if not found.pairs:
        raise ConfigError(
            f"data.path={path} has no pairs of sentences with {pivot} (data.pivot); expected are files such as "
            f"train.{pivot}-de.de and train.{pivot}-de.{pivot}, de.tsv, or de.po"
        )
    return found


def _djangos() -> Path:
    try:
        import django
    except ImportError as error:
        raise ConfigError(
            "data.path=null is the messages of Django in 97 languages, which is not installed here: "
            "pip install django, or give a folder"
        ) from error
    return Path(django.__file__).parent


def _add_undivided(found: Found, language: str, pairs: Iterable[Pair], fractions: Fractions) -> None:
    for pair in pairs:
        found.add(language, fractions.split_of(pair[1].strip()), [pair])


# ---- line files ------------------------------------------------------------------------------------------------------


def _add_aligned(found: Found, files: Iterable[Path], pivot: str, fractions: Fractions) -> None:
    """Each file of a language with that of the pivot beside it. Splits without a file are held out of the training."""
    there, by_language = set(files), dict[str, dict[str, list[Pair]]]()
    for file in files:
        match = _ALIGNED.fullmatch(file.name)
        if match is None:
            continue
        split, both, language = match.groups()
        if language == pivot or both not in (None, f"{pivot}-{language}", f"{language}-{pivot}"):
            continue
        beside = file.with_name(f"{file.name.removesuffix(language)}{pivot}")
        if beside not in there and both is not None:
            raise ConfigError(f"{file} has no {beside.name} beside it, which should hold its translation")
        if beside in there:
            by_language.setdefault(language, {}).setdefault(split, []).extend(_aligned(file, beside))
    for language, splits in by_language.items():
        missing = Fractions(*(0.0 if split in splits else share for split, share in fractions.shares.items()))
        for split, pairs in splits.items():
            if split == TRAIN:
                _add_undivided(found, language, pairs, missing)
            else:
                found.add(language, split, pairs)


def _aligned(file: Path, beside: Path) -> list[Pair]:
    lines, others = list(_lines(file)), list(_lines(beside))
    if len(lines) != len(others):
        raise ConfigError(
            f"{file} has {len(lines)} lines and {beside} has {len(others)}: line n of one must be the translation of "
            "line n of the other"
        )
    return list(zip(lines, others, strict=True))


def _lines(file: Path) -> Iterator[str]:
    try:
        content = file.read_bytes()
    except OSError as error:
        raise ConfigError(f"{file} cannot be read ({error.strerror})") from error
    for number, line in enumerate(content.removesuffix(b"\n").split(b"\n") if content else [], 1):
        try:
            yield line.decode().removesuffix("\r")
        except UnicodeDecodeError as error:
            raise ConfigError(f"{file}, line {number} is no UTF-8 ({error.reason})") from error


def _table(file: Path) -> Iterator[Pair]:
    for number, line in enumerate(_lines(file), 1):
        columns = line.split("\t")
        if len(columns) != 2:
            raise ConfigError(f"{file}, line {number} has {len(columns) - 1} tabs; between a pair there is one")
        yield columns[0], columns[1]


# ---- catalogues ------------------------------------------------------------------------------------------------------


def _add_catalogues(found: Found, files: Iterable[Path], pivot: str, fractions: Fractions) -> None:
    """Of a catalogue in both forms the readable one is taken. What several catalogues say alike counts once."""
    there = set(files)
    pairs: dict[str, dict[Pair, None]] = {}
    for file in files:
        if file.suffix == ".po" or (file.suffix == ".mo" and file.with_suffix(".po") not in there):
            in_folder = file.parent.name == _LANGUAGE_FOLDER
            pairs.setdefault(file.parent.parent.name if in_folder else file.stem, {}).update(
                dict.fromkeys(_catalogue(file))
            )
    if pairs and pivot != _PROGRAMS:
        raise ConfigError(
            f"data.pivot={pivot}, but gettext catalogues are paired with what stands in the program, which is in "
            "English; use data.pivot=en, with data.direction=from to translate from it"
        )
    for language, its in pairs.items():
        if any(one != other for one, other in its):  # the program's own language has itself
            _add_undivided(found, language, its, fractions)


def _catalogue(file: Path) -> Iterator[Pair]:
    import polib

    try:
        entries = polib.pofile(str(file)) if file.suffix == ".po" else polib.mofile(str(file))
    except (OSError, UnicodeDecodeError, ValueError) as error:
        if isinstance(error, UnicodeDecodeError) and file.suffix == ".po":
            list(_lines(file))  # which names the line
        raise ConfigError(f"{file} cannot be read as a catalogue ({error})") from error
    for entry in entries:
        if entry.obsolete or "fuzzy" in getattr(entry, "flags", ()):
            continue
        sides = [(entry.msgstr, entry.msgid)]
        if entry.msgid_plural:
            forms = [entry.msgstr_plural[form] for form in sorted(entry.msgstr_plural)]
            sides = [(forms[0], entry.msgid), (forms[-1], entry.msgid_plural)] if forms else []
        for one, other in sides:
            if one.strip():  # what is not translated yet is no pair
                yield " ".join(one.split()), " ".join(other.split())
