"""`action=check`: runs the first steps of the user's settings several times, and compares.

Each run is a real one, with the processes, the trainer and the checkpoints of a training run:

    yours      the settings as they are
    one_stage  the same with the whole model on one stage, gradients added up in the same order: the same bits
    resumed    the last step, from the checkpoint of `yours` before it: the same bits
    float64    the settings as they are, but in float64, and
    plain      each step of it in plain PyTorch, one process (see `reference`): the same but for rounding

All of them are written into a folder that is removed in the end.
"""

import dataclasses
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import rich.console
import torch
from rich.table import Table

from pipetrain.check.compare import Recorded, Row, compare, compare_draws
from pipetrain.check.reference_worker import run_reference
from pipetrain.config import CheckpointConfig, Config, EvalConfig
from pipetrain.derived import num_microbatches, num_stages
from pipetrain.errors import ConfigError, Exit
from pipetrain.launch import prepare, run_job
from pipetrain.paths import RunPaths
from pipetrain.planning.settle import settle
from pipetrain.schedule import ALWAYS, WEIGHT_GRADIENTS, generate
from pipetrain.torchrun import Place
from pipetrain.training.job import Job
from pipetrain.worker import num_threads, run_local_worker

SAME_BITS = 0.0
OTHER_ORDER = 1e-5  # on a GPU kernels may add up in another order, and so may halves of backwards
ROUNDING = 1e-10  # float64 rounds at 1e-16; the rest is for deep models, which amplify it
PLAIN = "plain, float64"
_UNLIMITED = 10_000  # columns where the output is no terminal


