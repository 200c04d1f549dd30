"""The small parts of the engine, each for what it promises."""

import pytest
import torch
from pipeline import CPU, build_runtime
from torch import Tensor, nn

from pipetrain import schedule
from pipetrain.engine.layer import Layer
from pipetrain.engine.local import LocalTransport, run_ranks
from pipetrain.engine.microbatch import split
from pipetrain.engine.rng import LayerRandomness
from pipetrain.engine.signature import TensorSpec, decode, encode, gradients_of, key_of, signature_of
from pipetrain.engine.stage import Stage
from pipetrain.errors import StageFailed
from pipetrain.models import LayerRecipe, Recipe
from pipetrain.seeds import derive_seed


def test_micro_batches_differ_by_at_most_one_row_and_keep_the_order() -> None:
    rows, marks = torch.arange(10).reshape(5, 2), torch.arange(5)
    pieces = split((rows, marks), 4)
    assert [len(piece[0]) for piece in pieces] == [2, 1, 1, 1]
    assert torch.equal(torch.cat([piece[0] for piece in pieces]), rows)
    assert torch.equal(torch.cat([piece[1] for piece in pieces]), marks)


def test_a_mini_batch_that_cannot_be_split_is_refused() -> None:
    with pytest.raises(ValueError, match="3 rows cannot be cut into 4 micro-batches of at least one row"):
        split((torch.zeros(3, 2),), 4)
    with pytest.raises(ValueError, match=r"the same number of rows \(got \[3, 4\]\)"):
        split((torch.zeros(3), torch.zeros(4)), 2)


def test_a_signature_travels_as_bytes() -> None:
    tensors = (torch.zeros(2, 3, dtype=torch.bfloat16), torch.zeros(4, dtype=torch.int64), torch.zeros(()))
    signature = signature_of(tensors, (True, False, True))
    assert decode(encode(signature)) == signature
    assert gradients_of(signature) == (
        TensorSpec((2, 3), torch.bfloat16, True),
        TensorSpec((), torch.float32, True),
    )


def test_keys_tell_kinds_of_micro_batches_apart() -> None:
    base = key_of((torch.zeros(2, 3),), training=True)
    assert base == key_of((torch.ones(2, 3),), training=True)
    others = [
        key_of((torch.zeros(3, 2),), training=True),
        key_of((torch.zeros(2, 3, dtype=torch.int64),), training=True),
        key_of((torch.zeros(2, 3),), training=False),
        key_of((torch.zeros(2, 3), torch.zeros(1)), training=True),
    ]
    assert len({base, *others}) == 5


def test_seeds_depend_on_every_part() -> None:
    seeds = [derive_seed(0, 1, "a", 2), derive_seed(0, 1, "a", 3), derive_seed(0, 2, "a", 2), derive_seed(0, 1, "b", 2)]
    assert len({*seeds, derive_seed(1, 1, "a", 2), derive_seed("0", 1, "a", 2)}) == 6
    assert derive_seed(1, "23") != derive_seed(12, "3")
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert derive_seed(0, "init", "head") == 1430733453208835419, "changing it changes every run"


def test_the_engine_leaves_the_users_randomness_alone() -> None:
    random = LayerRandomness(CPU, seed=0)
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    with random.preserved():
        random.before("layer", 0, 0)
        first = torch.rand(3)
        random.before("layer", 0, 0)
        assert torch.equal(torch.rand(3), first)
        random.before("layer", 0, 1)
        assert not torch.equal(torch.rand(3), first)
    assert torch.equal(torch.rand(3), expected)


class Picky(nn.Module):
    """Uses one of its two inputs."""

    def forward(self, x: Tensor, unused: Tensor) -> tuple[Tensor, Tensor]:
        return x * 2, torch.arange(3)


def test_a_layer_gives_zeros_for_an_input_that_it_does_not_use() -> None:
    outputs, graph = Layer("picky", Picky()).forward_with_graph((torch.ones(3), torch.ones(2)), (True, True))
    assert graph.needs_grad == (True, False)
    assert not any(out.requires_grad for out in outputs)
    used, unused = graph.backward((torch.full((3,), 5.0),))
    assert used.tolist() == [10, 10, 10]
    assert unused.tolist() == [0, 0]


def test_a_layer_that_returns_no_tensor_is_refused() -> None:
    class Wrong(nn.Module):
        def forward(self, x: Tensor) -> list[Tensor]:
            return [x]

    with pytest.raises(TypeError, match=r"a layer must return a tensor or a tuple of tensors \(got list\)"):
        Layer("wrong", Wrong()).forward((torch.ones(1),))


