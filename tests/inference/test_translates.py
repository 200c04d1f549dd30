"""A translation model learns some pairs by heart, and says them again."""

import dataclasses
import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from asking import asked, give
from runs import run, settings

from pipetrain.config import (
    AdamConfig,
    CheckpointConfig,
    Config,
    EvalConfig,
    EvaluateConfig,
    LrRuleConfig,
    Seq2SeqConfig,
    TranslationConfig,
)
from pipetrain.errors import CheckpointError, ConfigError, DataError
from pipetrain.inference.evaluate import evaluate
from pipetrain.inference.generate import generate

pytestmark = pytest.mark.slow
WORDS = {"rot": "red", "blau": "blue", "haus": "house", "hund": "dog", "klein": "small", "und": "and"}
GERMAN = [*WORDS, *map(" ".join, itertools.combinations(WORDS, 2)), *map(" ".join, itertools.combinations(WORDS, 4))]
SPANISH = [line.upper() for line in GERMAN]
ENGLISH = [" ".join(WORDS[word] for word in line.split()) for line in GERMAN]


def translation(root: Path, **changes: Any) -> Config:
    data = TranslationConfig(
        path=str(root / "pairs"), cache_dir=str(root / "cache"), max_tokens=24, vocab_size=300, **changes
    )
    model = Seq2SeqConfig(layers=1, d_model=32, d_ff=64, heads=2, head_width=16, dropout=0.0, label_smoothing=0.0)
    return settings(
        model=model,
        data=data,
        batch_size=12,
        micro_batches=2,
        optimizer=AdamConfig(name="adamw", lr=6e-3),
        lr_rule=LrRuleConfig(name="linear", warmup_steps=20, decay_steps=300),
        steps=300,
        log_every=100,
        eval=EvalConfig(),
        checkpoint=CheckpointConfig(every=300),
        seed=1,
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Config]:
    """Both ways between German, Spanish (shouted German) and English, on two stages, and none of them held out."""
    root = tmp_path_factory.mktemp("translation")
    (root / "pairs").mkdir()
    for split in ("train", "valid", "test"):
        for language, lines in (("de", GERMAN), ("es", SPANISH)):
            (root / "pairs" / f"{split}.en-{language}.{language}").write_text("\n".join(lines) + "\n")
            (root / "pairs" / f"{split}.en-{language}.en").write_text("\n".join(ENGLISH) + "\n")
    cfg = translation(root, direction="both")
    run(root, "run", 2, cfg)
    return root, cfg


