"""Makes the tables and the figure of the convergence study: docs/convergence.md, docs/convergence.svg.

    .venv/bin/python scripts/ouroboros/report.py WORK

The targets are the mean validation losses of the synchronous AdamW runs at 80 and 40 % of their steps. A run has
reached one at the first evaluation behind which its losses, as a mean of three, stay there; between two evaluations the
step is taken linearly. Ratios are to the synchronous AdamW run with the same seed.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib
from convergence import (
    EVAL_EVERY,
    EXTRAPOLATED,
    LAYERS,
    OF_EXTRAPOLATED,
    ONE_LATE,
    RATES,
    SEEDS,
    STALE,
    STEPS,
    SYNCHRONOUS,
    WARMUP,
    WIDTH,
    Cell,
    best_of_seed_0,
    first_cells,
    score,
)

matplotlib.use("Agg")
import matplotlib.pyplot as plt

PAGE = Path(__file__).parent.parent.parent / "docs" / "convergence.md"
BASELINE = "synchronous adamw"
LATE, EARLY = 0.8, 0.4  # shares of the baseline's steps

Losses = Sequence[float]


def losses_of(work: Path, cell: Cell) -> Losses | None:
    """None where the cell was not run."""
    path = cell.path(work)
    return json.loads(path.read_text())["losses"] if path.exists() else None


def smoothed(losses: Losses) -> list[float]:
    """Each with its neighbours."""
    return [mean(losses[max(0, i - 1) : i + 2]) for i in range(len(losses))]


def steps_to(target: float, losses: Losses) -> float | None:
    """Steps after which the smoothed loss stays at or below the target; None if it does not get there."""
    even = smoothed(losses)
    above = [i for i, loss in enumerate(even) if not loss <= target]
    if not above:
        return float(EVAL_EVERY)
    last = above[-1]
    if last + 1 >= len(even):
        return None
    share = (even[last] - target) / (even[last] - even[last + 1])
    return EVAL_EVERY * (last + 1 + share)


def ratios(work: Path, cell: Cell, target: float, base: Mapping[int, float]) -> list[float | None]:
    """Steps of each seed to the target, over those of the baseline."""
    found: list[float | None] = []
    for seed in base:
        losses = losses_of(work, Cell(cell.method, cell.modules, cell.lr, seed))
        if losses is not None:
            steps = steps_to(target, losses)
            found.append(None if steps is None else steps / base[seed])
    return found


def shown(values: Sequence[float | None]) -> str:
    """Mean and spread; a run that did not get there is said."""
    there = [value for value in values if value is not None]
    missing = len(values) - len(there)
    if not there:
        return "not reached"
    text = f"{mean(there):.2f}" + (f" ({min(there):.2f} to {max(there):.2f})" if len(there) > 1 else "")
    return f"{text}, {missing} not reached" if missing else text


@dataclass(frozen=True)
class Target:
    """A loss, and the steps in which the baseline is there, by seed."""

    loss: float
    base: Mapping[int, float]


def target_at(work: Path, share: float) -> Target:
    """The mean loss of the baseline's seeds after a share of the steps."""
    baseline = best_of_seed_0(work)[BASELINE, 0]
    curves = {seed: losses_of(work, replace(baseline, seed=seed)) for seed in SEEDS[4]}
    there = {seed: losses for seed, losses in curves.items() if losses is not None}
    loss = mean(smoothed(losses)[round(share * STEPS / EVAL_EVERY) - 1] for losses in there.values())
    return Target(loss, {seed: steps for seed, of in there.items() if (steps := steps_to(loss, of)) is not None})


def page(work: Path) -> str:
    best = best_of_seed_0(work)
    late, early = target_at(work, LATE), target_at(work, EARLY)
    wanted = [(method, 0) for method in (*SYNCHRONOUS, *ONE_LATE)]
    wanted += [(method, modules) for modules in SEEDS for method in STALE]
    rows = []
    for method, modules in wanted:
        if all(Cell(method, modules, lr, 0).path(work).exists() for lr in RATES):
            cell = best[method, modules]
            k = modules or ("any" if method in ONE_LATE else "-")
            steps = [shown(ratios(work, cell, target.loss, target.base)) for target in (late, early)]
            rows.append(f"| {method} | {k} | {cell.lr:g} | {steps[0]} | {steps[1]} | {last(work, cell)} |")
    rates = []
    for method, modules in dict.fromkeys((cell.method, cell.modules) for cell in first_cells()):
        cells = [Cell(method, modules, lr, 0) for lr in RATES]
        scores = [f"{score(work, cell):.3f}" if cell.path(work).exists() else "" for cell in cells]
        if any(scores):
            rates.append(f"| {method} | {modules or '-'} | {' | '.join(scores)} |")
    return TEXT.format(
        late=f"{late.loss:.3f}",
        late_steps=mean(late.base.values()),
        early=f"{early.loss:.3f}",
        early_steps=mean(early.base.values()),
        rows="\n".join(rows),
        rates="\n".join(rates),
        extrapolated=extrapolated(work),
        titles=" | ".join(f"{lr:g}" for lr in RATES),
        lines=" | ".join("---" for _ in RATES),
        layers=LAYERS,
        width=WIDTH,
        total=STEPS,
        warmup=WARMUP,
        every=EVAL_EVERY,
    )


