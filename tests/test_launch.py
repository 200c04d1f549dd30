"""The real command with real processes: what is right, what goes wrong, and what is left behind."""

import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from commands import (
    FOREVER,
    IMAGES,
    QUICK,
    Command,
    alive,
    children_of,
    numbers,
    rows,
    status,
    wait_for_steps,
    wait_until,
    workers_of,
)
from runs import assert_same
from safetensors.torch import load_file
from torch import Tensor

pytestmark = pytest.mark.dist


def weights(run: Path) -> dict[str, Tensor]:
    newest = max((run / "checkpoints").glob("step_*"))
    tensors: dict[str, Tensor] = {}
    for file in newest.glob("*.safetensors"):
        tensors |= load_file(file)
    return tensors


def test_numbers_are_the_same_bits_on_1_2_and_4_processes(command: Command) -> None:
    """Guarantee 1 with the real command, through shared memory and, the last run, over gloo, with dropout on."""
    done = command("-m", *QUICK, "steps=4", "eval.every=2", "eval.batches=3", "devices=1,2,4")
    assert done.returncode == 0, done.stderr
    over_gloo = [*QUICK, "steps=4", "eval.every=2", "eval.batches=3", "devices=[cpu,cpu]", "balance=[1,3]"]
    done = command(*over_gloo, fault="without_shared_memory")
    assert done.returncode == 0, done.stderr
    jobs = sorted(command.folder.glob("sweeps/*/*_*"))
    assert len(jobs) == 3
    for run in (*jobs[1:], command.run_folder()):
        assert numbers(run) == numbers(jobs[0])
        assert_same(weights(run), weights(jobs[0]))


@pytest.mark.parametrize("choice", [["model.tied=true"], ["precision=bf16"], ["recompute=never", "micro_batches=3"]])
def test_numbers_are_the_same_bits_with_other_settings(command: Command, choice: list[str]) -> None:
    done = command("-m", *QUICK, *choice, "steps=3", "devices=1,2,4")
    assert done.returncode == 0, done.stderr
    one, *others = sorted(command.folder.glob("sweeps/*/*_*"))
    for run in others:
        assert numbers(run) == numbers(one)
        assert_same(weights(run), weights(one))


def test_a_checkpoint_of_4_stages_resumed_on_2_equals_never_stopped(command: Command) -> None:
    assert command(*QUICK, "steps=6", "devices=1", "name=whole").returncode == 0
    assert command(*QUICK, "steps=3", "devices=4", "name=halves").returncode == 0
    run = command.run_folder("runs/halves/*")
    done = command(f"resume={run.relative_to(command.folder)}", "steps=6", "devices=2")
    assert done.returncode == 0, done.stderr
    assert "going on from step 3, with devices=2 (was 4), steps=6 (was 3)" in done.stdout
    whole = command.run_folder("runs/whole/*")
    assert_same(weights(run), weights(whole))
    assert numbers(run) == numbers(whole)
    again = command(f"resume={run}")
    assert again.returncode == 2
    assert "the run has reached step 6 and steps=6 ends there or before; to go on: steps=12" in again.stderr
    assert status(run)["state"] == "finished", "nothing was touched"


def program(name: str) -> str:
    """By name where the environment is active, else by path."""
    return name if shutil.which(name) else str(Path(sys.executable).parent / name)


