"""Data parallelism: replicas of the pipeline that share each mini-batch, all in this process."""

from pathlib import Path
from typing import Any

import pytest
import torch
from runs import assert_same, losses, metrics, run, saved, settings
from test_memory_of_segments import xl
from torch import Tensor

from pipetrain.config import AmoebaNetConfig, CheckpointConfig, EvalConfig, SgdConfig, StaleConfig, SyntheticConfig
from pipetrain.data.batches import Batch
from pipetrain.data.share import Share
from pipetrain.data.synthetic import SyntheticBatches
from pipetrain.errors import NonFiniteError
from pipetrain.training.loop import Exit, Request, Signals


def assert_close(one: dict[str, Tensor], other: dict[str, Tensor], atol: float = 1e-12) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], rtol=1e-9, atol=atol, msg=name)


# Adam would make as much of a gradient that is nothing but rounding (of the bias of keys) as of any other.
OPTIONS: dict[str, Any] = {
    "precision": "fp64",
    "optimizer": SgdConfig(name="sgd", lr=0.1, momentum=0.9),
    "batch_size": 7,
    "micro_batches": 6,
    "eval": EvalConfig(every=3),
}


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize(
    ("replicas", "ranks", "options"),
    [
        (2, 1, {}),
        (3, 1, {}),
        (2, 2, {}),
        (2, 2, {"schedule": "1f1b", "recompute": "never"}),
        (3, 2, {"schedule": "zb_h1"}),
        (2, 2, {"schedule": "interleaved", "partitions": 4}),
        (2, 2, {"schedule": "zb_v", "partitions": 4, "recompute": "except_last"}),
        (6, 1, {}),
    ],
)
def test_replicas_change_nothing_but_the_order_of_sums(
    tmp_path: Path, tied: bool, replicas: int, ranks: int, options: dict[str, Any]
) -> None:
    """With dropout, uneven micro-batches, and a last batch of evaluation with fewer rows than there are replicas."""
    run(tmp_path, "one", 1, settings(tied=tied, **OPTIONS))
    run(tmp_path, "all", replicas * ranks, settings(tied=tied, data_parallel=replicas, **OPTIONS | options))
    steps, found = zip(*losses(tmp_path, "all"), strict=True)
    wanted_steps, wanted = zip(*losses(tmp_path, "one"), strict=True)
    assert steps == wanted_steps
    assert found == pytest.approx(wanted, rel=1e-12)
    assert_close(saved(tmp_path, "all", 6), saved(tmp_path, "one", 6))


@pytest.mark.parametrize("replicas", [2, 3])
def test_with_replicas_too_the_cut_does_not_show(tmp_path: Path, replicas: int) -> None:
    """To the last bit, in float32: a sum over replicas is made layer by layer, whatever the stages."""
    options: dict[str, Any] = {"data_parallel": replicas, "micro_batches": 6, "batch_size": 7, "tied": True}
    run(tmp_path, "1", replicas, settings(**options))
    run(tmp_path, "2", 2 * replicas, settings(**options, schedule="1f1b"))
    run(tmp_path, "4", 2 * replicas, settings(**options, schedule="interleaved", partitions=4))
    for name in ("2", "4"):
        assert losses(tmp_path, name) == losses(tmp_path, "1")
        assert_same(saved(tmp_path, name, 6), saved(tmp_path, "1", 6))


@pytest.mark.slow
def test_batchnorm_has_the_statistics_of_all_replicas(tmp_path: Path) -> None:
    def amoebanet(**changes: Any) -> Any:
        model = AmoebaNetConfig(layers=3, filters=4, drop_path=0.2, drop_path_steps=4)
        data = SyntheticConfig(shape=[3, 16, 16], classes=5, samples=40)
        return settings(model=model, data=data, **{**OPTIONS, "batch_size": 8, "micro_batches": 4, **changes})

    run(tmp_path, "one", 1, amoebanet())
    run(tmp_path, "all", 4, amoebanet(data_parallel=2))
    one, other = saved(tmp_path, "one", 6), saved(tmp_path, "all", 6)
    assert any("running_var" in name for name in one)
    assert_close(one, other, atol=1e-9)


def test_the_parts_of_all_replicas_are_merged_in_the_order_of_the_micro_batches(tmp_path: Path) -> None:
    """The first step's statistics depend on no sum over replicas: they are the same bits."""
    model = AmoebaNetConfig(layers=3, filters=4)
    data = SyntheticConfig(shape=[3, 16, 16], classes=5, samples=40)
    options: dict[str, Any] = {"model": model, "data": data, "steps": 1, "batch_size": 8, "micro_batches": 4}
    run(tmp_path, "one", 1, settings(**options))
    run(tmp_path, "all", 4, settings(**options, data_parallel=2))
    one, other = saved(tmp_path, "one", 1), saved(tmp_path, "all", 1)
    names = [name for name in one if "running" in name]
    assert names
    assert all(torch.equal(one[name], other[name]) for name in names)


