"""Guarantee 1 for the schedules: the same bits under all of them, tied weights and dropout on; lifo ones among
themselves; recompute, also of some layers only, and halves of backwards are invisible."""

import itertools

import pytest
import torch
from pipeline import Result, train
from test_any_module import assert_same
from test_exactness import batches, transformer

from pipetrain.models import Recipe
from pipetrain.schedule import SCHEDULES, WEIGHT_GRADIENTS, generate

MICRO_BATCHES = 4
# Of six layers: (stages on each rank, cut).
CUTS = [(1, (3, 3)), (1, (1, 2, 2, 1)), (2, (2, 1, 1, 2)), (2, (1,) * 6), (3, (1,) * 6), (2, (4, 2)), (1, (6,))]
CASES = [
    (name, stages_per_rank, balance)
    for (name, family), (stages_per_rank, balance) in itertools.product(SCHEDULES.items(), CUTS)
    if family.fits(len(balance), len(balance) // stages_per_rank)
]


def run(recipe: Recipe, balance: tuple[int, ...], name: str, stages_per_rank: int = 1, **options: object) -> Result:
    torch.manual_seed(7)
    options = {"num_microbatches": MICRO_BATCHES, "recompute": "always"} | options
    return train(recipe, balance, batches(2), name=name, stages_per_rank=stages_per_rank, **options)


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def recipe(request: pytest.FixtureRequest) -> Recipe:
    return transformer(tied=request.param, logit_clip=1.0)


@pytest.mark.parametrize(("name", "stages_per_rank", "balance"), CASES)
def test_numbers_do_not_depend_on_the_schedule(
    recipe: Recipe, name: str, stages_per_rank: int, balance: tuple[int, ...]
) -> None:
    """Halves of backwards may differ by rounding; in a Transformer they do not."""
    order = [a.microbatch for a in generate(name, 1, 3, SCHEDULES[name].usual) if a.kind in WEIGHT_GRADIENTS]
    reference = "gpipe" if order[0] == 0 else "gpipe_lifo"
    expected = run(recipe, (6,), reference, recompute="never")
    for policy in ("always", "except_last", "never"):
        assert_same(run(recipe, balance, name, stages_per_rank, recompute=policy), expected, policy)


@pytest.mark.parametrize("name", ["gpipe", "zb_v"])
@pytest.mark.parametrize(
    "chosen",
    [("embedding",), ("blocks.1", "blocks.2"), ("blocks.0", "blocks.3", "loss"), ("head", "loss"), ()],
    ids=str,
)
def test_recompute_of_some_layers_is_invisible(recipe: Recipe, name: str, chosen: tuple[str, ...]) -> None:
    per_rank = SCHEDULES[name].usual
    expected = run(recipe, (6,), "gpipe", recompute="never")
    for balance in ((3, 3), (1, 2, 1, 2)):
        got = run(recipe, balance, name, per_rank, recompute="selective", recomputes=chosen.__contains__)
        assert_same(got, expected, balance)


def test_the_order_of_micro_batches_is_seen_in_the_bits() -> None:
    """So the comparisons above can fail."""
    forwards = run(transformer(), (6,), "gpipe")
    backwards = run(transformer(), (6,), "gpipe_lifo")
    assert any(not torch.equal(forwards.gradients[n], g) for n, g in backwards.gradients.items())


def test_narrow_messages_round_what_travels_and_nothing_else() -> None:
    exact = run(transformer(), (3, 3), "gpipe")
    narrow = run(transformer(), (3, 3), "gpipe", narrow_messages=True)
    assert narrow.reports[0].loss_sum != exact.reports[0].loss_sum
    assert narrow.reports[0].loss_sum == pytest.approx(exact.reports[0].loss_sum, rel=1e-2)
    on_one_rank = run(transformer(), (2, 2, 1, 1), "zb_v", 2, narrow_messages=True)
    assert on_one_rank.reports[0].loss_sum != exact.reports[0].loss_sum
    alone = run(transformer(), (3, 3), "zb_v", 2, narrow_messages=True)
    assert_same(alone, exact, "two stages on one rank send nothing")