def test_what_a_run_prints_and_leaves(command: Command) -> None:
    done = command(*QUICK, "steps=3", "eval.every=3", "eval.batches=2", "devices=2")
    run = command.run_folder()
    shown = run.relative_to(command.folder)
    lines = done.stdout.splitlines()
    assert lines[0] == f"run folder: {shown}"
    assert lines[1] == "2 CPU processes, one for each stage"
    assert re.match(r"0 +cpu +2 +embedding \.\. blocks\.0 +[\d,]+$", lines[3])
    assert any(
        re.match(r"step 1/3  loss/train [\d.]+  lr \S+  grad/norm \S+  speed/tokens_per_s \S+  ETA 0:", x)
        for x in lines
    )
    assert any("loss/val" in line for line in lines)
    assert lines[-4:] == [
        "finished at step 3",
        f"run folder:  {shown}",
        f"resume:      {program('pipetrain')} resume={shown} steps=6",
        f"TensorBoard: {program('tensorboard')} --logdir {shown}",
    ]
    names = {path.name.split(".")[0] if path.name.startswith("events") else path.name for path in run.iterdir()}
    assert names == {
        ".hydra", ".lock", "checkpoints", "data.json", "env.json", "events", "metrics.jsonl", "pipetrain.log",
        "plan.json", "status.json",
    }  # fmt: skip
    assert status(run)["state"] == "finished"
    assert status(run)["metrics"]["loss/train"] == [row for row in rows(run) if "loss/train" in row][-1]["loss/train"]
    assert done.stderr == ""


def test_an_exception_is_named_and_its_traceback_is_the_last_thing_printed(command: Command) -> None:
    started = time.monotonic()
    done = command(*QUICK, "steps=50", "checkpoint.every=2", "devices=4", fault="raising")
    assert done.returncode == 1
    assert time.monotonic() - started < 60
    lines = done.stderr.splitlines()
    assert lines[0] == "error: stage 1 (rank 1) failed at 1B2, step 4"
    assert lines[1] == "Traceback (most recent call last):"
    assert lines[-1] == "ValueError: boom"
    run = command.run_folder()
    assert status(run)["state"] == "failed"
    assert status(run)["exit_code"] == 1
    assert status(run)["error"] == "stage 1 (rank 1) failed at 1B2, step 4"
    assert "ValueError: boom" in (run / "pipetrain.log").read_text()
    assert not (run / ".processes").exists()
    assert command(f"resume={run}", "steps=4", "devices=2").returncode == 0


@pytest.mark.parametrize(
    ("fault", "text"),
    [
        ("killed", "error: stage 1 (rank 1) was killed by SIGKILL"),
        ("crashing", "error: stage 1 (rank 1) was killed by SIGSEGV"),
        ("leaving", "error: stage 1 (rank 1) failed"),
    ],
)
def test_a_silent_death_is_named(command: Command, fault: str, text: str) -> None:
    done = command(*QUICK, "steps=50", "devices=3", fault=fault)
    assert done.returncode == 1
    assert [line for line in done.stderr.splitlines() if line.startswith("error:")] == [
        line for line in done.stderr.splitlines() if line.startswith(text)
    ], done.stderr
    assert text in done.stderr


@pytest.mark.parametrize(
    ("number", "code", "state"),
    [(signal.SIGTERM, 75, "preempted"), (signal.SIGUSR1, 75, "preempted"), (signal.SIGINT, 130, "interrupted")],
)
def test_a_signal_saves_and_the_run_goes_on_from_there(
    command: Command, number: signal.Signals, code: int, state: str
) -> None:
    process = command.start(*FOREVER, "devices=2", start_new_session=True)
    run = wait_for_steps(command)
    pids = workers_of(run)
    os.killpg(process.pid, number) if number is signal.SIGINT else process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    assert status(run)["state"] == state
    step = status(run)["step"]
    assert f"{state}, saved at step {step}" in out
    assert [path.name for path in (run / "checkpoints").iterdir()] == [f"step_{step:08d}"]
    assert err == ""
    wait_until(lambda: not any(map(alive, pids)), timeout_s=5)


