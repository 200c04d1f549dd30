"""Steps to a loss under stale gradients: methods x K x learning rates x seeds, on the standard library's source code.

    .venv/bin/python scripts/ouroboros/convergence.py WORK            all cells, resumable: a result file each
    .venv/bin/python scripts/ouroboros/convergence.py WORK --list     how many there are, and are done

Every cell trains a byte-level Transformer of 12 layers with the delays of Ouroboros, K - k updates for module k, in one
process (see `delayed`). The loss on the validation text is taken every 2 % of the steps. Rates are tried at seed 0; the
best one of each method and K, by its last losses, then gets the other seeds. `report.py` makes the tables.
"""

import argparse
import json
import multiprocessing
import os
import sysconfig
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from delayed import Batch, DelayedTraining

from pipetrain import models
from pipetrain.config import (
    AdamConfig,
    Config,
    LrRuleConfig,
    MuonConfig,
    NadamConfig,
    OptimizerConfig,
    RotatedAdamConfig,
    StaleConfig,
    TextConfig,
    TransformerConfig,
)
from pipetrain.sim.balance import even

STEPS, WARMUP, EVAL_EVERY = 1000, 50, 20
BATCH, LENGTH, VALID_BATCHES = 8, 64, 8
LAYERS, WIDTH = 10, 48  # with embedding and head twelve layers
TEXT_BYTES = 4_000_000
RATES = (4e-4, 1e-3, 2.5e-3, 6e-3)
SEEDS = {4: (0, 1, 2), 8: (0, 1, 2), 11: (0,)}
BEST_OF = 5  # a rate is judged by the mean of so many last losses: one evaluation is noise


@dataclass(frozen=True)
class Method:
    """One way to train.

    Attributes:
        delay: of all modules; None is K - k of module k.
        feedback: of error_feedback.
    """

    optimizer: OptimizerConfig
    correctors: tuple[str, ...] = ()
    delay: int | None = None
    feedback: float = 1.0


ADAM = AdamConfig(name="adamw", weight_decay=0.1, betas=[0.9, 0.95])
NADAM = NadamConfig(name="nadam", weight_decay=0.1, betas=[0.99, 0.999])
MUON = MuonConfig(name="muon", weight_decay=0.1, betas=[0.9, 0.95])
ROTATED = RotatedAdamConfig(name="rotated_adam", weight_decay=0.1, betas=[0.9, 0.95])
SYNCHRONOUS = {
    "synchronous adamw": Method(ADAM, delay=0),
    "synchronous nadam": Method(NADAM, delay=0),
    "synchronous muon": Method(MUON, delay=0),
    "synchronous rotated_adam": Method(ROTATED, delay=0),
}
ONE_LATE = {
    "2bw adamw": Method(ADAM, delay=1),
    "2bw adamw + error_feedback": Method(ADAM, ("error_feedback",), delay=1),
}
STALE = {
    "adamw": Method(ADAM),
    "adamw + error_feedback": Method(ADAM, ("error_feedback",)),
    "adamw + pipemare": Method(ADAM, ("pipemare",)),
    "nadam": Method(NADAM),
    "muon": Method(MUON),
    "rotated_adam": Method(ROTATED),
    "rotated_adam + pipemare": Method(ROTATED, ("pipemare",)),
    "rotated_adam + error_feedback": Method(ROTATED, ("error_feedback",)),
    "muon + error_feedback": Method(MUON, ("error_feedback",)),
    "adamw + error_feedback 4": Method(ADAM, ("error_feedback",), feedback=4.0),
    "muon + error_feedback 4": Method(MUON, ("error_feedback",), feedback=4.0),
    "rotated_adam + error_feedback 4": Method(ROTATED, ("error_feedback",), feedback=4.0),
    "rotated_adam refresh 1 + error_feedback 4": Method(replace(ROTATED, refresh=1), ("error_feedback",), feedback=4.0),
}
METHODS = {**SYNCHRONOUS, **ONE_LATE, **STALE}


@dataclass(frozen=True)
class Cell:
    method: str
    modules: int  # 0 where it makes no difference
    lr: float
    seed: int
    layers: int = LAYERS + 2

    def path(self, work: Path) -> Path:
        deeper = f"_{self.layers}" if self.layers != LAYERS + 2 else ""
        name = f"{self.method}_{self.modules}_{self.lr:g}_{self.seed}{deeper}".replace(" ", "-").replace("+", "and")
        return work / f"{name}.json"


def text() -> torch.Tensor:
    """The standard library's modules one after the other, in the order of their names."""
    found = bytearray()
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        found += path.read_bytes()
    return torch.frombuffer(found[:TEXT_BYTES], dtype=torch.uint8).long()


def windows(data: torch.Tensor, generator: torch.Generator) -> Batch:
    starts = torch.randint(len(data) - LENGTH - 1, (BATCH,), generator=generator)
    rows = torch.stack([data[start : start + LENGTH + 1] for start in starts])
    return rows[:, :-1], rows[:, 1:]


