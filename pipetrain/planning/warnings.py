"""What a planner would tell a colleague who is about to start a plan."""

from collections.abc import Sequence
from itertools import accumulate

from pipetrain.sim.forecast import Forecast, Setting, compute_of

_DOMINATES = 1.2  # times as long as the others on average
_FULL = 0.9  # of a device's memory: what was not counted must fit as well
_LONG_BUBBLE = 0.3


def warnings_of(setting: Setting, plan: Forecast, layers: Sequence[str]) -> list[str]:
    """
    Args:
        layers: their names.
    """
    slow = _dominating(setting, plan, layers) or _waiting(plan)  # for a stage that dominates the others wait anyway
    return [*slow, *_full(setting, plan)]


def _dominating(setting: Setting, plan: Forecast, layers: Sequence[str]) -> list[str]:
    """The rank that works longest, where the others do much less."""
    placement = compute_of(setting, plan.choice).placement
    busy_s = [0.0] * len(setting.devices)
    own: list[list[int]] = [[] for _ in setting.devices]  # layers
    for stage, rank, end, number in zip(plan.stages, placement, accumulate(plan.balance), plan.balance, strict=True):
        cost = stage.cost
        busy_s[rank] += cost.forward_s + cost.recompute_s + cost.backward_s + cost.backward_weight_s
        own[rank] += range(end - number, end)
    if len(busy_s) == 1:
        return []
    slowest = max(range(len(busy_s)), key=busy_s.__getitem__)
    others_s = (sum(busy_s) - busy_s[slowest]) / (len(busy_s) - 1)
    if busy_s[slowest] <= _DOMINATES * others_s:
        return []
    model = setting.model_of(plan.choice.num_microbatches)
    longest = max(own[slowest], key=lambda n: model.layers[n].forward_s + model.layers[n].backward_s)
    who = f"stage {slowest}" if len(placement) == len(busy_s) else f"device {slowest}"
    times = f"{who} works {busy_s[slowest] / others_s:.2f} times as long as the others on average"
    if len(own[slowest]) == 1:
        return [f"{times}, and it is one layer: {layers[longest]}"]
    return [f"{times}; its longest layer is {layers[longest]}"]


def _full(setting: Setting, plan: Forecast) -> list[str]:
    shares = [need / device.memory_bytes for need, device in zip(plan.rank_bytes, setting.devices, strict=True)]
    fullest = max(range(len(shares)), key=shares.__getitem__)
    if shares[fullest] <= _FULL:
        return []
    return [
        f"device {fullest} will be {shares[fullest]:.0%} full; recompute=always or more micro_batches need less memory"
    ]


def _waiting(plan: Forecast) -> list[str]:
    if plan.bubble_fraction <= _LONG_BUBBLE or len(plan.balance) == 1:
        return []
    number = plan.choice.num_microbatches
    return [
        f"devices wait {plan.bubble_fraction:.0%} of the time, with {number} micro-batch{'es' if number > 1 else ''} "
        f"for {len(plan.balance)} stages; where they are not open yet, micro_batches=auto schedule=auto tell what helps"
    ]
