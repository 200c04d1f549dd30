"""The planner against all that it could have chosen, simulated one by one."""

import itertools
import math
import random
import re
from dataclasses import replace

import pytest

from pipetrain.costs import Device, LayerCost, Link, ModelCost, ValueCost
from pipetrain.errors import ConfigError
from pipetrain.schedule import STALE
from pipetrain.sim import planner
from pipetrain.sim.draft import drafts
from pipetrain.sim.forecast import Choice, Forecast, Setting, forecast
from pipetrain.sim.nowhere import FitsNowhere
from pipetrain.sim.planner import plans

SCHEDULES = (("gpipe", 1), ("1f1b", 1), ("zb_h1", 1), ("interleaved", 2), ("zb_v", 2))
CHOICES = [
    Choice(schedule, each, m, recompute)
    for (schedule, each), m, recompute in itertools.product(SCHEDULES, (2, 4, 8), ("always", "except_last", "never"))
]


def model(seconds: list[float], rows: int) -> ModelCost:
    """A chain; a fifth of a layer's time does not depend on the samples."""
    layers = tuple(
        LayerCost(
            name=f"layer{number}",
            forward_s=f * (rows + 1) / 5,
            backward_s=2 * f * (rows + 1) / 5,
            input_s=f * (rows + 1) / 5,
            weight_s=f * (rows + 1) / 5,
            update_s=0.01,
            parameters=100,
            parameter_bytes=400,
            optimizer_bytes=800,
            graph_bytes=int(1000 * f) * rows,
            between_bytes=0,
            forward_bytes=int(1500 * f) * rows,
            backward_bytes=100 * rows,
        )
        for number, f in enumerate(seconds)
    )
    n = len(seconds)
    values = [ValueCost(i, 100 * rows, (i + 1,) if i + 1 < n else (), (), has_gradient=True) for i in range(n)]
    return ModelCost(rows, layers, (ValueCost(-1, 50 * rows, (0,), (), has_gradient=False), *values))


def setting(seconds: list[float], num_ranks: int, memory_bytes: float = math.inf, slowness: float = 1.0) -> Setting:
    devices = [Device("first", memory_bytes, slowness), *[Device("other", memory_bytes)] * (num_ranks - 1)]
    return Setting(
        model=lambda rows: model(seconds, rows),
        batch_size=16,
        devices=tuple(devices),
        link=Link(0.01, 1e5),
        selected=(False,) * len(seconds),
        process_bytes=1000,
    )


def everything(given: Setting, num_layers: int) -> list[Forecast]:
    """Every choice with every balance."""
    found = []
    for choice in CHOICES:
        stages = len(given.devices) * choice.stages_per_rank
        for cuts in itertools.combinations(range(1, num_layers), stages - 1):
            balance = tuple(b - a for a, b in itertools.pairwise((0, *cuts, num_layers)))
            found.append(forecast(given, choice, balance))
    return found


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("limit", [math.inf, 60_000, 40_000])
def test_its_choice_is_within_a_twentieth_of_the_best(seed: int, limit: float) -> None:
    """It cuts for the slowest stage, which is not always the shortest step."""
    draw = random.Random(seed)
    seconds = [draw.choice([0.5, 1.0, 1.0, 2.0, 3.0]) for _ in range(7)]
    given = setting(seconds, 2 + seed % 2, limit, slowness=1.0 + (seed % 3) / 2)
    every = [each.step_s for each in everything(given, len(seconds)) if each.fits]
    best = plans(given, CHOICES)[0]
    assert best.fits
    assert max(best.rank_bytes) <= limit
    assert best.step_s <= 1.05 * min(every)


@pytest.mark.parametrize(
    ("schedule", "ranks"), [("interleaved", 3), ("interleaved", 2), ("zb_v", 2), ("looped_bfs", 2)]
)
def test_several_stages_on_a_rank_are_never_cut_worse_than_evenly(schedule: str, ranks: int) -> None:
    """Their slowest stage is not what counts: with ten equal layers on six stages it matters which ones get two."""
    given = setting([0.1, *[1.0] * 8, 0.2], ranks)
    found = plans(given, [Choice(schedule, 2, 8, "always")])[0]
    every = itertools.combinations(range(1, 10), 2 * ranks - 1)
    balances = [tuple(b - a for a, b in itertools.pairwise((0, *cuts, 10))) for cuts in every]
    best = min(forecast(given, found.choice, balance).step_s for balance in balances)
    assert found.step_s <= 1.02 * best


