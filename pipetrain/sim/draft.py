"""A draft of every choice: its best balance, and what a step would take by closed form."""

import math
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate, pairwise

from pipetrain.costs import LayerCost, ModelCost
from pipetrain.errors import ConfigError
from pipetrain.schedule import ALWAYS, EXCEPT_LAST, NEVER, SELECTIVE, Kind, Schedule
from pipetrain.sim.balance import even
from pipetrain.sim.cut import crossing_bytes
from pipetrain.sim.forecast import EVEN, LEAST_VARIANCE, Choice, Setting, compute_of, fits, peaks_of, policies_of
from pipetrain.sim.optimum import Chain, Seat, fastest, fits_at_all, fits_memory, leanest, least_variance

# Stages have more or less than equal shares of their rank's memory: balances for some are walked through, the fastest
# one first, where a schedule has no more actions than this.
_SHARES, _MOST_WALKED = (2.0, 1.5, 1.25, 1.0, 0.85), 20_000


@dataclass(frozen=True)
class Draft:
    """A choice with its balance, not simulated yet."""

    choice: Choice
    balance: tuple[int, ...]
    fits: bool
    estimate_s: float


def drafts(setting: Setting, choices: Sequence[Choice]) -> list[Draft]:
    """In the order in which they look good.

    Raises:
        ConfigError: if no choice can be cut into stages.
    """
    found: list[Draft] = []
    problems: list[ConfigError] = []
    unlimited: dict[object, tuple[int, ...]] = {}  # balances for devices of any memory, which many choices share
    for choice in choices:
        try:
            found.append(_draft(setting, choice, unlimited))
        except ConfigError as error:
            problems.append(error)
    if not found:
        raise problems[0]
    return sorted(found, key=lambda draft: (not draft.fits, draft.estimate_s))


def _draft(setting: Setting, choice: Choice, unlimited: dict[object, tuple[int, ...]]) -> Draft:
    """Raises:
    ConfigError: if there are fewer layers than stages.
    """
    model = setting.model_of(choice.num_microbatches)
    balance, fits = _balance(setting, model, choice, unlimited)
    return Draft(choice, balance, fits, _estimate_s(setting, model, choice, balance))


def _balance(
    setting: Setting, model: ModelCost, choice: Choice, unlimited: dict[object, tuple[int, ...]]
) -> tuple[tuple[int, ...], bool]:
    """The balance of a choice, and whether it fits the memory of the devices."""
    if not isinstance(choice.balance, str):
        return choice.balance, True
    chain, seats = chain_of(setting, model, choice), seats_of(setting, model, choice)
    if choice.balance == EVEN and len(model.layers) >= len(seats):
        return even(len(model.layers), len(seats)), True
    best = least_variance if choice.balance == LEAST_VARIANCE else fastest
    speeds = tuple((seat.slowness, policy) for seat, policy in zip(seats, _policies(setting, choice), strict=True))
    wanted = (choice.num_microbatches, tuple(chain.seconds), choice.balance, speeds)
    if wanted not in unlimited:
        unlimited[wanted] = best(chain, [replace(seat, memory_bytes=math.inf) for seat in seats])
    if 4 * len(seats) * choice.num_microbatches > _MOST_WALKED:  # what the chain says of memory must be enough
        shares: Sequence[float] = (1.0,)
        is_enough = partial(fits_memory, chain, seats)
    else:
        shares, is_enough = _SHARES, partial(fits, setting, choice)
    if is_enough(unlimited[wanted]):
        return unlimited[wanted], True
    if not may_fit(setting, choice):
        return unlimited[wanted], False
    for share in shares:
        with suppress(ConfigError):
            found = best(chain, _with_memory(seats, share))
            if is_enough(found):
                return found, True
    found = leanest(chain, seats)
    return found, is_enough(found)


def may_fit(setting: Setting, choice: Choice) -> bool:
    """Whether there is a balance that is worth a walk through its memory."""
    model = setting.model_of(choice.num_microbatches)
    return fits_at_all(chain_of(setting, model, choice), _with_memory(seats_of(setting, model, choice), _SHARES[0]))


def _with_memory(seats: Sequence[Seat], share: float) -> list[Seat]:
    return [replace(seat, memory_bytes=share * seat.memory_bytes) for seat in seats]


def chain_of(setting: Setting, model: ModelCost, choice: Choice) -> Chain:
    """The layers as balancing sees them, on the first stage."""
    return _chain(setting, model, compute_of(setting, choice).is_split, _policies(setting, choice)[0])


def _policies(setting: Setting, choice: Choice) -> list[str]:
    """Of each stage always, selective or never. `except_last` is always, but for a last stage where every micro-batch
    turns round."""
    schedule = compute_of(setting, choice)
    found = [ALWAYS if policy == EXCEPT_LAST else policy for policy in policies_of(choice, schedule.num_stages)]
    if policies_of(choice, schedule.num_stages)[-1] == EXCEPT_LAST and _all_turn_round(schedule):
        found[-1] = NEVER
    return found


