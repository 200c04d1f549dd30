"""Where the tricks for deep translation models change anything: depth x learning rate x norm x tricks.

    .venv/bin/python scripts/translation/depth.py WORK [--data FOLDER]   all cells, resumable: a result file each
    .venv/bin/python scripts/translation/depth.py WORK --table           the table for docs/translation.md

Huang et al. 2019, section 5, name two: clipped logits, and feed-forward layers that start smaller in deeper models.
Each cell is a run of the real command on one device, without warm-up, which hides what they are for; its result the
validation loss by token after STEPS steps, or where it ended if that was not at the last one. Some 25 minutes on two
cores, with Django's messages of four languages.
"""

import argparse
import itertools
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

STEPS = 200
DEPTHS = (3, 12, 24)  # blocks of the encoder, and as many of the decoder
RATES = (1e-3, 4e-3)
NORMS = ("pre", "post")
TRICKS = {
    "none": [],
    "clipped": ["logit_clip=20"],
    "scaled": ["model.init_scale=inverse_sqrt_depth"],
    "both": ["logit_clip=20", "model.init_scale=inverse_sqrt_depth"],
    "both, 1/L": ["logit_clip=20", "model.init_scale=inverse_depth"],
}
NOT_FINITE = 5  # exit code
SIZE = ["model=seq2seq", "model.d_model=64", "model.d_ff=256", "model.heads=4", "model.head_width=16"]
DATA = ["data.max_tokens=26", "data.vocab_size=4000", "batch_size=24", "micro_batches=1", "recompute=never"]
COURSE = ["optimizer=adam", "lr_rule=constant", f"steps={STEPS}", f"eval.every={STEPS}", "grad_clip=null"]


@dataclass(frozen=True)
class Cell:
    depth: int
    rate: float
    norm: str
    tricks: str

    def path(self, work: Path) -> Path:
        name = f"{self.depth}_{self.rate:g}_{self.norm}_{self.tricks}".replace(", 1/", "-over-").replace(" ", "")
        return work / f"{name}.json"

    @property
    def words(self) -> list[str]:
        own = [f"model.layers={self.depth}", f"optimizer.lr={self.rate}", f"model.norm={self.norm}"]
        return [*own, *TRICKS[self.tricks]]


def cells() -> Iterator[Cell]:
    yield from (Cell(*values) for values in itertools.product(DEPTHS, RATES, NORMS, TRICKS))


def run(cell: Cell, work: Path, data: list[str]) -> None:
    """Trains a cell and leaves its result."""
    with tempfile.TemporaryDirectory() as folder:
        words = [*SIZE, *DATA, *COURSE, *data, *cell.words, "devices=cpu", "balance=even", "name=depth"]
        command = [sys.executable, "-m", "pipetrain", *words, f"hydra.run.dir={folder}/run"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode not in (0, NOT_FINITE):
            sys.exit(done.stderr)
        status = json.loads((Path(folder) / "run" / "status.json").read_text())
    result = {**asdict(cell), "nll": status["metrics"].get("val/nll"), "step": status["step"]}
    aside = cell.path(work).with_suffix(".writing")
    aside.write_text(json.dumps(result))
    os.replace(aside, cell.path(work))
    print(result, flush=True)


def table(work: Path) -> str:
    """A row for each depth, rate and norm."""
    lines = [f"| L | rate | norm | {' | '.join(TRICKS)} |", f"| --- | --- | --- {'| --- ' * len(TRICKS)}|"]
    for depth, rate, norm in itertools.product(DEPTHS, RATES, NORMS):
        shown = []
        for tricks in TRICKS:
            result = json.loads(Cell(depth, rate, norm, tricks).path(work).read_text())
            ended = f"not finite, step {result['step'] + 1}"
            shown.append(ended if result["nll"] is None else f"{result['nll']:.2f}")
        lines.append(f"| {depth} | {rate:g} | {norm} | {' | '.join(shown)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="folder of the result files")
    parser.add_argument("--data", type=Path, help="pairs of sentences; without it Django's messages of four languages")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    if options.table:
        print(table(options.work))
        return
    data = [f"data.path={options.data}"] if options.data else ["data.languages=[de,nl,hi,fr]"]
    left = [cell for cell in cells() if not cell.path(options.work).exists()]
    with multiprocessing.get_context("spawn").Pool(options.processes) as pool:
        for _ in pool.imap_unordered(partial(run, work=options.work, data=data), left):
            pass


if __name__ == "__main__":
    main()
