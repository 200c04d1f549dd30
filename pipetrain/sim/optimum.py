"""The best balance: the cut of the layers at which the slowest stage is fastest, and every stage fits its device.

Exact, by threshold: whether some cut keeps a limit is decided by looking at all of them at once, from the last stage to
the first, and the least limit is found by bisection. If costs only grew with the layers, a greedy walk would do; with
communication at the borders, devices of different speeds, and inputs that a stage keeps, it would not be exact.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipetrain.errors import ConfigError

_Array = NDArray[np.float64]
_ROUNDING = 1e-12  # what sums in another order may differ by: windows are that much wider than they need to be


@dataclass(frozen=True)
class Chain:
    """The layers of a model in order, n of them, as balancing sees them. What is left out costs nothing.

    Attributes:
        seconds: of each layer, for all that is done for one micro-batch.
        border_s: for each layer, what the stages on both sides of a border in front of it spend on the messages. (The
            first one is the begin of the model, where nothing is sent.)
        kept_bytes: of each layer, whatever is in flight: weights, gradients, optimizer state.
        saved_bytes: of each layer, for each micro-batch in flight.
        redone_bytes: of each layer, for each graph that a recompute has made and that is still needed.
        input_bytes: for each layer, what a stage that begins with it keeps for each micro-batch in flight.
    """

    seconds: Sequence[float]
    border_s: Sequence[float] | None = None
    kept_bytes: Sequence[float] | None = None
    saved_bytes: Sequence[float] | None = None
    redone_bytes: Sequence[float] | None = None
    input_bytes: Sequence[float] | None = None


@dataclass(frozen=True)
class Seat:
    """Where a stage would run.

    Attributes:
        slowness: seconds that it takes for one second of a layer.
        memory_bytes: what it has for a stage.
        in_flight: micro-batches that the stage holds at once.
        redone: those of them whose graphs, where they are made by a recompute, it holds at once.
        layers: seconds and bytes as they are here, where they are others than on most seats: without recompute, say.
    """

    slowness: float = 1.0
    memory_bytes: float = math.inf
    in_flight: int = 1
    redone: int = 1
    layers: Chain | None = None


def fastest(chain: Chain, seats: Sequence[Seat]) -> tuple[int, ...]:
    """The number of layers of each stage at which the slowest one takes the least time.

    Among equally good ones it is the most even: that with the least sum of squares of the stages' seconds, which is
    GPipe's criterion (least variance), and then with the most layers on the first stage, on the second, and so on.

    Raises:
        ConfigError: if there are fewer layers than stages, or no cut fits the devices' memory.
    """
    _check_layers(chain, seats)
    stages = _Stages(chain, seats)
    low = stages.least_s()
    high = _near(stages, low)
    while high > 0 and (found := stages.keeps(math.nextafter(high, 0.0))) is not None:
        high = stages.slowest_s(found)
        middle = (low + high) / 2
        if (found := stages.keeps(middle)) is None:
            low = middle
        else:
            high = stages.slowest_s(found)
    best = stages.most_even(high)
    assert best is not None, "the limit was kept before"
    return best


def least_variance(chain: Chain, seats: Sequence[Seat]) -> tuple[int, ...]:
    """The balance with the least sum of squares of the stages' seconds, whether or not its slowest stage is fastest.

    That is GPipe's criterion ("minimize the variance in the estimated costs of all cells", Huang et al. 2019, section
    2.2). Ties and errors are those of `fastest`.
    """
    found = fastest(chain, seats)
    stages = _Stages(chain, seats)
    squares, number = sum(x * x for x in stages.all_s(found)), len(seats)
    # A stage of t seconds leaves at least total - t to the others, whose squares are least where they are equal.
    total = stages.total_s()
    limit = total / number + math.sqrt((number - 1) / number * max(0.0, squares - total * total / number))
    best = stages.most_even(max(limit * (1 + 1e-9), stages.slowest_s(found)))
    assert best is not None, "the fastest one is within the limit"
    return best


def leanest(chain: Chain, seats: Sequence[Seat]) -> tuple[int, ...]:
    """The balance whose stages all need the least share of their devices' memory, however long they take.

    To a thousandth; of those the one whose slowest stage is fastest.

    Raises:
        ConfigError: if there are fewer layers than stages.
    """
    _check_layers(chain, seats)

    def scaled(factor: float) -> list[Seat]:
        return [replace(seat, memory_bytes=max(seat.memory_bytes, 1.0) * factor) for seat in seats]

    def try_with(factor: float) -> tuple[int, ...] | None:
        return _Stages(chain, scaled(factor)).keeps(math.inf)

    low, high = 0.0, 1.0
    while try_with(high) is None:
        low, high = high, 2 * high
    while high - low > 1e-3 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if try_with(middle) is None else (low, middle)
    return fastest(chain, scaled(high))


def _check_layers(chain: Chain, seats: Sequence[Seat]) -> None:
    if len(chain.seconds) < len(seats):
        raise ConfigError(
            f"{len(chain.seconds)} layers cannot be cut into {len(seats)} stages: each needs at least one layer"
        )


def fits_memory(chain: Chain, seats: Sequence[Seat], balance: Sequence[int]) -> bool:
    """Whether every stage of a balance fits its device."""
    return _Stages(chain, seats).fit(balance)


def fits_at_all(chain: Chain, seats: Sequence[Seat]) -> bool:
    """Whether the stages of some balance do."""
    return len(chain.seconds) >= len(seats) and _Stages(chain, seats).keeps(math.inf) is not None


def slowest_s(chain: Chain, seats: Sequence[Seat], balance: Sequence[int]) -> float:
    """Seconds of the slowest stage of a balance."""
    return _Stages(chain, seats).slowest_s(balance)


def _near(stages: "_Stages", low: float) -> float:
    """The slowest stage of some balance, not far above the least one."""
    most = stages.everything_s()
    gap = max(low, most * 1e-9) / 64
    while True:
        limit = min(low + gap, most)
        if (found := stages.keeps(limit)) is not None:
            return stages.slowest_s(found)
        if limit == most:
            raise ConfigError(
                "no balance fits the memory of the devices; use more devices, smaller micro-batches or more recompute"
            )
        gap *= 2


class _Stages:
    """The costs of all possible stages [i, j), from sums over the first layers."""

    def __init__(self, chain: Chain, seats: Sequence[Seat]) -> None:
        self._n, self._seats = len(chain.seconds), seats
        sums = {id(own): _sums_of(own) for own in (chain, *(seat.layers for seat in seats if seat.layers is not None))}
        of_seats = [sums[id(seat.layers or chain)] for seat in seats]
        self._time = [time for time, _, _, _ in of_seats]
        # Bytes of the first layers, as a stage in each seat would hold them but for its inputs. Seats share them.
        held: dict[object, _Array] = {}
        for seat, (_, kept, saved, redone) in zip(seats, of_seats, strict=True):
            if (key := (id(kept), seat.in_flight, seat.redone)) not in held:
                held[key] = kept + seat.in_flight * saved + seat.redone * redone
        self._held = [held[id(of[1]), seat.in_flight, seat.redone] for seat, of in zip(seats, of_seats, strict=True)]
        # Of each layer the least that it can take.
        self._least: _Array = np.min([np.diff(time) for time, _, _, _ in sums.values()], axis=0)
        self._input = np.array([*(chain.input_bytes or [0.0] * self._n), 0.0])
        self._border = np.array([*(chain.border_s or [0.0] * self._n), 0.0])
        self._border[0] = 0.0

    def seconds(self, s: int, i: Any, j: Any) -> Any:
        """Of stage `s` if it has the layers i to j - 1; numbers, or slices of equal length."""
        time = self._time[s]
        return (time[j] - time[i]) * self._seats[s].slowness + self._border[i] + self._border[j]

    def num_bytes(self, s: int, i: Any, j: Any) -> Any:
        """What it holds at most."""
        held = self._held[s]
        return held[j] - held[i] + self._seats[s].in_flight * self._input[i]

    def least_s(self) -> float:
        """No cut can be faster: all devices at work all the time, or the longest layer on the fastest device."""
        longest = float(self._least.max()) * min(seat.slowness for seat in self._seats)
        all_at_work = float(self._least.sum()) / sum(1 / seat.slowness for seat in self._seats)
        return max(longest, all_at_work) * (1 - _ROUNDING)

    def everything_s(self) -> float:
        """No stage takes longer."""
        slowest = max(seat.slowness for seat in self._seats)
        most = max(float(time[-1]) for time in self._time)
        return (most * slowest + 2 * float(self._border.max())) * (1 + _ROUNDING)

    def total_s(self) -> float:
        """All stages together take no less."""
        return float(self._least.sum()) * min(seat.slowness for seat in self._seats)

    def all_s(self, balance: Sequence[int]) -> list[float]:
        return [float(self.seconds(s, i, j)) for s, (i, j) in enumerate(_pieces(balance))]

    def slowest_s(self, balance: Sequence[int]) -> float:
        return max(self.all_s(balance))

    def fit(self, balance: Sequence[int]) -> bool:
        pieces = enumerate(_pieces(balance))
        return all(float(self.num_bytes(s, i, j)) <= self._seats[s].memory_bytes for s, (i, j) in pieces)

    def keeps(self, limit_s: float) -> tuple[int, ...] | None:
        """A balance whose stages all keep the limit and fit their memory; None if there is none."""
        return self._walk(limit_s, evenly=False)

    def most_even(self, limit_s: float) -> tuple[int, ...] | None:
        """Of all these the one with the least sum of squares."""
        return self._walk(limit_s, evenly=True)

    def _walk(self, limit_s: float, *, evenly: bool) -> tuple[int, ...] | None:
        spans = self._where_stages_can_begin(limit_s)
        if spans is None:
            return None
        # For each begin of a stage the least that it and those behind it can cost: infinite where none keeps the
        # limits, else a sum of squares, or just nothing.
        costs = [np.zeros(1)]
        for s in reversed(range(len(self._seats))):
            found = self._least_costs(s, spans[s], spans[s + 1], costs[-1], limit_s, evenly)
            if not (found < math.inf).any():
                return None
            costs.append(found)
        costs.reverse()
        balance: list[int] = []
        begin = 0
        for s in range(len(self._seats)):
            first, last = max(spans[s + 1][0], begin + 1), spans[s + 1][1]
            behind = costs[s + 1][first - spans[s + 1][0] :]
            through = behind + self._cost(s, np.full(last + 1 - first, begin), slice(first, last + 1), limit_s, evenly)
            end = first + int(np.flatnonzero(through == costs[s][begin - spans[s][0]])[-1])
            balance.append(end - begin)
            begin = end
        return tuple(balance)

    def _least_costs(
        self, s: int, here: tuple[int, int], behind: tuple[int, int], next_costs: _Array, limit_s: float, evenly: bool
    ) -> _Array:
        """For every begin in `here` the least cost over all ends in `behind`."""
        found = np.full(here[1] - here[0] + 1, math.inf)
        for number in range(1, self._most_layers(s, here, limit_s) + 1):
            first, last = max(here[0], behind[0] - number), min(here[1], behind[1] - number)
            if first > last:
                continue
            begins, ends = slice(first, last + 1), slice(first + number, last + 1 + number)
            through = next_costs[ends.start - behind[0] : ends.stop - behind[0]]
            through = through + self._cost(s, begins, ends, limit_s, evenly)
            part = found[first - here[0] : last + 1 - here[0]]
            np.minimum(part, through, out=part)
            if not evenly and not found.any():
                break  # all can be kept
        return found

    def _cost(self, s: int, i: Any, j: Any, limit_s: float, evenly: bool) -> _Array:
        """Of stages [i, j): infinite where the limits are not kept."""
        seconds = self.seconds(s, i, j)
        fits = seconds <= limit_s
        if self._seats[s].memory_bytes < math.inf:
            fits &= self.num_bytes(s, i, j) <= self._seats[s].memory_bytes
        return np.where(fits, seconds * seconds if evenly else 0.0, math.inf)

    def _most_layers(self, s: int, here: tuple[int, int], limit_s: float) -> int:
        begins = np.arange(here[0], here[1] + 1)
        return int((self._farthest(s, begins, limit_s) - begins).max())

    def _farthest(self, s: int, begin: Any, limit_s: float) -> Any:
        """The last end of a stage that begins there, as far as its layers alone can tell."""
        seat, time, held = self._seats[s], self._time[s], self._held[s]
        within = time[begin] + limit_s / seat.slowness
        by_time = np.searchsorted(time, within * (1 + _ROUNDING), side="right") - 1
        if seat.memory_bytes == math.inf:
            return by_time
        within = held[begin] + seat.memory_bytes
        return np.minimum(by_time, np.searchsorted(held, within * (1 + _ROUNDING), side="right") - 1)

    def _nearest(self, s: int, end: int, limit_s: float) -> int:
        """The first begin of a stage that ends there, likewise."""
        seat, time, held = self._seats[s], self._time[s], self._held[s]
        within = time[end] - limit_s / seat.slowness
        by_time = int(np.searchsorted(time, within - abs(time[-1]) * _ROUNDING, side="left"))
        if seat.memory_bytes == math.inf:
            return by_time
        within = held[end] - seat.memory_bytes
        return max(by_time, int(np.searchsorted(held, within - abs(held[-1]) * _ROUNDING, side="left")))

    def _where_stages_can_begin(self, limit_s: float) -> list[tuple[int, int]] | None:
        """For every stage, and the end of the last one, the first and the last layer at which it can begin, as far as
        the layers alone can tell: a stage has at least one, keeps the limit, and fits its memory."""
        count = len(self._seats)
        if any(seat.memory_bytes < 0 for seat in self._seats):
            return None
        last = [0]
        for s in range(count):
            last.append(min(int(self._farthest(s, last[-1], limit_s)), self._n - (count - s - 1)))
        if last[-1] < self._n:
            return None
        first = [self._n]
        for s in reversed(range(count)):
            first.append(max(self._nearest(s, first[-1], limit_s), s))
        first.reverse()
        first[0] = 0
        spans = list(zip(first, last, strict=True))
        return spans if all(begin <= end for begin, end in spans) else None


def _pieces(balance: Sequence[int]) -> list[tuple[int, int]]:
    """(first layer, first one behind it) of each stage."""
    return list(pairwise((0, *accumulate(balance))))


def _sums_of(chain: Chain) -> tuple[_Array, _Array, _Array, _Array]:
    """Of seconds, and of kept, saved and redone bytes."""
    nothing = [0.0] * len(chain.seconds)
    num_bytes = (chain.kept_bytes, chain.saved_bytes, chain.redone_bytes)
    kept, saved, redone = (_sums(values or nothing) for values in num_bytes)
    return _sums(chain.seconds), kept, saved, redone


def _sums(values: Sequence[float]) -> _Array:
    """[n + 1]: the sum of the first 0, 1, ... n values."""
    return np.concatenate([[0.0], np.cumsum(np.asarray(values, dtype=np.float64))])