@pytest.mark.parametrize("ranks", [2, 3])
def test_estimates_are_near_what_is_simulated(ranks: int) -> None:
    """They say which plans are worth a simulation."""
    given = setting([1.0, 2.0, 1.0, 3.0, 1.0, 1.0, 2.0], ranks)
    for draft in drafts(given, CHOICES):
        simulated_s = forecast(given, draft.choice, draft.balance).step_s
        assert draft.estimate_s == pytest.approx(simulated_s, rel=0.3), draft


def test_plans_are_ranked_and_always_the_same() -> None:
    given = setting([1.0, 2.0, 1.0, 3.0, 1.0, 1.0], 2)
    first, second = plans(given, CHOICES), plans(given, CHOICES)
    assert [(each.choice, each.balance) for each in first] == [(each.choice, each.balance) for each in second]
    assert [each.step_s for each in first] == sorted(each.step_s for each in first)
    for of in (lambda choice: choice.schedule, lambda choice: choice.num_microbatches, lambda choice: choice.recompute):
        assert {of(each.choice) for each in first} == {of(choice) for choice in CHOICES}  # one with each value


def test_less_memory_asks_for_recompute_and_then_for_more() -> None:
    seconds = [1.0] * 6
    unlimited = plans(setting(seconds, 2), CHOICES)[0]
    assert unlimited.choice.recompute == "never"
    tight = plans(setting(seconds, 2, memory_bytes=20_000), CHOICES)[0]
    assert tight.choice.recompute != "never" or tight.choice.schedule != "gpipe"
    assert tight.step_s > unlimited.step_s


@pytest.mark.parametrize(("schedule", "each"), [("1f1b", 1), ("zb_h1", 1), ("zb_v", 2)])
def test_what_large_drafts_say_of_memory_is_not_too_little(schedule: str, each: int) -> None:
    """Of schedules that are too long to be walked through for every cut. In zb_h1 graphs wait for their second half,
    those that a recompute has made too."""
    choice, num_ranks = Choice(schedule, each, 160, "always"), 32
    given = replace(setting([1.0] * 64, num_ranks), batch_size=160)

    def with_memory(num_bytes: float) -> Setting:
        return replace(given, devices=(Device("X", num_bytes),) * num_ranks)

    low, high = 1e3, 1e7
    while high > 1.2 * low:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if drafts(with_memory(middle), [choice])[0].fits else (middle, high)
    assert max(forecast(given, choice, drafts(with_memory(high), [choice])[0].balance).rank_bytes) < 1.3 * high


def test_drafts_that_are_wrong_do_not_hide_what_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    """However few may be simulated."""
    given = setting([1.0] * 8, 4, memory_bytes=24_000)
    lean = [forecast(given, draft.choice, draft.balance).fits for draft in drafts(given, CHOICES)]
    assert any(lean)
    assert not all(lean)
    hopeful = [replace(draft, fits=True) for draft in drafts(given, CHOICES)]
    monkeypatch.setattr(planner, "drafts", lambda *_: sorted(hopeful, key=lambda draft: draft.estimate_s))
    monkeypatch.setattr(planner, "_MOST_ACTIONS", 0)
    assert plans(given, CHOICES)[0].fits


def test_a_slow_device_gets_fewer_layers() -> None:
    assert plans(setting([1.0] * 8, 2, slowness=3.0), [Choice("1f1b", 1, 8, "never")])[0].balance == (2, 6)


def test_a_balance_that_is_given_is_kept() -> None:
    found = plans(setting([1.0] * 8, 2), [Choice("1f1b", 1, 8, "never", balance=(7, 1))])
    assert found[0].balance == (7, 1)


def test_fewer_layers_than_stages_are_refused() -> None:
    with pytest.raises(ConfigError, match="2 layers cannot be cut into 3 stages"):
        plans(setting([1.0, 1.0], 3), [Choice("gpipe", 1, 2, "never"), Choice("gpipe", 1, 2, "never", balance="even")])


def test_forecasts_add_up() -> None:
    """Idle and busy seconds of a rank are the step; the bubble is the idle share of all."""
    found = plans(setting([1.0, 2.0, 1.0, 3.0], 2), [Choice("1f1b", 1, 8, "always")])[0]
    for stage in found.stages:
        cost = stage.cost
        busy_s = 8 * (cost.forward_s + cost.recompute_s + cost.backward_s) + cost.update_s
        assert busy_s + stage.idle_s == pytest.approx(found.step_s)
    assert found.bubble_fraction == pytest.approx(sum(s.idle_s for s in found.stages) / 2 / found.step_s)