@pytest.mark.parametrize("what", [FOREVER, [*IMAGES, "steps=100000"]], ids=["text", "images"])
def test_a_signal_to_the_whole_group_saves_too(command: Command, what: list[str]) -> None:
    """What `timeout`, schedulers and containers do. Processes that read images must not be hit."""
    process = command.start(*what, "devices=2", start_new_session=True)
    run = wait_for_steps(command)
    os.killpg(process.pid, signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 75, err
    assert "preempted, saved at step" in out
    assert status(run)["exit_code"] == 75


@pytest.mark.parametrize("delay_s", [0.0, 0.5, 1.0, 1.5])
def test_ctrl_c_while_starting_is_quiet(command: Command, delay_s: float) -> None:
    """Whatever is being imported or started at that moment; at the latest of them training may have begun."""
    process = command.start(*FOREVER, "devices=2", start_new_session=True)
    wait_until(lambda: any(command.folder.glob("runs/*/*")))
    time.sleep(delay_s)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in err, err
    assert len(err.splitlines()) <= 1


def test_a_second_ctrl_c_stops_at_once(command: Command) -> None:
    process = command.start(*FOREVER, "steps=1000", "devices=2", fault="hanging", start_new_session=True)
    run = wait_for_steps(command, steps=1)
    pids = workers_of(run)
    time.sleep(1)
    os.killpg(process.pid, signal.SIGINT)
    time.sleep(1)
    assert process.poll() is None, "the hanging stage keeps the first Ctrl-C from finishing the step"
    started = time.monotonic()
    os.killpg(process.pid, signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode == 130
    assert time.monotonic() - started < 10
    wait_until(lambda: not any(map(alive, pids)), timeout_s=5)


def test_no_orphans_after_sigkill_of_the_parent(command: Command) -> None:
    process = command.start(*FOREVER, "devices=3", start_new_session=True)
    run = wait_for_steps(command)
    pids = workers_of(run)
    assert len(pids) == 3
    assert all(map(alive, pids))
    process.kill()
    process.communicate(timeout=5)  # returns when nobody holds the pipes any more
    wait_until(lambda: not any(map(alive, pids)), timeout_s=5)


def test_processes_that_read_images_go_with_the_run(command: Command) -> None:
    process = command.start(*IMAGES, "steps=100000", "devices=2", "data.workers=2", start_new_session=True)
    run = wait_for_steps(command)
    first, last = workers_of(run)
    readers = children_of([first])
    assert len(readers) == 2
    assert not children_of([last]), "the last stage reads class numbers only"
    process.kill()
    process.communicate(timeout=5)
    wait_until(lambda: not any(map(alive, [first, last, *readers])), timeout_s=5)


def test_images_give_the_same_bits_on_2_processes_and_after_a_resume_as_on_1(command: Command) -> None:
    whole = command(*IMAGES, "steps=5", "devices=1", "name=whole", "eval.every=5")
    assert whole.returncode == 0, whole.stderr
    parts = command(*IMAGES, "steps=3", "devices=2", "name=parts", "data.workers=2")
    assert parts.returncode == 0, parts.stderr
    whole_run, parts_run = command.run_folder("runs/whole/*"), command.run_folder("runs/parts/*")
    assert numbers(parts_run) == numbers(whole_run)[:3]
    resumed = command(f"resume={parts_run}", "steps=5", "eval.every=5")
    assert resumed.returncode == 0, resumed.stderr
    assert "val/accuracy" in resumed.stdout
    assert numbers(parts_run) == numbers(whole_run)
    assert_same(weights(parts_run), weights(whole_run))


def test_sigterm_before_there_is_anything_to_save_is_143(command: Command) -> None:
    process = command.start(*FOREVER, "devices=2")
    wait_until(lambda: any(command.folder.glob("runs/*/*/.hydra")))
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 143


def test_two_runs_started_together_do_not_meet(command: Command) -> None:
    both = [command.start(*QUICK, "steps=3", "devices=2") for _ in range(2)]
    assert [process.communicate(timeout=120) and process.returncode for process in both] == [0, 0]
    first, second = command.folder.glob("runs/*/*")
    assert numbers(first) == numbers(second)


def test_a_run_folder_has_one_living_writer(command: Command) -> None:
    process = command.start(*FOREVER, "checkpoint.every=1", "devices=1")
    run = wait_for_steps(command)
    wait_until(lambda: any((run / "checkpoints").glob("step_*")))
    done = command(f"resume={run}")
    assert done.returncode == 2
    assert "is being written by another process; wait for it or stop it first" in done.stderr
    process.terminate()
    process.communicate(timeout=60)


def test_a_nan_stops_with_exit_code_5(command: Command) -> None:
    done = command(*QUICK, "steps=50", "devices=2", "optimizer.lr=1e38", "grad_clip=null", "checkpoint.every=1")
    assert done.returncode == 5
    assert re.match(r"error: step \d+: NaN or infinity first appears in .* stage \d", done.stderr), done.stderr
    assert "Try a lower optimizer.lr (now 1e+38)" in done.stderr
    assert "Traceback" not in done.stderr
    assert status(command.run_folder())["exit_code"] == 5


def test_a_full_disk_stops_the_run_and_keeps_the_checkpoint_before(command: Command) -> None:
    assert command(*QUICK, "steps=2", "devices=2").returncode == 0
    run = command.run_folder()

    def fill() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))

    done = command(f"resume={run}", "steps=4", preexec_fn=fill)
    assert done.returncode == 3
    assert "error: cannot write a checkpoint to" in done.stderr
    assert "the checkpoint of step 2 is intact" in done.stderr
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step_00000002"]
    assert command(f"resume={run}", "steps=4").returncode == 0


