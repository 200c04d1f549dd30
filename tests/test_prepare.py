"""Every bad input that needs a fact is answered before a worker starts: value, rule, remedy."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from runs import run, settings

from pipetrain import processes
from pipetrain.config import CheckpointConfig, Config, EvalConfig, TextConfig, TransformerConfig
from pipetrain.errors import CheckpointError, ConfigError, PipetrainError
from pipetrain.launch import launch, prepare
from pipetrain.paths import RunPaths


@pytest.fixture(autouse=True)
def _no_worker_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    def started(*args: object, **kwargs: object) -> None:
        raise AssertionError("a worker was started")

    monkeypatch.setattr(processes, "run_workers", started)
    monkeypatch.setattr("pipetrain.launch.run_workers", started)


def with_text(tmp_path: Path, text: str | bytes | None, **changes: Any) -> Config:
    path = tmp_path / "book.txt"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    data = TextConfig(**({"path": str(path), "seq_len": 8, "cache_dir": str(tmp_path / "cache")} | changes))
    return settings(data=data, devices=1)


def empty_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "empty"
    folder.mkdir()
    return folder


PROSE = "the quick brown fox jumps over the lazy dog\n" * 40


@pytest.mark.parametrize(
    ("make", "texts"),
    [
        (lambda p: with_text(p, None), ["book.txt", "data.path"]),
        (lambda p: with_text(p, ""), ["book.txt", "is empty"]),
        (
            lambda p: with_text(p, "hello"),
            ["in its train split, but one sample needs data.seq_len + 1 = 9", "a longer text"],
        ),
        (lambda p: with_text(p, PROSE, path=str(empty_folder(p))), ["data.path=", "empty", "no text"]),
        (lambda p: with_text(p, PROSE, tokenizer="byte"), ["data.tokenizer=byte", "Did you mean 'bytes'?"]),
        (
            lambda p: with_text(p, PROSE, tokenizer=str(p / "book.txt")),
            ["data.tokenizer=", "book.txt", "is not a sentencepiece model"],
        ),
        (
            lambda p: with_text(p, PROSE, tokenizer="sentencepiece", vocab_size=9000),
            ["data.vocab_size=9000 is more than this text supports (at most", "use data.vocab_size="],
        ),
        (
            lambda p: dataclasses.replace(with_text(p, PROSE), balance=[2, 3], devices=2),
            ["balance=[2,3] sums to 5, but the model has 4 layers (the last number could be 2)"],
        ),
        (
            lambda p: dataclasses.replace(with_text(p, PROSE), devices=5),
            ["5 stages, but the model has only 4 layers and every stage needs one; use devices=4"],
        ),
        (
            lambda p: dataclasses.replace(with_text(p, PROSE), devices="cuda:0"),
            ["devices=cuda:0 asks for cuda:0, but this machine has no GPU; use devices=cpu:1"],
        ),
        (
            lambda p: dataclasses.replace(with_text(p, PROSE, valid_fraction=0.0), eval=EvalConfig(every=1)),
            ["the text has 0 tokens in its valid split", "another data.valid_fraction"],
        ),
        (
            lambda p: dataclasses.replace(with_text(p, PROSE), batch_size=400),
            ["batch_size=400", "seq_len"],
        ),
    ],
)
def test_bad_input_is_answered(tmp_path: Path, make: Callable[[Path], Config], texts: list[str]) -> None:
    run_folder = tmp_path / "run"
    with pytest.raises(ConfigError) as caught:
        launch(make(tmp_path), run_folder)
    for text in texts:
        assert text in str(caught.value)
    assert caught.value.exit_code == 2
    assert not run_folder.exists(), "nothing is written"


def finished_run(tmp_path: Path, **changes: Any) -> Config:
    cfg = settings(data=TextConfig(path=str(tmp_path / "text.txt"), seq_len=8, cache_dir=str(tmp_path / "cache"),
                                   valid_fraction=0.1, test_fraction=0.1), steps=2, devices=1,
                   eval=EvalConfig(), checkpoint=CheckpointConfig(), **changes)  # fmt: skip
    run(tmp_path, "run", 1, cfg)
    return dataclasses.replace(cfg, resume=str(tmp_path / "run"))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            {"batch_size": 8},
            "batch_size=8, but the run to resume has batch_size=4: leave batch_size out, or",
        ),
        ({"seed": 3}, "seed=3, but the run to resume has seed=0"),
        (
            {"model": TransformerConfig(layers=3, d_model=16, d_ff=32, heads=2)},
            "model.layers=3, but the run to resume has model.layers=2",
        ),
    ],
)
def test_a_resumed_run_stays_the_run_it_was(tmp_path: Path, change: dict[str, Any], text: str) -> None:
    cfg = finished_run(tmp_path)
    with pytest.raises(ConfigError) as caught:
        prepare(dataclasses.replace(cfg, **change), RunPaths(tmp_path / "run"), 0)
    assert text in str(caught.value)


def test_devices_balance_and_steps_may_change_on_resume(tmp_path: Path) -> None:
    cfg = dataclasses.replace(finished_run(tmp_path), devices=2, balance=[1, 3], steps=9, recompute="never")
    job = prepare(cfg, RunPaths(tmp_path / "run"), 0)
    assert job.checkpoint == tmp_path / "run" / "checkpoints" / "step_00000002"


def test_micro_batches_that_were_left_to_the_planner_stay_on_resume(tmp_path: Path) -> None:
    """The numbers depend on them. What else is open may be chosen anew, and is no change."""
    cfg = finished_run(tmp_path, micro_batches=2)
    cfg = dataclasses.replace(cfg, micro_batches="auto", balance="auto", recompute="auto", steps=9)
    said: list[str] = []
    job = prepare(cfg, RunPaths(tmp_path / "run"), 0, say=said.append)
    assert (job.cfg.micro_batches, job.cfg.balance, job.cfg.recompute) == (2, "auto", "auto")
    assert said == ["going on from step 2, with steps=9 (was 2)"]


def test_other_replicas_have_to_share_the_micro_batches_of_the_run(tmp_path: Path) -> None:
    """Those that were left to the planner, and those that nobody typed."""
    cfg = dataclasses.replace(finished_run(tmp_path, micro_batches=1), steps=9, devices=2, data_parallel=2)
    with pytest.raises(ConfigError, match="micro_batches=1, of the whole mini-batch, cannot be shared evenly by"):
        prepare(dataclasses.replace(cfg, micro_batches="auto"), RunPaths(tmp_path / "run"), 0)


def test_the_usual_micro_batches_stay_with_other_replicas(tmp_path: Path) -> None:
    cfg = dataclasses.replace(finished_run(tmp_path, batch_size=4), steps=9, devices=3, data_parallel=3)
    with pytest.raises(ConfigError, match="micro_batches=4, of the whole mini-batch, cannot be shared evenly by"):
        prepare(cfg, RunPaths(tmp_path / "run"), 0)
    job = prepare(dataclasses.replace(cfg, devices=2, data_parallel=2), RunPaths(tmp_path / "run"), 0)
    assert job.cfg.micro_batches == 4


def test_a_changed_text_is_found_on_resume(tmp_path: Path) -> None:
    cfg = finished_run(tmp_path)
    (tmp_path / "text.txt").write_text("another text altogether, long enough to be read as one. " * 40)
    with pytest.raises(ConfigError, match=r"are not those that .* was trained on; put the old ones back, or"):
        prepare(cfg, RunPaths(tmp_path / "run"), 0)


def test_resume_without_a_usable_checkpoint_is_exit_3_and_says_why(tmp_path: Path) -> None:
    cfg = finished_run(tmp_path)
    manifest = tmp_path / "run" / "checkpoints" / "step_00000002" / "manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "format": 7}))
    with pytest.raises(CheckpointError, match=r"step_00000002: format 7, but this version reads format 1") as caught:
        prepare(cfg, RunPaths(tmp_path / "run"), 0)
    assert isinstance(caught.value, PipetrainError)
    assert caught.value.exit_code == 3
