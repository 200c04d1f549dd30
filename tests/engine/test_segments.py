"""Memories of segments, micro-batch by micro-batch."""

import torch
from torch import Tensor, nn

from pipetrain.engine.layer import Layer
from pipetrain.engine.segments import Segments
from pipetrain.segment_memory import SegmentMemory


def run(segments: Segments, memory: SegmentMemory, step: int, microbatch: int, value: float) -> Tensor:
    """What the memory puts in front of one token."""
    with segments.forward(0, (step, microbatch), keep=True):
        whole: Tensor = memory(torch.full((1, 1, 1), value))
    return whole.flatten()


def test_each_micro_batch_goes_on_where_it_was_and_a_repeated_forward_sees_the_same() -> None:
    memory = SegmentMemory(2, 2)
    segments = Segments([Layer("a", "a.", nn.Sequential(memory))])
    assert run(segments, memory, 0, 0, 1.0).tolist() == [1.0]
    assert run(segments, memory, 0, 1, 10.0).tolist() == [10.0]
    assert run(segments, memory, 1, 0, 2.0).tolist() == [1.0, 2.0]
    assert run(segments, memory, 1, 0, 2.0).tolist() == [1.0, 2.0]
    assert run(segments, memory, 1, 1, 20.0).tolist() == [10.0, 20.0]
    assert run(segments, memory, 2, 0, 3.0).tolist() == [1.0, 2.0, 3.0]
    assert segments.saved()["a.0"].flatten().tolist() == [2.0, 3.0, 10.0, 20.0]
    with segments.recompute(0, (1, 1)):
        assert memory(torch.full((1, 1, 1), 20.0)).flatten().tolist() == [10.0, 20.0]
    assert run(segments, memory, 2, 1, 30.0).tolist() == [10.0, 20.0, 30.0]


def test_a_new_epoch_and_an_evaluation_start_anew() -> None:
    memory = SegmentMemory(2, 2)
    segments = Segments([Layer("a", "a.", nn.Sequential(memory))])
    segments.steps_of_epoch = 2
    assert [len(run(segments, memory, step, 0, 1.0)) for step in range(5)] == [1, 2, 1, 2, 1]
    for _ in range(2):
        segments.train(False)
        assert [len(run(segments, memory, number, 0, 1.0)) for number in range(4)] == [1, 2, 3, 3]
        segments.train(True)
    assert len(run(segments, memory, 5, 0, 1.0)) == 2
