"""Tokenizers: text survives, foreign models are taken, mistakes are answered."""

import io
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece

from pipetrain.data.tokenizer import (
    LINE_CHARACTERS,
    ByteTokenizer,
    SentencePieceTokenizer,
    WordTokenizer,
    line_parts,
    load_tokenizer,
    train_sentencepiece,
    train_words,
)
from pipetrain.errors import ConfigError

RANDOM = random.Random(0)
WORDS = ["".join(RANDOM.choices("abcdefghijklmnopqrstuvwxyz", k=2 + i % 6)) for i in range(400)]
TEXT = "".join(" ".join(RANDOM.choices(WORDS, k=9)) + "\n" for _ in range(300))
AWKWARD = "  two  spaces \n\n\tTab, é, 日本語, 🙂 end \r\nx\n a </s> <s>\x00\nno newline at the end"


def foreign(**options: Any) -> bytes:
    model = io.BytesIO()
    defaults: dict[str, Any] = {"vocab_size": 400, "byte_fallback": True, "model_type": "bpe", "minloglevel": 2}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.split("\n")), model_writer=model, **{**defaults, **options}
    )
    return model.getvalue()


@pytest.fixture(scope="module")
def own() -> SentencePieceTokenizer:
    return SentencePieceTokenizer(train_sentencepiece([TEXT.encode()], 500), "own")


def test_bytes_are_the_ids_even_where_they_are_no_utf8() -> None:
    tokenizer = ByteTokenizer()
    assert tokenizer.vocab_size == 256
    assert tokenizer.encode_lines(b"a\n\xff\x00").tolist() == [97, 10, 255, 0]
    assert tokenizer.decode(tokenizer.encode_lines(AWKWARD.encode())) == AWKWARD
    assert tokenizer.decode([97, 255]) == "a\ufffd"


@pytest.mark.parametrize("text", [TEXT, AWKWARD, "", "\n", "\n\n", " ", " a", "a ", "line\n"])
def test_own_model_gives_the_text_back(own: SentencePieceTokenizer, text: str) -> None:
    ids = own.encode_lines(text.encode())
    assert own.decode(ids) == text
    assert ids.size == 0 or 0 <= ids.min() <= ids.max() < own.vocab_size


def test_own_model_compresses_and_has_the_size_asked_for(own: SentencePieceTokenizer) -> None:
    assert own.vocab_size == 500
    assert own.encode_lines(TEXT.encode()).size < 0.7 * len(TEXT)


def test_training_is_deterministic_and_silent(capfd: pytest.CaptureFixture[str]) -> None:
    assert train_sentencepiece([TEXT.encode()], 400) == train_sentencepiece([TEXT.encode()], 400)
    assert capfd.readouterr() == ("", "")


def test_invalid_utf8_becomes_the_replacement_character(own: SentencePieceTokenizer) -> None:
    assert own.decode(own.encode_lines(b"a\xffb\n")) == "a\ufffdb\n"


