"""Pairs of sentences: every layout, every mistake, and batches of them."""

import itertools
from collections import Counter
from pathlib import Path
from typing import Any

import polib
import pytest
import sentencepiece
import torch

from pipetrain.data.share import Share
from pipetrain.data.translation.batches import BEGIN, END, PADDING, PairBatches
from pipetrain.data.translation.pairs import SPLITS, Fractions, find_pairs
from pipetrain.data.translation.prepare import PairFolder, prepare_pairs
from pipetrain.data.translation.sampling import quotas
from pipetrain.errors import ConfigError

HALF = Fractions(0.25, 0.25)


def write(folder: Path, files: dict[str, str | bytes]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def aligned(folder: Path, **counts: int) -> Path:
    """So many pairs of each language, of different lengths, and some for validation."""
    files: dict[str, str | bytes] = {}
    for language, count in counts.items():
        for split, number in (("train", count), ("valid", 7), ("test", 5)):
            lines = [f"{language} {split} " + "wort " * (i % 9) + str(i) for i in range(number)]
            english = [f"{split} " + "word " * (i % 7) + str(i) for i in range(number)]
            for side, text in ((language, lines), ("en", english)):
                files[f"{split}.en-{language}.{side}"] = "\n".join(text) + "\n"
    return write(folder, files)


def prepared(folder: Path, **changes: Any) -> PairFolder:
    settings: dict[str, Any] = {
        "path": str(folder),
        "languages": None,
        "pivot": "en",
        "tokenizer": "sentencepiece",
        "vocab_size": 340,
        "max_tokens": 40,
        "sampling": 0.7,
        "valid_fraction": 0.1,
        "test_fraction": 0.1,
        "cache_dir": str(folder.parent / "cache"),
    }
    return prepare_pairs(**settings | changes)


def batches(pairs: PairFolder, split: str = "train", **changes: Any) -> PairBatches:
    settings: dict[str, Any] = {"direction": "into", "max_tokens": 40, "batch_size": 4, "sampling": 0.7, "seed": 0}
    return PairBatches(pairs, split, **settings | changes)


# Layouts


def test_aligned_files_of_several_languages(tmp_path: Path) -> None:
    found = find_pairs(str(aligned(tmp_path / "set", de=20, om=10)), "en", HALF)
    assert {
        language: {split: len(its) for split, its in splits.items()} for language, splits in found.pairs.items()
    } == {
        "de": {"train": 20, "valid": 7, "test": 5},
        "om": {"train": 10, "valid": 7, "test": 5},
    }
    assert found.pairs["om"]["train"][2] == ("om train wort wort 2", "train word word 2")


def test_languages_with_a_region(tmp_path: Path) -> None:
    lines = "um\ndois\n", "one\ntwo\n"
    folder = write(tmp_path, {"train.en-pt-BR.pt-BR": lines[0], "train.en-pt-BR.en": lines[1]})
    write(folder, {"train.zh-CN-en.zh-CN": lines[0], "train.zh-CN-en.en": lines[1]})
    assert sorted(find_pairs(str(folder), "en", Fractions(0, 0)).pairs) == ["pt-BR", "zh-CN"]


def test_aligned_files_of_one_language(tmp_path: Path) -> None:
    folder = write(
        tmp_path, {"train.de": "eins\nzwei\n", "train.en": "one\ntwo\n", "valid.de": "drei", "valid.en": "three"}
    )
    found = find_pairs(str(folder), "en", Fractions(0.5, 0.0))
    assert found.pairs == {
        "de": {"train": [("eins", "one"), ("zwei", "two")], "valid": [("drei", "three")], "test": []}
    }


def test_a_split_without_a_file_is_held_out_of_the_training(tmp_path: Path) -> None:
    lines = "\n".join(map(str, range(300)))
    folder = write(tmp_path, {"train.de": lines, "train.en": lines, "test.de": "x", "test.en": "y"})
    pairs = find_pairs(str(folder), "en", Fractions(0.25, 0.25)).pairs["de"]
    assert len(pairs["train"]) + len(pairs["valid"]) == 300
    assert 50 < len(pairs["valid"]) < 100
    assert pairs["test"] == [("x", "y")]


def test_tables_and_the_split_that_follows_from_the_pivot(tmp_path: Path) -> None:
    lines = [f"wort {i}\tword {i}" for i in range(200)]
    folder = write(tmp_path, {"de.tsv": "\n".join(lines), "nl.tsv": " \r\n".join(reversed(lines))})
    found = find_pairs(str(folder), "en", HALF).pairs
    for split in SPLITS:
        assert set(found["de"][split]) == set(found["nl"][split])
    assert 30 < len(found["de"]["valid"]) < 70
    assert len(find_pairs(str(folder / "de.tsv"), "en", HALF).pairs["de"]["train"]) == len(found["de"]["train"])


def catalogue() -> polib.POFile:
    made = polib.POFile()
    made.metadata = {"Content-Type": "text/plain; charset=utf-8"}
    made.append(polib.POEntry(msgid="Save", msgstr="Speichern"))
    made.append(polib.POEntry(msgid="May", msgstr="Mai", msgctxt="month"))
    made.append(polib.POEntry(msgid="not yet", msgstr=""))
    made.append(polib.POEntry(msgid="unsure", msgstr="unsicher", flags=["fuzzy"]))
    made.append(polib.POEntry(msgid="%d file", msgid_plural="%d files", msgstr_plural={0: "%d Datei", 1: "%d Dateien"}))
    return made


@pytest.mark.parametrize("kind", ["po", "mo", "both"])
def test_catalogues(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "locale" / "de" / "LC_MESSAGES"
    folder.mkdir(parents=True)
    if kind != "mo":
        catalogue().save(str(folder / "app.po"))
    if kind != "po":
        catalogue().save_as_mofile(str(folder / "app.mo"))
    found = find_pairs(str(tmp_path), "en", Fractions(0, 0)).pairs
    wanted = [("Speichern", "Save"), ("Mai", "May"), ("%d Datei", "%d file"), ("%d Dateien", "%d files")]
    assert sorted(found["de"]["train"]) == sorted(wanted)


def test_djangos_messages_are_there_without_a_download() -> None:
    found = find_pairs(None, "en", Fractions(0.02, 0.02)).pairs
    assert len(found) > 90
    assert sum(len(splits["train"]) for splits in found.values()) > 40_000
    assert "en" not in found, "the program's own language has no translation"
    in_german, in_dutch = ({english for _, english in found[language]["train"]} for language in ("de", "nl"))
    held_out = {english for _, english in (*found["nl"]["valid"], *found["nl"]["test"])}
    assert held_out
    assert not held_out & in_german, "a sentence is in one split in all languages"
    assert in_dutch & in_german


# Mistakes


@pytest.mark.parametrize(
    ("files", "text"),
    [
        ({"train.de": "eins\nzwei\n", "train.en": "one\n"}, "train.de has 2 lines and {}/train.en has 1"),
        ({"train.de": b"eins\nz\xffwei\n", "train.en": "one\ntwo\n"}, "train.de, line 2 is no UTF-8"),
        ({"de.tsv": "eins\tone\nzwei\n"}, "de.tsv, line 2 has 0 tabs"),
        ({"train.en-de.de": "eins\n"}, "train.en-de.de has no train.en-de.en beside it"),
        ({"readme.md": "nothing"}, "has no pairs of sentences with en (data.pivot)"),
        ({"de.mo": b"not a catalogue"}, "de.mo cannot be read as a catalogue"),
        ({"de.po": b'msgid "a"\nmsgstr "\xff"\n'}, "de.po, line 2 is no UTF-8"),
    ],
)
def test_damaged_files_are_named(tmp_path: Path, files: dict[str, str | bytes], text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        find_pairs(str(write(tmp_path, files)), "en", HALF)
    assert text.format(tmp_path) in str(caught.value)


def test_a_pivot_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data.pivot=de, but gettext catalogues are paired with what stands in the"):
        find_pairs(None, "de", HALF)
    folder = write(tmp_path, {"de.tsv": "eins\tone\n"})
    with pytest.raises(ConfigError, match=r"data.pivot=de is also a language of data.path="):
        find_pairs(str(folder), "de", HALF)


def test_what_is_asked_for_and_not_there(tmp_path: Path) -> None:
    folder = aligned(tmp_path / "set", de=20)
    with pytest.raises(ConfigError, match="is neither a file nor a folder"):
        find_pairs(str(tmp_path / "nowhere"), "en", HALF)
    with pytest.raises(ConfigError, match=r"data.languages has dd, of which there are no pairs. Choose one of: de"):
        prepared(folder, languages=["dd"])
    write(folder, {"valid.en-fr.fr": "un\n", "valid.en-fr.en": "one\n"})
    with pytest.raises(
        ConfigError, match=r"no pairs to train fr on \(0 have an empty side\); leave it out: data.languages=\[de\]"
    ):
        prepared(folder)
    with pytest.raises(ConfigError, match="is more than this text supports"):
        prepared(folder, languages=["de"], vocab_size=50_000)


# Tokens


def test_empty_and_long_pairs_are_left_out_and_counted(tmp_path: Path) -> None:
    folder = aligned(tmp_path / "set", de=30)
    write(folder, {"train.en-om.om": "a\n\nb\n" + "long " * 60 + "\n", "train.en-om.en": "a\nb\n \nd\n"})
    pairs = prepared(folder)
    assert pairs.counts["om"]["train"] == 1
    assert (pairs.empty, pairs.too_long) == ({"de": 0, "om": 2}, {"de": 0, "om": 1})
    assert prepared(folder) == pairs, "from the cache"
    assert pairs.described()[:2] == [
        "31 pairs of 2 languages and en to train on",
        "left out: 2 with an empty side, 1 longer than data.max_tokens",
    ]
    assert 0.9 < pairs.coverage["de"] <= 1


def test_what_is_prepared_is_what_was_written(tmp_path: Path) -> None:
    pairs = prepared(aligned(tmp_path / "set", de=30, om=5))
    processor = sentencepiece.SentencePieceProcessor(model_file=pairs.tokenizer)
    own, pivot = (pairs.side("om", "train", pivot=side) for side in (False, True))
    assert [processor.decode(side[2].tolist()) for side in (own, pivot)] == [
        "om train wort wort 2",
        "train word word 2",
    ]
    assert (processor.pad_id(), processor.bos_id(), processor.eos_id()) == (PADDING, BEGIN, END)
    assert "<2om>" not in {processor.id_to_piece(i) for i in processor.encode("translate <2om> this")}


# Batches


@pytest.fixture
def pairs(tmp_path: Path) -> PairFolder:
    return prepared(aligned(tmp_path / "set", de=300, om=40))


def test_inputs_and_targets_are_the_pair_with_its_ends(pairs: PairFolder) -> None:
    reader = batches(pairs)
    (source, begun), target = reader.batch(5)
    assert source.shape[0] == begun.shape[0] == target.shape[0] == reader.rows(5)
    assert begun.shape == target.shape
    assert torch.equal(target, reader.targets(5))
    for row in range(len(source)):
        own, before = source[row][source[row] != PADDING], begun[row][begun[row] != PADDING]
        after = target[row][target[row] != -100]
        assert own[-1] == after[-1] == END
        assert before[0] == BEGIN
        assert torch.equal(before[1:], after[:-1])


def test_a_batch_has_no_more_than_its_tokens_and_no_fewer_than_its_rows(pairs: PairFolder) -> None:
    reader = batches(pairs)
    for index in range(reader.num_batches):
        (source, begun), _ = reader.batch(index)
        assert max(source.numel(), begun.numel()) <= 4 * 40
        assert len(source) >= 4


@pytest.mark.slow
def test_little_is_padding() -> None:
    """Below a tenth, on real sentences."""
    made = prepared_djangos()
    reader = PairBatches(made, "train", direction="into", max_tokens=64, batch_size=16, sampling=0.7, seed=0)
    padding = tokens = 0
    for index in range(reader.num_batches):
        (source, _), target = reader.batch(index)
        padding += int((source == PADDING).sum()) + int((target == -100).sum())
        tokens += source.numel() + target.numel()
    assert padding < 0.1 * tokens


def prepared_djangos() -> PairFolder:
    return prepare_pairs(
        path=None,
        languages=None,
        pivot="en",
        tokenizer="sentencepiece",
        vocab_size=8000,
        max_tokens=64,
        sampling=0.7,
        valid_fraction=0.02,
        test_fraction=0.02,
        cache_dir="~/.cache/pipetrain",
    )


def test_a_batch_is_a_function_of_its_number_alone(pairs: PairFolder) -> None:
    through = batches(pairs)
    number = 3 * through.num_batches + 2
    expected = {index: through.batch(index) for index in (0, 7, number)}
    for index in (number, 0, 7):
        (source, begun), target = batches(pairs).batch(index)
        assert torch.equal(source, expected[index][0][0])
        assert torch.equal(begun, expected[index][0][1])
        assert torch.equal(target, expected[index][1])
    (other, _), _ = batches(pairs, seed=1).batch(7)
    assert other.shape != expected[7][0][0].shape or not torch.equal(other, expected[7][0][0])


def test_each_language_has_its_share_of_an_epoch_and_goes_on_in_the_next(pairs: PairFolder) -> None:
    wanted = quotas({"de": 300, "om": 40}, 0.5)
    reader = batches(pairs, sampling=0.5)
    seen: Counter[tuple[int, int]] = Counter()
    for epoch in range(4):
        plan = [tuple(row) for batch in reader._made(epoch) for row in batch.tolist()]
        of_epoch = Counter(way for way, _ in plan)
        assert 0 <= of_epoch[0] - wanted["de"] < 4  # what fills the last batch
        assert 0 <= of_epoch[1] - wanted["om"] < 4
        seen.update(plan)
    of_om = [count for (way, _), count in seen.items() if way == 1]
    assert len(of_om) == 40, "all of them"
    assert max(of_om) - min(of_om) <= 2, "in turn"


@pytest.mark.parametrize("number", [100, 101, 110, 290])
def test_no_pair_is_left_out_for_ever(tmp_path: Path, number: int) -> None:
    """Not even the shortest ones, which come last and seldom fill a batch."""
    lines = [f"{i}" if i < 6 else f"satz {i} " + "wort " * 5 for i in range(number)]
    folder = write(tmp_path / "set", {"de.tsv": "\n".join(f"{line}\t{line}" for line in lines)})
    reader = batches(prepared(folder, valid_fraction=0.0, test_fraction=0.0, vocab_size=300), batch_size=8)
    indices = range(12 * reader.num_batches)
    assert len({tuple(row) for index in indices for row in reader._numbers(index).tolist()}) == number
    assert min(map(reader.rows, indices)) >= 8


def test_too_few_pairs_for_a_batch(pairs: PairFolder) -> None:
    with pytest.raises(ConfigError, match="batch_size=200 needs at least 400 pairs to train on, and there are 340"):
        batches(pairs, batch_size=200)


def test_other_splits_have_each_pair_once(pairs: PairFolder) -> None:
    reader = batches(pairs, "valid", direction="both")
    numbers = [tuple(row) for index in range(reader.num_batches) for row in reader._numbers(index).tolist()]
    assert sorted(numbers) == list(itertools.product(range(4), range(7)))


def test_other_splits_have_one_language_in_a_batch_and_a_few_batches_have_all(pairs: PairFolder) -> None:
    reader = batches(pairs, "valid", direction="both", batch_size=1)
    ways = ["de-en", "en-de", "om-en", "en-om"]
    for index in range(reader.num_batches):
        assert {ways[way] for way, _ in reader._numbers(index).tolist()} == {reader.way(index)}
    assert [reader.way(index) for index in range(8)] == ways * 2


def test_what_was_seen_of_each_language(pairs: PairFolder) -> None:
    reader, counted = batches(pairs), Counter[str]()
    for index in range(2 * reader.num_batches + 3):
        counted.update(("de-en", "om-en")[way] for way, _ in reader._numbers(index).tolist())
        if index in (4, 5, reader.num_batches):
            assert reader.seen(index + 1) == counted
    assert reader.seen(2 * reader.num_batches + 3) == batches(pairs).seen(2 * reader.num_batches + 3) == counted


# Vocabularies that were made before


def test_a_vocabulary_of_another_run(pairs: PairFolder, tmp_path: Path) -> None:
    other = prepared(aligned(tmp_path / "other", om=30), tokenizer=pairs.tokenizer, vocab_size=9999)
    assert other.vocab_size == pairs.vocab_size
    assert Path(other.tokenizer).read_bytes() == Path(pairs.tokenizer).read_bytes()
    assert other.folder != prepared(tmp_path / "other").folder
    batches(other, direction="both")


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"byte_fallback": True, "vocab_size": 280}, "first pieces are not padding, unknown, begin and end"),
        ({"pad_id": 0, "unk_id": 1, "bos_id": 2, "eos_id": 3, "vocab_size": 25}, "no pieces for bytes"),
        (None, "no sentencepiece model"),
    ],
)
def test_a_foreign_vocabulary_is_refused(tmp_path: Path, settings: dict[str, Any] | None, problem: str) -> None:
    folder = aligned(tmp_path / "set", de=20)
    model = tmp_path / "foreign.model"
    model.write_bytes(b"x")
    if settings is not None:
        with model.open("wb") as file:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(["train word 12345", "de wort 67890"] * 9), model_writer=file, **settings
            )
    with pytest.raises(ConfigError, match=rf"foreign.model cannot be used for translation: .*{problem}"):
        prepared(folder, tokenizer=str(model))


