"""Finding the text and cutting it into train, valid and test; reading it as a stream, never as a whole."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pipetrain.errors import ConfigError

SPLITS = ("train", "valid", "test")
BLOCK_BYTES = 1 << 20
TEXT_SUFFIXES = ("", ".txt", ".text", ".tokens", ".raw")
_SPLIT_WORDS = {
    "train": "train", "valid": "valid", "validation": "valid", "val": "valid", "dev": "valid", "test": "test"
}  # fmt: skip
_SPLIT_NAME = re.compile(rf"(?:^|[._-])({'|'.join(_SPLIT_WORDS)})(?:[._-]|$)", re.IGNORECASE)


@dataclass(frozen=True)
class Extent:
    """Bytes `start` to `stop` of a file, or of text that is held in memory."""

    source: Path | bytes
    start: int
    stop: int


Text = tuple[Extent, ...]  # read one after the other


def find_splits(path: str | None, *, valid_fraction: float, test_fraction: float) -> dict[str, Text]:
    """The text of every split; one that does not exist is empty.

    A folder with a train file and a valid or test file (`train.txt`, `wiki.valid.tokens`, `test/page.txt`: the word
    stands in the name directly inside the folder) is taken as split already. Any other text is cut by the fractions:
    train first, then valid, and test at its end, each border moved back to the start of a UTF-8 character.

    Args:
        path: a text file, or a folder, or None for Python's own manual.
        valid_fraction: share of the bytes of a text that is not split already, also `test_fraction`.

    Raises:
        ConfigError: if there is no such path, no text in it, nothing in the text, or no permission to read it.
    """
    if path is None:
        return _cut_by_fractions(_manual(), valid_fraction, test_fraction)
    given = Path(path).expanduser()
    try:
        if given.is_dir() and (splits := _split_files(given)):
            if num_bytes(splits["train"]) == 0:
                raise ConfigError(f"data.path={path} has nothing in its train files; put the text to train on there")
            return splits
        whole = _join(_text_files(given, path))
        if num_bytes(whole) == 0:
            what = "has only empty .txt files" if given.is_dir() else "is empty"
            raise ConfigError(f"data.path={path} {what}; give a text, or data.path=null for Python's manual")
        return _cut_by_fractions(whole, valid_fraction, test_fraction)
    except OSError as error:
        raise _unreadable(path, error) from error


def num_bytes(text: Text) -> int:
    """Length of a text in bytes."""
    return sum(extent.stop - extent.start for extent in text)


def read_chunks(text: Text) -> Iterator[bytes]:
    """The bytes of a text, at most `BLOCK_BYTES` at a time.

    Raises:
        ConfigError: if a file cannot be read.
    """
    for extent in text:
        if isinstance(extent.source, bytes):
            yield extent.source[extent.start : extent.stop]
            continue
        try:
            with open(extent.source, "rb") as file:
                file.seek(extent.start)
                left = extent.stop - extent.start
                while left > 0 and (chunk := file.read(min(BLOCK_BYTES, left))):
                    left -= len(chunk)
                    yield chunk
        except OSError as error:
            raise _unreadable(str(extent.source), error) from error


def read_blocks(text: Text) -> Iterator[bytes]:
    """The bytes of a text in blocks of some `BLOCK_BYTES` that end with a line; inside a longer line, before a space.

    No block ends inside a UTF-8 character.
    """
    held = b""
    for chunk in read_chunks(text):
        held += chunk
        if len(held) >= BLOCK_BYTES:
            end = held.rfind(b"\n") + 1 or max(held.rfind(b" "), 0) or _last_character(held)
            yield held[:end]
            held = held[end:]
    if held:
        yield held


def _manual() -> Text:
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise ConfigError("data.path=null is Python's manual, but this Python lacks it; give data.path=...") from error
    content = "".join(topics.values()).encode()
    return (Extent(content, 0, len(content)),)


def _split_files(folder: Path) -> dict[str, Text] | None:
    files: dict[str, list[Path]] = {split: [] for split in SPLITS}
    for file in _files(folder):
        suffix = file.suffix.lower()
        match = _SPLIT_NAME.search(file.relative_to(folder).parts[0])
        if match and (suffix in TEXT_SUFFIXES or suffix[1:] in _SPLIT_WORDS):
            files[_SPLIT_WORDS[match[1].lower()]].append(file)
    if not files["train"] or not (files["valid"] or files["test"]):
        return None
    return {split: _join(found) for split, found in files.items()}


def _text_files(given: Path, path: str) -> list[Path]:
    if given.is_file():
        return [given]
    if not given.is_dir():
        raise ConfigError(
            f"data.path={path}: there is no such file or folder; give a text file or a folder of .txt files, "
            "or data.path=null for Python's manual"
        )
    files = _files(given)
    texts = [file for file in files if file.suffix.lower() == ".txt"]
    if not texts:
        other = f"give a text of another name by itself, as in data.path={files[0]}, or " if files else "give "
        raise ConfigError(
            f"data.path={path} is a folder with no text in it: it needs .txt files, or a train file beside a valid or "
            f"test file; {other}data.path=null for Python's manual"
        )
    return texts


def _files(folder: Path) -> list[Path]:
    """All files below a folder in sorted order, without hidden ones."""
    found = (file for file in folder.rglob("*") if not any(p.startswith(".") for p in file.relative_to(folder).parts))
    return sorted(file for file in found if file.is_file())


def _join(files: Sequence[Path]) -> Text:
    """The files as one text; a newline goes after a file that lacks it where another follows."""
    extents: list[Extent] = []
    for file in files:
        size = file.stat().st_size
        if size == 0:
            continue
        if extents and next(read_chunks((replace(extents[-1], start=extents[-1].stop - 1),)), b"") != b"\n":
            extents.append(Extent(b"\n", 0, 1))
        extents.append(Extent(file, 0, size))
    return tuple(extents)


def _cut_by_fractions(text: Text, valid_fraction: float, test_fraction: float) -> dict[str, Text]:
    size = num_bytes(text)
    test_start = size - round(size * test_fraction)
    valid_start = _boundary(text, test_start - round(size * valid_fraction))
    test_start = _boundary(text, test_start)
    return {
        "train": _cut(text, 0, valid_start),
        "valid": _cut(text, valid_start, test_start),
        "test": _cut(text, test_start, size),
    }


def _cut(text: Text, start: int, stop: int) -> Text:
    """Bytes `start` to `stop` of a text."""
    extents = []
    offset = 0
    for extent in text:
        first = max(extent.start, extent.start + start - offset)
        last = min(extent.stop, extent.start + stop - offset)
        if first < last:
            extents.append(Extent(extent.source, first, last))
        offset += extent.stop - extent.start
    return tuple(extents)


def _boundary(text: Text, offset: int) -> int:
    """The start of the UTF-8 character that holds the byte at `offset`."""
    if not 0 < offset < num_bytes(text):
        return offset
    near = b"".join(read_chunks(_cut(text, max(0, offset - 3), offset + 1)))
    return offset - (len(near) - 1 - _last_character(near))


def _last_character(data: bytes) -> int:
    """Where the last UTF-8 character begins; the last byte where that is no UTF-8."""
    for back in range(1, min(4, len(data)) + 1):
        if data[-back] & 0xC0 != 0x80:
            return len(data) - back
    return len(data) - 1


def _unreadable(path: str, error: OSError) -> ConfigError:
    reason = error.strerror or str(error)
    return ConfigError(f"data.path={path} cannot be read ({reason}); give a text that this user may read")
