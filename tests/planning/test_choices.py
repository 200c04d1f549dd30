"""What the planner may choose from: all that is open, and nothing that is not."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from runs import settings

from pipetrain.config import AmoebaNetConfig, SyntheticConfig
from pipetrain.errors import ConfigError
from pipetrain.planning.choices import choices, left_open
from pipetrain.sim.forecast import Choice

ALL_OPEN: dict[str, Any] = dict.fromkeys(("schedule", "micro_batches", "recompute", "partitions", "balance"), "auto")
VALUES: dict[str, Callable[[Choice], object]] = {
    "schedule": lambda choice: choice.schedule,
    "micro_batches": lambda choice: choice.num_microbatches,
    "recompute": lambda choice: choice.recompute,
    "partitions": lambda choice: 2 * choice.stages_per_rank,
}
GIVEN = {"schedule": "zb_h1", "micro_batches": 3, "recompute": "except_last", "partitions": 4}


@pytest.mark.parametrize("key", GIVEN)
def test_what_is_typed_is_kept_and_what_is_open_varies(key: str) -> None:
    cfg = settings(**ALL_OPEN | {"batch_size": 64, key: GIVEN[key]})
    assert left_open(cfg, 2) == tuple(other for other in ALL_OPEN if other != key)
    found = choices(cfg, 2, 12)
    assert {VALUES[key](choice) for choice in found} == {GIVEN[key]}
    for other, of in VALUES.items():
        if other != key:
            assert len({of(choice) for choice in found}) > 1, other


def test_nothing_is_open_where_all_is_typed() -> None:
    cfg = settings(schedule="1f1b", micro_batches=2, recompute="never", balance=[1, 3])
    assert left_open(cfg, 2) == ()
    assert choices(cfg, 2, 4) == [Choice("1f1b", 1, 2, "never", (1, 3))]


def test_one_stage_leaves_no_balance_open() -> None:
    assert left_open(settings(balance="auto"), 1) == ()
    assert left_open(settings(balance="auto"), 2) == ("balance",)
    assert left_open(settings(balance="auto", micro_batches="auto"), 1) == ("micro_batches", "balance")


def test_micro_batches_are_no_more_than_there_are_samples_for() -> None:
    def counts(**changes: Any) -> list[int]:
        return [choice.num_microbatches for choice in choices(settings(micro_batches="auto", **changes), 4, 8)]

    assert counts(batch_size=1000) == [2, 4, 8, 16, 32, 64]
    assert counts(batch_size=8) == [2, 4, 8]
    assert counts(batch_size=1) == [1]
    images = {"model": AmoebaNetConfig(), "data": SyntheticConfig(shape=[3, 8, 8])}
    assert counts(batch_size=64, **images) == [2, 4, 8, 16]  # BatchNorm wants four samples


def test_stages_of_a_list_decide_how_many_there_are() -> None:
    cfg = settings(**ALL_OPEN | {"balance": [1, 1, 1, 1]})
    assert {2 * choice.stages_per_rank for choice in choices(cfg, 2, 4)} == {4}
    cfg = settings(**ALL_OPEN | {"recompute": ["never", "always"]})
    assert {choice.recompute for choice in choices(cfg, 2, 4)} == {("never", "always")}
    assert {choice.stages_per_rank for choice in choices(cfg, 2, 4)} == {1}


def test_too_few_layers_are_refused_with_what_to_type() -> None:
    with pytest.raises(
        ConfigError, match="3 layers on 2 devices with data_parallel=1 partitions=4 schedule=auto batch_size=4: there"
    ):
        choices(settings(**ALL_OPEN | {"partitions": 4}), 2, 3)


def test_a_file_decides_but_for_recompute(tmp_path: Path) -> None:
    path = tmp_path / "mine.csv"
    path.write_text("0F0,0F1,0B0,0B1\n1F0,1B0,1F1,1B1\n")
    cfg = settings(**ALL_OPEN | {"schedule": str(path)})
    assert left_open(cfg, 2) == ("recompute", "balance")
    assert [choice.recompute for choice in choices(cfg, 2, 4)] == ["never", "except_last", "always"]
    assert {(choice.schedule, choice.num_microbatches) for choice in choices(cfg, 2, 4)} == {(str(path), 2)}


def test_replicas_share_devices_micro_batches_and_samples() -> None:
    cfg = settings(data_parallel="auto", micro_batches="auto", batch_size=24, balance="auto")
    found = {(choice.replicas, choice.num_microbatches) for choice in choices(cfg, 6, 6)}
    assert {replicas for replicas, _ in found} == {1, 2, 3, 6}
    assert all(replicas * m <= 24 for replicas, m in found)
    assert left_open(cfg, 6) == ("data_parallel", "micro_batches", "balance")
    typed = settings(data_parallel="auto", micro_batches=4, batch_size=24)
    assert {(choice.replicas, choice.num_microbatches) for choice in choices(typed, 6, 6)} == {(1, 4), (2, 2)}
    assert {choice.replicas for choice in choices(settings(data_parallel="auto"), 8, 4)} == {2, 4}, "a layer a device"


def test_replicas_change_neither_partitions_nor_micro_batches() -> None:
    assert {choice.replicas for choice in choices(settings(data_parallel="auto", batch_size=16), 3, 8)} == {1}, (
        "16 by 3"
    )
    cfg = settings(data_parallel="auto", partitions=4, batch_size=16)
    assert {(c.replicas, c.stages_per_rank) for c in choices(cfg, 8, 8)} == {(2, 1)}
    data, model = SyntheticConfig(shape=[3, 16, 16], classes=5, samples=40), AmoebaNetConfig(layers=3, filters=4)
    given = settings(model=model, data=data, data_parallel="auto", batch_size=3)
    assert {choice.replicas for choice in choices(given, 2, 8)} == {1}, "no micro-batch of a single sample"