def run(cell: Cell) -> dict[str, Any]:
    """Trains one cell."""
    torch.set_num_threads(1)
    method, data = METHODS[cell.method], text()
    train, valid = data[: -len(data) // 20], data[-len(data) // 20 :]
    modules = cell.modules or 4
    delays = [modules - 1 - s if method.delay is None else method.delay for s in range(modules)]
    model = TransformerConfig(layers=cell.layers - 2, d_model=WIDTH, d_ff=4 * WIDTH, heads=4, dropout=0.0, tied=True)
    cfg = Config(
        name="convergence",
        model=model,
        data=TextConfig(seq_len=LENGTH),
        optimizer=replace(method.optimizer, lr=cell.lr),
        lr_rule=LrRuleConfig(warmup_steps=WARMUP),
        stale=StaleConfig(
            warmup_steps=WARMUP, correctors=list(method.correctors), feedback=method.feedback, anneal_steps=STEPS // 4
        ),
        seed=cell.seed,
        grad_clip=1.0,
    )
    recipe = models.build(**asdict(model), vocab_size=256, seq_len=LENGTH)
    training = DelayedTraining(recipe, even(cell.layers, modules), cfg, delays)
    validation = [windows(valid, torch.Generator().manual_seed(10_000 + i)) for i in range(VALID_BATCHES)]
    losses: list[float] = []

    def after(step: int) -> None:
        if step % EVAL_EVERY == 0:
            losses.append(training.loss_of(validation))

    def batch(step: int) -> Batch:
        return windows(train, torch.Generator().manual_seed(cell.seed * 1_000_000 + step))

    started = time.perf_counter()
    training.train(batch, STEPS, after)
    return {**asdict(cell), "losses": losses, "seconds": time.perf_counter() - started}


# What the reviewers of Ouroboros asked for: modules, one more than devices, and layers.
EXTRAPOLATED = {"12 layers on 11 devices": (12, 12), "64 layers on 4 devices": (5, 64)}
OF_EXTRAPOLATED = ("adamw", "rotated_adam + error_feedback 4", "rotated_adam refresh 1 + error_feedback 4")


def extrapolated_cells() -> Iterator[Cell]:
    """Seed 0: the methods that matter with all rates, and synchronous ones of the same depth."""
    for modules, layers in EXTRAPOLATED.values():
        for lr in RATES:
            yield Cell("synchronous adamw", 0, lr, 0, layers)
            for method in OF_EXTRAPOLATED:
                yield Cell(method, modules, lr, 0, layers)


def score(work: Path, cell: Cell) -> float:
    """How good a finished cell has become; a training that failed is worst."""
    losses = json.loads(cell.path(work).read_text())["losses"][-BEST_OF:]
    mean = sum(losses) / len(losses)
    return mean if mean == mean else float("inf")


def first_cells() -> Iterator[Cell]:
    """Seed 0: all methods with all rates."""
    for lr in RATES:
        for method in (*SYNCHRONOUS, *ONE_LATE):
            yield Cell(method, 0, lr, 0)
        for modules in SEEDS:
            for method in STALE:
                yield Cell(method, modules, lr, 0)


def best_of_seed_0(work: Path) -> dict[tuple[str, int], Cell]:
    """For each method and K the cell with the best rate."""
    best: dict[tuple[str, int], Cell] = {}
    for cell in first_cells():
        key = cell.method, cell.modules
        if cell.path(work).exists() and (key not in best or score(work, cell) < score(work, best[key])):
            best[key] = cell
    return best


def further_cells(work: Path) -> Iterator[Cell]:
    """The best rates with the other seeds."""
    for (_, modules), cell in best_of_seed_0(work).items():
        for seed in SEEDS.get(modules or 4, ())[1:]:
            yield replace(cell, seed=seed)


def do(task: tuple[Cell, Path]) -> None:
    cell, work = task
    result = run(cell)
    aside = cell.path(work).with_suffix(".writing")
    aside.write_text(json.dumps(result))
    os.replace(aside, cell.path(work))
    print(f"{cell}: {result['losses'][-1]:.4f}, {result['seconds']:.0f} s", flush=True)


def do_all(cells: Sequence[Cell], work: Path, processes: int) -> None:
    left = [(cell, work) for cell in cells if not cell.path(work).exists()]
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        for _ in pool.imap_unordered(do, left):
            pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="folder of the result files")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--list", action="store_true")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    if options.list:
        cells = [*first_cells(), *further_cells(options.work), *extrapolated_cells()]
        print(f"{sum(cell.path(options.work).exists() for cell in cells)} of {len(cells)} cells are done")
        return
    do_all(list(first_cells()), options.work, options.processes)
    do_all(list(further_cells(options.work)), options.work, options.processes)
    do_all(list(extrapolated_cells()), options.work, options.processes)


if __name__ == "__main__":
    main()