@pytest.mark.parametrize(("num_ranks", "memory_bytes"), [(1, 11_000), (2, 8_000)])
def test_where_nothing_fits_it_says_what_would(num_ranks: int, memory_bytes: int) -> None:
    """What it says is enough, and a little less is not."""
    seconds = [1.0] * 6
    with pytest.raises(FitsNowhere, match="no plan fits: the leanest one, schedule=") as caught:
        plans(setting(seconds, num_ranks, memory_bytes), CHOICES)
    named = re.search(r"Devices with (\S+) KiB each would be enough; or (\d) such devices", str(caught.value))
    assert named is not None
    enough_bytes, enough = 1024 * float(named[1]) + 6, int(named[2])
    assert plans(setting(seconds, num_ranks, enough_bytes), CHOICES)[0].fits
    assert plans(setting(seconds, enough, memory_bytes), CHOICES)[0].fits
    for too_little in (setting(seconds, num_ranks, 0.97 * enough_bytes), setting(seconds, enough - 1, memory_bytes)):
        with pytest.raises(FitsNowhere):
            plans(too_little, CHOICES)


def test_a_layer_that_is_too_large_by_itself_is_not_helped_by_devices() -> None:
    with pytest.raises(FitsNowhere, match=r"more devices would not: layer layer\d alone needs \S+ KiB$"):
        plans(setting([1.0] * 6, 2, 1_500), CHOICES)


def test_what_the_engine_takes_is_time_in_which_nothing_is_computed() -> None:
    """Equal stages, 1F1B: a forward and a backward for each of M + K - 1 turns."""
    given = setting([1.0] * 4, 2)
    choice = Choice("1f1b", 1, 8, "never")
    without, found = (forecast(each, choice, (2, 2)) for each in (given, replace(given, engine_s=0.01)))
    assert found.step_s == pytest.approx(without.step_s + 2 * (8 + 2 - 1) * 0.01)
    for before, after in zip(without.stages, found.stages, strict=True):
        assert after.cost == before.cost
        assert after.idle_s - before.idle_s == pytest.approx(found.step_s - without.step_s)
    assert found.bubble_fraction == pytest.approx(sum(stage.idle_s for stage in found.stages) / 2 / found.step_s)


@pytest.mark.parametrize("schedule", ["1f1b", "zb_h1", "gpipe"])
@pytest.mark.parametrize("recompute", ["except_last", ("always", "never", "never"), ("never", "selective", "always")])
def test_a_stage_that_recomputes_nothing_gets_more_layers(schedule: str, recompute: str | tuple[str, ...]) -> None:
    """The cut is the best of all also where stages do not recompute the same."""
    selected = (False, True, False, True, True, False, True, False)
    for seed in range(3):
        draw = random.Random(seed)
        given = replace(setting([draw.choice([1.0, 2.0, 3.0]) for _ in range(8)], 3), selected=selected, link=Link())
        choice = Choice(schedule, 1, 16, recompute)
        cuts = itertools.combinations(range(1, 8), 2)
        balances = [tuple(b - a for a, b in itertools.pairwise((0, *cut, 8))) for cut in cuts]
        best_s = min(forecast(given, choice, balance).step_s for balance in balances)
        assert plans(given, [choice])[0].step_s <= 1.02 * best_s, seed


def test_selected_layers_are_run_again_where_the_policy_says_so() -> None:
    given = replace(setting([1.0] * 4, 2), selected=(True, False, False, False))
    policies = {"mixed": ("selective", "always"), "all": "always", "none": ("always", "never")}
    found = {name: forecast(given, Choice("1f1b", 1, 4, policy), (2, 2)) for name, policy in policies.items()}
    assert [stage.cost.recompute_s for stage in found["mixed"].stages] == pytest.approx([1.0, 2.0])
    first, last = found["mixed"].stages
    assert first.memory.in_flight > found["all"].stages[0].memory.in_flight
    assert last.memory == found["all"].stages[1].memory
    nothing = forecast(given, Choice("1f1b", 1, 4, ("always", "selective")), (2, 2))  # of the last stage's layers
    assert nothing.step_s == found["none"].step_s
    assert [stage.memory for stage in nothing.stages] == [stage.memory for stage in found["none"].stages]