def extrapolated(work: Path) -> str:
    """Rows of the reviewers' questions: each method at the best of its rates, against synchronous AdamW as deep."""
    rows = []
    for name, (modules, layers) in EXTRAPOLATED.items():
        base, late = None, 0.0
        for method in (BASELINE, *OF_EXTRAPOLATED):
            cells = [Cell(method, 0 if method == BASELINE else modules, lr, 0, layers) for lr in RATES]
            done = [cell for cell in cells if cell.path(work).exists()]
            if not done:
                continue
            cell = min(done, key=lambda each: score(work, each))
            losses = losses_of(work, cell)
            assert losses is not None
            if method == BASELINE:
                late = smoothed(losses)[round(LATE * STEPS / EVAL_EVERY) - 1]
                base = steps_to(late, losses)
            steps = steps_to(late, losses)
            ratio = "not reached" if steps is None or base is None else f"{steps / base:.2f}"
            tried = "" if len(done) == len(RATES) else f" ({len(done)} of {len(RATES)} rates)"
            rows.append(f"| {name} | {method}{tried} | {cell.lr:g} | {ratio} | {score(work, cell):.3f} |")
    return "\n".join(rows)


def last(work: Path, cell: Cell) -> str:
    """The losses at the end, of all seeds."""
    seeds = SEEDS.get(cell.modules or 4, (0,))
    cells = [Cell(cell.method, cell.modules, cell.lr, seed) for seed in seeds]
    return ", ".join(f"{score(work, each):.3f}" for each in cells if each.path(work).exists())


TEXT = """# Steps to a loss when gradients come late

    .venv/bin/python scripts/ouroboros/convergence.py WORK      # some two hours on two cores; resumable
    .venv/bin/python scripts/ouroboros/report.py WORK           # this page

A byte-level Transformer with tied embeddings, {layers} blocks of width {width}, embedding and head (twelve layers), on
4 MB of the standard library's source code: {total} steps, the first {warmup} of them synchronous, a constant rate after
them, validation every {every} steps. Delays are those of `schedule=ouroboros stale.tied=locked`, K - k for module k of
K, or 1 for all modules (2bw). One process stands in for the pipeline; tests/training/test_delayed.py shows that the
pipeline gives the same bits.

Target: the mean validation loss of synchronous AdamW at 80 % of its steps, {late}, which it reaches after
{late_steps:.0f} steps; and for what does not get there, that at 40 %, {early}, after {early_steps:.0f}. "Steps" below
are ratios to those of the same seed: mean, and in brackets the least and the most of the seeds (three for K = 4 and 8
and for what has no K, one for K = 11). Four learning rates were tried for every method and K at seed 0, the best by its
last five losses was taken.

| method | K | rate | steps to {late} | steps to {early} | loss at the end |
| --- | --- | --- | --- | --- | --- |
{rows}

![Steps to the target against K](convergence.svg)

## 12 layers on 11 devices, 64 on 4

Modules are one more than devices. The target is the loss of synchronous AdamW on as many layers at 80 % of its steps;
one seed.

| | method | rate | steps to it | loss at the end |
| --- | --- | --- | --- | --- |
{extrapolated}

## Every rate that was tried

Mean of the last five losses at seed 0.

| method | K | {titles} |
| --- | --- | {lines} |
{rates}
"""


def figure(work: Path) -> None:
    """Loss against steps for each K, and steps to the early target against K."""
    matplotlib.rcParams["svg.hashsalt"] = "convergence"  # the same file for the same curves
    best, early = best_of_seed_0(work), target_at(work, EARLY)
    figure, axes = plt.subplots(1, len(SEEDS) + 1, figsize=(16, 4))
    for axis, modules in zip(axes, SEEDS, strict=False):
        for method in (BASELINE, *STALE):
            cell = best.get((method, 0 if method == BASELINE else modules))
            losses = losses_of(work, cell) if cell is not None else None
            if losses is not None:
                steps = [EVAL_EVERY * (i + 1) for i in range(len(losses))]
                style: dict[str, Any] = {"color": "black", "linewidth": 2} if method == BASELINE else {"linewidth": 1}
                axis.plot(steps, smoothed(losses), label=method, **style)
        axis.set(title=f"K = {modules}", xlabel="steps", ylim=(1.7, 3.2))
    axes[0].set_ylabel("validation loss")
    axes[0].legend(fontsize=7)
    for method in STALE:
        found = {k: ratios(work, best[method, k], early.loss, early.base) for k in SEEDS if (method, k) in best}
        there = {k: mean(known) for k, of in found.items() if (known := [ratio for ratio in of if ratio is not None])}
        axes[-1].plot(list(there), list(there.values()), marker="o", label=method)
    axes[-1].set(title=f"to a loss of {early.loss:.2f}", xlabel="modules K", ylabel="steps / synchronous AdamW's")
    figure.tight_layout()
    figure.savefig(PAGE.with_suffix(".svg"), metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    work = parser.parse_args().work
    PAGE.write_text(page(work))
    figure(work)


if __name__ == "__main__":
    main()
