"""Language models go on with texts, and every model is evaluated."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from asking import asked, give
from runs import CPU, run, settings

from pipetrain.config import (
    AdamConfig,
    AmoebaNetConfig,
    Config,
    EvalConfig,
    ImagesConfig,
    TextConfig,
    TransformerConfig,
)
from pipetrain.engine.local import run_ranks
from pipetrain.errors import ConfigError
from pipetrain.inference.evaluate import evaluate
from pipetrain.inference.generate import generate
from pipetrain.inference.lines import escaped, unescaped
from pipetrain.paths import RunPaths
from pipetrain.training.data import prepare_data
from pipetrain.training.job import Job
from pipetrain.training.loop import Signals, train


def text(root: Path, **changes: Any) -> Config:
    data = TextConfig(path=str(root / "text.txt"), cache_dir=str(root / "cache"), seq_len=16, **changes)
    model = TransformerConfig(layers=1, d_model=32, d_ff=64, heads=2, dropout=0.0)
    return settings(
        model=model,
        data=data,
        optimizer=AdamConfig(name="adamw", lr=1e-2),
        steps=80,
        log_every=40,
        eval=EvalConfig(),
    )


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Config]:
    root = tmp_path_factory.mktemp("text")
    (root / "text.txt").write_text("one\\to\n" * 400)
    cfg = text(root)
    (root / "run").mkdir()
    job = Job(cfg, RunPaths(root / "run"), prepare_data(cfg, print), ("cpu",) * 2, None)
    run_ranks(2, lambda transport: train(job, transport, CPU, Signals()))
    return root, cfg


def test_a_text_goes_on_line_by_line(
    reader: tuple[Path, Config], capfdbinary: pytest.CaptureFixture[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    root, cfg = reader
    give(monkeypatch, b"one\n\nto\\none\\\\\n")
    generate(*asked(cfg, root, max_tokens=20, temperature=0.0))
    lines = capfdbinary.readouterr().out.decode().splitlines()
    assert lines[0] == escaped(("one\\to\n" * 9)[:23])
    assert lines[1] == escaped(("one\\to\n" * 9)[:20])
    assert lines[2] == escaped("to\n" + ("one\\to\n" * 9)[:24])
    assert unescaped(lines[2]).startswith("to\none\\to\none")


def test_chance_has_a_seed(
    reader: tuple[Path, Config], capfdbinary: pytest.CaptureFixture[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    root, cfg = reader
    outs = []
    for batch_size, lines in ((1, b"x\ny\nx\n"), (8, b"x\ny\nx\n"), (8, b"x\n")):
        give(monkeypatch, lines)
        generate(*asked(cfg, root, temperature=5.0, batch_size=batch_size))
        outs.append(capfdbinary.readouterr().out.splitlines())
    assert outs[0] == outs[1]
    assert outs[0][0] == outs[2][0]
    assert outs[0][0] != outs[0][2]


def test_a_text_is_evaluated(reader: tuple[Path, Config], capfd: pytest.CaptureFixture[str]) -> None:
    root, cfg = reader
    evaluate(dataclasses.replace(cfg, action="evaluate", resume=str(root / "run")), root / "run")
    assert "test split: loss" in capfd.readouterr().out
    values = json.loads((root / "run" / "evaluation" / "test.json").read_text())["values"]
    assert values["bits_per_character"] < 0.2


def test_images_are_evaluated_and_make_no_text(tmp_path: Path) -> None:
    data = ImagesConfig(set="digits", cache_dir=str(tmp_path), workers=0)
    cfg = settings(model=AmoebaNetConfig(layers=3, filters=4), data=data, batch_size=8, micro_batches=2, steps=2)
    cfg = dataclasses.replace(cfg, eval=EvalConfig(every=2))
    run(tmp_path, "run", 2, cfg)
    evaluate(dataclasses.replace(cfg, action="evaluate", resume=str(tmp_path / "run")), tmp_path / "run")
    values = json.loads((tmp_path / "run" / "evaluation" / "valid.json").read_text())["values"]
    told = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()][-1]
    assert values["loss"] == pytest.approx(told["loss/val"], rel=1e-5)
    assert values["accuracy"] == pytest.approx(told["val/accuracy"])
    with pytest.raises(ConfigError, match="data=images does not"):
        generate(*asked(cfg, tmp_path))
