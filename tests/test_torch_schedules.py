"""The orders of work are those of torch.distributed.pipelining, wherever both have the schedule.

Torch's data of 1F1B (`_get_pipeline_order`, made for drawing) is wrong on the last rank, where it holds every backward
once more than it runs: what is compared there is the order in which its own loop runs.
"""

import itertools
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from torch.distributed.pipelining import schedules as torchs
from torch.distributed.pipelining.stage import PipelineStage

from pipetrain.schedule import Kind, Schedule, build, generate, write_csv

MULTI = {
    "interleaved": torchs.ScheduleInterleaved1F1B,
    "looped_bfs": torchs.ScheduleLoopedBFS,
    "zb_h1": torchs.ScheduleInterleavedZeroBubble,
    "zb_v": torchs.ScheduleZBVZeroBubble,
}
SIZES = list(itertools.product(range(1, 6), range(1, 13)))


def order_of_torch(kind: type, num_ranks: int, num_microbatches: int, stages_per_rank: int) -> list[list[str]] | None:
    """What each rank does; None where torch refuses the numbers."""
    stage = mock.create_autospec(PipelineStage, instance=True)
    stage.group_rank, stage.group_size, stage.submod = 0, num_ranks, None
    stage.num_stages = num_ranks * stages_per_rank
    try:
        made = kind([stage] * stages_per_rank, num_microbatches)
    except ValueError:
        return None
    return [[str(a) for a in made.pipeline_order[rank] if a is not None] for rank in range(num_ranks)]


def order_of(schedule: Schedule) -> list[list[str]]:
    return [[str(a) for a in row if a.kind is not Kind.UPDATE] for row in schedule.actions]


@pytest.mark.parametrize(
    ("name", "stages_per_rank"),
    [("interleaved", 2), ("interleaved", 3), ("looped_bfs", 2), ("looped_bfs", 3), ("zb_v", 2)]
    + [("zb_h1", stages) for stages in (1, 2, 3)],
)
def test_schedules_of_several_stages_on_a_rank(name: str, stages_per_rank: int) -> None:
    compared = 0
    for num_ranks, num_microbatches in SIZES:
        theirs = order_of_torch(MULTI[name], num_ranks, num_microbatches, stages_per_rank)
        if theirs is not None:
            ours = order_of(generate(name, num_ranks, num_microbatches, stages_per_rank))
            assert ours == theirs, (num_ranks, num_microbatches)
            compared += 1
    assert compared >= 30


class _Recorder:
    """Stands in for torch's stage and notes what its schedule's loop asks of it."""

    def __init__(self, rank: int, num_ranks: int) -> None:
        self.done: list[str] = []
        self.stage = mock.MagicMock(spec=PipelineStage)
        self.stage.stage_index, self.stage.num_stages = rank, num_ranks
        self.stage.is_first, self.stage.is_last = rank == 0, rank == num_ranks - 1
        self.stage.group_rank, self.stage.group_size = rank, num_ranks
        self.stage.forward_one_chunk.side_effect = lambda m, *a, **k: self.done.append(f"{rank}F{m}")
        self.stage.backward_one_chunk.side_effect = lambda m, *a, **k: self.done.append(f"{rank}B{m}")
        for name in ("get_fwd_recv_ops", "get_fwd_send_ops", "get_bwd_recv_ops", "get_bwd_send_ops"):
            getattr(self.stage, name).return_value = []


@pytest.mark.parametrize(("name", "kind"), [("gpipe", torchs.ScheduleGPipe), ("1f1b", torchs.Schedule1F1B)])
def test_schedules_of_one_stage_on_a_rank(name: str, kind: type) -> None:
    for num_ranks, num_microbatches in SIZES:
        if name == "1f1b" and num_microbatches < num_ranks:
            continue  # torch refuses it
        rows = []
        for rank in range(num_ranks):
            recorder = _Recorder(rank, num_ranks)
            made = kind(recorder.stage, num_microbatches, loss_fn=lambda output, target: output)
            made._initialize_stage = lambda *a, **k: None
            made._initialize_pp_stages = lambda *a, **k: None
            made._maybe_compute_loss = lambda *a, **k: None
            made._maybe_get_loss = lambda *a, **k: None
            made._update_losses = lambda *a, **k: None
            inputs: tuple[list[Any], list[Any]] = [()] * num_microbatches, [{}] * num_microbatches
            made._check_inputs = mock.Mock(return_value=inputs)
            made._step_microbatches()
            rows.append(recorder.done)
        assert rows == order_of(generate(name, num_ranks, num_microbatches, 1)), (num_ranks, num_microbatches)


def test_torch_runs_what_is_written(tmp_path: Path) -> None:
    """Its own reader takes the file, and its own passes find nothing wrong with it."""
    for name in MULTI:
        schedule = build(name, 3, 6, recompute="never", stages_per_rank=2)
        path = tmp_path / f"{name}.csv"
        path.write_text(write_csv(schedule))
        stage = mock.create_autospec(PipelineStage, instance=True)
        stage.group_rank, stage.group_size, stage.num_stages, stage.submod = 0, 3, 6, None
        runtime = torchs._PipelineScheduleRuntime([stage, stage], 6)
        runtime._load_csv(str(path))
        assert runtime.pipeline_order_with_comms.keys() == {0, 1, 2}
