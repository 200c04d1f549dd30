"""What is left open is chosen: from a profile that is there, or from one that is measured."""

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import CPU, metrics, saved, settings, tokens_of

from pipetrain.config import Config, PlanConfig, TransformerConfig
from pipetrain.costs import LayerCost, Link, ModelCost, ValueCost
from pipetrain.engine.local import run_ranks
from pipetrain.errors import ConfigError, Exit
from pipetrain.paths import RunPaths
from pipetrain.planning.measuring import _Watch
from pipetrain.planning.profiles import MeasuringFailed
from pipetrain.planning.settle import settle
from pipetrain.profile.store import Profile
from pipetrain.training.job import Job
from pipetrain.training.loop import Signals, train

SECONDS = (0.1, 1.0, 1.0, 3.0)  # of the four layers of the model: a large head


def profile(rows: int) -> Profile:
    layers = [LayerCost(str(i), f, 2 * f, f, f, 0.0, 10, 40, 80, 100, 0, 100, 100) for i, f in enumerate(SECONDS)]
    values = [ValueCost(i, 10, (i + 1,) if i < 3 else (), (), has_gradient=True) for i in range(4)]
    cost = ModelCost(rows, tuple(layers), tuple(values))
    return Profile(
        {}, {"a cpu": 1e9}, {"a cpu": 1.0}, Link(1e-5, 1e9), Link(1e-4, 1e9), 0.0, 1.0, False, 1000, {rows: cost}
    )


class Measuring:
    """Stands for the processes that measure."""

    def __init__(self, code: int = Exit.DONE, error: type[Exception] | None = None) -> None:
        self.code, self.error, self.calls, self.rows = code, error, 0, 1

    def __call__(self, job: Job, worker: Callable[[str, int], None], argument: str, limit_s: float) -> int:
        self.calls += 1
        job.run.scratch.mkdir()
        job.run.measuring.write_text("blocks.1")
        if self.error is not None:
            raise self.error
        job.run.profile.write_text(profile(self.rows).to_json())
        return self.code


def job_of(tmp_path: Path, ranks: int = 2, **changes: object) -> Job:
    plan = PlanConfig(**({"cache_dir": str(tmp_path / "profiles")} | changes.pop("plan", {})))  # type: ignore
    cfg: Config = settings(plan=plan, **({"balance": "auto"} | changes))
    return Job(cfg, RunPaths(tmp_path / "run"), tokens_of(tmp_path), ("cpu",) * ranks, None)


def test_the_large_head_is_left_alone(tmp_path: Path) -> None:
    said: list[str] = []
    job = settle(job_of(tmp_path), Measuring(), said.append)
    assert job.cfg.balance == [3, 1]
    assert said == [
        "measuring the layers, once for these sizes on this machine (balance=even does without)",
        "balance=[3,1] (type that for the same plan again); "
        "balance=even, which is [2,2], would take 1.24 times as long",
    ]
    assert job.prediction is not None
    assert [stage.forward_s for stage in job.prediction.stages] == [pytest.approx(2.1), 3.0]
    assert Job.from_json(job.to_json()) == job


def test_layers_are_measured_once(tmp_path: Path) -> None:
    measuring = Measuring()
    for _ in range(2):
        settle(job_of(tmp_path), measuring, lambda text: None)
    assert measuring.calls == 1
    settle(job_of(tmp_path, precision="fp64"), measuring, lambda text: None)
    assert measuring.calls == 2