class _Ended(Exception):
    """A run did not reach its last step; what there is to say has been said."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


def check(cfg: Config, root: Path) -> int:
    """Runs, compares, prints the table.

    Args:
        cfg: the settings, not checked yet.
        root: the run folder; nothing stays in it.

    Returns:
        0 if all guarantees hold, 1 if one does not; the code of the run that failed, if one did.

    Raises:
        PipetrainError: for everything that is found before a worker starts.
    """
    if Place.read(os.environ) is not None:
        raise ConfigError("action=check starts its own processes: run it without torchrun")
    folder = RunPaths(root).check
    try:
        job = settle(prepare(cfg, RunPaths(folder / "yours"), torch.cuda.device_count(), say=_say), run_job, _say)
        rows = _Runs(_shortened(job)).rows()
    except _Ended as ended:
        return ended.code
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    _print(rows)
    return Exit.DONE if all(row.holds for row in rows) else Exit.FAILED


def _shortened(job: Job) -> Job:
    """The job with a few steps, a checkpoint before the last of them, and one number of threads for all runs."""
    cfg = dataclasses.replace(
        job.cfg,
        steps=job.cfg.check.steps,
        epochs=None,
        threads=num_threads(job),
        eval=EvalConfig(every=0),
        checkpoint=CheckpointConfig(every=job.cfg.check.steps - 1, keep=2),
    )
    return dataclasses.replace(job, cfg=cfg, record=True)


class _Runs:
    """The runs and what is compared."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._folder = job.run.root.parent
        self._steps = range(1, job.cfg.check.steps + 1)
        self._same = SAME_BITS if job.devices[0] == "cpu" else OTHER_ORDER
        number = num_stages(job.cfg, len(job.devices))
        self._stages = number
        self._schedule = generate(
            job.cfg.schedule, len(job.devices), num_microbatches(job.cfg), number // len(job.devices)
        )

    def rows(self) -> list[Row]:
        """Runs everything. A run takes disk space, so it is removed as soon as it has been compared."""
        yours = self._run("yours", f"your settings on {self._shown_stages()}", self._job)
        return [*self._one_stage(yours), *self._resumed(yours), *self._plain(yours)]

    def _one_stage(self, yours: Recorded) -> list[Row]:
        order = [a.microbatch for a in self._schedule if a.stage == 0 and a.kind in WEIGHT_GRADIENTS]
        is_reversed = order != sorted(order) and order == sorted(order, reverse=True)
        cfg = dataclasses.replace(
            self._job.cfg,
            devices=1,
            partitions=None,
            balance="even",
            schedule="gpipe_lifo" if is_reversed else "gpipe",
            micro_batches=len(order),
            recompute=self._job.cfg.recompute if isinstance(self._job.cfg.recompute, str) else ALWAYS,
        )
        job = dataclasses.replace(self._job, cfg=cfg, devices=self._job.devices[:1])
        runs = yours, self._run("one_stage", "the same on one stage", job)
        kinds = {
            "loss": "loss",
            "gradient norm": "norm",
            "gradients": "gradient",
            "weights": "weight",
            "buffers": "buffer",
            "optimizer state": "optimizer",
        }
        same_order = is_reversed or order == sorted(order)
        limit = self._same if same_order and not self._schedule.is_split else OTHER_ORDER
        rows = [compare(what, kind, "one stage", runs, self._steps, limit) for what, kind in kinds.items()]
        rows.append(compare_draws("one stage", runs, self._steps))
        self._remove("one_stage")
        return rows

    def _resumed(self, yours: Recorded) -> list[Row]:
        before = min(self._job.run.checkpoints.glob("step_*"))
        job = dataclasses.replace(self._job, checkpoint=before)
        against = f"resumed at {self._steps[-2]}"
        runs = yours, self._run("resumed", f"the last step, resumed from the checkpoint of step {self._steps[-2]}", job)
        kinds = {"loss": "loss", "weights": "weight", "buffers": "buffer", "optimizer state": "optimizer"}
        rows = [compare(what, kind, against, runs, self._steps[-1:], self._same) for what, kind in kinds.items()]
        self._remove("resumed")
        return rows

    def _plain(self, yours: Recorded) -> list[Row]:
        job = dataclasses.replace(self._job, cfg=dataclasses.replace(self._job.cfg, precision="fp64"))
        if self._job.cfg.precision == "fp64":
            ours, name = yours, "yours"
        else:
            self._remove("yours")
            ours, name = self._run("float64", "your settings in float64", job), "float64"
        plain = partial(run_reference, other=str(self._folder / name))
        job = dataclasses.replace(job, devices=job.devices[:1])
        runs = ours, self._run("plain", "each step in plain PyTorch, float64, one process", job, plain)
        kinds = {
            "loss": "loss",
            "gradients": "gradient",
            "clip factor": "clip",
            "weights": "weight",
            "buffers": "buffer",
        }
        rows = [compare(what, kind, PLAIN, runs, self._steps, ROUNDING) for what, kind in kinds.items()]
        return [*rows, compare_draws(PLAIN, runs, self._steps)]

    def _run(self, name: str, title: str, job: Job, worker: Callable[[str, int], None] = run_local_worker) -> Recorded:
        """Raises: _Ended if the run did not."""
        _say(title)
        run = RunPaths(self._folder / name)
        run.root.mkdir(parents=True, exist_ok=True)
        code = run_job(dataclasses.replace(job, run=run), worker)
        if code != Exit.DONE:
            raise _Ended(code)
        return Recorded(run)

    def _shown_stages(self) -> str:
        number, ranks = self._stages, len(self._job.devices)
        if number == 1:
            return "1 stage (devices=2 would cut the model in two)"
        return f"{number} stages" + ("" if number == ranks else f" on {ranks} devices")

    def _remove(self, name: str) -> None:
        shutil.rmtree(self._folder / name)


def _print(rows: Sequence[Row]) -> None:
    table = Table("what", "compared with", "largest difference", "where", "limit", "", box=None, pad_edge=False)
    for row in rows:
        limit = "same bits" if row.limit == 0 else f"{row.limit:.0e}"
        difference = "-" if row.difference is None else "0" if row.difference == 0 else f"{row.difference:.1e}"
        verdict = "-" if row.difference is None else "ok" if row.holds else "FAILED"
        table.add_row(row.what, row.against, difference, row.where, limit, verdict)
    console = rich.console.Console(markup=False, highlight=False)
    if not console.is_terminal:
        console.width = _UNLIMITED
    console.print()
    console.print(table)
    failed = [f"{row.what} (against {row.against})" for row in rows if not row.holds]
    held = sum(row.difference is not None for row in rows)
    good = f"all {held} guarantees hold for this configuration"
    console.print(f"\nFAILED: {', '.join(failed)}" if failed else f"\n{good}")


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()
