"""A sweep: jobs one after the other, failures named when they happen, a table at the end."""

import json
import logging
import re
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from hashlib import sha1
from pathlib import Path
from typing import Any

from pipetrain.errors import Exit, PipetrainError
from pipetrain.paths import RunPaths

_MAX_SLUG = 80
_UNLIMITED = 10_000
_STOPS = (Exit.INTERRUPTED, Exit.PREEMPTED, Exit.TERMINATED)
_COLUMNS = (("loss/train", "{:.4f}"), ("loss/val", "{:.4f}"), ("speed/tokens_per_s", "{:,.0f}"))

log = logging.getLogger(__name__)


def slug(overrides: str) -> str:
    """`devices=[0,1],model=a/b` as a part of a folder name: `devices-0-1-model-a-b`."""
    name = re.sub(r"[^\w.]+", "-", re.sub(r"[\\:'\"]", "", overrides), flags=re.ASCII).strip("-") or "defaults"
    if len(name) > _MAX_SLUG:
        name = f"{name[: _MAX_SLUG - 9]}-{sha1(overrides.encode()).hexdigest()[:8]}"
    return name


def read_status(folder: Path) -> dict[str, Any]:
    """The `status.json` of a run, or nothing if there is none that can be read."""
    try:
        status = json.loads(RunPaths(folder).status.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return status if isinstance(status, dict) else {}


@dataclass
class Job:
    """One row of the table."""

    folder: Path
    overrides: list[str]
    state: str = "running"
    code: int = 0


@dataclass
class Sweep:
    """The jobs of one `pipetrain -m`, in the order in which they ran."""

    folder: Path
    jobs: list[Job] = field(default_factory=list)

    def run(self, folder: Path, overrides: list[str], start: Callable[[], int]) -> None:
        """Runs one job, unless its folder says that it was finished before; a failing one does not end the sweep.

        Raises:
            SystemExit: with the job's exit code, if it was told to stop: then the jobs after it are not wanted either.
        """
        job = Job(folder, overrides)
        self.jobs.append(job)
        title = f"job {len(self.jobs) - 1}: {' '.join(overrides)}"
        if read_status(folder).get("state") == "finished":
            job.state = "finished"
            print(f"{title}: finished before, skipped ({_short(folder)})", flush=True)
            return
        print(f"{title} -> {_short(folder)}", flush=True)
        error = self._start(job, start)
        print(f"{title}: {job.state}" + (f" (exit code {job.code}): {error}" if job.code else ""), flush=True)
        if job.code in _STOPS:
            raise SystemExit(job.code)

    def _start(self, job: Job, start: Callable[[], int]) -> str:
        """Fills in how the job ended and returns the text of its error."""
        try:
            job.code = start()
        except PipetrainError as error:
            refused = error.exit_code == Exit.BAD_SETTINGS
            job.code, job.state = error.exit_code, "refused" if refused else "failed"
            log.error("%s", error)
            return str(error)
        except Exception as error:
            job.code, job.state = Exit.FAILED, "crashed"
            log.exception("job crashed")
            traceback.print_exc()
            return f"{type(error).__name__}: {error}"
        status = read_status(job.folder)
        job.state = str(status.get("state") or ("failed" if job.code else "finished"))
        return str(status.get("error") or f"see {_short(RunPaths(job.folder).log)}")

    @property
    def code(self) -> int:
        """Exit code of the whole sweep."""
        return Exit.FAILED if any(job.code for job in self.jobs) else Exit.DONE

    def print_table(self) -> None:
        """Prints one row for each job and the command that shows them side by side."""
        from rich.console import Console
        from rich.table import Column, Table

        overrides = Column("overrides", overflow="fold")
        table = Table("job", overrides, "state", "step", *(name for name, _ in _COLUMNS), box=None, pad_edge=False)
        for number, job in enumerate(self.jobs):
            status = read_status(job.folder)
            metrics = status.get("metrics") or {}
            numbers = [_cell(metrics.get(name), form) for name, form in _COLUMNS]
            differing = " ".join(word for word in job.overrides if word not in self._shared())
            table.add_row(str(number), differing, job.state, _cell(status.get("step"), "{}"), *numbers)
        console = Console(markup=False, highlight=False)
        if not console.is_terminal:
            console.width = _UNLIMITED
        console.print()
        console.print(table)
        failed = sum(job.code != 0 for job in self.jobs)
        console.print(f"\njobs: {len(self.jobs)}, failed: {failed}")
        console.print(f"tensorboard --logdir {_short(self.folder)}", soft_wrap=True)
        if failed:
            console.print(f"to go on: the same command with hydra.sweep.dir={_short(self.folder)}", soft_wrap=True)

    def _shared(self) -> list[str]:
        """The settings that all jobs have in common: no use in a table that compares them."""
        rest = self.jobs[1:]
        return [word for word in self.jobs[0].overrides if rest and all(word in job.overrides for job in rest)]


def _cell(value: Any, form: str) -> str:
    return form.format(value) if isinstance(value, int | float) else "-"


def _short(path: Path) -> str:
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)