def test_sizes_that_were_measured_stay(tmp_path: Path) -> None:
    measuring = Measuring()
    for rows in (1, 2, 1, 2):
        measuring.rows = rows
        settle(job_of(tmp_path, micro_batches=4 // rows), measuring, lambda text: None)
    assert measuring.calls == 2


@pytest.fixture(autouse=True)
def _as_many_cores_as_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipetrain.worker.num_cores", lambda: 8)


@pytest.mark.parametrize(("balance", "ranks"), [("even", 2), ([1, 3], 2), ("auto", 1)])
def test_nothing_is_measured_where_nothing_is_open(tmp_path: Path, balance: object, ranks: int) -> None:
    job, measuring = job_of(tmp_path, ranks, balance=balance), Measuring()
    assert settle(job, measuring, print) is job
    assert not measuring.calls


def test_what_fits_nowhere_says_what_would(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"no plan fits: the leanest one, .* needs 1.63 KiB on device 1, which has 0.1"
    ):
        settle(job_of(tmp_path, plan={"memory_gib": 1e-7}), Measuring(), lambda text: None)
    assert not (tmp_path / "run").exists()


def test_measuring_takes_no_longer_than_it_may(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"not done after plan.timeout_s=7 seconds, at layer blocks.1; give it more"):
        settle(job_of(tmp_path, plan={"timeout_s": 7.0}), Measuring(error=TimeoutError), lambda text: None)


def test_a_failure_keeps_its_exit_code(tmp_path: Path) -> None:
    with pytest.raises(MeasuringFailed, match="balance=even needs no measuring") as caught:
        settle(job_of(tmp_path), Measuring(Exit.INTERRUPTED), lambda text: None)
    assert caught.value.exit_code == Exit.INTERRUPTED
    assert not (tmp_path / "profiles").exists()


def test_the_numbers_are_those_of_any_other_cut(tmp_path: Path) -> None:
    job = settle(job_of(tmp_path), Measuring(), lambda text: None)
    other = dataclasses.replace(job, run=RunPaths(tmp_path / "other"), cfg=dataclasses.replace(job.cfg, balance=[1, 3]))
    other.run.root.mkdir()
    for each in (job, other):
        assert set(run_ranks(2, lambda transport: train(each, transport, CPU, Signals()))) == {Exit.DONE}  # noqa: B023
    assert metrics(tmp_path, "run")[-1]["loss/val"] == metrics(tmp_path, "other")[-1]["loss/val"]
    ours, theirs = saved(tmp_path, "run", 6), saved(tmp_path, "other", 6)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_given_profile_is_taken_instead_of_measuring(tmp_path: Path) -> None:
    measuring = Measuring()
    first = settle(job_of(tmp_path), measuring, lambda text: None)
    kept = tmp_path / "kept.json"
    kept.write_text(first.run.profile.read_text())
    plan = {"profile": str(kept), "cache_dir": str(tmp_path / "empty")}
    assert settle(job_of(tmp_path, plan=plan), measuring, lambda text: None).prediction == first.prediction
    assert measuring.calls == 1


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        (
            {"model": TransformerConfig(layers=2, d_model=32, d_ff=32, heads=2)},
            "is of another model; leave it out to measure",
        ),
        ({"precision": "fp64"}, "is of another precision or optimizer: its training are fp32 "),
        ({"threads": 2}, "is of other threads: its threads are 1, here they are 2; leave it out to measure"),
        ({"micro_batches": 1}, "has micro-batches of 1 samples, but here they may have 4; use other micro_batches"),
    ],
)
def test_a_profile_of_something_else_is_refused(tmp_path: Path, changes: dict[str, Any], text: str) -> None:
    settle(job_of(tmp_path), Measuring(), lambda text: None)
    plan = {"profile": str(tmp_path / "run" / "profile.json")}
    with pytest.raises(ConfigError) as caught:
        settle(job_of(tmp_path, plan=plan, **changes), Measuring(), lambda text: None)
    assert text in str(caught.value)


def test_a_profile_of_another_device_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settle(job_of(tmp_path), Measuring(), lambda text: None)
    monkeypatch.setattr("pipetrain.planning.profiles.cpu_name", lambda: "a VAX")
    with pytest.raises(ConfigError, match=r"is of another device: its devices are .*, here they are a VAX"):
        settle(job_of(tmp_path, plan={"profile": str(tmp_path / "run" / "profile.json")}), Measuring(), print)


@pytest.mark.parametrize("content", [None, "", "[1]", "{}"])
def test_what_is_no_profile_is_refused(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "some.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(
        ConfigError, match=r"some.json cannot be read as a profile \(.*\); give the profile.json of a run"
    ):
        settle(job_of(tmp_path, plan={"profile": str(path)}), Measuring(), lambda text: None)


