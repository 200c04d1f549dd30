"""Takes a sweep of runs apart: seconds a step and steps to a loss, synchronous and stale, and what both make.

    pipetrain experiment=ouroboros_breakdown
    .venv/bin/python scripts/ouroboros/breakdown.py sweeps/FOLDER      prints the table, writes breakdown.svg there

Ratios are to the first synchronous run of the sweep on as many devices. The target is that run's validation loss at
80 % of its steps; where a run reached it is read off between two evaluations. A step updates all modules once.
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib
import yaml

matplotlib.use("Agg")
import matplotlib.pyplot as plt

STALE = ("ouroboros", "pipedream", "pipedream_2bw", "bounded")
HEADER = ["schedule", "optimizer", "modules", "s a step", "steps", "together", "bubble", "updates late", "memory MiB"]


@dataclass(frozen=True)
class Run:
    """What the table needs of one run."""

    schedule: str
    optimizer: str
    devices: str
    rows: list[dict[str, Any]]

    @property
    def losses(self) -> list[tuple[int, float]]:
        """(step, validation loss)."""
        return [(row["step"], row["loss/val"]) for row in self.rows if "loss/val" in row]

    @property
    def steps(self) -> list[dict[str, Any]]:
        return [row for row in self.rows if "speed/step_s" in row]

    @property
    def step_s(self) -> float:
        return median(row["speed/step_s"] for row in self.steps[1:])

    def of_stages(self, what: str) -> list[float]:
        """A measurement of each stage, in the last step that was logged."""
        last = self.steps[-1]
        stages = sorted(int(key.split("/")[0][6:]) for key in last if key.startswith("stage_") and key.endswith(what))
        return [last[f"stage_{stage}/{what}"] for stage in stages]


def read(folder: Path) -> list[Run]:
    """All runs of a sweep that have something to tell."""
    found = []
    for path in sorted(folder.glob("*/metrics.jsonl")):
        cfg = yaml.safe_load((path.parent / ".hydra" / "config.yaml").read_text())
        schedule = cfg["schedule"] + (" locked" if cfg["stale"]["tied"] == "locked" else "")
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        found.append(Run(schedule, cfg["optimizer"]["name"], str(cfg["devices"]), rows))
    return found


def steps_to(target: float, losses: list[tuple[int, float]]) -> float | None:
    """Where the line between evaluations falls to the target for good; None if it does not."""
    above = [place for place, (_, loss) in enumerate(losses) if not loss <= target]
    if not above:
        return float(losses[0][0])
    if above[-1] + 1 == len(losses):
        return None
    (before, high), (after, low) = losses[above[-1]], losses[above[-1] + 1]
    return before + (after - before) * (high - target) / (high - low)


def rows(runs: list[Run]) -> list[list[str]]:
    """Of the table under `HEADER`."""
    found = []
    for run in runs:
        base = next((r for r in runs if r.devices == run.devices and r.schedule.split()[0] not in STALE), runs[0])
        target = base.losses[round(0.8 * len(base.losses)) - 1][1]
        of_base, steps = steps_to(target, base.losses), steps_to(target, run.losses)
        assert of_base is not None
        seconds = run.step_s / base.step_s
        late, memory = run.of_stages("staleness"), run.of_stages("memory_bytes")
        found.append(
            [
                run.schedule,
                run.optimizer,
                str(len(memory)),
                f"{seconds:.2f} ({run.step_s:.4f})",
                "not reached" if steps is None else f"{steps / of_base:.2f} ({steps:.0f})",
                "" if steps is None else f"{seconds * steps / of_base:.2f}",
                f"{median(row['pipeline/bubble_measured'] for row in run.steps):.1%}",
                ", ".join(f"{number:.0f}" for number in late) or "0",
                ", ".join(f"{size / 2**20:.0f}" for size in memory),
            ]
        )
    return found


def draw(runs: list[Run], path: Path) -> None:
    """Loss against steps, and against seconds."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True)
    for run in runs:
        label = f"{run.schedule}, {run.optimizer}, {run.devices} devices"
        steps, losses = zip(*run.losses, strict=True)
        axes[0].plot(steps, losses, label=label)
        axes[1].plot([step * run.step_s for step in steps], losses, label=label)
    axes[0].set_xlabel("steps")
    axes[1].set_xlabel("seconds")
    axes[0].set_ylabel("validation loss")
    axes[1].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of the sweep")
    folder = parser.parse_args().folder
    runs = read(folder)
    for row in (HEADER, ["---"] * len(HEADER), *rows(runs)):
        print("| " + " | ".join(row) + " |")
    draw(runs, folder / "breakdown.svg")


if __name__ == "__main__":
    main()
