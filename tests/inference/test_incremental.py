"""A text in pieces is the text as a whole, for every model that makes text."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipetrain.inference.incremental import Incremental
from pipetrain.models import Recipe, build
from pipetrain.partition.split import take_stage
from pipetrain.segment_memory import SegmentMemory

V = 17
CPU = torch.device("cpu")
COMMON = {"layers": 2, "d_model": 8, "d_ff": 16, "heads": 2, "dropout": 0.3, "init_scale": "none", "vocab_size": V}
KINDS: dict[str, dict[str, Any]] = {
    "seq2seq": {"head_width": 6, "embeddings": "all", "norm": "pre", "label_smoothing": 0.1, "max_tokens": 12},
    "seq2seq, post-norm": {
        "head_width": 4,
        "embeddings": "none",
        "norm": "post",
        "label_smoothing": 0,
        "max_tokens": 9,
    },
    "transformer": {"tied": True, "positions": "learned", "seq_len": 9},
    "transformer, sinusoids": {"tied": False, "positions": "sinusoidal", "seq_len": 9, "logit_clip": 0.5},
    "transformer_xl": {"cutoffs": []},
    "transformer_xl, adaptive": {"cutoffs": [5, 9]},
}
OF_XL = {"attention_dropout": 0.2, "memory": 9, "evaluation_memory": None, "shared_biases": False, "tied": True}


def made(kind: str) -> tuple[Recipe, list[nn.Module]]:
    settings = {**COMMON, **KINDS[kind]}
    if kind.startswith("transformer_xl"):
        settings = {**settings, **OF_XL, "seq_len": 9}
        del settings["init_scale"]
    recipe = build(name=kind.split(",")[0], **settings)
    built = take_stage(recipe, (len(recipe.layers),), 0, seed=1, device=CPU)
    return recipe, [layer.module.double().eval() for layer in built]


def sources_of(kind: str) -> tuple[Tensor, ...]:
    return (torch.tensor([[5, 6, 7, 3], [8, 9, 3, 0]]),) if kind.startswith("seq2seq") else ()


def whole(kind: str, ids: Tensor, sources: tuple[Tensor, ...], used: list[nn.Module] | None = None) -> Tensor:
    """log p behind each token, layer by layer, without anything that remembers.

    Args:
        used: layers that had something else to do before; None is fresh ones.
    """
    recipe, modules = made(kind)
    modules = used or modules
    for part in (part for module in modules for part in module.modules() if isinstance(part, SegmentMemory)):
        part.state = None
    values: dict[str, Any] = {}
    inputs = (*sources, ids)
    for place, (layer, module) in enumerate(zip(recipe.layers, modules, strict=True)):
        taken = [
            inputs[value.element or 0]  # type: ignore[index]
            if value.layer == "batch"
            else values[value.layer]
            if value.element is None
            else values[value.layer][value.element]
            for value in recipe.taken_by(place)
        ]
        values[layer.name] = module(*taken)
    assert recipe.generation is not None
    return recipe.generation.log_probs(values[recipe.layers[-1].name])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pieces", [[1] * 7, [7], [3, 1, 1, 2], [1, 4, 2]])
@torch.no_grad()
def test_pieces_give_what_the_whole_gives(kind: str, pieces: list[int]) -> None:
    torch.manual_seed(0)
    ids, sources = torch.randint(4, V, (2, 7)), sources_of(kind)
    expected = whole(kind, ids, sources)
    assert torch.allclose(expected.exp().sum(-1), torch.ones(2, 7, dtype=torch.float64))
    recipe, modules = made(kind)
    model = Incremental(recipe, modules, segment=1)
    for _ in range(2):  # a second text starts anew
        model.begin(*sources)
        seen = 0
        for number in pieces:
            found = model.extend(ids[:, seen : seen + number])
            seen += number
            assert torch.allclose(found, expected[:, seen - 1], atol=1e-12)
    model.end()  # and the model is as it was
    assert torch.equal(whole(kind, ids, sources, modules), whole(kind, ids, sources, modules))
    assert torch.equal(whole(kind, ids, sources, modules), expected)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_rows_are_chosen_anew(kind: str) -> None:
    torch.manual_seed(0)
    ids, sources = torch.randint(4, V, (2, 4)), sources_of(kind)
    model = Incremental(*made(kind), segment=1)
    model.begin(*sources)
    model.extend(ids[:, :2])
    rows = torch.tensor([1, 0, 1])
    model.select(rows, rows)
    found = model.extend(ids[rows, 2:])
    assert torch.allclose(found, whole(kind, ids, sources)[rows, -1], atol=1e-12)


@torch.no_grad()
def test_a_source_may_have_several_targets() -> None:
    """The rows of a source lie behind each other, and then one source is left."""
    torch.manual_seed(0)
    kind = "seq2seq"
    (source,), ids = sources_of(kind), torch.randint(4, V, (6, 5))
    model = Incremental(*made(kind))
    model.begin(source)
    model.extend(ids[::3, :1])
    model.select(torch.tensor([0, 0, 0, 1, 1, 1]))
    ids[:, 0] = ids[[0, 0, 0, 3, 3, 3], 0]
    for place in range(1, 4):
        found = model.extend(ids[:, place : place + 1])
    expected = whole(kind, ids, (source.repeat_interleave(3, 0),))
    assert torch.allclose(found, expected[:, 3], atol=1e-12)
    model.select(torch.tensor([4, 5]), torch.tensor([1]))
    assert torch.allclose(model.extend(ids[4:, 4:]), expected[4:, 4], atol=1e-12)


@torch.no_grad()
def test_memory_reaches_as_far_as_in_training() -> None:
    """Of segments of 4 tokens with 3 remembered, the last token of one sees 6 before it."""
    torch.manual_seed(0)
    recipe = build(**_short())
    modules = [m.module.double().eval() for m in take_stage(recipe, (len(recipe.layers),), 0, seed=1, device=CPU)]
    ids = torch.randint(4, V, (1, 30))
    other = torch.cat([ids[:, :16] * 0 + 5, ids[:, 16:]], dim=1)
    ends = []
    for text in (ids, other):
        model = Incremental(recipe, modules, segment=4)
        model.begin()
        for place in range(30):
            end = model.extend(text[:, place : place + 1])
        ends.append(end)
        for module in model._memories:
            assert module.state is not None
            assert module.state.shape[1] == 6
        assert model.piece == 4
        model.end()
        assert [module.length_in_evaluation for module in model._memories] == [3, 3]
    assert torch.equal(*ends)  # two blocks see 12 tokens back


def _short() -> dict[str, Any]:
    settings = {**COMMON, **OF_XL, "cutoffs": [], "memory": 3, "seq_len": 4, "name": "transformer_xl"}
    del settings["init_scale"]
    return settings