def _chain(setting: Setting, model: ModelCost, split: bool, policy: str) -> Chain:
    """Every stage has room for all recomputed graphs that it holds at once."""
    redone = [policy == ALWAYS or (policy == SELECTIVE and selected) for selected in setting.selected]
    of_outputs = [0] * len(model.layers)
    for value in model.values:
        if value.layer >= 0 and value.keepers:
            of_outputs[value.layer] += value.num_bytes
    graphs = [layer.graph_bytes + outputs for layer, outputs in zip(model.layers, of_outputs, strict=True)]
    crossing = crossing_bytes(model)
    return Chain(
        seconds=[_seconds(layer, again, split) for layer, again in zip(model.layers, redone, strict=True)],
        border_s=[2 * n / setting.link.bytes_per_s for n in crossing[:-1]],
        kept_bytes=[2 * layer.parameter_bytes + layer.optimizer_bytes for layer in model.layers],
        saved_bytes=[graph * (not again) for graph, again in zip(graphs, redone, strict=True)],
        redone_bytes=[graph * again for graph, again in zip(graphs, redone, strict=True)],
        input_bytes=[2 * n for n in crossing[:-1]],
    )


def _seconds(layer: LayerCost, is_recomputed: bool, split: bool) -> float:
    backward_s = layer.input_s + layer.weight_s if split else layer.backward_s
    return layer.forward_s * (1 + is_recomputed) + backward_s


def seats_of(setting: Setting, model: ModelCost, choice: Choice) -> list[Seat]:
    """For each stage its rank's device, of whose time and memory the stages on it have equal shares."""
    schedule = compute_of(setting, choice)
    shared = Counter(schedule.placement)
    fewest = min(shared.values())
    working = max(max(layer.forward_bytes, layer.backward_bytes) for layer in model.layers)
    policies = _policies(setting, choice)
    chains = {p: _chain(setting, model, schedule.is_split, p) for p in {*policies} - {policies[0]}}
    return [
        Seat(
            slowness=setting.devices[rank].slowness * shared[rank] / fewest,
            memory_bytes=(setting.devices[rank].memory_bytes - setting.process_bytes - working) / shared[rank],
            in_flight=in_flight,
            redone=half_way,
            layers=chains.get(policy),
        )
        for rank, in_flight, half_way, policy in zip(
            schedule.placement, *peaks_of(setting, choice), policies, strict=True
        )
    ]


def _estimate_s(setting: Setting, model: ModelCost, choice: Choice, balance: Sequence[int]) -> float:
    """The slowest rank at work all the time, and the way of the first micro-batch to it and of the last one from it,
    which the steps of a stale schedule share.

    That way is a (K - 1) / K of a micro-batch's through the whole model, a V-th of it where a rank has V stages, and a
    third of that where backwards are split (where forwards and halves take as long). The gradients of the stage with
    most parameters go to the other replicas behind that.
    """
    num_ranks, each = len(setting.devices), choice.stages_per_rank
    schedule = compute_of(setting, choice)
    chain, seats = chain_of(setting, model, choice), seats_of(setting, model, choice)
    busy_s = [0.0] * num_ranks
    stages = zip(schedule.placement, seats, accumulate(balance), balance, _policies(setting, choice), strict=True)
    for rank, seat, end, number, policy in stages:
        actions = 2 + (policy != NEVER) + schedule.is_split  # of a micro-batch
        seconds = (seat.layers or chain).seconds[end - number : end]
        busy_s[rank] += setting.devices[rank].slowness * sum(seconds) + actions * setting.engine_s
    slowest = max(device.slowness for device in setting.devices)
    through_s = sum(layer.forward_s + layer.backward_s for layer in model.layers) * slowest
    between_s = setting.link.latency_s + setting.engine_s
    way_s = (through_s + 2 * len(balance) * between_s) * (num_ranks - 1) / num_ranks / each
    ends = list(accumulate(balance))
    reduce_s = max(
        setting.reduce_s(number, sum(layer.parameter_bytes for layer in model.layers[end - number : end]))
        for end, number in zip(ends, balance, strict=True)
    )
    busiest_s = choice.num_microbatches * max(busy_s)
    return busiest_s + way_s / (3 if schedule.is_split else choice.num_steps) + reduce_s


def _all_turn_round(schedule: Schedule) -> bool:
    """Whether every micro-batch goes back as soon as it has reached the end, so that `except_last` spares it there."""
    last = schedule.num_stages - 1
    row = schedule.actions[schedule.placement[last]]
    turning = [b for a, b in pairwise(row) if a.kind is Kind.FORWARD and a.stage == last and b[1:] == a[1:]]
    return len(turning) == schedule.num_microbatches * schedule.num_steps
