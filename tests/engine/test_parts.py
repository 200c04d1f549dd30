"""The small parts of the engine, each for what it promises."""

import gc
import random as python_random
from typing import Any

import numpy as np
import pytest
import torch
from pipeline import CPU, build_runtime
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from pipetrain import schedule
from pipetrain.config import AmoebaNetConfig
from pipetrain.engine.known import runs_known_code_only
from pipetrain.engine.layer import Layer
from pipetrain.engine.local import LocalTransport, run_ranks
from pipetrain.engine.message import Layout, Wire
from pipetrain.engine.microbatch import split
from pipetrain.engine.rng import LayerRandomness
from pipetrain.engine.stage import Stage
from pipetrain.engine.structure import (
    TensorSpec,
    decode,
    encode,
    flat,
    flatten,
    key_of,
    kind_of,
    structure_of,
    without_gaps,
)
from pipetrain.errors import LayerError, StageFailed
from pipetrain.models import LayerRecipe, Recipe, build
from pipetrain.models.capture import CapturedLayer, capture
from pipetrain.schedule import Dataflow, Take
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


def test_a_structure_travels_as_bytes() -> None:
    pytree = {"x": (torch.zeros(2, 3, dtype=torch.bfloat16), None), "n": [3, 0.5, True], "mode": "same"}
    leaves, spec = flatten(pytree)
    structure = structure_of(leaves, spec, [isinstance(leaf, Tensor) for leaf in leaves])
    assert decode(encode({4: structure})) == {4: structure}
    assert structure.select("n")[1] == range(2, 5)
    assert flatten(torch.ones(1))[1] == flatten({"a": torch.ones(1)})[1].children()[0]


PARTS = {
    (0, 0): torch.arange(6.0).reshape(2, 3),
    (0, 1): 7,
    (0, 2): torch.tensor([True, False, True]),
    (1, 0): -0.1,
    (1, 1): torch.zeros(0, 4),
    (2, 0): torch.tensor(5j),
    (3, 0): torch.arange(24.0).reshape(2, 3, 4).permute(2, 0, 1),
    (2, 1): True,
    (2, 2): "text",
    (2, 3): None,
}


def layout_of(values: dict[tuple[int, int], Any]) -> Layout:
    return Layout(tuple((value, kind_of(leaf, False)) for value, leaf in values.items()))


def test_many_values_travel_in_one_tensor_and_arrive_unchanged() -> None:
    layout = layout_of(PARTS)
    message = layout.pack(PARTS, CPU)
    assert message is not None
    assert layout.wire is not None
    assert layout.wire == Wire(len(message), torch.uint8)
    arrived = layout.unpack(message.clone(), CPU)
    assert list(arrived) != []
    for value, leaf in PARTS.items():
        if isinstance(leaf, Tensor):
            assert torch.equal(arrived[value], leaf)
            assert (arrived[value].dtype, arrived[value].stride()) == (leaf.dtype, leaf.stride())
        else:
            assert arrived[value] == leaf
            assert type(arrived[value]) is type(leaf)


def test_a_single_tensor_travels_as_it_is_and_constants_not_at_all() -> None:
    tensor = torch.ones(3)
    layout = layout_of({(0, 0): tensor, (0, 1): "text", (0, 2): torch.device("cuda:1")})
    message = layout.pack({(0, 0): tensor}, CPU)
    assert message is not None
    assert message.data_ptr() == tensor.data_ptr()
    arrived = layout.unpack(message, CPU)
    assert torch.equal(arrived.pop((0, 0)), tensor)
    assert arrived == {(0, 1): "text", (0, 2): CPU}, "a device becomes the receiver's own"
    assert layout_of({(0, 0): "text"}).wire is None


def test_narrow_messages_halve_what_is_wide_and_leave_the_rest() -> None:
    single = Layout(layout_of({(0, 0): torch.ones(3)}).parts, narrow=True)
    message = single.pack({(0, 0): torch.tensor([1.0, 1 / 3, 1e30])}, CPU)
    assert message is not None
    assert single.wire == Wire(3, torch.bfloat16) == Wire(message.numel(), message.dtype)
    (arrived,) = single.unpack(message, CPU).values()
    assert torch.equal(arrived, torch.tensor([1.0, 1 / 3, 1e30]).bfloat16().float())
    layout = Layout(layout_of(PARTS).parts, narrow=True)
    message = layout.pack(PARTS, CPU)
    assert message is not None
    for value, leaf in layout.unpack(message, CPU).items():
        if isinstance(leaf, Tensor):
            assert torch.equal(leaf, PARTS[value]), "small whole numbers, and what is no floating-point tensor"
            assert leaf.stride() == PARTS[value].stride()
        else:
            assert leaf == PARTS[value]


