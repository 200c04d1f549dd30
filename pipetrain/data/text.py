"""From text to files of token ids, once: everything that happens before a worker starts. Never imports torch."""

import hashlib
import itertools
import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pipetrain.data import corpus
from pipetrain.data.finished import finished_folder, write_synced
from pipetrain.data.tokenizer import (
    BYTES,
    SENTENCEPIECE,
    TRAINED,
    WORDS,
    ByteTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
    WordTokenizer,
    read_model,
    train_sentencepiece,
    train_words,
)
from pipetrain.errors import ConfigError

FORMAT = 1  # raise it whenever the same text would give other files
TRAINING_BYTES = 100_000_000  # a tokenizer is trained on at most so much, in blocks spread over a longer text
MODEL_FILE = "tokenizer.model"
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TokenFolder:
    """A finished folder of token files.

    Attributes:
        folder: absolute path; holds train.bin, valid.bin, test.bin, meta.json and, but for bytes, tokenizer.model.
        vocab_size: ids are 0 .. vocab_size - 1.
        num_tokens: tokens of each split.
        num_bytes: bytes of the text behind those tokens, for bits per byte.
        tokenizer: 'bytes', or the absolute path of the sentencepiece model in the folder.
    """

    folder: str
    vocab_size: int
    num_tokens: dict[str, int]
    num_bytes: dict[str, int]
    tokenizer: str

    def file(self, split: str) -> Path:
        """The ids of a split, one after the other, each a `token_dtype(vocab_size)`."""
        return Path(self.folder) / f"{split}.bin"


def prepare_text(
    *,
    path: str | None,
    tokenizer: str,
    vocab_size: int | None,
    valid_fraction: float,
    test_fraction: float,
    cache_dir: str,
) -> TokenFolder:
    """Finds, splits and tokenises a text, or finds that this was done before.

    The folder's name is a hash of the text of every split, the tokenizer and the vocabulary's size. It is written aside
    and renamed, so that it is whole wherever it exists, also when several processes prepare it at once.

    Args:
        path: a text file, a folder (see `corpus.find_splits`), or None for Python's own manual.
        tokenizer: 'bytes', 'words' or 'sentencepiece' (made of the train split), or the path of a sentencepiece model.
        vocab_size: pieces of the two that are made; None is all words.
        valid_fraction: share of the text held out, as `test_fraction`; unused where the text is split already.
        cache_dir: where token folders are kept.

    Raises:
        ConfigError: if the text, the tokenizer, the vocabulary's size or the cache folder cannot be used.
    """
    if tokenizer == SENTENCEPIECE and vocab_size is None:
        raise ConfigError("data.tokenizer=sentencepiece needs data.vocab_size; try data.vocab_size=8000")
    model = None if tokenizer in (BYTES, *TRAINED) else read_model(tokenizer)
    if model is not None:
        SentencePieceTokenizer(model, tokenizer)
    splits = corpus.find_splits(path, valid_fraction=valid_fraction, test_fraction=test_fraction)
    pieces = vocab_size if tokenizer in TRAINED else None
    root = Path(os.path.abspath(os.path.expanduser(cache_dir))) / "text"
    folder = root / _key(splits, tokenizer if model is None else hashlib.sha256(model).hexdigest(), pieces)
    try:
        return finished_folder(
            folder,
            _load,
            lambda aside: _fill(aside, splits, _tokenizer(aside, splits["train"], model, tokenizer, pieces)),
        )
    except OSError as error:
        reason = error.strerror or str(error)
        raise ConfigError(
            f"data.cache_dir={cache_dir} cannot be used ({reason}); give a folder that you may write to"
        ) from error


def too_short(tokens: TokenFolder, split: str, seq_len: int) -> ConfigError:
    """The error for a split that does not hold one sample."""
    count = tokens.num_tokens[split]
    shorter = f"data.seq_len={count - 1} or " if count > 1 else ""
    held_out = "" if split == "train" else f" or another data.{split}_fraction"
    return ConfigError(
        f"the text has {count} tokens in its {split} split, but one sample needs data.seq_len + 1 = {seq_len + 1}; "
        f"use {shorter}a longer text{held_out}"
    )