def test_recompute_keeps_inputs_only_and_sees_the_same_dropout() -> None:
    stage = Stage(0, [("drop", nn.Dropout(0.5)), ("linear", nn.Linear(8, 8))], device=CPU, seed=0)
    stage.train(True)
    options = {"needs_grad": (False,), "targets": (), "key": 1, "for_backward": True}
    x = torch.randn(4, 8)
    first = stage.forward(0, (x,), keep_graph=False, **options)
    second = stage.forward(1, (x,), keep_graph=True, **options)
    assert not torch.equal(first[0], second[0]), "another micro-batch, another mask"
    assert not stage._in_flight[0].graphs
    stage.recompute(0)
    stage.backward(0, (torch.ones(4, 8),))
    recomputed = {name: p.grad.clone() for name, p in stage.named_parameters()}
    stage.layers[1].module.zero_grad()
    stage.forward(0, (x,), keep_graph=True, **options)
    stage.backward(0, (torch.ones(4, 8),))
    for name, parameter in stage.named_parameters():
        assert torch.equal(parameter.grad, recomputed[name])


def test_local_ranks_that_wait_for_each_other_are_found() -> None:
    def rank_main(transport: LocalTransport) -> None:
        transport.hear(torch.zeros(1), 1 - transport.rank, tag=0)

    with pytest.raises(RuntimeError, match="all ranks wait for each other"):
        run_ranks(2, rank_main)


def test_local_ranks_get_the_first_failure() -> None:
    def rank_main(transport: LocalTransport) -> None:
        if transport.rank == 1:
            raise ValueError("boom")
        transport.hear(torch.zeros(1), 1, tag=0)

    with pytest.raises(ValueError, match="boom"):
        run_ranks(3, rank_main)


def linear_recipe(layers: int) -> Recipe:
    return Recipe(
        layers=tuple(LayerRecipe(f"layer{i}", lambda: nn.Linear(4, 4)) for i in range(layers)),
        loss_sum=lambda output, targets: output.sum(),
        count=lambda targets: len(targets[0]),
    )


def test_ranks_with_different_schedules_are_refused() -> None:
    def rank_main(transport: LocalTransport) -> None:
        runtime = build_runtime(linear_recipe(3), (1, 1, 1), transport)
        runtime.prepare(schedule.build("gpipe", 3, 4, recompute=transport.rank == 1))

    with pytest.raises(StageFailed, match=r"ranks \[1\] hold another schedule or another version of torch than rank 0"):
        run_ranks(3, rank_main)


def test_measured_spans_are_the_actions_of_the_schedule_in_its_order() -> None:
    plan = schedule.build("gpipe", 2, 3, recompute=True)

    def rank_main(transport: LocalTransport) -> list[str]:
        runtime = build_runtime(linear_recipe(2), (1, 1), transport)
        batch = (torch.randn(3, 4),)
        runtime.train_step(runtime.prepare(plan), 0, batch, batch, total=3, update=lambda report: None)
        assert all(span.start_s <= span.end_s for span in runtime.spans)
        return [str(span.action) for span in runtime.spans]

    for rank, actions in enumerate(run_ranks(2, rank_main)):
        assert actions == [str(action) for action in plan.compute().actions[rank]]


def test_an_output_shape_that_does_not_follow_from_the_input_shape_is_refused() -> None:
    class Growing(nn.Module):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            type(self).calls += 1
            return x.repeat(1, 1 if self.calls < 3 else 2)

    recipe = linear_recipe(2)
    layers = (LayerRecipe("growing", Growing), *recipe.layers[1:])

    def rank_main(transport: LocalTransport) -> None:
        runtime = build_runtime(Recipe(layers, recipe.loss_sum, recipe.count), (1, 1), transport)
        program = runtime.prepare(schedule.build_forward_only(2, 4))
        runtime.evaluate_step(program, (torch.randn(4, 4),), (torch.randn(4, 4),))

    with pytest.raises(
        RuntimeError, match=r"the output of stage 0 is \[\(1, 8\)\], but it was \[\(1, 4\)\] for the same"
    ):
        run_ranks(2, rank_main)


def test_what_crosses_a_border_is_contiguous_in_both_directions() -> None:
    """Elsewhere a sum over other strides could give other bits than on one stage."""
    seen: list[bool] = []

    class Watched(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            out = x * 1
            out.register_hook(lambda gradient: seen.append(gradient.is_contiguous()))
            return out

    class Turned(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.t()

    assert Layer("turned", Turned()).forward((torch.randn(2, 3),))[0].is_contiguous()
    _, graph = Layer("watched", Watched()).forward_with_graph((torch.randn(2, 3),), (True,))
    graph.backward((torch.randn(3, 2).t(),))
    assert seen == [True]
