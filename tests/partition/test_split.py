import itertools
from collections.abc import Iterable
from dataclasses import replace

import pytest
import torch
from torch import nn

from pipetrain.errors import ConfigError
from pipetrain.models import Value, build
from pipetrain.partition.split import BuiltLayer, dataflow_of, stage_of_each_layer, stages_of_ties, take_stage
from pipetrain.schedule import Skips, Take

RECIPE = build(
    "transformer",
    layers=3,
    d_model=8,
    d_ff=16,
    heads=2,
    dropout=0.0,
    tied=True,
    positions="learned",
    init_scale="none",
    vocab_size=11,
    seq_len=4,
)


def modules_of(layers: Iterable[BuiltLayer]) -> dict[str, nn.Module]:
    return {layer.name: layer.module for layer in layers}


def test_every_layer_is_on_one_stage_and_starts_the_same_wherever_it_is() -> None:
    whole = modules_of(take_stage(RECIPE, (5,), 0, seed=1, device=torch.device("cpu")))
    for balance in [(2, 3), (1, 1, 3), (1, 1, 1, 1, 1)]:
        stages = [take_stage(RECIPE, balance, s, seed=1, device=torch.device("cpu")) for s in range(len(balance))]
        assert [len(stage) for stage in stages] == list(balance)
        parts = modules_of(itertools.chain(*stages))
        assert list(parts) == list(whole)
        for name, module in parts.items():
            for key, value in module.state_dict().items():
                assert torch.equal(value, whole[name].state_dict()[key]), (balance, name, key)


def test_layers_and_seeds_start_differently() -> None:
    a, b = (modules_of(take_stage(RECIPE, (5,), 0, seed=seed, device=torch.device("cpu"))) for seed in (1, 2))
    weight = "attention.qkv.weight"
    assert not torch.equal(a["blocks.0"].get_parameter(weight), b["blocks.0"].get_parameter(weight))
    assert not torch.equal(a["blocks.0"].get_parameter(weight), a["blocks.1"].get_parameter(weight))


def test_a_tied_parameter_starts_as_its_first_use() -> None:
    layers = modules_of(take_stage(RECIPE, (4, 1), 1, seed=1, device=torch.device("cpu")))
    first = modules_of(take_stage(RECIPE, (4, 1), 0, seed=1, device=torch.device("cpu")))
    assert torch.equal(layers["head"].get_parameter("output.weight"), first["embedding"].get_parameter("token.weight"))


def test_building_leaves_the_callers_randomness_alone() -> None:
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    take_stage(RECIPE, (5,), 0, seed=1, device=torch.device("cpu"))
    assert torch.equal(torch.rand(1), expected)


def test_a_rank_builds_its_own_layers_only() -> None:
    built: list[str] = []
    layers = tuple(
        type(layer)(layer.name, lambda layer=layer: (built.append(layer.name), layer.build())[1])
        for layer in RECIPE.layers
    )
    recipe = type(RECIPE)(layers, RECIPE.loss_sum, RECIPE.count)
    take_stage(recipe, (2, 2, 1), 1, seed=0, device=torch.device("cpu"))
    assert built == ["blocks.1", "blocks.2"]


def test_stages_of_layers_and_ties() -> None:
    assert stage_of_each_layer((2, 1, 2)) == [0, 0, 1, 2, 2]
    assert stages_of_ties(RECIPE, (2, 1, 2)) == [[("embedding.token.weight", 0), ("head.output.weight", 2)]]


def test_the_dataflow_of_a_chain_has_no_skips() -> None:
    flow = dataflow_of(RECIPE, (2, 1, 2))
    assert flow.takes == tuple((Take(layer - 1),) for layer in range(6))
    assert flow.stage_of == (0, 0, 1, 2, 2, 2)
    assert flow.names[-2:] == ("head", "loss")
    assert flow.skips() == Skips()


def test_a_layer_cannot_take_what_is_not_there_yet() -> None:
    first, *others = RECIPE.layers
    wrong = replace(RECIPE, layers=(replace(first, takes=(Value("blocks.0"),)), *others))
    with pytest.raises(ConfigError, match=r"layer embedding takes the output of blocks.0, which is no layer before it"):
        dataflow_of(wrong, (2, 3))
