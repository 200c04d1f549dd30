"""Text to token folders, and token folders to batches."""

import itertools
import json
import os
import pickle
import re
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import pytest

from pipetrain.data import corpus, finished
from pipetrain.data import text as text_module
from pipetrain.data.batches import TextBatches
from pipetrain.data.text import TokenFolder, prepare_text, token_dtype
from pipetrain.data.tokenizer import load_tokenizer, train_sentencepiece
from pipetrain.errors import ConfigError

SENTENCES = "".join(f"Line {i} of the städtische Zeitung: {i * i} cafés, {'ab' * (i % 9)}.\n" for i in range(400))
ROOT = Path(__file__).parents[2]
Prepare = Callable[..., TokenFolder]


@pytest.fixture
def prepare(tmp_path: Path) -> Prepare:
    def call(path: Path | str | None, **changes: Any) -> TokenFolder:
        keys: dict[str, Any] = {
            "tokenizer": "bytes",
            "vocab_size": None,
            "valid_fraction": 0.05,
            "test_fraction": 0.05,
            "cache_dir": str(tmp_path / "cache"),
        }
        return prepare_text(path=None if path is None else str(path), **{**keys, **changes})

    return call


@pytest.fixture
def article(tmp_path: Path) -> Path:
    path = tmp_path / "article.txt"
    path.write_text(SENTENCES)
    return path


def content(tokens: TokenFolder, split: str) -> bytes:
    """The ids of a byte folder, as the bytes that they are."""
    return tokens.file(split).read_bytes()


def contents(tokens: TokenFolder) -> tuple[bytes, ...]:
    return tuple(content(tokens, split) for split in ("train", "valid", "test"))


