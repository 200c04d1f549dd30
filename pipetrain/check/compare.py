"""Compares what two runs recorded: one row of the table for each quantity."""

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from pipetrain.paths import RunPaths
from pipetrain.training.record import DRAWS

ALONE = ("loss", "norm")  # one number each; the other kinds are tensors by name


@dataclass(frozen=True)
class Row:
    """How far one quantity is from what it must be.

    Attributes:
        what: the quantity.
        against: what it is compared with.
        difference: the largest one, as a share of the quantity's largest magnitude; None if the model has none of it.
        where: name and step of the largest difference; for None what the model does not have.
        limit: the largest difference that holds; 0 asks for the same bits.
    """

    what: str
    against: str
    difference: float | None
    where: str
    limit: float

    @property
    def holds(self) -> bool:
        return self.difference is None or self.difference <= self.limit


class Recorded:
    """The steps that one run recorded, whatever ranks wrote them."""

    def __init__(self, run: RunPaths) -> None:
        self._run = run

    def tensors(self, step: int, kind: str) -> dict[str, Tensor]:
        """Everything of one kind (see `training.record`) by name, as float64."""
        prefix = f"{kind}/"
        found: dict[str, Tensor] = {}
        for path in self._files(step):
            with safe_open(path, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118 (safetensors' file is no dict)
                    if key == kind or key.startswith(prefix):
                        found[key.removeprefix(prefix)] = file.get_tensor(key).double()
        return found

    def draws(self, step: int) -> dict[str, list[str]]:
        """Digests of what each random module drew."""
        found: dict[str, list[str]] = {}
        for path in self._files(step):
            with safe_open(path, framework="pt") as file:
                for name, digests in json.loads(file.metadata()[DRAWS]).items():
                    found[name] = sorted({*found.get(name, []), *digests})
        return found

    def _files(self, step: int) -> list[Path]:
        pattern = self._run.recorded(step, 0).name.replace("rank_0", "rank_*")
        return sorted(self._run.recorded(step, 0).parent.glob(pattern))


def compare(
    what: str,
    kind: str,
    against: str,
    runs: tuple[Recorded, Recorded],
    steps: Iterable[int],
    limit: float,
) -> Row:
    """The row of one kind of tensors; differences are a share of the largest magnitude in the whole model.

    Args:
        runs: the one to judge, and the one that says what is right. A tensor that only one has counts as zeros.
    """
    worst, where, found = 0.0, "", False
    for step in steps:
        ours, right = (run.tensors(step, kind) for run in runs)
        unit = max((_largest(tensor) for tensor in right.values()), default=0.0)
        for name in {**right, **ours}:
            found = True
            difference = _largest(_difference(ours.get(name), right.get(name))) / (unit or 1.0)
            if difference > worst:
                worst, where = difference, f"step {step}" if name in ALONE else f"{name}, step {step}"
    return Row(what, against, worst if found else None, where if found else f"the model has no {what}", limit)


def compare_draws(against: str, runs: tuple[Recorded, Recorded], steps: Iterable[int]) -> Row:
    """The row of the dropout masks: how many random modules drew something else, over all steps."""
    wrong: list[str] = []
    found = False
    for step in steps:
        ours, right = (run.draws(step) for run in runs)
        found = found or bool(ours or right)
        wrong += [f"{name}, step {step}" for name in {**right, **ours} if ours.get(name) != right.get(name)]
    where = (wrong[0] if wrong else "") if found else "no random layer"
    return Row("dropout masks", against, float(len(wrong)) if found else None, where, 0)


def _difference(ours: Tensor | None, right: Tensor | None) -> Tensor:
    if ours is None or right is None:
        present = right if ours is None else ours
        assert present is not None
        return present
    difference = (ours - right).abs().nan_to_num(nan=math.inf, posinf=math.inf)
    return difference.masked_fill((ours == right) | (ours.isnan() & right.isnan()), 0.0)


def _largest(tensor: Tensor) -> float:
    return float(tensor.abs().max()) if tensor.numel() else 0.0