@pytest.mark.parametrize(("replicas", "after"), [(2, 2), (2, 1), (1, 2)])
def test_a_run_goes_on_with_as_many_replicas_or_others(tmp_path: Path, replicas: int, after: int) -> None:
    run(tmp_path, "whole", 2 * after, settings(data_parallel=after, **OPTIONS))
    run(tmp_path, "halves", 2 * replicas, settings(data_parallel=replicas, steps=3, **OPTIONS))
    run(tmp_path, "halves", 2 * after, settings(data_parallel=after, **OPTIONS), resume=True)
    whole, halves = saved(tmp_path, "whole", 6), saved(tmp_path, "halves", 6)
    if replicas == after:
        assert_same(halves, whole)
    assert_close(halves, whole)


def test_one_replica_writes_and_each_file_is_there_once(tmp_path: Path) -> None:
    run(tmp_path, "all", 4, settings(data_parallel=2))
    folder = tmp_path / "all" / "checkpoints" / "step_00000006"
    assert sorted(path.name for path in folder.iterdir()) == [
        "manifest.json",
        "stage_0.safetensors",
        "stage_1.safetensors",
    ]
    assert [row["step"] for row in metrics(tmp_path, "all") if "loss/train" in row] == [1, 2, 4, 6]


def test_each_replica_remembers_its_own_rows(tmp_path: Path) -> None:
    """Also through a checkpoint, and where replicas have different numbers of rows."""
    options: dict[str, Any] = {**OPTIONS, "batch_size": 5, "micro_batches": 4, "checkpoint": CheckpointConfig(every=3)}
    run(tmp_path, "one", 1, xl(**options))
    run(tmp_path, "all", 4, xl(data_parallel=2, **options))
    run(tmp_path, "halves", 4, xl(data_parallel=2, **options | {"steps": 3}))
    run(tmp_path, "halves", 2, xl(**options), resume=True)
    one = saved(tmp_path, "one", 6)
    assert any(name.startswith("memory/") for name in one)
    for name in ("all", "halves"):
        assert_close(saved(tmp_path, name, 6), one)


@pytest.mark.parametrize("schedule", ["ouroboros", "pipedream_2bw"])
def test_a_stale_run_resumes_and_evaluates_with_replicas(tmp_path: Path, schedule: str) -> None:
    def stale(**changes: Any) -> Any:
        options: dict[str, Any] = {
            "data_parallel": 2,
            "batch_size": 6,
            "steps": 8,
            "checkpoint": CheckpointConfig(every=4),
        }
        options |= {"eval": EvalConfig(every=4), "stale": StaleConfig(drain_every=4, warmup_steps=1)}
        return settings(schedule=schedule, **options | changes)

    run(tmp_path, "whole", 4, stale())
    run(tmp_path, "halves", 4, stale(steps=4))
    run(tmp_path, "halves", 4, stale(), resume=True)
    assert losses(tmp_path, "halves") == losses(tmp_path, "whole")
    assert_same(saved(tmp_path, "halves", 8), saved(tmp_path, "whole", 8))


@pytest.mark.parametrize("rank", range(4))
def test_a_signal_to_any_rank_stops_all(tmp_path: Path, rank: int) -> None:
    def signals(of: int) -> Signals:
        found = Signals()
        if of == rank:
            found.request = Request.PREEMPT
        return found

    assert run(tmp_path, "all", 4, settings(data_parallel=2), signals=signals) is Exit.PREEMPTED


def test_nan_in_the_samples_of_one_replica_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = SyntheticBatches.batch

    def broken(self: SyntheticBatches, index: int) -> Batch:
        (inputs,), targets = batch(self, index)
        if self.share.replica == 1:
            inputs[-1] = float("nan")
        return (inputs,), targets

    monkeypatch.setattr(SyntheticBatches, "batch", broken)
    model = AmoebaNetConfig(layers=3, filters=4)
    data = SyntheticConfig(shape=[3, 16, 16], classes=5, samples=40)
    with pytest.raises(
        NonFiniteError, match=r"step 1: NaN or infinity first appears in the output of layer .*, stage 0, micro-batch 3"
    ):
        run(tmp_path, "all", 4, settings(model=model, data=data, batch_size=8, micro_batches=4, data_parallel=2))


@pytest.mark.parametrize("rows", range(1, 14))
@pytest.mark.parametrize(("replicas", "num_microbatches"), [(1, 1), (1, 4), (2, 2), (2, 6), (3, 3), (3, 12)])
def test_shares_are_the_micro_batches_of_the_whole_mini_batch(rows: int, replicas: int, num_microbatches: int) -> None:
    shares = [Share(replica, replicas, num_microbatches) for replica in range(replicas)]
    whole = torch.arange(rows)
    parts = [whole[share.rows(rows)] for share in shares]
    assert torch.equal(torch.cat(parts), whole)
    if rows >= num_microbatches:
        pieces = [piece for part in parts for piece in part.tensor_split(shares[0].microbatches(rows))]
        assert all(map(torch.equal, pieces, whole.tensor_split(num_microbatches)))
