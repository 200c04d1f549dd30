"""What a choice would do: one step simulated, and its memory walked through."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import accumulate, pairwise

from pipetrain.costs import Device, LayerCost, Link, ModelCost, StageCost
from pipetrain.schedule import NEVER, SELECTIVE, Kind, Schedule, generate, peak_half_way, peak_in_flight
from pipetrain.schedule.recompute import add_recompute
from pipetrain.sim.cut import Cut
from pipetrain.sim.memory import Memory, memory
from pipetrain.sim.simulate import simulate

_NO_WAY = Link()
AUTO, EVEN, LEAST_VARIANCE = "auto", "even", "least_variance"


@dataclass(frozen=True)
class Choice:
    """One way to train.

    Attributes:
        num_microbatches: of each replica.
        recompute: a policy for all stages, or one for each.
        num_steps: mini-batches between two drains, under a stale schedule.
        balance: layers of each stage, or how to find them: auto, even, least_variance.
        replicas: pipelines that share each mini-batch.
    """

    schedule: str
    stages_per_rank: int
    num_microbatches: int
    recompute: str | tuple[str, ...]
    balance: str | tuple[int, ...] = AUTO
    num_steps: int = 1
    replicas: int = 1


@dataclass(frozen=True)
class StageForecast:
    """What one stage would do in a step.

    Attributes:
        cost: of one micro-batch.
        idle_s: of its rank.
        memory: in the fullest moment of its rank.
    """

    cost: StageCost
    idle_s: float
    memory: Memory


@dataclass(frozen=True)
class Forecast:
    """What the simulator says of a choice.

    Attributes:
        rank_bytes: what each rank holds in its fullest moment.
        fits: whether all ranks have that much.
    """

    choice: Choice
    balance: tuple[int, ...]
    step_s: float
    bubble_fraction: float
    stages: tuple[StageForecast, ...]
    rank_bytes: tuple[int, ...]
    fits: bool


@dataclass(frozen=True)
class Setting:
    """What plans are made for.

    Attributes:
        model: the costs of all layers for micro-batches of so many samples.
        batch_size: samples of a mini-batch.
        devices: one for each rank.
        selected: for each layer, whether recompute=selective runs it again.
        engine_s: what every action takes beside its layers; it counts as waiting.
        process_bytes: what a rank holds before it has built its stage.
        stashes: whether stale schedules keep the weights of forwards for their backwards.
        locked: whether ouroboros has its shared matrix locked.
        replicas: of which this is one; see `of_one`.
        sums: what it takes to add up a message of two ranks.
    """

    model: Callable[[int], ModelCost]
    batch_size: int
    devices: tuple[Device, ...]
    link: Link
    selected: tuple[bool, ...]
    engine_s: float = 0.0
    process_bytes: int = 0
    stashes: bool = True
    locked: bool = False
    replicas: int = 1
    sums: Link = _NO_WAY

    def of_one(self, replicas: int) -> "Setting":
        """That of one of so many replicas, the one with the slowest devices and the largest share of the samples."""
        length = len(self.devices) // replicas
        same_place = [self.devices[place::length] for place in range(length)]
        devices = (
            Device(same[0].name, min(each.memory_bytes for each in same), max(each.slowness for each in same))
            for same in same_place
        )
        return replace(self, devices=tuple(devices), batch_size=-(-self.batch_size // replicas), replicas=replicas)

    def reduce_s(self, num_layers: int, num_bytes: int) -> float:
        """What it takes to add up the gradients of a stage over the replicas, in a ring, a message for each layer."""
        others = self.replicas - 1
        return others * (num_layers * self.sums.latency_s + 2 / self.replicas * num_bytes / self.sums.bytes_per_s)

    def model_of(self, num_microbatches: int) -> ModelCost:
        """Bytes of the largest of so many micro-batches, and their seconds on average."""
        sizes = sizes_of(self.batch_size, num_microbatches)
        largest = self.model(sizes[0])
        if len(sizes) == 1:
            return largest
        share = (self.batch_size % num_microbatches) / num_microbatches  # of large ones
        layers = zip(largest.layers, self.model(sizes[1]).layers, strict=True)
        return replace(largest, layers=tuple(_mean(large, small, share) for large, small in layers))


def sizes_of(batch_size: int, num_microbatches: int) -> list[int]:
    """Samples in so many micro-batches: two sizes where they do not come out even, the larger one first."""
    least, left = divmod(batch_size, num_microbatches)
    return [least + 1, least] if left else [least]


def samples_of(batch_size: int, choice: Choice) -> list[int]:
    """Those in the micro-batches of a choice."""
    return sizes_of(-(-batch_size // choice.replicas), choice.num_microbatches)


def _mean(large: LayerCost, small: LayerCost, share: float) -> LayerCost:
    seconds = {
        name: share * getattr(large, name) + (1 - share) * getattr(small, name)
        for name in ("forward_s", "backward_s", "input_s", "weight_s")
    }
    return replace(large, **seconds)


def forecast(setting: Setting, choice: Choice, balance: tuple[int, ...]) -> Forecast:
    """Simulates one step, or the steps between two drains, and walks through the memory.

    Args:
        setting: of one of the choice's replicas.
    """
    schedule = schedule_of(setting, choice, balance)
    cut = _cut(setting, choice, balance)
    homes = [setting.devices[rank] for rank in schedule.placement]
    sizes = cut.bytes()
    costs = [
        replace(cost, reduce_s=setting.reduce_s(num_layers, size.parameters))
        for cost, num_layers, size in zip(
            cut.costs(split=schedule.is_split, slowness=[home.slowness for home in homes]), balance, sizes, strict=True
        )
    ]
    spans = simulate(schedule, [_in_engine(cost, setting.engine_s) for cost in costs], setting.link)
    busy_s = [0.0] * schedule.num_ranks
    for span in spans:
        own_s = 0.0 if span.action.kind is Kind.UPDATE else setting.engine_s
        busy_s[schedule.placement[span.action.stage]] += span.seconds - own_s
    used = memory(schedule, sizes, stashes=setting.stashes)
    needs = _rank_bytes(setting, schedule, used)
    step_s = max(span.end_s for span in spans) / schedule.num_steps
    busy_s = [seconds / schedule.num_steps for seconds in busy_s]
    return Forecast(
        choice=choice,
        balance=balance,
        step_s=step_s,
        bubble_fraction=1 - sum(busy_s) / (schedule.num_ranks * step_s),
        stages=tuple(
            StageForecast(cost, step_s - busy_s[rank], used[s])
            for s, (cost, rank) in enumerate(zip(costs, schedule.placement, strict=True))
        ),
        rank_bytes=tuple(needs),
        fits=_is_enough(setting, needs),
    )


def _in_engine(cost: StageCost, engine_s: float) -> StageCost:
    return replace(
        cost,
        forward_s=cost.forward_s + engine_s,
        backward_s=cost.backward_s + engine_s,
        backward_weight_s=cost.backward_weight_s + engine_s,
        recompute_s=cost.recompute_s + engine_s,
    )


def fits(setting: Setting, choice: Choice, balance: tuple[int, ...]) -> bool:
    """Whether every rank has what it needs in its fullest moment."""
    return _is_enough(setting, rank_bytes(setting, choice, balance))


def rank_bytes(setting: Setting, choice: Choice, balance: tuple[int, ...]) -> list[int]:
    """What each rank holds in its fullest moment."""
    schedule = schedule_of(setting, choice, balance)
    used = memory(schedule, _cut(setting, choice, balance).bytes(), stashes=setting.stashes)
    return _rank_bytes(setting, schedule, used)


def _rank_bytes(setting: Setting, schedule: Schedule, used: Sequence[Memory]) -> list[int]:
    needs = [setting.process_bytes] * schedule.num_ranks
    for stage, rank in enumerate(schedule.placement):
        needs[rank] += used[stage].total
    return needs


def _is_enough(setting: Setting, needs: Sequence[int]) -> bool:
    return all(need <= device.memory_bytes for need, device in zip(needs, setting.devices, strict=True))


def _cut(setting: Setting, choice: Choice, balance: tuple[int, ...]) -> Cut:
    again = [
        selected or policy != SELECTIVE
        for policy, layers in zip(policies_of(choice, len(balance)), _pieces(setting.selected, balance), strict=True)
        for selected in layers
    ]
    return Cut(setting.model_of(choice.num_microbatches), balance, tuple(again))


def schedule_of(setting: Setting, choice: Choice, balance: tuple[int, ...]) -> Schedule:
    """The compute of a choice's schedule, with its recomputes; a stage with no layer to run again has none."""
    policies = [
        NEVER if policy == SELECTIVE and not any(layers) else policy
        for policy, layers in zip(policies_of(choice, len(balance)), _pieces(setting.selected, balance), strict=True)
    ]
    return add_recompute(compute_of(setting, choice), policies)