def test_a_vocabulary_without_the_symbol_of_a_language(pairs: PairFolder, tmp_path: Path) -> None:
    other = prepared(aligned(tmp_path / "other", nl=30), tokenizer=pairs.tokenizer)
    batches(other)  # into English there is nothing to say
    with pytest.raises(ConfigError, match="the vocabulary has no piece <2nl>"):
        batches(other, direction="both")


@pytest.mark.parametrize(
    ("direction", "symbols"), [("into", set()), ("from", {"<2de>", "<2om>"}), ("both", {"<2de>", "<2om>", "<2en>"})]
)
def test_a_source_says_what_it_is_to_become_where_that_may_be_several(
    pairs: PairFolder, direction: str, symbols: set[str]
) -> None:
    processor = sentencepiece.SentencePieceProcessor(model_file=pairs.tokenizer)
    reader = batches(pairs, "valid", direction=direction)
    first = {processor.id_to_piece(int(row[0])) for i in range(reader.num_batches) for row in reader.batch(i)[0][0]}
    assert {piece for piece in first if piece.startswith("<2")} == symbols
    assert not symbols or first == symbols


def test_shares_are_rows_of_the_whole_batch(pairs: PairFolder) -> None:
    whole = batches(pairs)
    (source, _), target = whole.batch(3)
    parts = [batches(pairs, share=Share(replica, 2, 4)).batch(3) for replica in range(2)]
    assert torch.equal(torch.cat([part[0][0] for part in parts]), source)
    assert torch.equal(torch.cat([part[1] for part in parts]), target)
