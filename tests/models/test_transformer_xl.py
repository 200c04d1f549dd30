"""Transformer-XL against its formula, its published size, and itself in one piece."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from pipetrain.models import Recipe, build
from pipetrain.models.transformer_xl import RelativeAttention
from pipetrain.partition.split import build_layer
from pipetrain.segment_memory import SegmentMemory


def recipe(**changes: Any) -> Recipe:
    settings: dict[str, Any] = {
        "layers": 2,
        "d_model": 8,
        "d_ff": 16,
        "heads": 2,
        "dropout": 0.0,
        "attention_dropout": 0.0,
        "memory": 6,
        "evaluation_memory": None,
        "tied": True,
        "shared_biases": False,
        "cutoffs": [],
        "vocab_size": 11,
        "seq_len": 6,
    }
    return build(name="transformer_xl", **(settings | changes))


def parameters(of: Recipe) -> int:
    later_uses = {use for tie in of.ties for use in tie[1:]}
    with torch.device("meta"):
        built = [(layer.name, layer.build()) for layer in of.layers]
    return sum(p.numel() for layer, m in built for name, p in m.named_parameters() if (layer, name) not in later_uses)


def test_the_authors_base_model_has_its_published_size() -> None:
    """Dai et al. 2019, enwik8: 41 M; with the 204 characters of that text 41,055,436."""
    base = recipe(layers=12, d_model=512, d_ff=2048, heads=8, memory=512, vocab_size=204, shared_biases=True)
    assert parameters(base) == 41_055_436


def test_the_authors_word_model_has_its_published_size() -> None:
    """Dai et al. 2019, WikiText-103: 151 M."""
    words: dict[str, Any] = {"vocab_size": 267_735, "cutoffs": [20_000, 40_000, 200_000], "shared_biases": True}
    assert parameters(recipe(layers=16, d_model=410, d_ff=2100, heads=10, memory=150, **words)) == 151_107_538


def test_attention_is_the_papers_formula() -> None:
    """Each score written out: ((q_i + u) k_j + (q_i + v) r_(i-j)) / sqrt(d), over keys not behind the query."""
    torch.manual_seed(0)
    heads, width, tokens, before = 2, 8, 3, 4
    module = RelativeAttention(width, heads, 0.0, 0.0).double()
    x, memory = torch.randn(1, tokens, width).double(), torch.randn(1, before, width).double()
    whole = torch.cat([memory, x], dim=1)
    found = module(x, whole)[0]
    d = width // heads
    keys, values = (whole[0] @ module.key_value.weight.T).chunk(2, dim=-1)
    mixed = torch.zeros(tokens, width, dtype=torch.float64)
    for i in range(tokens):
        q = x[0, i] @ module.query.weight.T
        for h in range(heads):
            part = slice(h * d, (h + 1) * d)
            scores = []
            for j in range(before + i + 1):
                angle = (before + i - j) * 10_000 ** (-torch.arange(0, width, 2).double() / width)
                r = torch.cat([angle.sin(), angle.cos()]) @ module.position.weight.T
                u, v = module.content_bias[part], module.position_bias[part]
                scores.append(((q[part] + u) @ keys[j, part] + (q[part] + v) @ r[part]) / math.sqrt(d))
            weights = torch.stack(scores).softmax(0)
            mixed[i, part] = sum(w * values[j, part] for j, w in enumerate(weights))
    torch.testing.assert_close(found, mixed @ module.output.weight.T, rtol=1e-12, atol=1e-12)


def run(of: Recipe, pieces: list[Tensor], *, training: bool = True) -> list[Tensor]:
    """One piece after the other through the whole model."""
    modules = [build_layer(layer, 0).double().train(training) for layer in of.layers]
    outputs = []
    for ids in pieces:
        value = ids
        for module in modules:
            value = module(value)
        outputs.append(value)
    return outputs


def test_two_segments_with_memory_are_one_of_twice_the_length() -> None:
    """With one block, whose input depends on nothing before it; memory is what makes it so."""
    torch.manual_seed(0)
    ids = torch.randint(11, (3, 12))
    (whole,) = run(recipe(layers=1), [ids])
    parts = run(recipe(layers=1), [ids[:, :6], ids[:, 6:]])
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-12, atol=1e-12)
    forgetful = run(recipe(layers=1, memory=0), [ids[:, :6], ids[:, 6:]])
    assert not torch.allclose(forgetful[1], whole[:, 6:])


def test_no_token_sees_a_later_one() -> None:
    torch.manual_seed(0)
    ids = torch.randint(11, (1, 6))
    other = ids.clone()
    other[0, 4] = (ids[0, 4] + 1) % 11
    (a,), (b,) = run(recipe(), [ids]), run(recipe(), [other])
    assert torch.equal(a[:, :4], b[:, :4])
    assert not torch.equal(a[:, 4:], b[:, 4:])


@pytest.mark.parametrize(("training", "length"), [(True, 4), (False, 7)])
def test_memory_has_a_length_for_training_and_one_for_evaluation(training: bool, length: int) -> None:
    memory = SegmentMemory(4, 7).train(training)
    x = torch.arange(20.0).reshape(1, 20, 1)
    assert torch.equal(memory(x[:, :5]), x[:, :5])
    assert torch.equal(memory(x[:, 5:10]), x[:, 5 - min(5, length) : 10])
    assert torch.equal(memory(x[:, 10:12]), x[:, 10 - length : 12])
    assert memory.state is not None
    assert not memory.state.requires_grad
