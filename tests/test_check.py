"""`action=check` with real processes: it says that the guarantees hold, and it notices when one does not."""

import signal
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from commands import QUICK, Command, wait_until
from launch_stub import Launch, launch  # noqa: F401
from runs import settings

from pipetrain import cli, rules
from pipetrain.config import CheckConfig, Config
from pipetrain.errors import ConfigError

CHECK = [*QUICK, "action=check", "devices=2", "optimizer.lr=0.01", "lr_rule.warmup_steps=0"]


def rows(output: str) -> dict[tuple[str, str], str]:
    """(what, compared with) -> the rest of its line."""
    table = [line for line in output.splitlines() if line.endswith((" ok", " FAILED", " -", " - "))]
    return {(line[:15].strip(), line[17:31].strip()): line[33:].strip() for line in table}


@pytest.mark.dist
@pytest.mark.parametrize(
    ("choice", "holding"),
    [
        (["model.tied=true", "recompute=never", "balance=[1,3]"], 14),
        (["precision=bf16", "micro_batches=3", "optimizer=sgd", "grad_clip=0.1"], 12),  # sgd has no state
        (["schedule=zb_v", "model.tied=true"], 14),
        (["schedule=looped_bfs", "recompute=selective", "recompute_layers=[blocks.*]"], 14),
    ],
    ids=["tied", "bf16", "halves", "reversed"],
)
def test_all_guarantees_hold(command: Command, choice: list[str], holding: int) -> None:
    done = command(*CHECK, *choice)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"all {holding} guarantees hold for this configuration" in done.stdout
    assert rows(done.stdout)["dropout masks", "plain, float64"].endswith("ok")


@pytest.mark.dist
def test_they_hold_for_amoebanet(command: Command) -> None:
    """BatchNorm, a skip to the last stage, and drop-path that counts the steps in a buffer."""
    images = ["model=amoebanet_tiny", "data=synthetic", "data.shape=[2,7,9]", "batch_size=8", "micro_batches=3"]
    drops = ["model.drop_path=0.5", "model.drop_path_steps=2"]
    done = command("action=check", "devices=2", *images, *drops, "model.filters=4")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "all 17 guarantees hold for this configuration" in done.stdout
    assert done.stderr == ""
    assert list(command.folder.iterdir()) == []


@pytest.mark.dist
@pytest.mark.parametrize(
    ("fault", "named", "broken"),
    [
        ("scaled", "blocks.1.norm2.bias, step 1", [("gradients", "one stage"), ("gradients", "plain, float64")]),
        ("masks_of_the_stage", "embedding.dropout, step 1", [("dropout masks", "plain, float64")]),
        ("restored_with_a_difference", "head.norm.weight, step 2", [("weights", "resumed at 1")]),
    ],
)
def test_what_is_broken_is_named(command: Command, fault: str, named: str, broken: list[tuple[str, str]]) -> None:
    done = command(*CHECK, "check.steps=2", fault=fault)
    assert done.returncode == 1, done.stdout + done.stderr
    last = done.stdout.splitlines()[-1]
    assert last.startswith("FAILED: ")
    for what, against in broken:
        assert f"{what} (against {against})" in last
        row = rows(done.stdout)[what, against]
        assert named in row
        assert row.endswith("FAILED")
    assert "guarantees hold" not in done.stdout


@pytest.mark.dist
def test_a_failing_run_ends_it_as_it_ends_a_training(command: Command) -> None:
    done = command(*CHECK, "check.steps=4", fault="raising")
    assert done.returncode == 1
    assert done.stderr.startswith("error: stage 1 (rank 1) failed at 1B2, step 4")
    assert "ValueError: boom" in done.stderr
    assert list(command.folder.iterdir()) == []


@pytest.mark.dist
def test_an_interrupt_leaves_nothing_behind(command: Command) -> None:
    process = command.start(*CHECK, "check.steps=1000", fault="slow")
    wait_until(lambda: any(command.folder.glob("runs/*/*/.check/yours/recorded/*")))
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130
    assert list(command.folder.iterdir()) == []


@pytest.mark.dist
def test_wrong_settings_are_refused(command: Command) -> None:
    done = command(*CHECK, "balance=[9,9]")
    assert done.returncode == 2
    assert done.stderr.startswith("error: balance=[9,9] sums to 18, but the model has 4 layers")
    assert done.stdout == ""
    assert list(command.folder.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"action": "chek"}, "action=chek: no such choice. Did you mean 'check'?"),
        ({"check": CheckConfig(steps=1)}, "check.steps=1 must be at least 2"),
        ({"action": "check", "resume": "runs/a/b"}, "action=check runs the first steps of the settings"),
    ],
)
def test_rules(change: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError) as raised:
        rules.check(settings(**change), 0)
    assert text in str(raised.value)


def test_a_check_is_no_run(launch: Launch, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    module = types.ModuleType("pipetrain.check.run")
    given: list[Config] = []

    def check(cfg: Config, folder: Path) -> int:
        given.append(cfg)
        (folder / ".check" / "yours").mkdir(parents=True)
        return 1

    module.check = check  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pipetrain.check.run", module)
    assert cli.main(["action=check", "steps=7"]) == 1
    assert given[0].steps == 7
    assert not launch.calls
    assert list(tmp_path.iterdir()) == []
