"""The best balance beside torchgpipe's heuristic, on lists of random costs. Nothing is timed but the search itself."""

import random
import statistics
import time
from pathlib import Path
from typing import Any

from measure import cell
from torchgpipe.balance import blockpartition

from pipetrain.sim.optimum import Chain, Seat, fastest, slowest_s

LISTS = 2000
LARGE = ((1_000, 128), (10_000, 1_024))  # layers, stages


def _random_list(number: int) -> tuple[list[int], int]:
    """Costs of 8 to 40 layers, with a few heavy ones, and 2 to 8 stages."""
    draw = random.Random(number)
    layers = range(draw.randint(8, 40))
    costs = [draw.randint(1, 100) if draw.random() < 0.9 else draw.randint(100, 1000) for _ in layers]
    return costs, draw.randint(2, 8)


def _ratios() -> list[float]:
    """The slowest stage of torchgpipe's balance over that of the best one."""
    found = []
    for number in range(LISTS):
        costs, stages = _random_list(number)
        chain, seats = Chain([float(cost) for cost in costs]), [Seat()] * stages
        best_s = slowest_s(chain, seats, fastest(chain, seats))
        found.append(max(map(sum, blockpartition.solve(costs, partitions=stages))) / best_s)
    return found


def _search_s(layers: int, stages: int) -> float:
    draw = random.Random(0)
    chain, seats = Chain([draw.uniform(0.5, 2.0) for _ in range(layers)]), [Seat()] * stages
    started = time.perf_counter()
    fastest(chain, seats)
    return time.perf_counter() - started


def measure(folder: Path) -> dict[str, Any]:
    """How far the heuristic is off, and what the search takes."""

    def everything() -> dict[str, Any]:
        ratios = _ratios()
        return {
            "mean": statistics.mean(ratios),
            "worst": max(ratios),
            "optimal": sum(ratio <= 1 for ratio in ratios) / len(ratios),
            "search_s": {f"{layers} layers, {stages} stages": _search_s(layers, stages) for layers, stages in LARGE},
        }

    found: dict[str, Any] = cell(folder, "balance", everything)
    return found
