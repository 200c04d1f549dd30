"""Looks for the best way to train a model on some devices: schedule, micro-batches, recompute and balance together.

Every combination that is allowed gets its best balance (`optimum`) and an estimate by closed form; the most promising
ones are then simulated, action by action, and walked through for their memory. What is said of a plan is always what
the simulator and the memory model say of its schedule, never the estimate.
"""

from collections.abc import Sequence
from itertools import permutations

from pipetrain.garbage import no_garbage_collection
from pipetrain.sim.balance import even
from pipetrain.sim.draft import Draft, drafts
from pipetrain.sim.forecast import AUTO, Choice, Forecast, Setting, forecast
from pipetrain.sim.nowhere import does_not_fit

# How many of the estimates are simulated, and how many actions all of these may have together at most.
_MOST_SIMULATED, _MOST_ACTIONS = 24, 1_000_000
_MOST_CLIMBED = 300_000  # actions of all neighbours of a balance together, where it is improved by simulating them


def plans(setting: Setting, choices: Sequence[Choice]) -> list[Forecast]:
    """The forecasts of the best choices, and of the best one with each schedule, number of micro-batches and so on.

    The best one comes first: shorter steps, then less memory, then the given order; behind them what does not fit.

    Raises:
        ConfigError: if no choice can be cut into stages.
        FitsNowhere: if none fits the memory of the devices.
    """
    found: list[Forecast] = []
    actions = 0
    with no_garbage_collection():
        for draft in _promising(drafts(setting, choices)):
            actions += 4 * len(draft.balance) * draft.choice.num_microbatches
            if found and actions > _MOST_ACTIONS:
                break
            found.append(forecast(setting, draft.choice, draft.balance))
        found = [_improved(setting, each) for each in found]
    if not any(each.fits for each in found):
        raise does_not_fit(setting, choices, sum(found[0].balance))
    return sorted(found, key=lambda each: (*_order(each), max(each.rank_bytes)))


def _promising(ordered: Sequence[Draft]) -> list[Draft]:
    """The best ones, in their order; among the first of them one for each value that something can have."""
    of_values: dict[object, Draft] = {}
    for draft in ordered:
        choice = draft.choice
        kinds = ("schedule", choice.schedule), ("each", choice.stages_per_rank), ("recompute", choice.recompute)
        for value in (*kinds, ("microbatches", choice.num_microbatches)):
            of_values.setdefault(value, draft)
    first = [draft for draft in ordered if any(draft is other for other in of_values.values())]
    others = [draft for draft in ordered if all(draft is not other for other in first)]
    return [*first, *others[:_MOST_SIMULATED]]


def _improved(setting: Setting, given: Forecast) -> Forecast:
    """Where a rank has several stages, the slowest stage is not what counts: layers change stages, one at a time, from
    the best balance of single stages or from the even one on, for as long as steps become shorter."""
    choice = given.choice
    actions = 4 * choice.num_microbatches * len(given.balance) ** 3
    if choice.balance != AUTO or choice.stages_per_rank == 1 or actions > _MOST_CLIMBED:
        return given
    as_even = forecast(setting, choice, even(sum(given.balance), len(given.balance)))
    best = min(given, as_even, key=_order)
    while True:
        around = [forecast(setting, choice, balance) for balance in _neighbours(best.balance)]
        nearest = min(around, key=_order, default=best)
        if _order(nearest) >= _order(best):
            return best
        best = nearest


def _order(each: Forecast) -> tuple[bool, float]:
    return not each.fits, each.step_s if each.fits else max(each.rank_bytes)


def _neighbours(balance: tuple[int, ...]) -> list[tuple[int, ...]]:
    """With one layer less on one stage and one more on another."""
    moves = [(a, b) for a, b in permutations(range(len(balance)), 2) if balance[a] > 1]
    return [tuple(n - (s == a) + (s == b) for s, n in enumerate(balance)) for a, b in moves]