def write_files(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def made(count: int, tmp_path: Path, vocab_size: int = 60000, **splits: int) -> TokenFolder:
    """A token folder whose ids are 0, 1, 2, ..."""
    sizes = {"train": count, "valid": 0, "test": 0, **splits}
    tokens = TokenFolder(str(tmp_path), vocab_size, sizes, sizes, "bytes")
    for split, size in sizes.items():
        np.arange(size).astype(token_dtype(vocab_size)).tofile(tokens.file(split))
    return tokens


# Finding and splitting the text


def test_null_is_pythons_manual(prepare: Prepare) -> None:
    tokens = prepare(None)
    assert b"".join(contents(tokens)) == "".join(topics.values()).encode()


def test_a_python_without_its_manual_says_so(prepare: Prepare, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(ConfigError, match=r"but this Python lacks it; give data.path="):
        prepare(None)


def test_a_file_is_cut_as_enwik8_is(prepare: Prepare, tmp_path: Path) -> None:
    path = tmp_path / "enwik"
    path.write_bytes(bytes(range(100)) * 10)
    tokens = prepare(path)
    assert contents(tokens) == (path.read_bytes()[:900], path.read_bytes()[900:950], path.read_bytes()[950:])
    assert tokens.num_tokens == tokens.num_bytes == {"train": 900, "valid": 50, "test": 50}


def test_fractions_may_be_zero(prepare: Prepare, article: Path) -> None:
    tokens = prepare(article, valid_fraction=0, test_fraction=0.0)
    assert contents(tokens) == (article.read_bytes(), b"", b"")


def test_no_border_falls_inside_a_character(prepare: Prepare, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    for shift, fraction in itertools.product(range(4), (0.0, 0.3, 0.317)):
        path.write_text("x" * shift + "日🙂é" * 47)
        parts = contents(prepare(path, valid_fraction=fraction, test_fraction=fraction))
        assert b"".join(parts) == path.read_bytes()
        assert [len(part.decode()) > 0 for part in parts] == [True, fraction > 0, fraction > 0]


def test_borders_in_bytes_that_are_no_utf8_stay_where_they_are(prepare: Prepare, tmp_path: Path) -> None:
    path = tmp_path / "binary"
    path.write_bytes(b"\x80" * 100)
    assert [len(part) for part in contents(prepare(path))] == [90, 5, 5]


@pytest.mark.parametrize(
    "names",
    [
        ("train.txt", "valid.txt", "test.txt"),
        ("wiki.train.tokens", "wiki.valid.tokens", "wiki.test.tokens"),
        ("ptb.Train.TXT", "ptb.validation.txt", "ptb_test-1.txt"),
        ("train", "dev", "test"),
        ("wiki.train", "wiki.val", "wiki.test"),
        ("train/a.txt", "val/a.txt", "test/a.txt"),
    ],
)
def test_files_that_are_split_already_stay_so(prepare: Prepare, tmp_path: Path, names: tuple[str, ...]) -> None:
    folder = write_files(tmp_path / "set", dict(zip(names, ("one\n", "two\n", "three\n"), strict=True)))
    write_files(folder, {"readme.txt": "no", "._train.txt": "hidden", "train.bin": "binary", "contest.txt": "no"})
    assert contents(prepare(folder)) == (b"one\n", b"two\n", b"three\n")


def test_a_split_may_be_missing_and_may_be_many_files(prepare: Prepare, tmp_path: Path) -> None:
    folder = write_files(tmp_path / "set", {"train-1.txt": "a", "train-2.txt": "", "train-3.txt": "b", "test.txt": "c"})
    assert contents(prepare(folder)) == (b"a\nb", b"", b"c")


def test_other_folders_are_one_text_in_sorted_order(prepare: Prepare, tmp_path: Path) -> None:
    files = {"b.txt": "b\n", "a/z.txt": "z", "c.TXT": "c", "train.txt": "t", "notes.md": "no", ".git/x.txt": "no"}
    folder = write_files(tmp_path / "books", files)
    assert b"".join(contents(prepare(folder))) == b"z\nb\nc\nt"


# Token files


def test_byte_files_are_memory_mappable_and_described(prepare: Prepare, article: Path) -> None:
    tokens = prepare(article)
    meta = json.loads(Path(tokens.folder, "meta.json").read_text())
    ids = np.memmap(tokens.file("train"), dtype=meta["dtype"], mode="r")
    assert (meta["dtype"], tokens.vocab_size, tokens.tokenizer) == ("uint8", 256, "bytes")
    assert ids.tobytes() == article.read_bytes()[: len(ids)]
    assert Path(tokens.folder).is_absolute()
    assert Path(tokens.folder).parent == article.parent / "cache" / "text"


def test_sentencepiece_is_trained_on_the_train_split_only(prepare: Prepare, tmp_path: Path) -> None:
    rare = "zyxwvutzyxwvut " * 500
    files = {"train.txt": SENTENCES, "valid.txt": rare, "test.txt": rare}
    tokens = prepare(write_files(tmp_path / "set", files), tokenizer="sentencepiece", vocab_size=350)
    tokenizer = load_tokenizer(tokens.tokenizer)
    assert Path(tokens.tokenizer) == Path(tokens.folder, "tokenizer.model")
    assert tokens.vocab_size == tokenizer.vocab_size == 350
    assert tokens.num_bytes == {split: len(files[f"{split}.txt"].encode()) for split in ("train", "valid", "test")}
    ids = np.fromfile(tokens.file("train"), dtype=np.uint16)
    assert len(ids) == tokens.num_tokens["train"] < tokens.num_bytes["train"] / 2
    assert tokenizer.decode(ids) == SENTENCES
    assert tokens.num_tokens["valid"] > len("zyxwvutzyxwvut") * 400  # its letters were never merged


def test_a_foreign_model_is_copied_and_hashed_by_content(prepare: Prepare, article: Path, tmp_path: Path) -> None:
    trained = prepare(article, tokenizer="sentencepiece", vocab_size=350)
    model = Path(trained.tokenizer).read_bytes()
    folders = []
    for name, data in (("one.bin", model), ("two", model), ("two", _other_model(prepare, article))):
        (tmp_path / name).write_bytes(data)
        tokens = prepare(article, tokenizer=str(tmp_path / name))
        assert Path(tokens.tokenizer).read_bytes() == data
        folders.append(tokens.folder)
    assert folders[0] == folders[1] != folders[2]
    assert trained.file("test").read_bytes() == Path(folders[0], "test.bin").read_bytes()


def _other_model(prepare: Prepare, article: Path) -> bytes:
    return Path(prepare(article, tokenizer="sentencepiece", vocab_size=360).tokenizer).read_bytes()


def test_ids_take_the_smallest_type() -> None:
    sizes = {100: "uint8", 256: "uint8", 257: "uint16", 65_535: "uint16", 65_536: "uint16", 65_537: "uint32"}
    assert {size: np.dtype(token_dtype(size)).name for size in sizes} == sizes


@pytest.mark.parametrize("line", ["word and wörd ", "日本語" * 40, "line of text\n", "日" * 30 + "\n"])
def test_a_text_of_many_blocks_is_read_in_pieces(
    prepare: Prepare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str
) -> None:
    path = tmp_path / "long.txt"
    path.write_text(line * 700)
    monkeypatch.setattr(corpus, "BLOCK_BYTES", 1000)
    splits = corpus.find_splits(str(path), valid_fraction=0.1, test_fraction=0.1)
    blocks = list(corpus.read_blocks(splits["train"]))
    assert len(blocks) > 5
    assert max(map(len, blocks)) < 2 * 1000
    assert all(block.decode() for block in blocks)
    assert all(block.endswith(b"\n") for block in blocks[:-1]) or "\n" not in line
    assert all(block.startswith(b" ") for block in blocks[1:]) or " " not in line or "\n" in line
    tokens = prepare(path, valid_fraction=0.1, test_fraction=0.1)
    assert b"".join(contents(tokens)) == path.read_bytes()


def test_memory_stays_small_however_long_the_text(prepare: Prepare, tmp_path: Path) -> None:
    path = tmp_path / "long.txt"
    path.write_bytes(b"sixteen bytes..\n" * (1 << 19))
    tracemalloc.start()
    prepare(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5 << 20  # of 8


def test_a_longer_text_trains_on_blocks_spread_over_it(
    prepare: Prepare, article: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    train = train_sentencepiece

    def spy(blocks: Any, vocab_size: int) -> bytes:
        kept = list(blocks)
        seen.append(sum(map(len, kept)))
        return train(kept, vocab_size)

    monkeypatch.setattr(corpus, "BLOCK_BYTES", 1000)
    monkeypatch.setattr(text_module, "TRAINING_BYTES", 10_000)
    monkeypatch.setattr(text_module, "train_sentencepiece", spy)
    tokens = prepare(article, tokenizer="sentencepiece", vocab_size=320)
    assert 5_000 < seen[0] < 12_000 < tokens.num_bytes["train"]


# The cache


def test_a_finished_folder_is_used_again(prepare: Prepare, article: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = prepare(article, tokenizer="sentencepiece", vocab_size=320)
    monkeypatch.setattr(text_module, "_fill", lambda *_: pytest.fail("made again"))
    (article.parent / "copy.txt").write_text(SENTENCES)
    assert prepare(article, tokenizer="sentencepiece", vocab_size=320) == first
    assert prepare(article.parent / "copy.txt", tokenizer="sentencepiece", vocab_size=320) == first


def test_whatever_changes_the_tokens_changes_the_folder(prepare: Prepare, article: Path) -> None:
    folders = [
        prepare(article).folder,
        prepare(article, valid_fraction=0.1).folder,
        prepare(article, test_fraction=0.1).folder,
        prepare(article, tokenizer="sentencepiece", vocab_size=320).folder,
        prepare(article, tokenizer="sentencepiece", vocab_size=330).folder,
    ]
    article.write_text(SENTENCES.replace("Line 399", "Line 398"))
    folders.append(prepare(article).folder)
    assert len(set(folders)) == len(folders)


def test_the_format_is_part_of_the_name(prepare: Prepare, article: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = prepare(article).folder
    monkeypatch.setattr(text_module, "FORMAT", 999)
    assert prepare(article).folder != before


@pytest.mark.parametrize("damage", ["train.bin", "meta.json", "tokenizer.model"])
@pytest.mark.parametrize("how", ["cut", "gone"])
def test_a_damaged_folder_is_made_again(prepare: Prepare, article: Path, damage: str, how: str) -> None:
    first = prepare(article, tokenizer="sentencepiece", vocab_size=320)
    file = Path(first.folder, damage)
    whole = file.read_bytes()
    file.unlink()
    if how == "cut":
        file.write_bytes(whole[:-5])
    assert prepare(article, tokenizer="sentencepiece", vocab_size=320) == first
    assert file.read_bytes() == whole
    assert os.listdir(Path(first.folder).parent) == [Path(first.folder).name]


def run_python(code: str, *arguments: object) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


PREPARE = """
import sys
from pipetrain.data.text import prepare_text
tokens = prepare_text(path=sys.argv[1], tokenizer="sentencepiece", vocab_size=320, valid_fraction=0.05,
                      test_fraction=0.05, cache_dir=sys.argv[2])
assert "torch" not in sys.modules
print(tokens.folder)
"""


def test_two_processes_at_once_share_one_folder_without_torch(article: Path, tmp_path: Path) -> None:
    processes = [run_python(PREPARE, article, tmp_path / "cache") for _ in range(2)]
    answers = [process.communicate() for process in processes]
    assert [process.returncode for process in processes] == [0, 0], answers
    assert answers[0][0] == answers[1][0]
    assert not answers[0][1]
    assert os.listdir(tmp_path / "cache" / "text") == [Path(answers[0][0].strip()).name]


def test_who_comes_second_keeps_the_first_ones_folder(
    prepare: Prepare, article: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill = text_module._fill
    inodes: list[int] = []

    def slow(*arguments: Any) -> None:
        fill(*arguments)
        monkeypatch.setattr(text_module, "_fill", fill)
        inodes.append(Path(prepare(article).folder).stat().st_ino)

    monkeypatch.setattr(text_module, "_fill", slow)
    tokens = prepare(article)
    assert Path(tokens.folder).stat().st_ino == inodes[0]
    assert os.listdir(Path(tokens.folder).parent) == [Path(tokens.folder).name]


def test_a_killed_process_leaves_nothing_half(prepare: Prepare, article: Path, tmp_path: Path) -> None:
    kill = "import os, pipetrain.data.finished as t\nt._publish = lambda *_: os.kill(os.getpid(), 9)\n"
    process = run_python(kill + PREPARE, article, tmp_path / "cache")
    process.communicate()
    (abandoned,) = (tmp_path / "cache" / "text").iterdir()
    assert process.returncode == -9
    assert abandoned.name.startswith(".pipetrain-")
    tokens = prepare(article, tokenizer="sentencepiece", vocab_size=320)
    assert load_tokenizer(tokens.tokenizer).vocab_size == 320
    assert abandoned.exists()  # it may be at work still
    day_before = time.time() - 25 * 3600
    stranger = abandoned.with_name(".git")
    stranger.mkdir()
    for folder in (abandoned, stranger):
        os.utime(folder, (day_before, day_before))
    prepare(article)
    assert not abandoned.exists()
    assert stranger.exists()


def test_an_interrupted_one_clears_up(prepare: Prepare, article: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(finished, "_publish", interrupt)
    with pytest.raises(KeyboardInterrupt):
        prepare(article)
    assert os.listdir(article.parent / "cache" / "text") == []


# Mistakes


def test_a_missing_path(prepare: Prepare) -> None:
    with pytest.raises(ConfigError) as caught:
        prepare("nowhere/book.txt")
    assert str(caught.value) == (
        "data.path=nowhere/book.txt: there is no such file or folder; give a text file or a folder of .txt files, "
        "or data.path=null for Python's manual"
    )


def test_a_folder_without_text(prepare: Prepare, tmp_path: Path) -> None:
    folder = write_files(tmp_path / "set", {})
    folder.mkdir()
    start = (
        f"data.path={folder} is a folder with no text in it: it needs .txt files, "
        "or a train file beside a valid or test file; "
    )
    with pytest.raises(ConfigError, match=re.escape(start + "give data.path=null for Python's manual")):
        prepare(folder)
    write_files(folder, {"enwik8": "text"})
    remedy = (
        f"give a text of another name by itself, as in data.path={folder}/enwik8, or data.path=null for Python's manual"
    )
    with pytest.raises(ConfigError, match=re.escape(start + remedy)):
        prepare(folder)


def test_empty_texts(prepare: Prepare, tmp_path: Path) -> None:
    folder = write_files(tmp_path / "set", {"a.txt": ""})
    with pytest.raises(ConfigError, match=r"a\.txt is empty; give a text, or data.path=null for Python's manual$"):
        prepare(folder / "a.txt")
    with pytest.raises(ConfigError, match=r"set has only empty \.txt files; give a text"):
        prepare(folder)
    write_files(folder, {"train.txt": "", "test.txt": "text"})
    with pytest.raises(ConfigError, match=r"set has nothing in its train files; put the text to train on there$"):
        prepare(folder)


@pytest.mark.parametrize("refusing", ["pipetrain.data.corpus._text_files", "builtins.open"])
def test_a_text_that_cannot_be_read(
    prepare: Prepare, article: Path, monkeypatch: pytest.MonkeyPatch, refusing: str
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(refusing, refuse)
    with pytest.raises(ConfigError) as caught:
        prepare(article)
    assert str(caught.value) == (
        f"data.path={article} cannot be read (Permission denied); give a text that this user may read"
    )


def test_a_cache_folder_that_cannot_be_written(prepare: Prepare, article: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        prepare(article, cache_dir=f"{article}/cache")
    assert str(caught.value) == (
        f"data.cache_dir={article}/cache cannot be used (Not a directory); give a folder that you may write to"
    )


def test_a_full_disk_is_the_cache_folders_matter(
    prepare: Prepare, article: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(text_module, "write_synced", full)
    with pytest.raises(ConfigError, match=r"data\.cache_dir=.* cannot be used \(No space left on device\)"):
        prepare(article)
    assert os.listdir(article.parent / "cache" / "text") == []


def test_tokenizer_mistakes_come_before_any_work(prepare: Prepare, article: Path) -> None:
    with pytest.raises(ConfigError, match=r"Did you mean 'sentencepiece'"):
        prepare("nowhere", tokenizer="sentencepice")
    with pytest.raises(ConfigError, match=r"article\.txt is not a sentencepiece model"):
        prepare("nowhere", tokenizer=str(article))
    with pytest.raises(ConfigError, match=r"^data.tokenizer=sentencepiece needs data.vocab_size; try"):
        prepare("nowhere", tokenizer="sentencepiece")
    assert not (article.parent / "cache").exists()


@pytest.mark.parametrize(("vocab_size", "answer"), [(9000, "supports .at most"), (200, "is too small")])
def test_vocabularies_that_do_not_fit_leave_nothing(
    prepare: Prepare, article: Path, vocab_size: int, answer: str
) -> None:
    with pytest.raises(ConfigError, match=f"^data.vocab_size={vocab_size} .*{answer}"):
        prepare(article, tokenizer="sentencepiece", vocab_size=vocab_size)
    assert os.listdir(article.parent / "cache" / "text") == []


# Batches


def batches(tokens: TokenFolder, order: str, **changes: Any) -> TextBatches:
    keys: dict[str, Any] = {"split": "train", "seq_len": 4, "batch_size": 3, "seed": 1}
    keys.update(changes)
    return TextBatches(tokens, keys.pop("split"), order=order, **keys)


def test_a_split_that_does_not_hold_one_sample_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        batches(made(8, tmp_path), "once", seq_len=8)
    assert str(caught.value) == (
        "the text has 8 tokens in its train split, but one sample needs data.seq_len + 1 = 9; "
        "use data.seq_len=7 or a longer text"
    )
    with pytest.raises(ConfigError, match=r"valid split.* use a longer text or another data.valid_fraction$"):
        batches(made(9, tmp_path, valid=1), "once", split="valid", seq_len=8)


@pytest.mark.parametrize("order", ["shuffled", "contiguous", "once"])
@pytest.mark.parametrize("vocab_size", [60_000, 70_000])
def test_targets_are_the_next_tokens(tmp_path: Path, order: str, vocab_size: int) -> None:
    (inputs,), targets = batches(made(100, tmp_path, vocab_size), order).batch(2)
    assert inputs.shape == targets.shape == (3, 4)
    assert str(inputs.dtype) == str(targets.dtype) == "torch.int64"
    assert inputs.is_contiguous()
    assert targets.is_contiguous()
    assert (targets == inputs + 1).all()


def starts(reader: TextBatches, epoch: int) -> list[int]:
    first = epoch * reader.num_batches
    rows = [reader.batch(first + i)[0][0][:, 0].tolist() for i in range(reader.num_batches)]
    return [start for row in rows for start in row]


def test_shuffled_sees_every_window_once_an_epoch_in_another_order(tmp_path: Path) -> None:
    reader = batches(made(4 * 30 + 1, tmp_path), "shuffled")
    epochs = [starts(reader, epoch) for epoch in range(3)]
    assert reader.num_batches == 10
    assert all(sorted(epoch) == list(range(0, 120, 4)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0] != sorted(epochs[0])


def test_shuffled_drops_what_does_not_fill_a_batch(tmp_path: Path) -> None:
    reader = batches(made(4 * 32, tmp_path), "shuffled")  # 31 windows: the last one lacks its last target
    assert reader.num_batches == 10
    assert len(set(starts(reader, 0))) == 30
    assert reader.rows(9) == 3


def test_the_order_depends_on_the_seed_and_the_split(tmp_path: Path) -> None:
    tokens = made(121, tmp_path, valid=121)
    orders = [starts(batches(tokens, "shuffled", **keys), 0) for keys in ({}, {}, {"seed": 2}, {"split": "valid"})]
    assert orders[0] == orders[1]
    assert orders[0] != orders[2]
    assert orders[0] != orders[3]


def test_the_shuffled_order_never_changes_between_versions(tmp_path: Path) -> None:
    reader = batches(made(4 * 6 + 1, tmp_path), "shuffled", seed=0)
    assert [starts(reader, epoch) for epoch in (0, 1)] == [[12, 0, 4, 16, 8, 20], [20, 12, 8, 4, 0, 16]]


@pytest.mark.parametrize("order", ["shuffled", "contiguous", "once"])
def test_a_batch_is_a_function_of_its_number_alone(tmp_path: Path, order: str) -> None:
    tokens = made(131, tmp_path)
    run_through = batches(tokens, order)
    expected = [run_through.batch(i) for i in range(25)]
    for index in (24, 3, 13, 0):
        resumed = pickle.loads(pickle.dumps(batches(tokens, order))).batch(index)
        assert (resumed[0][0] == expected[index][0][0]).all()
        assert (resumed[1] == expected[index][1]).all()
        assert len(resumed[1]) == run_through.rows(index)


def test_contiguous_rows_read_on_where_they_stopped(tmp_path: Path) -> None:
    reader = batches(made(100, tmp_path), "contiguous")
    assert reader.num_batches == 8
    seen = [reader.batch(i) for i in range(reader.num_batches)]
    for (_, before), ((after,), _) in itertools.pairwise(seen):
        assert (after[:, 0] == before[:, -1]).all()  # a row's first input is its last target
    assert seen[0][0][0][:, 0].tolist() == [0, 33, 66]
    assert (reader.batch(reader.num_batches)[0][0] == seen[0][0][0]).all()


@pytest.mark.parametrize("count", range(13, 60))
def test_contiguous_never_reads_past_the_text(tmp_path: Path, count: int) -> None:
    reader = batches(made(count, tmp_path), "contiguous")
    (inputs,), targets = reader.batch(reader.num_batches - 1)
    assert (targets == inputs + 1).all()
    assert int(targets.max()) < count


def test_once_reads_every_window_in_order_with_a_short_last_batch(tmp_path: Path) -> None:
    reader = batches(made(4 * 7 + 3, tmp_path), "once")
    assert reader.num_batches == 3
    assert [reader.rows(i) for i in range(4)] == [3, 3, 1, 3]
    assert [len(reader.batch(i)[0][0]) for i in range(3)] == [3, 3, 1]
    assert starts(reader, 0) == starts(reader, 1) == list(range(0, 28, 4))


def test_once_needs_no_full_batch(tmp_path: Path) -> None:
    assert batches(made(5, tmp_path), "once", batch_size=64).batch(0)[0][0].tolist() == [[0, 1, 2, 3]]


def test_a_batch_of_a_large_file_does_not_load_it(tmp_path: Path) -> None:
    tokens = TokenFolder(str(tmp_path), 256, {"train": 50 << 20}, {"train": 50 << 20}, "bytes")
    with open(tokens.file("train"), "wb") as file:
        file.truncate(50 << 20)
    tracemalloc.start()
    reader = batches(tokens, "contiguous", seq_len=256, batch_size=8)
    assert "_ids" not in vars(reader)  # not even opened
    reader.batch(1234)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert isinstance(reader._ids, np.memmap)
    assert peak < 1 << 20


@pytest.mark.parametrize("order", ["shuffled", "contiguous"])
def test_a_batch_larger_than_the_text_names_the_largest(tmp_path: Path, order: str) -> None:
    tokens = made(4 * 5 + 3, tmp_path)
    with pytest.raises(ConfigError) as caught:
        batches(tokens, order, batch_size=9)
    assert str(caught.value) == (
        "batch_size=9 is more than the 5 samples of data.seq_len=4 in the train split; "
        "use batch_size=5 or data.seq_len=2, or a longer text"
    )
    assert batches(tokens, order, batch_size=5).num_batches == 1
    assert batches(tokens, order, batch_size=9, seq_len=2).num_batches == 1
    with pytest.raises(ConfigError, match=r"use batch_size=5, or a longer text$"):
        batches(tokens, order, batch_size=1000)


def test_other_mistakes_of_a_reader(tmp_path: Path) -> None:
    tokens = made(100, tmp_path)
    with pytest.raises(ConfigError, match=r"^data.order=shufled: no such choice. Did you mean 'shuffled'?"):
        batches(tokens, "shufled")
    with pytest.raises(ConfigError, match=r"^split=val: the text has no such split. Did you mean 'valid'?"):
        batches(tokens, "once", split="val")
    with pytest.raises(ConfigError, match=r"^the text has 0 tokens in its test split, .* another data.test_fraction$"):
        batches(tokens, "once", split="test")
