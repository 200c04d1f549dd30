"""Stale schedules with the real command and real processes."""

import signal

import pytest
from commands import QUICK, Command, numbers, status, wait_for_steps
from runs import assert_same
from test_launch import weights

pytestmark = pytest.mark.dist

QUIET = [word for word in QUICK if not word.startswith(("eval.", "checkpoint."))]
STALE = [*QUIET, "stale.drain_every=5", "eval.every=5", "eval.batches=2", "checkpoint.every=5", "model.tied=true"]


def test_the_transport_makes_no_difference(command: Command) -> None:
    """In a ring: rank 0 has the first and the last stage, and their matrix."""
    done = command(*STALE, "schedule=ouroboros", "devices=2", "steps=10", "name=shared")
    assert done.returncode == 0, done.stderr
    done = command(*STALE, "schedule=ouroboros", "devices=2", "steps=10", "name=gloo", fault="without_shared_memory")
    assert done.returncode == 0, done.stderr
    one, other = (command.run_folder(f"runs/{name}/*") for name in ("shared", "gloo"))
    assert numbers(one) == numbers(other)
    assert_same(weights(one), weights(other))


def test_a_signal_saves_at_the_next_drain_and_the_run_goes_on_as_if_never_stopped(command: Command) -> None:
    options = [*STALE, "schedule=ouroboros", "devices=2"]
    process = command.start(*options, "steps=100000", "name=stopped")
    run = wait_for_steps(command, 8)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 75, err
    step = int(status(run)["step"])
    assert step % 5 == 0
    assert command(f"resume={run}", f"steps={step + 10}").returncode == 0
    assert command(*options, f"steps={step + 10}", "name=whole").returncode == 0
    assert_same(weights(run), weights(command.run_folder("runs/whole/*")))