def test_a_tensor_of_another_size_than_agreed_is_refused_before_it_is_sent() -> None:
    with pytest.raises(RuntimeError, match=r"a value of layer 0 is \(2,\), not \(3,\)"):
        layout_of({(0, 0): torch.ones(3)}).pack({(0, 0): torch.ones(2)}, CPU)


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

    def draw() -> tuple[float, float, float]:
        return float(torch.rand(())), python_random.random(), np.random.random()

    def seed() -> None:
        torch.manual_seed(1)
        python_random.seed(1)
        np.random.seed(1)

    seed()
    expected = draw()
    seed()
    with random.preserved():
        random.before("layer", 0, 0)
        first = draw()
        random.before("layer", 0, 0)
        assert draw() == first
        random.before("layer", 0, 1)
        assert all(a != b for a, b in zip(draw(), first, strict=True))
    assert draw() == expected


class Picky(nn.Module):
    """Uses one of its two inputs."""

    def forward(self, x: Tensor, unused: Tensor) -> tuple[Tensor, Tensor]:
        return x * 2, torch.arange(3)


def test_a_layer_gives_nothing_for_an_input_that_it_does_not_use() -> None:
    inputs = (torch.ones(3), torch.ones(2))
    leaves, _, graph = Layer("picky", "", Picky()).forward_with_graph(inputs, list, (True, True))
    assert not graph.is_empty
    assert not any(leaf.requires_grad for leaf in leaves)
    used, unused = graph.backward({0: torch.full((3,), 5.0)})
    assert used is not None
    assert used.tolist() == [10, 10, 10]
    assert unused is None


def test_a_value_lives_on_only_where_the_modules_graph_needs_it() -> None:
    """The backward of tanh starts from its output, that of a square from its input."""
    alive = []
    for module in (nn.Tanh(), Square()):
        x = torch.randn(4, 3)
        value = StorageWeakRef(x.untyped_storage())
        layer = Layer("layer", "", module)
        layer.forward_with_graph((torch.randn(4, 3),), list, (True,))  # the first one gets copies
        _, _, graph = layer.forward_with_graph((x,), list, (True,))
        del x
        alive.append(not value.expired())
        (gradient,) = graph.backward({0: torch.ones(4, 3)})
        assert gradient is not None
    assert alive == [False, True]


@pytest.mark.parametrize("split", [False, True])
def test_the_gradient_of_an_input_has_its_strides(split: bool) -> None:
    """That of a sum is one number, seen as a tensor."""
    layer, x = Layer("sum", "", Total()), torch.randn(3, 4).t()
    _, _, graph = layer.forward_with_graph((x,), list, (True,))
    (gradient,) = graph.backward({0: torch.tensor(2.0)}, split=split)
    assert gradient is not None
    assert gradient.stride() == x.stride()
    assert bool((gradient == 2).all())


