"""The translation model: GPipe's sizes, its own formula once more, and every cut."""

from pathlib import Path
from typing import Any

import pytest
import torch
from runs import assert_same, losses, run, saved, settings
from torch import Tensor, nn
from torch.func import functional_call

from pipetrain.config import Seq2SeqConfig, TranslationConfig
from pipetrain.data.translation import batches, prepare
from pipetrain.models import Recipe, build
from pipetrain.models.seq2seq import PADDING
from pipetrain.models.transformer import IGNORED_TARGET
from pipetrain.partition.split import build_layer
from pipetrain.rules.data import DIRECTIONS
from pipetrain.rules.models import EMBEDDINGS, NORMS

V, D = 17, 8


def recipe(**changes: Any) -> Recipe:
    settings: dict[str, Any] = {
        "layers": 2,
        "d_model": D,
        "d_ff": 16,
        "heads": 2,
        "head_width": 6,
        "dropout": 0.0,
        "embeddings": "all",
        "norm": "pre",
        "init_scale": "none",
        "label_smoothing": 0.1,
        "vocab_size": V,
        "max_tokens": 12,
    }
    return build(name="seq2seq", **(settings | changes))


def parameters(of: Recipe) -> int:
    later_uses = {use for tie in of.ties for use in tie[1:]}
    with torch.device("meta"):
        built = [(layer.name, layer.build()) for layer in of.layers]
    return sum(p.numel() for layer, m in built for name, p in m.named_parameters() if (layer, name) not in later_uses)


@pytest.mark.parametrize(
    ("size", "billions", "rounded"),
    [
        ((6, 8192, 16), 0.4, 0.03),
        ((24, 8192, 16), 1.3, 0.05),
        ((12, 16384, 32), 1.3, 0.05),
        ((32, 16384, 32), 3.0, 0.04),
        ((64, 16384, 32), 6.0, 0.02),
    ],
)
def test_the_papers_sizes(size: tuple[int, int, int], billions: float, rounded: float) -> None:
    """Huang et al. 2019, section 5 and Figure 3: T(L, H, A)."""
    layers, d_ff, heads = size
    paper: dict[str, Any] = {"d_model": 1024, "head_width": 64, "vocab_size": 64_000, "embeddings": "output"}
    count = parameters(recipe(layers=layers, d_ff=d_ff, heads=heads, **paper))
    assert count / 1e9 == pytest.approx(billions, rel=rounded)


def outputs(of: Recipe, source: Tensor, begun: Tensor) -> Tensor:
    """Layer by layer, as the recipe wires them."""
    values: dict[str, Any] = {}
    for place, layer in enumerate(of.layers):
        taken = [
            (source, begun)[value.element]
            if value.layer == "batch"
            else values[value.layer]  # type: ignore[index]
            if value.element is None
            else values[value.layer][value.element]
            for value in of.taken_by(place)
        ]
        values[layer.name] = build_layer(layer, seed=0).double().eval()(*taken)
    return values["head"]  # type: ignore[no-any-return]


def test_pre_norm_blocks_are_torchs_own_with_these_weights() -> None:
    """nn.Transformer's encoder and decoder layers, whose heads are D / A wide."""
    of = recipe(head_width=D // 2, embeddings="none")
    made = {layer.name: build_layer(layer, seed=0).double().eval() for layer in of.layers}
    x, y = torch.randn(3, 5, D).double(), torch.randn(3, 4, D).double()
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2, [True] * 4 + [False]])
    options: dict[str, Any] = {"dropout": 0.0, "batch_first": True, "norm_first": True, "dtype": torch.float64}
    encoder = nn.TransformerEncoderLayer(D, 2, 16, **options).eval()
    ours = made["encoder.blocks.0"]
    found = functional_call(encoder, _torchs(ours), (x,), {"src_key_padding_mask": ~mask})
    torch.testing.assert_close(ours(x, mask), found)
    decoder = nn.TransformerDecoderLayer(D, 2, 16, **options).eval()
    causal = nn.Transformer.generate_square_subsequent_mask(4, dtype=torch.float64)
    theirs = functional_call(
        decoder, _torchs(made["decoder.blocks.0"]), (y, x), {"tgt_mask": causal, "memory_key_padding_mask": ~mask}
    )
    torch.testing.assert_close(made["decoder.blocks.0"](y, x, mask), theirs)


def _torchs(block: nn.Module) -> dict[str, Tensor]:
    """A block's weights by the names that torch has for them."""
    state = block.state_dict()
    attentions = {"attention": ("self_attn", "norm1"), "source_attention": ("multihead_attn", "norm2")}
    found = {}
    for ours, (theirs, norm) in attentions.items():
        if f"{ours}.norm.weight" not in state:
            continue
        for kind in ("weight", "bias"):
            query, rest = state[f"{ours}.part.query.{kind}"], state[f"{ours}.part.key_value.{kind}"]
            found[f"{theirs}.in_proj_{kind}"] = torch.cat([query, rest])
            found[f"{theirs}.out_proj.{kind}"] = state[f"{ours}.part.output.{kind}"]
            found[f"{norm}.{kind}"] = state[f"{ours}.norm.{kind}"]
    last = "norm3" if "source_attention.norm.weight" in state else "norm2"
    for kind in ("weight", "bias"):
        found |= {f"linear1.{kind}": state[f"ffn.part.0.{kind}"], f"linear2.{kind}": state[f"ffn.part.2.{kind}"]}
        found[f"{last}.{kind}"] = state[f"ffn.norm.{kind}"]
    return found


