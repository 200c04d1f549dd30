"""The training loop under stale schedules."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from runs import assert_same, losses, metrics, run, saved, settings

from pipetrain.config import CheckpointConfig, Config, EvalConfig, StaleConfig
from pipetrain.errors import ConfigError, NonFiniteError, StageFailed
from pipetrain.training import stale


def stale_settings(schedule: str = "ouroboros", **changes: Any) -> Config:
    options = {"drain_every": 6, **changes.pop("stale", {})}
    return settings(
        schedule=schedule,
        stale=StaleConfig(**options),
        **{"steps": 12, "eval": EvalConfig(every=6, batches=2), "checkpoint": CheckpointConfig(every=6), **changes},
    )


@pytest.mark.parametrize("weights", ["stash", "replay", "current"])
@pytest.mark.parametrize("schedule", ["ouroboros", "pipedream", "pipedream_2bw", "bounded"])
def test_resumed_at_a_drain_equals_never_stopped(tmp_path: Path, schedule: str, weights: str) -> None:
    recompute = "never" if weights == "current" else "always"
    options: dict[str, Any] = {"stale": {"weights": weights, "warmup_steps": 2}, "recompute": recompute}
    run(tmp_path, "whole", 2, stale_settings(schedule, **options))
    run(tmp_path, "halves", 2, stale_settings(schedule, steps=6, **options))
    run(tmp_path, "halves", 2, stale_settings(schedule, **options), resume=True)
    assert losses(tmp_path, "halves") == losses(tmp_path, "whole")
    assert_same(saved(tmp_path, "halves", 12), saved(tmp_path, "whole", 12))


@pytest.mark.parametrize("correctors", [["error_feedback"], ["error_feedback", "pipemare"]])
def test_what_correctors_remember_is_in_the_checkpoint(tmp_path: Path, correctors: list[str]) -> None:
    options: dict[str, Any] = {"stale": {"correctors": correctors, "tied": "locked"}, "tied": True}
    run(tmp_path, "whole", 2, stale_settings(**options))
    run(tmp_path, "halves", 2, stale_settings(steps=6, **options))
    run(tmp_path, "halves", 2, stale_settings(**options), resume=True)
    assert_same(saved(tmp_path, "halves", 12), saved(tmp_path, "whole", 12))


def test_warm_up_steps_are_those_of_a_synchronous_run(tmp_path: Path) -> None:
    """And all weights are clipped by what the devices have, so without clipping."""
    run(tmp_path, "stale", 2, stale_settings("bounded", grad_clip=None, stale={"warmup_steps": 12}))
    run(tmp_path, "synchronous", 2, stale_settings("1f1b", grad_clip=None))
    assert losses(tmp_path, "stale") == losses(tmp_path, "synchronous")
    assert_same(saved(tmp_path, "stale", 12), saved(tmp_path, "synchronous", 12))


def test_every_logged_step_has_its_loss_and_its_measurements(tmp_path: Path) -> None:
    run(tmp_path, "run", 3, stale_settings(log_every=1))
    rows = [row for row in metrics(tmp_path, "run") if "loss/train" in row]
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert len({row["loss/train"] for row in rows}) == 12
    for row in rows:
        seconds = sum(value for name, value in row.items() if name.startswith("time/"))
        assert seconds == pytest.approx(row["speed/step_s"], rel=1e-6)
        assert row["stage_1/staleness"] <= 2


def test_a_segment_never_passes_a_drain() -> None:
    cfg = stale_settings(stale={"warmup_steps": 3, "drain_every": 10})
    starts, step = [], 0
    while step < 30:
        starts.append(step)
        step += stale.steps_of_segment(cfg, step, 30)
    assert starts == [0, 1, 2, 3, 10, 20]


def test_tied_weights_on_devices_that_do_not_wait_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="one parameter on several devices"):
        run(tmp_path, "run", 2, stale_settings("pipedream", tied=True))


def test_nan_names_stage_and_step_and_keeps_the_checkpoint(tmp_path: Path) -> None:
    run(tmp_path, "run", 2, stale_settings(steps=6))
    cfg = stale_settings()
    cfg.optimizer = dataclasses.replace(cfg.optimizer, lr=1e30)
    with pytest.raises(NonFiniteError, match=r"stage \d, step \d+: .* the checkpoint of step 6 is kept"):
        run(tmp_path, "run", 2, cfg, resume=True)


def test_a_run_that_is_later_than_its_schedule_says_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stale, "staleness", lambda schedule: [[9] * schedule.num_steps] * schedule.num_stages)
    with pytest.raises(StageFailed, match="but the schedule says"):
        run(tmp_path, "run", 2, stale_settings())
