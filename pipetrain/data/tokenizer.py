"""Text to token ids and back: bytes, words, or any sentencepiece model, own or foreign."""

import io
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import sentencepiece

from pipetrain.errors import ConfigError
from pipetrain.suggest import one_of

BYTES = "bytes"
SENTENCEPIECE = "sentencepiece"
WORDS = "words"
TRAINED = (SENTENCEPIECE, WORDS)  # on the text
_ALL_WORDS = 10_000_000
_WORD_BEGINS = "\u2581"  # how sentencepiece writes a space
LINE_CHARACTERS = 4096  # longer lines are encoded in parts: a whole corpus may be one line
# Byte-pair encoding that gives back exactly the text that it got.
_AS_IT_IS: dict[str, Any] = {
    "model_type": "bpe",
    "byte_fallback": True,
    "normalization_rule_name": "identity",
    "add_dummy_prefix": False,
    "remove_extra_whitespaces": False,
    "allow_whitespace_only_pieces": True,
    "max_sentence_length": 4 * LINE_CHARACTERS,
    "minloglevel": 2,
}
Ids = npt.NDArray[np.integer[Any]]


class Tokenizer(Protocol):
    """Text to ids in 0 .. vocab_size - 1 and back."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def line_end(self) -> int | None:
        """The id that stands for a newline, if there is one."""

    def encode_lines(self, text: bytes) -> Ids:
        """The ids [tokens] of any number of lines; a last line without a newline gets no line end."""

    def decode(self, ids: Iterable[int]) -> str:
        """The text of some ids; bytes that are no UTF-8 become U+FFFD."""


class ByteTokenizer:
    """Every byte is a token, as it is, valid UTF-8 or not."""

    vocab_size = 256
    line_end = 10

    def encode_lines(self, text: bytes) -> Ids:
        return np.frombuffer(text, dtype=np.uint8)

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(int(token) for token in ids).decode("utf-8", errors="replace")


class SentencePieceTokenizer:
    """A sentencepiece model, applied line by line.

    A line ends with the model's eos id; without one, with its piece for the newline; without that, with nothing, and
    the lines of the text run into each other. bos and pad are never written. Bytes that are no UTF-8 become U+FFFD.
    What the model normalises away is lost; sentencepiece itself gives a space back for U+2581.

    Args:
        model: the content of a model file.
        name: what the user calls it, for the error.

    Raises:
        ConfigError: if that is no sentencepiece model.
    """

    def __init__(self, model: bytes, name: str) -> None:
        problem = "it holds no pieces"
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(model)
            self.vocab_size = int(self._processor.get_piece_size())
        except RuntimeError as error:
            self.vocab_size, problem = 0, str(error)
        if self.vocab_size == 0:
            raise ConfigError(
                f"data.tokenizer={name} is not a sentencepiece model: {problem.strip()}; give a model file that "
                f"sentencepiece wrote, or data.tokenizer={SENTENCEPIECE} to train one, or data.tokenizer={BYTES}"
            )
        self.line_end = self._find_line_end()

    def encode_lines(self, text: bytes) -> Ids:
        parts = list(line_parts(text))
        ids: list[int] = []
        for encoded, (_, ends) in zip(self._processor.encode([part for part, _ in parts]), parts, strict=True):
            ids.extend(encoded)
            if ends and self.line_end is not None:
                ids.append(self.line_end)
        return np.array(ids, dtype=np.int64)

    def decode(self, ids: Iterable[int]) -> str:
        lines: list[list[int]] = [[]]
        for token in map(int, ids):
            if token == self.line_end:
                lines.append([])
            else:
                lines[-1].append(token)
        return "\n".join(self._processor.decode(line) for line in lines)

    def _find_line_end(self) -> int | None:
        if self._processor.eos_id() >= 0:
            return int(self._processor.eos_id())
        for piece in ("\n", "<0x0A>"):
            token = int(self._processor.piece_to_id(piece))
            if self._processor.id_to_piece(token) == piece:
                return token
        return None


class WordTokenizer(SentencePieceTokenizer):
    """A model of `train_words`: each word is one token. (sentencepiece makes one of several unknown words in a row.)"""

    def encode_lines(self, text: bytes) -> Ids:
        ids: list[int] = []
        for part, ends in line_parts(text):
            ids.extend(self._processor.piece_to_id([_WORD_BEGINS + word for word in part.split()]))
            if ends and self.line_end is not None:
                ids.append(self.line_end)
        return np.array(ids, dtype=np.int64)


def load_tokenizer(name_or_path: str) -> Tokenizer:
    """The tokenizer that `TokenFolder.tokenizer` names: `bytes`, or the path of a sentencepiece model.

    Raises:
        ConfigError: if it is neither.
    """
    if name_or_path == BYTES:
        return ByteTokenizer()
    return SentencePieceTokenizer(read_model(name_or_path), name_or_path)


def read_model(path: str) -> bytes:
    """The content of a tokenizer's file.

    Raises:
        ConfigError: if there is no such file, or it cannot be read.
    """
    file = Path(path).expanduser()
    try:
        if file.is_file():
            return file.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"data.tokenizer={path} cannot be read ({error.strerror}); give a model that this user may read"
        ) from error
    raise ConfigError(
        f"data.tokenizer={path} is neither {BYTES}, {WORDS}, {SENTENCEPIECE} nor a file. "
        f"{one_of(path, (BYTES, WORDS, SENTENCEPIECE))}, or the path of a sentencepiece model"
    )


def train_sentencepiece(blocks: Iterable[bytes], vocab_size: int) -> bytes:
    """Trains byte-pair encoding that keeps the text as it is: not normalised, no dummy prefix, byte fallback.

    Args:
        blocks: the text, each block whole lines.
        vocab_size: pieces, with the 256 bytes and the three of unk, bos and eos among them.

    Returns:
        The content of a model file, the same for the same text.

    Raises:
        ConfigError: if the text supports fewer pieces, or needs more.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(part for block in blocks for part, _ in line_parts(block) if part),
            model_writer=model,
            vocab_size=vocab_size,
            **_AS_IT_IS,
        )
    except RuntimeError as error:
        raise _training_error(str(error), vocab_size) from error
    return model.getvalue()


