"""Numbers of a run, under the same names in three places: the console, `metrics.jsonl` and TensorBoard.

One process writes: the first rank. Every rank knows the loss, so the last stage need not be the one.
"""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from pipetrain.config import Config
from pipetrain.derived import num_microbatches
from pipetrain.paths import RunPaths
from pipetrain.training.console import Console

# What TensorBoard's "Custom Scalars" tab shows in common charts.
_LAYOUT = {
    "Pipeline": {
        "bubble": ["Multiline", ["pipeline/bubble_measured", "pipeline/bubble_predicted", "predicted/bubble"]],
        "where a step goes": ["Multiline", [r"time/.*_s"]],
        "step": ["Multiline", ["speed/step_s", "predicted/step_s"]],
        "waiting by stage": ["Multiline", [r"stage_\d+/wait_s"]],
        "memory by stage": ["Multiline", [r"stage_\d+/memory_bytes"]],
    },
    "Loss": {"train and validation": ["Multiline", ["loss/train", "loss/val"]]},
    "Languages": {
        "validation": ["Multiline", ["val_nll/.*"]],
        "pairs seen": ["Multiline", ["pairs_seen/.*"]],
    },
}
_COMPARED = ("loss/train", "loss/val", "speed/tokens_per_s", "pipeline/bubble_measured")


class Metrics:
    """The writer of a run. On resume the lines behind the step that is gone back to are dropped."""

    def __init__(self, run: RunPaths, console: Console, settings: Mapping[str, Any], first_step: int) -> None:
        """
        Args:
            settings: what TensorBoard's HParams tab compares runs by; flat.
            first_step: updates done before this start: 0 unless resumed.
        """
        self.latest: dict[str, float] = {}
        self._console = console
        self._file = _open_behind(run.metrics, first_step)
        self._board = SummaryWriter(str(run.root), purge_step=first_step + 1 if first_step else None)
        self._board.add_custom_scalars(_LAYOUT)
        # The three HParams records go into this run's one event file; add_hparams would start another.
        start, session, self._session_end = hparams(dict(settings), dict.fromkeys(_COMPARED, 0.0))
        self._board._get_file_writer().add_summary(start)
        self._board._get_file_writer().add_summary(session)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Writes one line: after `step` updates these were the values."""
        self.latest |= values
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._board.add_scalar(name, value, step)
        self._console.line(step, values)

    def text(self, name: str, markdown: str) -> None:
        """Puts a text into TensorBoard."""
        self._board.add_text(name, markdown)

    def close(self) -> None:
        """Flushes everything."""
        self._board._get_file_writer().add_summary(self._session_end)
        self._board.close()
        self._file.close()


def compared_settings(cfg: Config, balance: Sequence[int]) -> dict[str, str | float]:
    """The settings by which TensorBoard's HParams tab compares runs."""
    return {
        "stages": len(balance),
        "balance": "-".join(map(str, balance)),
        "schedule": cfg.schedule,
        "micro_batches": num_microbatches(cfg),
        "recompute": str(cfg.recompute),
        "batch_size": cfg.batch_size,
        "lr": cfg.optimizer.lr,
        "optimizer": cfg.optimizer.name,
        "precision": cfg.precision,
        "seed": cfg.seed,
    }


def _open_behind(path: Path, first_step: int) -> TextIO:
    kept: list[str] = []
    if first_step and path.is_file():
        for line in path.read_text().splitlines():
            try:
                if json.loads(line)["step"] <= first_step:
                    kept.append(line + "\n")
            except (ValueError, KeyError, TypeError):  # a line that a killed run left half written
                continue
    aside = path.with_suffix(".writing")
    aside.write_text("".join(kept))
    os.replace(aside, path)
    return path.open("a")