def token_dtype(vocab_size: int) -> npt.DTypeLike:
    """The smallest unsigned type that holds every id: uint8, uint16 or uint32."""
    return np.min_scalar_type(vocab_size - 1)


def _key(splits: Mapping[str, corpus.Text], tokenizer: str, vocab_size: int | None) -> str:
    digests = {}
    for split, text in splits.items():
        digest = hashlib.sha256()
        for chunk in corpus.read_chunks(text):
            digest.update(chunk)
        digests[split] = digest.hexdigest()
    parts = {"format": FORMAT, "text": digests, "tokenizer": tokenizer, "vocab_size": vocab_size}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def _load(folder: Path) -> TokenFolder | None:
    """The finished folder; None where there is none or a file in it is missing or cut off."""
    try:
        meta = json.loads((folder / "meta.json").read_text())
        model = folder / MODEL_FILE
        tokens = TokenFolder(
            folder=str(folder),
            vocab_size=meta["vocab_size"],
            num_tokens=meta["num_tokens"],
            num_bytes=meta["num_bytes"],
            tokenizer=BYTES if meta["tokenizer"] == BYTES else str(model),
        )
        width = np.dtype(meta["dtype"]).itemsize
        sizes = {tokens.file(split): count * width for split, count in tokens.num_tokens.items()}
        if meta["tokenizer"] != BYTES:
            sizes[model] = meta["model_bytes"]
        return tokens if all(file.stat().st_size == size for file, size in sizes.items()) else None
    except (FileNotFoundError, ValueError, KeyError):
        return None


def _tokenizer(aside: Path, train: corpus.Text, model: bytes | None, name: str, vocab_size: int | None) -> Tokenizer:
    """The tokenizer, trained if need be, its model written down."""
    if name == WORDS:
        log.info("collecting the words of %.1f MB of text (once)", corpus.num_bytes(train) / 1e6)
        model = train_words(corpus.read_blocks(train), vocab_size)
    elif name == SENTENCEPIECE and vocab_size is not None:
        num_bytes = corpus.num_bytes(train)
        log.info("training a tokenizer of %d pieces on %.1f MB of text (once)", vocab_size, num_bytes / 1e6)
        every = -(-num_bytes // TRAINING_BYTES) or 1
        model = train_sentencepiece(itertools.islice(corpus.read_blocks(train), 0, None, every), vocab_size)
    if model is None:
        return ByteTokenizer()
    write_synced(aside / MODEL_FILE, model)
    kind = WordTokenizer if name == WORDS else SentencePieceTokenizer
    return kind(model, MODEL_FILE)


def _fill(aside: Path, splits: Mapping[str, corpus.Text], tokenizer: Tokenizer) -> None:
    """Writes the ids of every split, and what they are."""
    dtype = token_dtype(tokenizer.vocab_size)
    num_bytes = {split: corpus.num_bytes(text) for split, text in splits.items()}
    log.info("writing tokens of %.1f MB of text (once)", sum(num_bytes.values()) / 1e6)
    num_tokens = {}
    for split, text in splits.items():
        with open(aside / f"{split}.bin", "wb") as file:
            for block in corpus.read_blocks(text):
                tokenizer.encode_lines(block).astype(dtype).tofile(file)
            num_tokens[split] = file.tell() // np.dtype(dtype).itemsize
            os.fsync(file.fileno())
    own_model = aside / MODEL_FILE
    meta: dict[str, Any] = {
        "format": FORMAT,
        "tokenizer": MODEL_FILE if own_model.exists() else BYTES,
        "model_bytes": own_model.stat().st_size if own_model.exists() else 0,
        "vocab_size": tokenizer.vocab_size,
        "dtype": np.dtype(dtype).name,
        "num_tokens": num_tokens,
        "num_bytes": num_bytes,
    }
    write_synced(aside / "meta.json", json.dumps(meta, indent=2).encode())
