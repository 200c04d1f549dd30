"""Where no plan fits the memory of the devices: with how much of it, or on how many of them, one would."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

from pipetrain.errors import ConfigError
from pipetrain.schedule import ALWAYS
from pipetrain.sim.draft import chain_of, may_fit, seats_of
from pipetrain.sim.forecast import Choice, Setting, rank_bytes
from pipetrain.sim.optimum import leanest


class FitsNowhere(ConfigError):
    """No plan fits; the text names the leanest one, and what would be enough for it."""


@dataclass(frozen=True)
class _Need:
    """What a choice with its leanest balance needs."""

    choice: Choice
    rank_bytes: tuple[int, ...]
    short_bytes: float  # on the rank that lacks most; what it has left counts as less than nothing


def does_not_fit(setting: Setting, choices: Sequence[Choice], num_layers: int) -> FitsNowhere:
    """
    Args:
        choices: at least one of which can be cut into stages.
    """
    choices = _lean(choices)
    least = _least(setting, choices)
    assert least is not None, "such as were tried before"
    short_of = [need - device.memory_bytes for need, device in zip(least.rank_bytes, setting.devices, strict=True)]
    rank = max(range(len(short_of)), key=short_of.__getitem__)
    count = _enough_devices(setting, choices, num_layers)
    choice, needs, has = least.choice, least.rank_bytes, setting.devices[rank].memory_bytes
    return FitsNowhere(
        f"no plan fits: the leanest one, schedule={choice.schedule} recompute={choice.recompute} "
        f"micro_batches={choice.num_microbatches}, needs {size(needs[rank])} on device {rank}, which has {size(has)}. "
        f"Devices with {size(max(needs))} each would be enough"
        + (f"; or {count} such devices" if count is not None else _one_layer(setting, choices, num_layers))
    )


def _one_layer(setting: Setting, choices: Sequence[Choice], num_layers: int) -> str:
    """That a layer is too large by itself, where one is."""
    alone = [
        replace(choice, balance=(1,) * num_layers)
        for choice in choices
        if isinstance(choice.recompute, str) and choice.stages_per_rank == 1
    ]
    least = _least(replace(setting, devices=setting.devices[:1] * num_layers), alone)
    if least is None or least.short_bytes <= 0:
        return ""
    largest = max(range(num_layers), key=least.rank_bytes.__getitem__)
    name = setting.model_of(least.choice.num_microbatches).layers[largest].name
    return f"; more devices would not: layer {name} alone needs {size(least.rank_bytes[largest])}"


def _least(setting: Setting, choices: Sequence[Choice]) -> _Need | None:
    """The one that lacks least."""
    found = list[_Need]()
    for choice in choices:
        with suppress(ConfigError):  # fewer layers than stages
            found.append(_need(setting, choice))
    return min(found, key=lambda need: need.short_bytes, default=None)


def _lean(choices: Sequence[Choice]) -> list[Choice]:
    """Of each schedule and number of stages the one with the smallest micro-batches, and recompute: the others need
    more."""
    of_kinds: dict[tuple[str, int], Choice] = {}
    for choice in sorted(choices, key=lambda choice: (choice.recompute != ALWAYS, -choice.num_microbatches)):
        of_kinds.setdefault((choice.schedule, choice.stages_per_rank), choice)
    return list(of_kinds.values())


def _need(setting: Setting, choice: Choice) -> _Need:
    """Raises:
    ConfigError: if there are fewer layers than stages.
    """
    model = setting.model_of(choice.num_microbatches)
    is_free = isinstance(choice.balance, str)
    balance = leanest(chain_of(setting, model, choice), seats_of(setting, model, choice)) if is_free else choice.balance
    needs = rank_bytes(setting, choice, balance)  # type: ignore[arg-type]
    short = max(need - device.memory_bytes for need, device in zip(needs, setting.devices, strict=True))
    return _Need(choice, tuple(needs), short)


def _enough_devices(setting: Setting, choices: Sequence[Choice], num_layers: int) -> int | None:
    """The smallest number of devices like the first one on which something fits, if there is one."""

    def is_enough(count: int) -> bool:
        more = replace(setting, devices=setting.devices[:1] * count)
        possible = (choice for choice in choices if may_fit(more, choice))
        return any(_need(more, choice).short_bytes <= 0 for choice in possible)

    if any(not isinstance(choice.balance, str) or not isinstance(choice.recompute, str) for choice in choices):
        return None  # a list is for the devices that there are
    low = len(setting.devices)  # is not enough
    high = low
    while not is_enough(high):
        if high == num_layers:
            return None
        low, high = high, min(2 * high, num_layers)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if is_enough(middle) else (middle, high)
    return high


def size(num_bytes: float) -> str:
    """
    >>> size(3 * 2**29), size(300)
    ('1.5 GiB', '0.293 KiB')
    """
    unit, name = next(((2**n, name) for n, name in ((30, "GiB"), (20, "MiB")) if num_bytes >= 2**n), (2**10, "KiB"))
    return f"{num_bytes / unit:.3g} {name}"