def test_micro_batches_that_do_not_come_out_even_cost_what_they_cost_on_average() -> None:
    """17 samples in 16 micro-batches: one of two samples and fifteen of one."""
    given = replace(setting([1.0] * 2, 1), batch_size=17)
    found = forecast(given, Choice("gpipe", 1, 16, "never"), (2,))
    a_forward_s = [sum(layer.forward_s for layer in model([1.0] * 2, rows).layers) for rows in (1, 2)]
    assert found.stages[0].cost.forward_s == pytest.approx((15 * a_forward_s[0] + a_forward_s[1]) / 16)
    large = replace(given, batch_size=32)
    assert found.stages[0].memory == forecast(large, Choice("gpipe", 1, 16, "never"), (2,)).stages[0].memory


@pytest.mark.parametrize("name", ["ouroboros", "pipedream", "bounded"])
@pytest.mark.parametrize("seed", range(4))
def test_its_cut_for_a_stale_schedule_is_within_a_twentieth_of_the_best(seed: int, name: str) -> None:
    """The first and the last module share a device: together they are to take as long as one of the others."""
    draw = random.Random(seed)
    seconds = [draw.choice([0.5, 1.0, 1.0, 2.0, 3.0]) for _ in range(9)]
    given, stages = setting(seconds, 3), STALE[name].num_stages(3)
    choice = Choice(name, 1, 4 if name == "bounded" else 1, "never", num_steps=30)
    cuts = itertools.combinations(range(1, len(seconds)), stages - 1)
    balances = [tuple(b - a for a, b in itertools.pairwise((0, *cut, len(seconds)))) for cut in cuts]
    best = min(forecast(given, choice, balance).step_s for balance in balances)
    assert plans(given, [choice])[0].step_s <= 1.05 * best


def test_a_stale_step_is_what_a_step_takes_between_two_drains() -> None:
    given, balance = setting([1.0] * 6, 3, slowness=1.0), (1, 2, 2, 1)
    many, one = (forecast(given, Choice("ouroboros", 1, 1, "never", num_steps=n), balance) for n in (200, 1))
    work_s = sum(2 * (stage.cost.forward_s + stage.cost.backward_s) for stage in many.stages) / 2
    assert work_s / 3 < many.step_s < 1.05 * work_s / 3 + 0.1
    assert one.step_s > work_s
    assert many.bubble_fraction < 0.1 < one.bubble_fraction


def test_a_locked_matrix_is_part_of_the_forecast() -> None:
    """Forwards wait for each other then, and a step takes longer."""
    given, choice = setting([1.0] * 6, 3), Choice("ouroboros", 1, 1, "never", num_steps=30)
    free, locked = (plans(replace(given, locked=locked), [choice])[0].step_s for locked in (False, True))
    assert locked > 1.3 * free


def test_replicas_win_where_sums_cost_nothing_and_lose_where_they_cost_much() -> None:
    """Layers of one weight: two pipelines of one stage have no bubble, but have to add up all gradients."""
    choices = [Choice("gpipe", 1, 2, "never"), Choice("gpipe", 1, 1, "never", replicas=2)]
    given = setting([1.0, 1.0], 2)
    for sums, best in ((Link(), 2), (Link(0.0, 10.0), 1)):
        (first, *_) = plans(replace(given, sums=sums), choices)
        assert first.choice.replicas == best
    both = plans(replace(given, sums=Link(0.01, 100.0)), choices)
    of_one = next(plan for plan in both if plan.choice.replicas == 2)
    # A half of the mini-batch forwards and backwards, the update, and two layers of messages there and back.
    own = given.of_one(2)
    whole = forecast(own, of_one.choice, (2,))
    num_bytes = 2 * own.model(8).layers[0].parameter_bytes
    assert of_one.step_s == pytest.approx(whole.step_s + 2 * 0.01 + num_bytes / 100.0)
    assert len(of_one.rank_bytes) == 1


def test_one_of_several_replicas_has_the_worst_of_each_place() -> None:
    devices = [Device("a", 100, 1.0), Device("b", 80, 2.0), Device("c", 90, 3.0), Device("d", 95, 1.0)]
    own = replace(setting([1.0, 1.0], 2), devices=tuple(devices), batch_size=5).of_one(2)
    assert [(d.memory_bytes, d.slowness) for d in own.devices] == [(90, 3.0), (80, 2.0)]
    assert own.batch_size == 3
