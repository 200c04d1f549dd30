"""Memory of schedules against counts by hand."""

import pytest

from pipetrain.schedule import STALE, Action, Schedule, build, peak_in_flight
from pipetrain.sim.cut import StageBytes
from pipetrain.sim.memory import Memory, memory

STAGE = StageBytes(
    parameters=1000,
    optimizer=2000,
    inputs=10,
    outputs=20,
    kept=0,
    graph=100,
    between=7,
    forward=3,
    building=4,
    backward=5,
)


@pytest.mark.parametrize("name", ["gpipe", "gpipe_lifo", "1f1b"])
def test_without_recompute_every_micro_batch_in_flight_has_its_graph(name: str) -> None:
    schedule = build(name, 3, 5, recompute="never")
    for found, in_flight in zip(memory(schedule, [STAGE] * 3), peak_in_flight(schedule), strict=True):
        assert found.in_flight == 100 * in_flight
        assert (found.weights, found.optimizer, found.recomputed, found.versions) == (1000, 2000, 0, 0)


def test_gpipe_with_recompute_is_fullest_in_its_first_backward() -> None:
    """Inputs of all micro-batches and one graph: N + L / K x N / M of Huang et al. 2019, section 2.3."""
    first, last = memory(build("gpipe", 2, 4, recompute="always"), [STAGE] * 2)
    assert first == Memory(1000, 1000, 2000, 0, in_flight=3 * 10, recomputed=100, messages=3 * 20, working=5)
    assert last == Memory(1000, 1000, 2000, 0, in_flight=3 * 10, recomputed=100, messages=10, working=5)


def test_a_split_backward_keeps_its_graph_and_more_until_its_second_half() -> None:
    row = tuple(map(Action.parse, ("0F0", "0I0", "0F1", "0I1", "0W0", "0W1", "0U")))
    (found,) = memory(Schedule("split", 2, (0,), (row,)), [STAGE])
    assert found == Memory(1000, 1000, 2000, 0, in_flight=200, working=7 * 2 + 5)


def test_stages_of_one_rank_are_added_up_at_one_moment() -> None:
    """That is when both have gradients: the graphs of the second one are gone then, and its peak must not be added."""
    schedule = build("looped_bfs", 1, 2, stages_per_rank=2, recompute="never")
    found = memory(schedule, [STAGE] * 2)
    assert [stage.in_flight for stage in found] == [200, 0]
    assert [stage.gradients for stage in found] == [1000, 1000]


def test_versions_of_weights_are_those_that_micro_batches_in_flight_have_seen() -> None:
    row = tuple(map(Action.parse, ("0F0", "0F1", "0B0", "0U", "0F2", "0B1")))
    (found,) = memory(Schedule("stale", 3, (0,), ((*row, Action.parse("0B2"), Action.parse("0U")),)), [STAGE])
    assert found.versions == 1000  # F1 has seen what was before the update, and its backward is still to come


def test_module_k_of_a_stale_pipeline_has_k_minus_1_copies_less_than_the_first() -> None:
    schedule = STALE["pipedream"].generate(4, 1, 9)
    assert [found.versions for found in memory(schedule, [STAGE] * 4)] == [3000, 2000, 1000, 0]
    assert [found.versions for found in memory(schedule, [STAGE] * 4, stashes=False)] == [0, 0, 0, 0]


def test_2bw_has_two_versions_at_any_depth() -> None:
    for depth in (2, 4, 6):
        found = memory(STALE["pipedream_2bw"].generate(depth, depth + 1, 5), [STAGE] * depth)
        assert {stage.versions for stage in found} <= {0, 1000}
