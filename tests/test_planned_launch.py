"""What is left to the planner, with real processes that measure: local ones, and those of torchrun."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from commands import QUICK, Command, numbers

pytestmark = pytest.mark.dist
OPEN = [word for word in QUICK if not word.startswith("balance=")]  # which is left to the planner by default


def plan_of(run: Path) -> dict[str, object]:
    content: dict[str, object] = json.loads((run / "plan.json").read_text())
    return content


def test_a_run_measures_plans_and_trains_as_any_other(command: Command) -> None:
    words = [*OPEN, "steps=3", "devices=2", f"plan.cache_dir={command.folder}/profiles"]
    done = command(*words)
    assert done.returncode == 0, done.stderr
    assert "measuring the layers, once" in done.stdout
    assert "predicted: " in done.stdout
    planned = command.run_folder()
    plan = plan_of(planned)
    assert plan["prediction"] is not None
    assert (planned / "profile.json").exists()
    assert not list(Path("/tmp").glob(f"pipetrain-*/{planned.name}"))
    # Not from the cache: what was measured beside other tests may not be in it.
    again = command(*words, "action=plan", f"plan.profile={planned}/profile.json")
    assert again.returncode == 0, again.stderr
    assert "measuring" not in again.stdout
    assert plan_of(command.run_folder()) == plan
    done = command(*words, "balance=[1,3]")
    assert done.returncode == 0, done.stderr
    assert numbers(command.run_folder()) == numbers(planned)


def test_under_torchrun_all_ranks_measure_and_the_first_one_decides(command: Command) -> None:
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node=2",
        "-m",
        "pipetrain",
    ]
    folders = [f"plan.cache_dir={command.folder}/profiles", f"data.cache_dir={command.cache}"]
    words = [*torchrun, *OPEN, "steps=3", *folders]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}

    def run(*more: str) -> subprocess.CompletedProcess[str]:
        options: dict[str, Any] = {"cwd": command.folder, "env": environment, "capture_output": True, "text": True}
        return subprocess.run([*words, *more], timeout=120, check=False, **options)

    done = run()
    assert done.returncode == 0, done.stderr
    planned = command.run_folder()
    assert plan_of(planned)["prediction"] is not None
    done = run("plan.memory_gib=0.01")
    assert done.returncode != 0
    assert "no plan fits: the leanest one" in done.stderr
    done = command(*QUICK, "steps=3", "devices=2", "balance=[1,3]")
    assert numbers(command.run_folder()) == numbers(planned)


def test_a_layer_that_fails_while_it_is_measured_is_shown(command: Command) -> None:
    words = [*OPEN, "steps=3", "devices=2", f"plan.cache_dir={command.folder}/profiles"]
    done = command(*words, fault="while_measured")
    assert done.returncode == 1
    assert "RuntimeError: this layer does not like to be watched" in done.stderr
    assert "the layers could not be measured (see above); balance=even needs no measuring" in done.stderr


def test_all_is_chosen_and_only_what_fits(command: Command) -> None:
    """A size that one rank has no memory to measure is left out. The numbers are those of the same settings typed."""
    words = [*OPEN, "steps=3", "devices=2", "schedule=auto", "micro_batches=auto", "recompute=auto", "partitions=auto"]
    done = command(*words, f"plan.cache_dir={command.folder}/profiles", fault="short_of_memory")
    assert done.returncode == 0, done.stderr
    planned = command.run_folder()
    plan = json.loads((planned / "plan.json").read_text())
    weighed = plan["prediction"]["weighed"]
    assert {each["settings"]["micro_batches"] for each in weighed} == {4, 8}
    assert len({each["settings"]["schedule"] for each in weighed}) == 5
    chosen = weighed[0]["settings"]
    assert chosen.pop("data_parallel") == 1, "it was not left open"
    assert chosen == {key: chosen[key] for key in ("schedule", "partitions", "micro_batches", "recompute", "balance")}
    typed = [f"{key}={str(value).replace(' ', '')}" for key, value in chosen.items()]
    assert all(word in done.stdout.replace(" (type", "(type").replace("(type", " ").split() for word in typed)
    done = command(*OPEN, "steps=3", "devices=2", *typed)
    assert done.returncode == 0, done.stderr
    assert numbers(command.run_folder()) == numbers(planned)
    again = json.loads((command.run_folder() / "plan.json").read_text())
    assert again | {"prediction": None} == plan | {"prediction": None}