def test_a_plan_predicts_also_where_nothing_is_open(tmp_path: Path) -> None:
    job = settle(job_of(tmp_path, balance=[2, 2], action="plan"), Measuring(), lambda text: None)
    assert job.cfg.balance == [2, 2]
    assert job.prediction is not None
    assert job.prediction.chosen == []
    assert job.prediction.samples_per_s == pytest.approx(4 / job.prediction.step_s)
    assert job.prediction.tokens_per_s == pytest.approx(32 / job.prediction.step_s)
    assert job.prediction.warnings == [
        "stage 1 works 3.64 times as long as the others on average; its longest layer is head",
        "balance=auto, which is [3,1], would take 0.81 of the time",
    ]


def test_more_processes_than_cores_are_as_much_slower(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipetrain.worker.num_cores", lambda: 2)
    step_s = {}
    for ranks in (2, 4):
        for threads in (1, 2):
            folder = tmp_path / f"{ranks}_{threads}"
            folder.mkdir()
            job = settle(job_of(folder, ranks, threads=threads), Measuring(), lambda text: None)
            assert job.prediction is not None
            step_s[ranks, threads] = job.prediction.step_s
            said = [text for text in job.prediction.warnings if "CPU processes share 2 cores" in text]
            assert len(said) == (ranks * threads > 2)
    assert step_s[2, 2] == pytest.approx(2 * step_s[2, 1], rel=1e-3)
    assert step_s[4, 2] == pytest.approx(2 * step_s[4, 1], rel=1e-3)
    elsewhere = job_of(tmp_path, 4, plan={"devices": [4]})
    prediction = settle(elsewhere, Measuring(), lambda text: None).prediction
    assert prediction is not None
    assert step_s[4, 1] == pytest.approx(2 * prediction.step_s, rel=1e-3)


def test_sizes_that_no_device_has_memory_for_are_no_choice(tmp_path: Path) -> None:
    class Measured(Measuring):
        def __call__(self, job: Job, worker: Any, argument: str, limit_s: float) -> int:
            super().__call__(job, worker, argument, limit_s)
            costs = {rows: profile(rows).costs[rows] if rows == 1 else None for rows in (1, 2, 4)}
            job.run.profile.write_text(dataclasses.replace(profile(1), costs=costs).to_json())
            return Exit.DONE

    job = settle(job_of(tmp_path, micro_batches="auto"), Measured(), lambda text: None)
    assert job.cfg.micro_batches == 4
    with pytest.raises(ConfigError, match="micro_batches=2 makes micro-batches of which the devices have no memory"):
        settle(job_of(tmp_path, micro_batches=2), Measured(), lambda text: None)


def test_what_is_typed_as_it_was_chosen_is_no_reason_to_warn(tmp_path: Path) -> None:
    job = settle(job_of(tmp_path, balance=[3, 1], action="plan"), Measuring(), lambda text: None)
    assert job.prediction is not None
    assert not any("balance=auto" in text for text in job.prediction.warnings)


def test_one_process_and_two_measure_each_for_themselves(tmp_path: Path) -> None:
    measuring = Measuring()
    for ranks in (1, 2, 1, 2, 4):
        settle(job_of(tmp_path, ranks, action="plan"), measuring, lambda text: None)
    assert measuring.calls == 2


def test_what_was_measured_while_others_took_the_cores_is_not_kept(tmp_path: Path) -> None:
    class Disturbed(Measuring):
        def __call__(self, job: Job, worker: Any, argument: str, limit_s: float) -> int:
            code = super().__call__(job, worker, argument, limit_s)
            job.run.profile.write_text(dataclasses.replace(profile(1), disturbed=True).to_json())
            return code

    measuring = Disturbed()
    for _ in range(2):
        prediction = settle(job_of(tmp_path), measuring, lambda text: None).prediction
        assert prediction is not None
        assert prediction.warnings[-1].startswith(
            "other processes took part of the cores while the layers were measured"
        )
    assert measuring.calls == 2
    settle(job_of(tmp_path), Measuring(), lambda text: None)
    settle(job_of(tmp_path), measuring, lambda text: None)
    assert measuring.calls == 2


def test_time_without_a_core_is_noticed() -> None:
    alone, disturbed = _Watch(), _Watch()
    with alone.running():
        sum(range(2_000_000))
    with disturbed.running():
        sum(range(2_000_000))
        time.sleep(1.0)
    assert disturbed.waited_more_than(1.2)
    assert not alone.waited_more_than(1000.0)