class Square(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * x


class Total(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.sum()


class Residual(nn.Module):
    """Not a chain: its operations are captured, those of the user's own forward."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + x


def test_modules_of_torch_and_pipetrain_need_no_watching_and_all_others_do() -> None:
    sizes = {"layers": 3, "filters": 4, "image_size": (8, 8), "channels": 1, "num_classes": 2}
    net = build("amoebanet", **{k: v for k, v in vars(AmoebaNetConfig()).items() if k != "name"} | sizes)
    assert all(runs_known_code_only(layer.build()) for layer in net.layers)
    hooked = nn.Linear(2, 2)
    hooked.register_forward_hook(lambda module, args, output: None)
    own_function = nn.TransformerEncoderLayer(8, 2, activation=lambda x: x)
    assert runs_known_code_only(nn.TransformerEncoderLayer(8, 2, activation="gelu"))
    (captured, *_), _ = capture(Residual(), Residual, num_inputs=1)
    assert isinstance(captured.build(), CapturedLayer)
    for module in (hooked, own_function, nn.Sequential(nn.Linear(2, 2), Square()), captured.build()):
        assert not runs_known_code_only(module)


class LooksForCycles(nn.Module):
    """Notes whether Python may stop here to look for cycles."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.seen: list[bool] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(gc.isenabled())
        return self.linear(x)


def test_no_step_stops_to_look_for_cycles() -> None:
    module = LooksForCycles()
    recipe = Recipe(
        layers=(LayerRecipe("looks", lambda: module),),
        loss_sum=lambda output, targets: output.sum(),
        count=lambda targets: targets[0].numel(),
    )
    x = torch.ones(4, 4)

    def rank_main(transport: LocalTransport) -> None:
        plan = schedule.build("gpipe", 1, 2, recompute="never")
        runtime = build_runtime(recipe, (1,), transport)
        runtime.train_step(runtime.prepare(plan), 0, (x,), (x,), total=4, update=lambda report: None)

    run_ranks(1, rank_main)
    assert module.seen
    assert not any(module.seen)
    assert gc.isenabled()


def test_recompute_keeps_inputs_only_and_sees_the_same_dropout() -> None:
    flow = Dataflow(((Take(-1),), (Take(0),)), (0, 0), ("drop", "linear"))
    layers = [("drop", "drop.", nn.Dropout(0.5)), ("linear", "linear.", nn.Linear(8, 8))]
    stage = Stage(0, layers, flow, device=CPU, seed=0)
    stage.train(True)
    x = torch.randn(4, 8)
    stage.wiring.learn_batch(1, (x,))

    def forward(microbatch: int, keep_graph: bool) -> Tensor:
        inputs = {(-1, 0): x}
        return stage.forward(microbatch, inputs, targets=(), key=1, for_backward=True, keep_graph=keep_graph)[1, 0]

    assert not torch.equal(forward(0, False), forward(1, True)), "another micro-batch, another mask"
    assert not stage._in_flight[0, 0].graphs
    stage.recompute(0)
    stage.backward(0, {(1, 0): torch.ones(4, 8)})
    recomputed = {name: p.grad.clone() for name, p in stage.named_parameters()}
    stage.layers[1].module.zero_grad()
    forward(0, True)
    stage.backward(0, {(1, 0): torch.ones(4, 8)})
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
        runtime.prepare(schedule.build("gpipe", 3, 4, recompute="always" if transport.rank == 1 else "never"))

    with pytest.raises(StageFailed, match=r"ranks \[1\] hold another schedule or another version of torch than rank 0"):
        run_ranks(3, rank_main)


def test_measured_spans_are_the_actions_of_the_schedule_in_its_order() -> None:
    plan = schedule.build("gpipe", 2, 3, recompute="always")

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
        program = runtime.prepare(schedule.build_forward_only(tuple(range(2)), 4))
        runtime.evaluate_step(program, (torch.randn(4, 4),), (torch.randn(4, 4),))

    with pytest.raises(
        LayerError, match=r"layer growing is a float32 tensor \[1, 8\], but for .* it was a float32 tensor \[1, 4\]"
    ):
        run_ranks(2, rank_main)


def test_strides_are_kept_and_gaps_closed() -> None:
    turned = torch.randn(2, 3, 4).permute(2, 0, 1)
    assert without_gaps(turned) is turned
    assert without_gaps(turned[:, :, ::2]).is_contiguous()
    assert without_gaps(torch.zeros(3, 1).expand(3, 4)).is_contiguous()
    spec = kind_of(turned, False)
    assert isinstance(spec, TensorSpec)
    arrived = spec.shaped(flat(turned).clone())
    assert torch.equal(arrived, turned)
    assert arrived.stride() == turned.stride()
    assert spec.conform(turned) is turned
    assert spec.conform(turned.contiguous()).stride() == turned.stride()


def test_a_layer_hands_on_strides_and_gets_gradients_with_them() -> None:
    class Turned(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.t() * 2

    x = torch.randn(4, 3).t()
    (out,), _, graph = Layer("turned", "", Turned()).forward_with_graph((x,), list, (True,))
    assert out.stride() == (3, 1) == torch.empty(4, 3).stride()
    (gradient,) = graph.backward({0: torch.randn(4, 3)})
    assert gradient.stride() == x.stride() == (1, 3)


def test_a_layer_that_changes_its_input_in_training_only_is_watched_in_both_modes() -> None:
    layer, x = Layer("drop", "", nn.Dropout(0.5, inplace=True)), torch.ones(8)
    layer.module.eval()
    layer.forward((x,), list)
    assert layer.changed_inputs == frozenset()
    layer.module.train()
    for _ in range(2):
        layer.forward_with_graph((x,), list, (True,))
    assert layer.changed_inputs == {0}
    assert torch.equal(x, torch.ones(8))
