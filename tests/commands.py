"""Starts the real command and looks at what it leaves behind."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parent
# A model that trains a step in milliseconds, cut without being measured first.
QUICK = [
    "balance=even",
    "model=transformer_tiny",
    "data.seq_len=16",
    "log_every=1",
    "eval.every=0",
    "checkpoint.every=0",
    "batch_size=8",
]
# Images, read by a process of their own.
IMAGES = [
    "balance=even",
    "model=amoebanet_tiny",
    "model.filters=4",
    "data.size=8",
    "log_every=1",
    "eval.every=0",
    "checkpoint.every=0",
    "batch_size=8",
]
FOREVER = [*QUICK, "steps=100000", "log_every=10"]


class Command:
    """`pipetrain` with a folder to run in and a cache that all tests share."""

    def __init__(self, folder: Path, cache: Path) -> None:
        self.folder = folder
        self.cache = cache

    def start(self, *words: str, fault: str | None = None, **options: Any) -> subprocess.Popen[str]:
        program = ["-m", "pipetrain"] if fault is None else [str(TESTS / "drive.py"), fault]
        cache = [] if "data=synthetic" in words else [f"data.cache_dir={self.cache}"]
        environment = os.environ | {"PYTHONPATH": str(TESTS), **({"FAULT": fault} if fault else {})}
        return subprocess.Popen(
            [sys.executable, *program, *words, *cache],
            cwd=self.folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            **options,
        )

    def __call__(self, *words: str, timeout: float = 120, **options: Any) -> subprocess.CompletedProcess[str]:
        process = self.start(*words, **options)
        try:
            out, err = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def run_folder(self, pattern: str = "runs/*/*") -> Path:
        """The newest run."""
        return max(self.folder.glob(pattern), key=lambda path: path.stat().st_mtime)


def wait_until(true: Callable[[], bool], timeout_s: float = 60) -> None:
    end = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def wait_for_steps(command: Command, steps: int = 2) -> Path:
    """Waits until the newest run has logged so many lines."""

    def there() -> bool:
        return any(
            len(path.read_text().splitlines()) >= steps for path in command.folder.glob("runs/*/*/metrics.jsonl")
        )

    wait_until(there)
    return command.run_folder()


def status(run: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((run / "status.json").read_text())
    return content


def rows(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def numbers(run: Path) -> list[tuple[Any, ...]]:
    """What must not depend on the partitioning: step, loss and gradient norm of every line."""
    return [(row["step"], row.get("loss/train"), row.get("loss/val"), row.get("grad/norm")) for row in rows(run)]


def workers_of(run: Path) -> list[int]:
    return [int(path.read_text()) for path in sorted((run / ".processes").glob("pid.*"))]


def alive(pid: int) -> bool:
    return _state_and_parent(pid)[0] not in ("", "Z")


def children_of(pids: Sequence[int]) -> list[int]:
    every = [int(path.name) for path in Path("/proc").glob("[0-9]*")]
    return [pid for pid in every if int(_state_and_parent(pid)[1] or 0) in pids]


def _state_and_parent(pid: int) -> tuple[str, str]:
    """Of a process that is gone two empty words."""
    try:
        state, parent, *_ = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "", ""
    return state, parent
