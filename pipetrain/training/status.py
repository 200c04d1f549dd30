"""`status.json`: how a run stands or ended."""

import json
import os
from collections.abc import Mapping
from typing import Any

from pipetrain.errors import Exit
from pipetrain.paths import RunPaths

STATE_OF_EXIT = {
    Exit.DONE: "finished",
    Exit.PREEMPTED: "preempted",
    Exit.INTERRUPTED: "interrupted",
    Exit.TERMINATED: "interrupted",
}


def write(
    run: RunPaths, state: str, *, step: int, exit_code: int | None, error: str | None, metrics: Mapping[str, float]
) -> None:
    """Replaces the file in one go: a reader sees the old one or the new one."""
    content = {"state": state, "step": step, "exit_code": exit_code, "error": error, "metrics": dict(metrics)}
    aside = run.status.with_suffix(".writing")
    aside.write_text(json.dumps(content, indent=2))
    os.replace(aside, run.status)


def read(run: RunPaths) -> dict[str, Any]:
    """The content of the file, or an empty dictionary."""
    try:
        content: dict[str, Any] = json.loads(run.status.read_text())
    except (OSError, ValueError):
        return {}
    return content