def train_joint(sentences: Iterable[str], vocab_size: int, symbols: Iterable[str]) -> bytes:
    """As `train_sentencepiece`, for sentences of several languages: with a piece for padding, which is the first one,
    and symbols that no text can have.

    Raises:
        ConfigError: if the sentences support fewer pieces, or need more.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences),
            model_writer=model,
            vocab_size=vocab_size,
            pad_id=0,
            unk_id=1,
            bos_id=2,
            eos_id=3,
            control_symbols=list(symbols),
            **_AS_IT_IS,
        )
    except RuntimeError as error:
        raise _training_error(str(error), vocab_size) from error
    return model.getvalue()


def train_words(blocks: Iterable[bytes], vocab_size: int | None) -> bytes:
    """A vocabulary of whole words, for texts that are tokenised already: what lies between spaces.

    It is a sentencepiece model like any other, to be read by `WordTokenizer`. A word that is not in it is `<unk>`, and
    so is `<unk>` itself, which such texts have; a line ends with `</s>`.

    Args:
        blocks: the text, each block whole lines.
        vocab_size: the most frequent words, with the three of unk, bos and eos among them; None is all words.

    Raises:
        ConfigError: if there are no words.
    """
    model, most = io.BytesIO(), _ALL_WORDS if vocab_size is None else vocab_size
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(part for block in blocks for part, _ in line_parts(block) if part.strip()),
            model_writer=model,
            model_type="word",
            vocab_size=most,
            hard_vocab_limit=False,
            normalization_rule_name="identity",
            character_coverage=1.0,
            max_sentence_length=4 * LINE_CHARACTERS,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise _training_error(str(error), most) from error
    return model.getvalue()


def line_parts(text: bytes) -> Iterator[tuple[str, bool]]:
    """Every line without its newline, and whether a newline followed.

    A line of more than `LINE_CHARACTERS` comes in parts, cut before a space where it has one.
    """
    *lines, rest = text.decode("utf-8", errors="replace").split("\n")
    for line in lines:
        yield from _parts(line, True)
    if rest:
        yield from _parts(rest, False)


def _parts(line: str, ends: bool) -> Iterator[tuple[str, bool]]:
    while len(line) > LINE_CHARACTERS:
        space = line.rfind(" ", 1, LINE_CHARACTERS + 1)
        cut = space if space > 0 else LINE_CHARACTERS
        yield line[:cut], False
        line = line[cut:]
    yield line, ends


def _training_error(problem: str, vocab_size: int) -> ConfigError:
    """What sentencepiece says, in the words of the settings."""
    given = f"data.vocab_size={vocab_size}"
    if most := re.search(r"value <= (\d+)", problem):
        return ConfigError(
            f"{given} is more than this text supports (at most {most[1]}); "
            f"use data.vocab_size={most[1]} or a longer text"
        )
    if least := re.search(r"\d+ vs (\d+)", problem):
        return ConfigError(
            f"{given} is too small: 256 bytes, 3 special pieces and the characters of this text need {least[1]}; "
            f"use data.vocab_size={least[1]} or more"
        )
    return ConfigError(f"{given}: sentencepiece cannot train on this text ({problem}); use data.tokenizer={BYTES}")
