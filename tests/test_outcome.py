"""Who is to blame, decided from exit codes and what the ranks left behind."""

import json
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from runs import settings

from pipetrain import launch
from pipetrain.paths import RunPaths
from pipetrain.processes import Ended, run_workers
from pipetrain.training import status
from pipetrain.training.job import Job
from pipetrain.worker import Failure


@pytest.fixture
def run(tmp_path: Path) -> RunPaths:
    paths = RunPaths(tmp_path)
    paths.scratch.mkdir()
    return paths


def _outcome(run: RunPaths, ended: Ended, **changes: Any) -> int:
    return launch._outcome(Job(settings(**changes), run, None, ("cpu",) * len(ended.codes), None), ended)


def leave(run: RunPaths, rank: int, error: str, *, secondary: bool, code: int = 1) -> None:
    failure = Failure(rank, error, "Traceback\n", code, secondary, time.time_ns())
    run.failure(rank).write_text(json.dumps(vars(failure)))


def said(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().err.splitlines()[0]


def test_a_crash_after_an_earlier_success_is_a_failure(run: RunPaths, capsys: pytest.CaptureFixture[str]) -> None:
    status.write(run, "finished", step=5, exit_code=0, error=None, metrics={})
    assert _outcome(run, Ended([-9])) == 1
    assert said(capsys).startswith("error: stage 0 (rank 0) was killed by SIGKILL")
    assert status.read(run)["state"] == "failed"
    assert status.read(run)["step"] == 5


def test_a_rank_of_several_replicas_is_named_with_its_own(run: RunPaths, capsys: pytest.CaptureFixture[str]) -> None:
    assert _outcome(run, Ended([None, None, None, -9]), data_parallel=2) == 1
    assert said(capsys).startswith("error: stage 1 (rank 3, replica 1) was killed by SIGKILL")


@pytest.mark.parametrize("code", [0, 75, 130])
def test_ranks_that_agree_on_a_good_end_are_believed(run: RunPaths, code: int) -> None:
    assert _outcome(run, Ended([code] * 3)) == code


def test_the_cause_is_named_and_not_its_victims(run: RunPaths, capsys: pytest.CaptureFixture[str]) -> None:
    leave(run, 0, "stage 0 lost its neighbour", secondary=True)
    leave(run, 2, "stage 2 (rank 2) failed at 2B1, step 3", secondary=False)
    assert _outcome(run, Ended([1, None, 1])) == 1
    assert said(capsys) == "error: stage 2 (rank 2) failed at 2B1, step 3"


def test_a_rank_that_was_killed_is_named_and_not_those_that_had_to_be_ended(
    run: RunPaths, capsys: pytest.CaptureFixture[str]
) -> None:
    leave(run, 0, "stage 0 lost its neighbour", secondary=True)
    assert _outcome(run, Ended([1, None, -9])) == 1
    assert said(capsys).startswith(
        "error: stage 2 (rank 2) was killed by SIGKILL. If the system did it, it ran out of mem"
    )


def test_with_victims_only_the_first_of_them_speaks(run: RunPaths, capsys: pytest.CaptureFixture[str]) -> None:
    leave(run, 1, "stage 1 lost its neighbour", secondary=True)
    assert _outcome(run, Ended([None, 1])) == 1
    assert said(capsys) == "error: stage 1 lost its neighbour"


def test_a_signal_before_anything_was_saved(run: RunPaths, capsys: pytest.CaptureFixture[str]) -> None:
    assert _outcome(run, Ended([None, None], signal.SIGTERM)) == 143
    assert _outcome(run, Ended([None, None], signal.SIGINT)) == 130
    assert said(capsys) == "error: stopped by SIGTERM before a step could be finished and saved"


def end_with_own_rank(argument: str, rank: int) -> None:
    if argument == "hang" and rank == 0:
        time.sleep(60)
    sys.exit(rank)


@pytest.mark.dist
def test_codes_are_those_of_each_rank_and_a_hanging_one_is_ended() -> None:
    assert run_workers(end_with_own_rank, "", 3, gpus=False).codes == [0, 1, 2]
    started = time.monotonic()
    assert run_workers(end_with_own_rank, "hang", 3, gpus=False).codes == [None, 1, 2]
    assert time.monotonic() - started < 30