@pytest.mark.parametrize(
    ("options", "line_end"),
    [
        ({}, 2),
        ({"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}, 1),  # T5 style
        ({"eos_id": -1, "pad_id": -1, "bos_id": -1}, 1 + 10),  # unk, then the bytes
        ({"eos_id": -1, "byte_fallback": False, "user_defined_symbols": ["\n"]}, 2),
        ({"eos_id": -1, "byte_fallback": False}, None),
    ],
)
def test_foreign_models_end_lines_with_what_they_have(options: dict[str, Any], line_end: int | None) -> None:
    tokenizer = SentencePieceTokenizer(foreign(**options), "foreign")
    lines = TEXT.split("\n")[:3]
    ids = tokenizer.encode_lines("".join(f"{line}\n" for line in lines).encode())
    assert tokenizer.line_end == line_end
    if line_end is None:
        assert tokenizer.decode(ids) == " ".join(lines)
    else:
        assert (ids == line_end).sum() == 3
        assert tokenizer.decode(ids) == "".join(f"{line}\n" for line in lines)


def test_a_foreign_model_loads_under_any_name(tmp_path: Path) -> None:
    path = tmp_path / "spm.weird-name"
    path.write_bytes(foreign(pad_id=3))
    assert load_tokenizer(str(path)).vocab_size == 400
    assert load_tokenizer("bytes").vocab_size == 256


def test_long_lines_are_cut_before_spaces_and_nothing_is_lost(own: SentencePieceTokenizer) -> None:
    one_line = TEXT.replace("\n", " ") * 2 + "x" * 9000
    parts = list(line_parts(f"{one_line}\nend".encode()))
    assert "".join(part for part, _ in parts) == one_line + "end"
    assert [ends for _, ends in parts] == [False] * (len(parts) - 2) + [True, False]
    assert max(len(part) for part, _ in parts) <= LINE_CHARACTERS
    assert all(part.startswith(" ") for part, _ in parts[1:6])
    assert own.decode(own.encode_lines(one_line.encode())) == one_line


@pytest.mark.parametrize("first_letter", ["a", "\u0430"])  # ASCII, and two bytes a letter
def test_a_text_of_one_line_trains_a_tokenizer(first_letter: str) -> None:
    letters = {97 + i: ord(first_letter) + i for i in range(26)}
    one_line = TEXT.replace("\n", " ").translate(letters)
    assert SentencePieceTokenizer(train_sentencepiece([one_line.encode()], 400), "own").vocab_size == 400


def test_decode_takes_numpy_and_python_integers(own: SentencePieceTokenizer) -> None:
    ids = own.encode_lines(b"abc def\n")
    assert own.decode(ids.astype(np.uint16)) == own.decode(ids.tolist()) == "abc def\n"


WIKI = b" \n = Some title = \n \n the cat <unk> sat on the mat , again @-@ again . \n the cat <unk> \n"


def test_words_are_what_lies_between_spaces_and_a_line_has_an_end() -> None:
    """As WikiText comes: tokenised already, with an <unk> of its own."""
    words = WordTokenizer(train_words([WIKI], None), "words")
    distinct = set(WIKI.decode().split()) - {"<unk>"}
    assert words.vocab_size == len(distinct) + 3
    ids = words.encode_lines(WIKI)
    assert len(ids) == len(WIKI.decode().split()) + WIKI.count(b"\n")
    assert words.decode(ids).split() == [w if w != "<unk>" else "\u2047" for w in WIKI.decode().split()]
    assert list(words.encode_lines(b"never seen\n")) == [0, 0, words.line_end]


def test_the_most_frequent_words_are_kept() -> None:
    words = WordTokenizer(train_words([b"a a a b b c\n" * 5], 5), "words")
    assert words.vocab_size == 5
    assert list(words.encode_lines(b"a b c")) == [3, 4, 0]


def test_a_text_without_words_has_no_vocabulary() -> None:
    with pytest.raises(ConfigError, match="sentencepiece cannot train on this text"):
        train_words([b" \n \n"], None)


def test_more_pieces_than_the_text_supports_names_the_most() -> None:
    with pytest.raises(ConfigError) as caught:
        train_sentencepiece([b"low lower lowest\nnew newer newest\n"], 9000)
    most = int(str(caught.value).split("at most ")[1].split(")")[0])
    assert str(caught.value) == (
        f"data.vocab_size=9000 is more than this text supports (at most {most}); "
        f"use data.vocab_size={most} or a longer text"
    )
    model = train_sentencepiece([b"low lower lowest\nnew newer newest\n"], most)
    assert SentencePieceTokenizer(model, "own").vocab_size == most


def test_too_few_pieces_names_the_least() -> None:
    with pytest.raises(ConfigError, match=r"^data.vocab_size=100 is too small: 256 bytes, 3 special pieces") as caught:
        train_sentencepiece([TEXT.encode()], 100)
    least = int(str(caught.value).split("use data.vocab_size=")[1].split(" ")[0])
    assert least > 259
    assert SentencePieceTokenizer(train_sentencepiece([TEXT.encode()], least), "own").vocab_size == least
    with pytest.raises(ConfigError, match=r"too small"):
        train_sentencepiece([TEXT.encode()], least - 1)


def test_a_text_of_nothing_trains_no_tokenizer() -> None:
    with pytest.raises(ConfigError, match=r"sentencepiece cannot train on this text .* use data.tokenizer=bytes$"):
        train_sentencepiece([b"\n\n"], 300)


@pytest.mark.parametrize("content", [b"# A readme\n", b"", b"\x00" * 100])
def test_a_file_that_is_no_model_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "README.md"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load_tokenizer(str(path))
    assert str(caught.value).startswith(f"data.tokenizer={path} is not a sentencepiece model: ")
    assert str(caught.value).endswith(
        "; give a model file that sentencepiece wrote, or data.tokenizer=sentencepiece to train one, "
        "or data.tokenizer=bytes"
    )


def test_an_unknown_name_gets_a_suggestion(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_tokenizer("sentencepeice")
    assert str(caught.value) == (
        "data.tokenizer=sentencepeice is neither bytes, words, sentencepiece nor a file. Did you mean 'sentencepiece'? "
        "Choose one of: bytes, words, sentencepiece, or the path of a sentencepiece model"
    )
    with pytest.raises(ConfigError, match=r"nor a file"):
        load_tokenizer(str(tmp_path))


def test_a_model_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    path = tmp_path / "m.model"
    path.write_bytes(b"x")
    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(ConfigError, match=r"m\.model cannot be read \(Permission denied\); give a model"):
        load_tokenizer(str(path))
