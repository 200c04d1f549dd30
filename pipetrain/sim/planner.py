"""Looks for the best way to train a model on some devices: replicas, schedule, micro-batches, recompute and balance
together.

Every combination that is allowed gets its best balance (`optimum`) and an estimate by closed form; the most promising
ones are then simulated, action by action, and walked through for their memory. What is said of a plan is always what
the simulator and the memory model say of its schedule, never the estimate.
"""

from collections.abc import Sequence
from itertools import permutations

from pipetrain.errors import ConfigError
from pipetrain.garbage import no_garbage_collection
from pipetrain.sim.balance import even
from pipetrain.sim.draft import Draft, drafts
from pipetrain.sim.forecast import AUTO, Choice, Forecast, Setting, forecast
from pipetrain.sim.nowhere import does_not_fit

# How many of the estimates are simulated, and how many actions all of these may have together at most.
_MOST_SIMULATED, _MOST_ACTIONS = 24, 2_000_000
# Where balances are improved by simulating their neighbours: actions of all of these together, and how far from the
# best plan one may be from which that starts.
_MOST_CLIMBED, _IN_REACH = 600_000, 1.2


def plans(setting: Setting, choices: Sequence[Choice]) -> list[Forecast]:
    """The forecasts of the best choices, and of the best one with each schedule, number of micro-batches and so on.

    The best one comes first: shorter steps, then less memory, then the given order; behind them what does not fit.

    Raises:
        ConfigError: if no choice can be cut into stages.
        FitsNowhere: if none fits the memory of the devices.
    """
    of_replicas: dict[int, list[Choice]] = {}
    for choice in choices:
        of_replicas.setdefault(choice.replicas, []).append(choice)
    found: list[Forecast] = []
    problems: list[ConfigError] = []
    with no_garbage_collection():
        for replicas, some in of_replicas.items():
            try:
                found += _of_one(setting.of_one(replicas), some, share=1 / len(of_replicas))
            except ConfigError as error:
                problems.append(error)
    if not found:
        raise problems[0]
    if not any(each.fits for each in found):
        fewest = min(each.choice.replicas for each in found)  # and so the most devices for a model
        raise does_not_fit(setting.of_one(fewest), of_replicas[fewest], sum(found[0].balance))
    return sorted(found, key=lambda each: (*_order(each), max(each.rank_bytes)))


def _of_one(setting: Setting, choices: Sequence[Choice], share: float) -> list[Forecast]:
    """
    Args:
        setting: of one of the choices' replicas.
        share: of all that may be simulated.
    """
    found: list[Forecast] = []
    actions = 0
    for draft in _promising(drafts(setting, choices)):
        actions += _actions(draft.choice, len(draft.balance))
        if any(each.fits for each in found) and actions > share * _MOST_ACTIONS:
            break  # but not before there is one that fits: what drafts know of memory is less than the truth
        found.append(forecast(setting, draft.choice, draft.balance))
    return _all_improved(setting, found, int(share * _MOST_CLIMBED))


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


def _all_improved(setting: Setting, found: Sequence[Forecast], left: int) -> list[Forecast]:
    """Where a rank has several stages, the slowest stage is not what counts: layers change stages for as long as steps
    become shorter. The most promising plans come first.

    Args:
        left: the actions that may be simulated for it.
    """
    ordered = sorted(found, key=_order)
    best, improved = ordered[0], list[Forecast]()
    for each in ordered:
        choice = each.choice
        is_in_reach = not best.fits or each.step_s <= _IN_REACH * best.step_s
        has_several = len(each.balance) > len(setting.devices)
        if choice.balance == AUTO and has_several and is_in_reach:
            each, left = _improved(setting, each, left)
        improved.append(each)
    return improved


def _improved(setting: Setting, given: Forecast, left: int) -> tuple[Forecast, int]:
    """From the best balance of single stages or from the even one on.

    Args:
        left: the actions that may be simulated for it.

    Returns:
        The best balance that was found, and the actions that are left.
    """
    num_layers, num_stages = sum(given.balance), len(given.balance)
    actions = _actions(given.choice, num_stages)
    best = min(given, forecast(setting, given.choice, even(num_layers, num_stages)), key=_order)
    size = max(1, num_layers // num_stages // 4)
    while size:
        around = _neighbours(best.balance, size)
        left -= actions * len(around)
        if left < 0:
            break
        nearest = min((forecast(setting, given.choice, balance) for balance in around), key=_order, default=best)
        if _order(nearest) < _order(best):
            best = nearest
        else:
            size //= 2
    return best, left


def _actions(choice: Choice, num_stages: int) -> int:
    return 4 * num_stages * choice.num_microbatches * choice.num_steps


def _order(each: Forecast) -> tuple[bool, float]:
    return not each.fits, each.step_s if each.fits else max(each.rank_bytes)


def _neighbours(balance: tuple[int, ...], size: int) -> list[tuple[int, ...]]:
    """With so many layers less on one stage and more on another."""
    moves = [(a, b) for a, b in permutations(range(len(balance)), 2) if balance[a] > size]
    return [tuple(n + size * ((s == b) - (s == a)) for s, n in enumerate(balance)) for a, b in moves]