def test_torchrun_processes_become_the_ranks(command: Command) -> None:
    assert command(*QUICK, "steps=3", "devices=2", "name=local").returncode == 0
    words = [*QUICK, "steps=3", "name=joined", f"data.cache_dir={command.cache}"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "pipetrain"]
    done = subprocess.run(
        [*torchrun, *words], cwd=command.folder, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    (joined,) = command.folder.glob("runs/joined/*")
    assert numbers(joined) == numbers(command.run_folder("runs/local/*"))
    assert sorted(path.name for path in command.folder.iterdir()) == ["runs"], "other ranks leave nothing"


def test_nothing_listens_but_on_the_loopback_address(command: Command) -> None:
    process = command.start(*FOREVER, "devices=2")
    run = wait_for_steps(command)
    pids = {process.pid, *workers_of(run)}
    listening = _listening_addresses(pids)
    process.terminate()
    process.communicate(timeout=60)
    assert listening, "gloo's pairs are seen"
    assert listening <= {"127.0.0.1", "::1"}


def _listening_addresses(pids: set[int]) -> set[str]:
    inodes = set()
    for pid in pids:
        for link in Path(f"/proc/{pid}/fd").iterdir():
            try:
                target = os.readlink(link)
            except OSError:
                continue
            if target.startswith("socket:["):
                inodes.add(target[8:-1])
    found = set()
    for name, loopback in (("tcp", {"0100007F": "127.0.0.1"}), ("tcp6", {"00000000000000000000000001000000": "::1"})):
        for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in inodes:
                address = fields[1].rpartition(":")[0]
                found.add(loopback.get(address, address))
    return found


def test_memory_of_a_rank_grows_with_its_stage_not_with_the_model(command: Command) -> None:
    """Under the same limit for each process one stage dies with advice and four stages train."""
    large = [
        "model.layers=28", "model.d_model=512", "model.d_ff=2048", "data.seq_len=16", "batch_size=4", "steps=2",
        "eval.every=0", "checkpoint.every=0",
    ]  # fmt: skip

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (2_050 * 2**20, 2_050 * 2**20))

    done = command(*large, "devices=1", preexec_fn=limit)
    assert done.returncode == 1
    assert "error: stage 0 (rank 0) failed" in done.stderr
    assert "out of memory: use more partitions (devices=...), recompute=always, smaller micro-batches" in done.stderr
    assert command(*large, "devices=4", preexec_fn=limit).returncode == 0