@pytest.mark.parametrize("generation", [{"beams": 1}, {"beams": 4}, {"beams": 3, "batch_size": 5}])
def test_lines_become_their_translations_in_order(
    trained: tuple[Path, Config],
    generation: dict[str, Any],
    capfdbinary: pytest.CaptureFixture[bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    root, cfg = trained
    lines = [GERMAN[3], "", SPANISH[5], "  ", *GERMAN[10:20], GERMAN[3]]
    give(monkeypatch, "\n".join(lines).encode())
    generate(*asked(cfg, root, into="en", **generation))
    out, _ = capfdbinary.readouterr()
    expected = [ENGLISH[3], "", ENGLISH[5], "", *ENGLISH[10:20], ENGLISH[3]]
    assert out.decode() == "".join(f"{line}\n" for line in expected)


def test_the_target_is_chosen(
    trained: tuple[Path, Config], capfdbinary: pytest.CaptureFixture[bytes], tmp_path: Path
) -> None:
    root, cfg = trained
    (tmp_path / "lines").write_bytes(b"red house\r\nblue dog\n")
    for language, expected in (("de", "rot haus\nblau hund\n"), ("es", "ROT HAUS\nBLAU HUND\n")):
        cfg, folder = asked(cfg, root, into=language)
        generate(dataclasses.replace(cfg, input=str(tmp_path / "lines")), folder)
        assert capfdbinary.readouterr().out.decode() == expected
    for into, words in (
        (None, "into 3 languages; say into which one: generate.into=de"),
        ("ed", "Choose one of: de, es, en"),
    ):
        with pytest.raises(ConfigError, match=words):
            generate(*asked(cfg, root, into=into))


def test_a_long_line_is_cut_and_said(
    trained: tuple[Path, Config], capfdbinary: pytest.CaptureFixture[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    root, cfg = trained
    give(monkeypatch, b"rot " * 100 + b"\nrot haus\n")
    generate(*asked(cfg, root, into="en"))
    out, err = capfdbinary.readouterr()
    assert out.decode().splitlines()[1] == "red house"
    assert len(out.splitlines()) == 2
    assert b"1 of the lines were cut to the data.max_tokens" in err


def test_bytes_that_are_no_text(
    trained: tuple[Path, Config], capfdbinary: pytest.CaptureFixture[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What came before is translated."""
    root, cfg = trained
    give(monkeypatch, b"rot haus\n\xff\xfe\nklein hund\n")
    with pytest.raises(DataError, match="stdin, line 2 is no UTF-8"):
        generate(*asked(cfg, root, into="en"))
    assert capfdbinary.readouterr().out == b"red house\n"


def test_the_run_alone_is_enough(trained: tuple[Path, Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Elsewhere, without the data, on another number of devices; but not with another tokenizer."""
    root, cfg = trained
    give(monkeypatch, b"")
    shutil.copytree(root / "run", tmp_path / "run")
    moved = dataclasses.replace(cfg, devices=4, data=dataclasses.replace(cfg.data, path="gone", cache_dir="gone"))
    generate(*asked(moved, tmp_path, into="en"))
    tokenizer = tmp_path / "run" / "tokenizer.model"
    content = tokenizer.read_bytes()
    tokenizer.write_bytes(content + b"x")
    with pytest.raises(CheckpointError, match=r"tokenizer.model is not the tokenizer that this run was trained with"):
        generate(*asked(moved, tmp_path, into="en"))
    tokenizer.write_bytes(content)
    for manifest in (tmp_path / "run" / "checkpoints").glob("*/manifest.json"):  # one of an older version
        facts = json.loads(manifest.read_text())
        del facts["tokenizer"], facts["config"]["data"]["tokenizer"]
        manifest.write_text(json.dumps(facts))
    generate(*asked(moved, tmp_path, into="en"))
    tokenizer.unlink()
    with pytest.raises(CheckpointError, match=r"lacks a data.json or tokenizer.model"):
        generate(*asked(moved, tmp_path, into="en"))


def test_other_settings_are_refused(trained: tuple[Path, Config]) -> None:
    root, cfg = trained
    changed = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, d_model=16))
    with pytest.raises(ConfigError, match=r"model.d_model=16, but the run to resume has model.d_model=32"):
        generate(*asked(changed, root, into="en"))
    asked_for, folder = asked(cfg, root, into="en")
    with pytest.raises(CheckpointError, match="has a validation loss"):
        generate(dataclasses.replace(asked_for, weights="best"), folder)


def test_the_score_of_each_language(trained: tuple[Path, Config], capfd: pytest.CaptureFixture[str]) -> None:
    root, cfg = trained
    cfg = dataclasses.replace(cfg, action="evaluate", resume=str(root / "run"), evaluate=EvaluateConfig(sentences=30))
    evaluate(cfg, root / "run")
    out, _ = capfd.readouterr()
    found = json.loads((root / "run" / "evaluation" / "test.json").read_text())
    assert {row["way"] for row in found["languages"]} == {"de-en", "en-de", "es-en", "en-es"}
    for row in found["languages"]:
        assert row["chrf"]["value"] > 95
        assert row["chrf"]["value"] > row["copied_chrf"]["value"]
        assert (row["pairs"], row["sentences"]) == (36, 30)
        assert row["nll"] < 0.2
        assert row["chrf"]["signature"] in out
    with pytest.raises(ConfigError, match=r"generate.into=fr: this run does not translate into it"):
        generate(*asked(cfg, root, into="fr"))
    said = (root / "run" / "evaluation" / "test.es-en.tsv").read_text().splitlines()
    assert len(said) == 30
    assert all(len(line.split("\t")) == 3 for line in said)
    other = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, valid_fraction=0.0, path=str(root / "other")))
    shutil.copytree(root / "pairs", root / "other")
    (root / "other" / "train.en-de.de").write_text("\n".join(GERMAN[::-1]))
    with pytest.raises(ConfigError, match=r"valid_fraction|not those that the run was trained on"):
        evaluate(other, root / "run")