@pytest.mark.parametrize("norm", ["pre", "post"])
def test_padding_and_what_comes_later_make_no_difference(norm: str) -> None:
    of = recipe(norm=norm)
    source, begun = torch.randint(1, V, (1, 5)), torch.randint(1, V, (1, 4))
    alone = outputs(of, source, begun)
    padded = outputs(of, nn.functional.pad(source, (0, 3)), nn.functional.pad(begun, (0, 2)))
    torch.testing.assert_close(padded[:, :4], alone)
    torch.testing.assert_close(outputs(of, source, begun[:, :2]), alone[:, :2])


def test_the_rules_the_data_and_the_model_mean_the_same() -> None:
    """None of them may import the others."""
    assert batches.PADDING == PADDING
    assert batches._IGNORED == IGNORED_TARGET
    assert set(DIRECTIONS) == {prepare.INTO, prepare.FROM, prepare.BOTH}
    for embeddings in EMBEDDINGS:
        for norm in NORMS:
            assert recipe(embeddings=embeddings, norm=norm)


def test_what_is_shared() -> None:
    sizes = {kind: parameters(recipe(embeddings=kind)) for kind in ("none", "output", "all")}
    assert sizes["none"] - sizes["output"] == sizes["output"] - sizes["all"] == V * D


def test_smoothing_is_its_formula_and_the_measure_is_without_it() -> None:
    of, logits = recipe(), torch.randn(2, 3, V).double()
    target = torch.tensor([[1, 2, 3], [4, -100, -100]])
    logs = logits.log_softmax(-1)
    rows = [(0, 0), (0, 1), (0, 2), (1, 0)]
    plain = [-logs[row][target[row]] for row in rows]
    smooth = [0.9 * nll - 0.1 * logs[row].mean() for nll, row in zip(plain, rows, strict=True)]
    torch.testing.assert_close(of.loss_sum(logits, (target,)), torch.stack(smooth).sum())
    torch.testing.assert_close(of.measures["nll"](logits, (target,)), torch.stack(plain).sum())
    assert of.count((target,)) == 4


def translation(tmp_path: Path, **changes: Any) -> Any:
    for split, number in (("train", 60), ("valid", 9)):
        pairs = [(f"das ist {'sehr ' * (i % 6)}{i}", f"this is {'very ' * (i % 4)}{i}") for i in range(number)]
        for side, language in enumerate(("de", "en")):
            (tmp_path / f"{split}.{language}").write_text("\n".join(pair[side] for pair in pairs))
    data = TranslationConfig(path=str(tmp_path), vocab_size=320, max_tokens=32, cache_dir=str(tmp_path / "cache"))
    model = Seq2SeqConfig(layers=1, d_model=16, d_ff=32, heads=2, head_width=8, **changes.pop("model", {}))
    return settings(model=model, data=data, **changes)


@pytest.mark.parametrize("model", [{}, {"norm": "post", "embeddings": "output", "init_scale": "inverse_depth"}])
def test_runs_are_the_same_bits_for_every_cut(tmp_path: Path, model: dict[str, Any]) -> None:
    """Every batch has other shapes, and the encoder's output skips stages."""
    cases: dict[str, tuple[int, dict[str, Any]]] = {
        "1": (1, {}),
        "2": (2, {"recompute": "never", "schedule": "1f1b"}),
        "5": (5, {}),
        "v": (2, {"schedule": "interleaved", "partitions": 4}),
    }
    for name, (stages, options) in cases.items():
        run(tmp_path, name, stages, translation(tmp_path, model=model, **options))
    for name in cases:
        assert losses(tmp_path, name) == losses(tmp_path, "1")
        assert_same(saved(tmp_path, name, 6), saved(tmp_path, "1", 6))


def test_a_run_goes_on_where_it_stopped_also_on_two_replicas(tmp_path: Path) -> None:
    options: dict[str, Any] = {"batch_size": 4, "data_parallel": 2}
    run(tmp_path, "whole", 4, translation(tmp_path, **options))
    run(tmp_path, "halves", 4, translation(tmp_path, steps=3, **options))
    run(tmp_path, "halves", 4, translation(tmp_path, **options), resume=True)
    whole = losses(tmp_path, "whole")
    assert [row for row in losses(tmp_path, "halves") if row in whole] == whole
    assert_same(saved(tmp_path, "halves", 6), saved(tmp_path, "whole", 6))
