"""The best balance against all balances."""

import itertools
import math
import random
from collections.abc import Iterator
from dataclasses import replace

import pytest

from pipetrain.errors import ConfigError
from pipetrain.sim.balance import even
from pipetrain.sim.optimum import Chain, Seat, fastest, fits_memory, leanest, least_variance, slowest_s


def all_balances(num_layers: int, num_stages: int) -> Iterator[tuple[int, ...]]:
    for cuts in itertools.combinations(range(1, num_layers), num_stages - 1):
        ends = (0, *cuts, num_layers)
        yield tuple(b - a for a, b in itertools.pairwise(ends))


def brute_force(chain: Chain, seats: list[Seat]) -> tuple[float, list[tuple[int, ...]]]:
    """The least seconds of the slowest stage, and every balance that has them, the most even one first."""
    found: dict[tuple[int, ...], tuple[float, float]] = {}
    for balance in all_balances(len(chain.seconds), len(seats)):
        slowest, squares, begin, fits = 0.0, 0.0, 0, True
        for seat, number in zip(seats, balance, strict=True):
            end, own = begin + number, seat.layers or chain
            seconds = sum(own.seconds[begin:end]) * seat.slowness
            seconds += chain.border_s[begin] if chain.border_s and begin > 0 else 0.0
            seconds += chain.border_s[end] if chain.border_s and end < len(chain.seconds) else 0.0
            held = sum(own.saved_bytes[begin:end]) if own.saved_bytes else 0.0
            held = seat.in_flight * (held + (chain.input_bytes[begin] if chain.input_bytes else 0.0))
            held += sum(own.kept_bytes[begin:end]) if own.kept_bytes else 0.0
            held += seat.redone * sum(own.redone_bytes[begin:end]) if own.redone_bytes else 0.0
            fits &= held <= seat.memory_bytes
            slowest, squares, begin = max(slowest, seconds), squares + seconds**2, end
        if fits:
            found[balance] = slowest, squares
    least = min((slowest for slowest, _ in found.values()), default=math.inf)
    best = [balance for balance, (slowest, _) in found.items() if slowest == least]
    return least, sorted(best, key=lambda balance: (found[balance][1], [-number for number in balance]))


def random_case(number: int) -> tuple[Chain, list[Seat]]:
    """Whole numbers, so that no sum depends on its order, and many balances are equally good."""
    draw = random.Random(number)
    n = draw.randint(1, 10)
    k = draw.randint(1, min(n, 5))

    def some(most: int, chance: float) -> list[float] | None:
        return [float(draw.randint(0, most)) for _ in range(n)] if draw.random() < chance else None

    chain = Chain([float(draw.choice([1, 2, 3, 5, 8, 40])) for _ in range(n)], some(6, 0.5), some(9, 0.5), some(4, 0.5))
    chain = replace(chain, redone_bytes=some(6, 0.3), input_bytes=some(5, 0.5))
    is_uneven, is_tight, differs = (draw.random() < chance for chance in (0.4, 0.4, 0.4))
    seconds = [s + draw.choice([-1.0, 0.0, 4.0]) for s in chain.seconds]
    other = replace(
        chain, seconds=seconds, kept_bytes=some(9, 0.5), saved_bytes=some(4, 0.5), redone_bytes=some(6, 0.3)
    )
    seats = [
        Seat(
            slowness=float(draw.choice([1, 2, 3])) if is_uneven else 1.0,
            memory_bytes=float(draw.randint(5, 60)) if is_tight else math.inf,
            in_flight=k - s,
            redone=draw.randint(1, 3),
            layers=other if differs and draw.random() < 0.5 else None,
        )
        for s in range(k)
    ]
    return chain, seats


@pytest.mark.parametrize("hundred", range(20))
def test_it_is_the_best_of_all_balances(hundred: int) -> None:
    """2,000 lists of costs, with and without communication, unequal devices and limits of memory."""
    for number in range(100 * hundred, 100 * (hundred + 1)):
        chain, seats = random_case(number)
        least, balances = brute_force(chain, seats)
        if not balances:
            with pytest.raises(ConfigError, match="no balance fits the memory"):
                fastest(chain, seats)
            continue
        found = fastest(chain, seats)
        assert found == balances[0], (number, chain, seats, least)
        assert slowest_s(chain, seats, found) == least


def squares_of(chain: Chain, seats: list[Seat], balance: tuple[int, ...]) -> float:
    ends = list(itertools.accumulate(balance))
    return sum(
        (
            seat.slowness * sum((seat.layers or chain).seconds[end - number : end])
            + (chain.border_s[end - number] if chain.border_s and end > number else 0.0)
            + (chain.border_s[end] if chain.border_s and end < len(chain.seconds) else 0.0)
        )
        ** 2
        for seat, end, number in zip(seats, ends, balance, strict=True)
    )


@pytest.mark.parametrize("hundred", range(5))
def test_least_variance_has_the_least_sum_of_squares_of_all_balances(hundred: int) -> None:
    for number in range(100 * hundred, 100 * (hundred + 1)):
        chain, seats = random_case(number)
        allowed = [b for b in all_balances(len(chain.seconds), len(seats)) if fits_memory(chain, seats, b)]
        if allowed:
            least = min(squares_of(chain, seats, balance) for balance in allowed)
            assert squares_of(chain, seats, least_variance(chain, seats)) == least, number


@pytest.mark.slow
def test_the_leanest_balance_needs_the_least_memory() -> None:
    for number in range(300):
        chain, seats = random_case(number)
        seats = [replace(seat, memory_bytes=10.0) for seat in seats]

        def needs(balance: tuple[int, ...], chain: Chain = chain, seats: list[Seat] = seats) -> float:
            """The factor by which the memory must grow."""
            grown = ([replace(seat, memory_bytes=x / 100) for seat in seats] for x in range(0, 100_000, 5))
            return next(each[0].memory_bytes / 10 for each in grown if fits_memory(chain, each, balance))

        least = min(map(needs, all_balances(len(chain.seconds), len(seats)))) if len(chain.seconds) < 5 else None
        if least is not None:
            assert needs(leanest(chain, seats)) <= 1.002 * least + 0.01, number


def test_equal_layers_are_cut_as_even_does() -> None:
    for n, k in ((8, 3), (12, 4), (7, 7), (11, 2)):
        assert slowest_s(Chain([1.0] * n), [Seat()] * k, fastest(Chain([1.0] * n), [Seat()] * k)) == math.ceil(n / k)
    assert fastest(Chain([1.0] * 8), [Seat()] * 3) == even(8, 3)


def test_it_beats_even_where_layers_are_unequal() -> None:
    """A Transformer whose head costs as much as six blocks."""
    chain, seats = Chain([0.2, *[1.0] * 12, 6.0]), [Seat()] * 4
    assert fastest(chain, seats) == (5, 4, 4, 1)
    assert slowest_s(chain, seats, even(14, 4)) / slowest_s(chain, seats, fastest(chain, seats)) > 1.3


def test_layers_that_cost_nothing_are_cut_too() -> None:
    assert fastest(Chain([0.0] * 4), [Seat()] * 2) == (3, 1)
    assert fastest(Chain([0.0, 0.0, 1.0, 0.0]), [Seat()] * 2) == (3, 1)


def test_fewer_layers_than_stages_are_refused() -> None:
    with pytest.raises(ConfigError, match="2 layers cannot be cut into 3 stages"):
        fastest(Chain([1.0, 1.0]), [Seat()] * 3)