def policies_of(choice: Choice, num_stages: int) -> Sequence[str]:
    """Of each stage."""
    return [choice.recompute] * num_stages if isinstance(choice.recompute, str) else choice.recompute


def _pieces(values: Sequence[bool], balance: Sequence[int]) -> list[Sequence[bool]]:
    return [values[a:b] for a, b in pairwise((0, *accumulate(balance)))]


def compute_of(setting: Setting, choice: Choice) -> Schedule:
    """The same without them."""
    return _compute(*_key(setting, choice))


def peaks_of(setting: Setting, choice: Choice) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Of each stage the most micro-batches in flight, and half way back: `peak_in_flight` and `peak_half_way`."""
    return _peaks(*_key(setting, choice))


def _key(setting: Setting, choice: Choice) -> tuple[str, int, int, int, int, bool]:
    """What a schedule's compute depends on."""
    sizes = len(setting.devices), choice.num_microbatches, choice.stages_per_rank, choice.num_steps
    return choice.schedule, *sizes, setting.locked


@lru_cache(maxsize=8)
def _compute(
    name: str, num_ranks: int, num_microbatches: int, stages_per_rank: int, num_steps: int, locked: bool
) -> Schedule:
    return generate(name, num_ranks, num_microbatches, stages_per_rank, num_steps, locked=locked)


@lru_cache(maxsize=1024)
def _peaks(
    name: str, num_ranks: int, num_microbatches: int, stages_per_rank: int, num_steps: int, locked: bool
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    schedule = _compute(name, num_ranks, num_microbatches, stages_per_rank, num_steps, locked)
    return peak_in_flight(schedule), peak_half_way(schedule)
