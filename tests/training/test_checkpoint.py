"""Checkpoints are whole or absent, and anything else is found out."""

import json
import os
import random
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from runs import assert_same, run, saved, settings

from pipetrain.config import CheckpointConfig, EvalConfig
from pipetrain.engine.local import LocalTransport, run_ranks
from pipetrain.errors import CheckpointError
from pipetrain.training import checkpoint


def save(folder: Path, step: int, *, ranks: int = 2, loss_val: float | None = None, keep: int = 2) -> None:
    def rank_main(transport: LocalTransport) -> None:
        tensors = {f"model/layer{transport.rank}.weight": torch.full((300,), float(step))}
        checkpoint.save(
            folder, tensors, transport, step=step, config={"seed": 0}, data="abc", loss_val=loss_val, keep=keep
        )

    run_ranks(ranks, rank_main)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@contextmanager
def files_no_larger_than(num_bytes: int) -> Iterator[None]:
    """What a full disk looks like to a program: a write in the middle of a file fails."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_what_is_written_is_what_is_read(tmp_path: Path) -> None:
    save(tmp_path, 7, loss_val=1.5)
    path, skipped = checkpoint.find_usable(tmp_path)
    assert (path.name, skipped) == ("step_00000007", [])
    assert names(path) == ["manifest.json", "stage_0.safetensors", "stage_1.safetensors"]
    reader = checkpoint.Reader(path)
    assert reader.manifest.loss_val == 1.5
    assert torch.equal(reader.get("model/layer1.weight"), torch.full((300,), 7.0))
    with pytest.raises(CheckpointError, match=r"the checkpoint has no model/layer9\.weight: it is of another model"):
        reader.get("model/layer9.weight")


def test_the_newest_and_the_best_stay(tmp_path: Path) -> None:
    for step, loss in [(1, 3.0), (2, 1.0), (3, float("nan")), (4, 2.0), (5, None)]:
        save(tmp_path, step, loss_val=loss)
    assert names(tmp_path) == ["step_00000002", "step_00000004", "step_00000005"]


def test_a_damaged_later_checkpoint_never_costs_the_good_one(tmp_path: Path) -> None:
    save(tmp_path, 50, keep=1)
    save(tmp_path, 100, keep=9)
    (tmp_path / "step_00000100" / "stage_0.safetensors").unlink()
    assert checkpoint.find_usable(tmp_path)[0].name == "step_00000050"
    save(tmp_path, 60, keep=1)
    assert names(tmp_path) == ["step_00000060"]
    checkpoint.verify(tmp_path / "step_00000060")


def test_every_flipped_bit_is_found(tmp_path: Path) -> None:
    save(tmp_path, 1)
    path = tmp_path / "step_00000001"
    pick = random.Random(0)
    for _ in range(60):
        file = path / f"stage_{pick.randrange(2)}.safetensors"
        good = file.read_bytes()
        at = pick.randrange(len(good))
        file.write_bytes(good[:at] + bytes([good[at] ^ (1 << pick.randrange(8))]) + good[at + 1 :])
        with pytest.raises(CheckpointError, match="was changed"):
            checkpoint.verify(path)
        file.write_bytes(good)
    checkpoint.verify(path)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda p: (p / "stage_1.safetensors").unlink(), "stage_1.safetensors is missing"),
        (lambda p: (p / "stage_0.safetensors").write_bytes(b"short"), "stage_0.safetensors has 5 bytes instead of"),
        (lambda p: (p / "manifest.json").unlink(), "manifest.json is missing"),
        (lambda p: (p / "manifest.json").write_text('{"step": 2, "conf'), "manifest.json cannot be read"),
        (lambda p: (p / "manifest.json").write_text('{"other": 1}'), "manifest.json cannot be read"),
        (
            lambda p: (p / "manifest.json").write_text(
                (p / "manifest.json").read_text().replace('"format": 1', '"format": 99')
            ),
            "format 99, but this version reads format 1",
        ),
        (
            lambda p: (p / "manifest.json").write_text(
                (p / "manifest.json").read_text().replace("stage_0.safetensors", "../stage_0.safetensors", 1)
            ),
            "../stage_0.safetensors is missing",
        ),
    ],
)
def test_a_damaged_checkpoint_is_skipped_with_the_reason(tmp_path: Path, damage, reason: str) -> None:  # type: ignore[no-untyped-def]
    save(tmp_path, 1)
    save(tmp_path, 2)
    damage(tmp_path / "step_00000002")
    path, skipped = checkpoint.find_usable(tmp_path)
    assert path.name == "step_00000001"
    assert len(skipped) == 1
    assert reason in skipped[0]


def test_no_usable_checkpoint_says_why(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no usable checkpoint in .*: it holds none"):
        checkpoint.find_usable(tmp_path)
    save(tmp_path, 1)
    (tmp_path / "step_00000001" / "stage_0.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"step_00000001: stage_0\.safetensors is missing"):
        checkpoint.find_usable(tmp_path)


def test_a_full_disk_leaves_the_previous_checkpoint_intact(tmp_path: Path) -> None:
    save(tmp_path, 1)
    before = names(tmp_path)
    with files_no_larger_than(1000), pytest.raises(CheckpointError) as caught:
        save(tmp_path, 2)
    assert "cannot write a checkpoint to" in str(caught.value)
    assert "MiB free there); the checkpoint of step 1 is intact. Make room and go on with resume=" in str(caught.value)
    assert names(tmp_path) == before
    assert checkpoint.verify(tmp_path / "step_00000001").step == 1


def test_a_full_disk_on_one_rank_stops_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = checkpoint._write_stage

    def full(folder: Path, rank: int, tensors) -> None:  # type: ignore[no-untyped-def]
        if rank == 1:
            raise OSError(28, "No space left on device")
        write(folder, rank, tensors)

    monkeypatch.setattr(checkpoint, "_write_stage", full)
    with pytest.raises(CheckpointError, match="No space left on device"):  # on whichever rank
        save(tmp_path, 1)
    assert names(tmp_path) == []


@pytest.mark.parametrize("killed_at", ["_make_empty", "_write_stage", "_write_synced", "_remove_old"])
def test_a_run_killed_while_saving_goes_on_from_a_whole_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed_at: str
) -> None:
    """A death at any point of the save, played by an exception that nothing catches."""

    class Killed(BaseException):
        pass

    cfg = settings(checkpoint=CheckpointConfig(every=2), eval=EvalConfig())
    run(tmp_path, "whole", 1, cfg)
    run(tmp_path, "run", 2, settings(checkpoint=CheckpointConfig(every=2), eval=EvalConfig(), steps=2))

    def die(*args: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, killed_at, die)
        with pytest.raises(Killed):
            run(
                tmp_path,
                "run",
                2,
                settings(checkpoint=CheckpointConfig(every=2), eval=EvalConfig(), steps=4),
                resume=True,
            )
    step = 4 if killed_at == "_remove_old" else 2
    assert checkpoint.read_manifest(checkpoint.find_usable(tmp_path / "run" / "checkpoints")[0]).step == step
    run(tmp_path, "run", 2, cfg, resume=True)
    assert_same(saved(tmp_path, "run", 6), saved(tmp_path, "whole", 6))
    assert not list((tmp_path / "run" / "checkpoints").glob(".writing*"))


def test_files_are_keyed_by_names_of_the_unsplit_model(tmp_path: Path) -> None:
    run(tmp_path, "run", 4, settings(tied=True))
    manifest = json.loads((tmp_path / "run" / "checkpoints" / "step_00000006" / "manifest.json").read_text())
    weights = [t for entry in manifest["files"].values() for t in entry["tensors"] if t.startswith("model/")]
    assert "model/embedding.token.weight" in weights
    assert "model/blocks.1.attention.qkv.weight" in weights
    assert "model/head.output.weight" not in weights, "a tied parameter is stored once"
    assert manifest["config"]["seed"] == 0
    assert os.listdir(tmp_path / "run" / "checkpoints") != []
