"""Replicas of the pipeline with the real command and real processes."""

import os
import signal
import subprocess
import sys

import pytest
from commands import FOREVER, QUICK, Command, alive, numbers, rows, wait_for_steps, wait_until, workers_of
from runs import assert_same
from test_launch import weights

from pipetrain.paths import RunPaths

pytestmark = pytest.mark.dist
TWICE = [*QUICK, "devices=4", "data_parallel=2", "model.tied=true", "steps=4"]


def test_replicas_train_as_one_pipeline_does_whatever_the_transport(command: Command) -> None:
    for name, options, fault in (
        ("one", ["devices=2", "data_parallel=1"], None),
        ("shared", [], None),
        ("gloo", [], "without_shared_memory"),
    ):
        done = command(*TWICE, "precision=fp64", "eval.every=2", *options, f"name={name}", fault=fault)
        assert done.returncode == 0, done.stderr
    one, shared, gloo = (command.run_folder(f"runs/{name}/*") for name in ("one", "shared", "gloo"))
    assert numbers(shared) == numbers(gloo)
    assert_same(weights(shared), weights(gloo))
    key = "loss/train"
    losses = [[row[key] for row in rows(run) if key in row] for run in (one, shared)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-12)


def test_replicas_under_torchrun(command: Command) -> None:
    assert command(*TWICE, "name=local").returncode == 0
    words = [word for word in TWICE if not word.startswith("devices=")]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=4", "-m", "pipetrain"]
    done = subprocess.run(
        [*torchrun, *words, "name=joined", f"data.cache_dir={command.cache}"],
        cwd=command.folder,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert numbers(command.run_folder("runs/joined/*")) == numbers(command.run_folder("runs/local/*"))


def test_a_killed_rank_of_the_second_replica_is_named_and_ends_all(command: Command) -> None:
    process = command.start(*FOREVER, "devices=4", "data_parallel=2")
    run = wait_for_steps(command)
    workers = workers_of(run)
    os.kill(int(RunPaths(run).pid(3).read_text()), signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert err.startswith("error: stage 1 (rank 3, replica 1) was killed by SIGKILL")
    wait_until(lambda: not any(map(alive, workers)))


def test_the_planner_chooses_the_replicas_and_the_numbers_stay(command: Command) -> None:
    open_words = [word for word in QUICK if not word.startswith("balance=")]
    options = [*open_words, "devices=2", "steps=3", "precision=fp64", f"plan.cache_dir={command.folder}/profiles"]
    done = command(*options, "data_parallel=auto", "schedule=auto", "name=planned")
    assert done.returncode == 0, done.stderr
    assert "data_parallel=" in done.stdout
    assert command(*QUICK, "devices=1", "steps=3", "precision=fp64", "name=one").returncode == 0
    found = [[row["loss/train"] for row in rows(command.run_folder(f"runs/{name}/*"))] for name in ("planned", "one")]
    assert found[0] == pytest.approx(found[1], rel=1e-12)
