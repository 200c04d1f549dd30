"""The Transformer: parameter counts of the papers, and what each part computes."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn

from pipetrain.config import TransformerConfig
from pipetrain.models import Recipe, build
from pipetrain.models.transformer import Embedding, Head, clip_logits, cross_entropy_sum, depth_scale, sinusoids
from pipetrain.partition.split import build_layer

CONF = Path(__file__).parents[2] / "conf" / "model"


def recipe(**changes: Any) -> Recipe:
    settings = {
        "layers": 2,
        "d_model": 16,
        "d_ff": 32,
        "heads": 2,
        "dropout": 0.0,
        "tied": False,
        "positions": "learned",
        "init_scale": "none",
        "vocab_size": 11,
        "seq_len": 8,
    }
    settings |= changes
    settings.pop("name", None)
    return build("transformer", **settings)


def from_file(name: str, **changes: Any) -> Recipe:
    """The recipe of a size in conf/model/transformer_*."""
    content = yaml.safe_load((CONF / f"transformer_{name}.yaml").read_text())
    sizes = {key: value for key, value in content.items() if key != "defaults"}
    return recipe(**(vars(TransformerConfig()) | sizes | changes))


def count_on_meta(model: Recipe) -> int:
    """Parameters of the whole model without its memory; a tied one once."""
    tied = {(layer, name) for tie in model.ties for layer, name in tie[1:]}
    total = 0
    for layer in model.layers:
        with torch.device("meta"):
            module = layer.build()
        total += sum(p.numel() for name, p in module.named_parameters() if (layer.name, name) not in tied)
    return total


@pytest.mark.parametrize(
    ("layers", "published"),
    [(3, 282.2e6), (13, 785.8e6), (103, 5.3e9), (415, 21.0e9), (1663, 83.9e9)],
)
def test_parameters_of_gpipes_transformer_l(layers: int, published: float) -> None:
    """Huang et al. 2019, Table 1, to the digits printed there."""
    model = from_file("gpipe", layers=layers, vocab_size=32_000, seq_len=1024)
    count = count_on_meta(model)
    d, f, v = 2048, 8192, 32_000
    assert count == layers * (4 * d * d + 4 * d + 2 * d * f + f + d + 4 * d) + 2 * v * d + v + 2 * d
    unit = 1e9 if published >= 1e9 else 1e6
    assert round(count / unit, 1) == round(published / unit, 1)


def test_parameters_of_ouroboros_vanilla_transformer() -> None:
    """12 layers, d 512, feed-forward 2048, bytes, tied: about 37.9 M."""
    model = from_file("12x512", vocab_size=256, seq_len=512)
    assert count_on_meta(model) == pytest.approx(37.9e6, rel=0.003)


def test_a_token_sees_only_the_past() -> None:
    model = nn.Sequential(*(build_layer(layer, seed=0) for layer in recipe().layers)).eval()
    ids = torch.randint(0, 11, (1, 8))
    changed = ids.clone()
    changed[0, 5] = (changed[0, 5] + 1) % 11
    before, after = model(ids), model(changed)
    assert torch.equal(before[:, :5], after[:, :5])
    assert not torch.allclose(before[:, 5:], after[:, 5:])


def test_positions_matter() -> None:
    for positions in ("learned", "sinusoidal"):
        layer = Embedding(11, 16, 8, positions, dropout=0.0)
        out = layer(torch.full((1, 8), 3))
        assert not torch.allclose(out[0, 0], out[0, 1])
    assert "position" not in dict(Embedding(11, 16, 8, "sinusoidal", 0.0).named_parameters())


def test_sinusoids_are_those_of_the_paper() -> None:
    table = sinusoids(50, 8)
    for position, i in [(0, 0), (7, 1), (49, 3)]:
        angle = position / 10_000 ** (2 * i / 8)
        assert table[position, 2 * i] == pytest.approx(math.sin(angle), abs=1e-5)
        assert table[position, 2 * i + 1] == pytest.approx(math.cos(angle), abs=1e-5)


def test_hard_clip_clamps_in_training_only_and_passes_no_gradient_outside() -> None:
    x = torch.tensor([-30.0, -5.0, 5.0, 30.0], requires_grad=True)
    clipped = clip_logits(x, 20.0, "hard", training=True)
    assert clipped.tolist() == [-20, -5, 5, 20]
    clipped.sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [0, 1, 1, 0]
    assert clip_logits(x, 20.0, "hard", training=False) is x
    assert clip_logits(x, None, "hard", training=True) is x


def test_soft_clip_bends_all_logits_always() -> None:
    x = torch.tensor([-300.0, 1.0, 300.0])
    for training in (True, False):
        assert torch.allclose(clip_logits(x, 20.0, "soft", training), 20 * torch.tanh(x / 20))


def test_the_head_clips() -> None:
    head = Head(4, 3, logit_clip=0.01, logit_clip_kind="hard").requires_grad_(False)
    x = torch.randn(2, 5, 4)
    assert float(head.train()(x).abs().max()) <= 0.01
    assert float(head.eval()(x).abs().max()) > 0.01


@pytest.mark.parametrize(
    ("init_scale", "factor"), [("none", 1.0), ("inverse_depth", 1 / 9), ("inverse_sqrt_depth", 1 / 3)]
)
def test_depth_scaled_initialisation_touches_the_feed_forward_layers_only(init_scale: str, factor: float) -> None:
    plain, scaled = (recipe(layers=9, init_scale=scale).layers[1] for scale in ("none", init_scale))
    before, after = (dict(build_layer(layer, seed=3).named_parameters()) for layer in (plain, scaled))
    for name, value in before.items():
        expected = factor if name.startswith("ffn") and name.endswith("weight") else 1.0
        assert torch.allclose(after[name], value * expected), name
    assert depth_scale(init_scale, 9) == pytest.approx(factor)


def test_the_loss_is_a_sum_over_tokens_that_are_not_padding() -> None:
    logits, targets = torch.randn(2, 3, 5), torch.tensor([[1, -100, 2], [-100, -100, 4]])
    expected = -sum(
        float(logits[b, t].log_softmax(0)[targets[b, t]]) for b in range(2) for t in range(3) if targets[b, t] >= 0
    )
    assert float(cross_entropy_sum(logits, (targets,))) == pytest.approx(expected, rel=1e-6)
    assert recipe().count((targets,)) == 3
