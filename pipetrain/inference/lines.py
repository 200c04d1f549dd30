"""Lines in, lines out: the input of `action=generate` in blocks."""

import re
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import BinaryIO

from pipetrain.errors import ConfigError, DataError

_BLOCK = 1000  # lines that are read before the first answer
_ESCAPED = re.compile(r"\\(.)", re.DOTALL)


def blocks(given: str | None) -> Iterator[list[str]]:
    """The lines of a file, or of stdin, without their ends. From a terminal each line comes by itself.

    Raises:
        ConfigError: at once, if there is no such file.
        DataError: later, if a line is no UTF-8.
    """
    if given is None:
        return _blocks(nullcontext(sys.stdin.buffer), "stdin", 1 if sys.stdin.isatty() else _BLOCK)
    try:
        file = Path(given).expanduser().open("rb")
    except OSError as error:
        raise ConfigError(f"input={given} cannot be read ({error.strerror}); give a file of lines") from error
    return _blocks(file, given, _BLOCK)


def _blocks(source: AbstractContextManager[BinaryIO], name: str, size: int) -> Iterator[list[str]]:
    block: list[str] = []
    with source as file:
        for number, line in enumerate(file, 1):
            try:
                block.append(line.decode().removesuffix("\n").removesuffix("\r"))
            except UnicodeDecodeError as error:
                if block:
                    yield block
                raise DataError(f"{name}, line {number} is no UTF-8 ({error.reason})") from error
            if len(block) == size:
                yield block
                block = []
    if block:
        yield block


def write(line: str) -> None:
    """One line to stdout."""
    sys.stdout.buffer.write(line.encode(errors="replace") + b"\n")


def escaped(text: str) -> str:
    r"""A text as one line.

    >>> escaped("a\nb")
    'a\\nb'
    """
    return text.replace("\\", "\\\\").replace("\n", "\\n").replace("\r", "\\r")


def unescaped(line: str) -> str:
    r"""The inverse of `escaped`.

    >>> unescaped("a\\nb")
    'a\nb'
    """
    return _ESCAPED.sub(lambda match: {"n": "\n", "r": "\r"}.get(match[1], match[1]), line)
