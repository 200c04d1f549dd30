"""AmoebaNet: parameter counts of the papers, what its cells and heads compute, and that it pipelines at any cut."""

import itertools
from collections import Counter
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
import torch.nn.functional as F
import yaml
from pipeline import train
from torch import Tensor, nn

from pipetrain.config import AmoebaNetConfig
from pipetrain.errors import ConfigError
from pipetrain.models import Recipe, build
from pipetrain.models.amoebanet.cell import Cell
from pipetrain.models.amoebanet.draw import SHORT, drawing
from pipetrain.models.amoebanet.droppath import DropPathSchedule
from pipetrain.models.amoebanet.genotype import AMOEBANET_B, AMOEBANET_D, GENOTYPES
from pipetrain.models.amoebanet.heads import AuxiliaryHead, Classifier, loss_sum
from pipetrain.models.amoebanet.model import check_image_size
from pipetrain.models.amoebanet.operations import OPERATIONS
from pipetrain.partition.split import build_layer
from pipetrain.rules import GENOTYPES as GENOTYPES_OF_THE_RULES

DOCS = Path(__file__).parents[2] / "docs"
CONF = Path(__file__).parents[2] / "conf" / "model"
NO_DROPS = DropPathSchedule(0.0, 0, 1)


def recipe(**changes: Any) -> Recipe:
    small = {"layers": 3, "filters": 8, "channels": 3, "image_size": (12, 12), "num_classes": 5}
    settings = vars(AmoebaNetConfig()) | small | changes
    settings.pop("name")
    return build("amoebanet", **settings)


def of_imagenet(**changes: Any) -> Recipe:
    """The recipe of conf/model/amoebanet_18x208, for the pictures and classes of ImageNet."""
    content = yaml.safe_load((CONF / "amoebanet_18x208.yaml").read_text())
    sizes = {key: value for key, value in content.items() if key != "defaults"}
    return recipe(**(sizes | {"image_size": (224, 224), "num_classes": 1000} | changes))


def count_on_meta(model: Recipe) -> int:
    """Parameters of the whole model without its memory."""
    with torch.device("meta"):
        return sum(p.numel() for layer in model.layers for p in layer.build().parameters())


def built(model: Recipe) -> dict[str, nn.Module]:
    return {layer.name: build_layer(layer, seed=0) for layer in model.layers}


def run(model: Recipe, modules: dict[str, nn.Module], images: Tensor) -> dict[str, Any]:
    """The output of every layer."""
    outputs: dict[str, Any] = {}
    for place, layer in enumerate(model.layers):
        arguments = [
            images if v.layer == "batch" else outputs[v.layer] if v.element is None else outputs[v.layer][v.element]
            for v in model.taken_by(place)
        ]
        outputs[layer.name] = modules[layer.name](*arguments)
    return outputs


# (layers, filters): parameters here, and in Huang et al. 2019, Table 1.
AMOEBANET_D_SIZES = {
    (18, 208): (81_505_540, 82e6),
    (18, 416): (319_024_120, 318e6),
    (18, 544): (542_734_840, 542e6),
    (36, 544): (1_055_832_376, 1.05e9),
    (72, 512): (1_844_858_344, 1.8e9),
}
AMOEBANET_B_SIZE = (560_053_608, 557e6)  # (18, 512), ImageNet, section 4


@pytest.mark.parametrize(("size", "counts"), AMOEBANET_D_SIZES.items())
def test_parameters_of_gpipes_amoebanet_d(size: tuple[int, int], counts: tuple[int, float]) -> None:
    """To the parameter those of torchgpipe's port, without the auxiliary head; Table 1 has two or three digits."""
    exact, table = counts
    assert count_on_meta(of_imagenet(layers=size[0], filters=size[1], aux_weight=0.0)) == exact
    assert exact == pytest.approx(table, rel=0.03 if table == 1.8e9 else 0.007)


def test_parameters_of_gpipes_amoebanet_b() -> None:
    count = count_on_meta(of_imagenet(genotype="B", filters=512, aux_weight=0.0))
    assert count == AMOEBANET_B_SIZE[0]
    assert count == pytest.approx(AMOEBANET_B_SIZE[1], rel=0.006)


def test_the_paper_s_figure_would_give_too_few_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    """Concatenating states 4, 5 and 6 of the normal cell, as in the figure of Real et al. 2019."""
    figure = type(AMOEBANET_D.normal)(AMOEBANET_D.normal.pairs, (4, 5, 6))
    monkeypatch.setitem(GENOTYPES, "D", type(AMOEBANET_D)("figure", figure, AMOEBANET_D.reduction))
    assert count_on_meta(of_imagenet(aux_weight=0.0)) < 72e6


def test_names_of_the_layers() -> None:
    names = [layer.name for layer in of_imagenet(layers=6).layers]
    assert names == [
        *("stem", "stem_cells.0", "stem_cells.1", "cells.0", "cells.1", "reductions.0", "cells.2", "cells.3"),
        *("aux_head", "reductions.1", "cells.4", "cells.5", "classifier"),
    ]
    assert [layer.name for layer in recipe(aux_weight=0.0).layers] == [
        *("stem", "cells.0", "reductions.0", "cells.1", "reductions.1", "cells.2", "classifier"),
    ]
    assert len(of_imagenet(aux_weight=0.0).layers) == 24


@pytest.mark.parametrize("genotype", GENOTYPES)
@pytest.mark.parametrize(
    ("stem", "image", "sizes"),
    [
        ("imagenet", (224, 224), [(112, 112), (56, 56), (28, 28), (28, 28), (14, 14), (14, 14), (7, 7), (7, 7)]),
        ("imagenet", (97, 33), [(49, 17), (25, 9), (13, 5), (13, 5), (7, 3), (7, 3), (4, 2), (4, 2)]),
        ("small", (27, 29), [(27, 29), (27, 29), (14, 15), (14, 15), (7, 8), (7, 8)]),
    ],
)
def test_shapes(genotype: str, stem: str, image: tuple[int, int], sizes: list[tuple[int, int]]) -> None:
    model = recipe(genotype=genotype, stem=stem, image_size=image, channels=1, num_classes=7, filters=16)
    with torch.device("meta"):
        modules = {layer.name: layer.build() for layer in model.layers}
        outputs = run(model, modules, torch.zeros(2, 1, *image))
    pairs = {name: output for name, output in outputs.items() if name not in ("aux_head", "classifier")}
    assert [tuple(state.shape[2:]) for state, _ in pairs.values()] == sizes
    assert [len(output) for output in pairs.values()] == [2] * len(sizes)
    states = [state for state, _ in pairs.values()]
    assert all(previous is state for (_, previous), state in zip(list(pairs.values())[1:], states, strict=False))
    concat = len(GENOTYPES[genotype].normal.concat)
    assert [states[-1].shape[1], pairs["cells.0"][0].shape[1]] == [4 * 16 * concat, 16 * concat]
    assert [tuple(logits.shape) for logits in outputs["classifier"]] == [(2, 7), (2, 7)]


def cell(kind: Any, stride: int, halve_previous: bool = False) -> Cell:
    return Cell(
        kind, channels=6, previous_channels=5, filters=8, stride=stride, halve_previous=halve_previous,
        norm=nn.BatchNorm2d, drop_path=NO_DROPS,
    )  # fmt: skip


def test_the_normal_cell_of_amoebanet_d() -> None:
    """The equations of the source, written out once more."""
    made = cell(AMOEBANET_D.normal, 1)
    s, p = torch.randn(2, 6, 9, 9), torch.randn(2, 5, 9, 9)
    op = list(made.operations)
    h0, h1 = made.enter(s), made.match(p)
    h2 = op[0](h1) + F.max_pool2d(h1, 3, 1, 1)
    h3 = h1 + op[3](h0)
    h4 = op[4](h0) + op[5](h0)
    h5 = F.max_pool2d(h2, 3, 1, 1) + h2
    h6 = F.avg_pool2d(h1, 3, 1, 1, count_include_pad=False) + op[9](h5)
    state, previous = made((s, p))
    assert torch.equal(state, torch.cat([h0, h3, h4, h6], dim=1))
    assert previous is s


def test_the_reduction_cell_of_amoebanet_d() -> None:
    made = cell(AMOEBANET_D.reduction, 2, halve_previous=True)
    s, p = torch.randn(2, 6, 9, 9), torch.randn(2, 5, 18, 18)
    op = list(made.operations)
    h0, h1 = made.enter(s), made.match(p)
    assert h1.shape == (2, 8, 9, 9)
    h2 = F.max_pool2d(h0, 2, 2, ceil_mode=True) + F.max_pool2d(h0, 3, 2, 1)
    h3 = h2 + op[3](h1)
    h4 = op[4](h2) + F.max_pool2d(h2, 3, 1, 1)
    h5 = h3 + F.max_pool2d(h1, 2, 2, ceil_mode=True)
    h6 = F.avg_pool2d(h2, 3, 1, 1, count_include_pad=False) + op[9](h3)
    state, previous = made((s, p))
    assert torch.equal(state, torch.cat([h4, h5, h6], dim=1))
    assert previous is s
    assert state.shape == (2, 24, 5, 5)


def test_the_cells_of_amoebanet_b() -> None:
    normal, reduction = cell(AMOEBANET_B.normal, 1), cell(AMOEBANET_B.reduction, 2)
    s, p = torch.randn(2, 6, 9, 9), torch.randn(2, 5, 9, 9)
    op, (h0, h1) = list(normal.operations), (normal.enter(s), normal.match(p))
    h2 = op[0](h1) + F.max_pool2d(h1, 3, 1, 1)
    h3, h4, h5 = h1 + op[3](h0), op[4](h1) + op[5](h0), op[6](h2) + h2
    h6 = F.avg_pool2d(h1, 3, 1, 1, count_include_pad=False) + op[9](h5)
    assert torch.equal(normal((s, p))[0], torch.cat([h0, h3, h4, h6], dim=1))
    op, (h0, h1) = list(reduction.operations), (reduction.enter(s), reduction.match(p))
    h2 = F.max_pool2d(h0, 2, 2, ceil_mode=True) + F.max_pool2d(h0, 3, 2, 1)
    h3, h4 = h2 + op[3](h1), op[4](h2) + F.max_pool2d(h2, 3, 1, 1)
    h5, h6 = h3 + op[7](h1), F.avg_pool2d(h4, 3, 1, 1, count_include_pad=False) + op[9](h3)
    assert torch.equal(reduction((s, p))[0], torch.cat([h5, h6], dim=1))


def test_genotypes_name_operations_and_earlier_states() -> None:
    assert set(GENOTYPES) == set(GENOTYPES_OF_THE_RULES)
    for genotype in GENOTYPES.values():
        for kind in (genotype.normal, genotype.reduction):
            for number, pair in enumerate(kind.pairs, 2):
                assert all(term.operation in OPERATIONS and term.state < number for term in pair)
            used = {term.state for pair in kind.pairs for term in pair} | set(kind.concat)
            assert used == set(range(7))
        assert min(genotype.reduction.concat) >= 2  # states 0 and 1 are twice as wide as the output
    assert str(AMOEBANET_D.normal).splitlines()[1] == "3 = none(1) + 1x7_7x1(0)"
    assert str(AMOEBANET_D.normal).splitlines()[-1] == "output = concat of 0, 3, 4, 6"


def test_drop_path_reaches_every_operation_but_none() -> None:
    """Almost all paths are dropped: what is left of a normal cell is its input and the `none` of state 3."""
    always = DropPathSchedule(0.999999, 0, 1)
    made = Cell(
        AMOEBANET_D.normal, channels=8, previous_channels=8, filters=8, stride=1, halve_previous=False,
        norm=nn.BatchNorm2d, drop_path=always,
    )  # fmt: skip
    s, p = torch.randn(2, 8, 6, 6), torch.randn(2, 8, 6, 6)
    first, third, *others = made((s, p))[0].split(8, dim=1)
    assert torch.equal(first, made.enter(s))
    assert torch.equal(third, p)
    assert not any(state.any() for state in others)
    assert all(state.any() for state in made.eval()((s, p))[0].split(8, dim=1))


def test_the_rate_of_drop_path_grows_with_the_depth_of_a_cell() -> None:
    modules = built(recipe(stem="imagenet", image_size=(33, 33), drop_path=0.7))
    keeps = [module.keep_probability() for module in modules.values() if isinstance(module, Cell)]
    assert keeps == pytest.approx([1 - 0.7 * (i + 1) / 7 for i in range(7)])


@pytest.mark.parametrize(
    ("size", "window", "left"),
    [((14, 14), (5, 5), (4, 4)), ((16, 16), (5, 5), (4, 4)), ((6, 9), (5, 5), (1, 2)), ((3, 4), (3, 4), (1, 1))],
)
def test_the_auxiliary_head_fits_its_state(size: tuple[int, int], window: tuple[int, int], left: Any) -> None:
    head = AuxiliaryHead(6, size, 5, nn.BatchNorm2d)
    assert head.reduce.weight.shape == (307, 51, *left)
    x = torch.randn(3, 6, *size)
    means = [
        [x.relu()[:, :, 3 * i : 3 * i + window[0], 3 * j : 3 * j + window[1]].mean((2, 3)) for j in range(left[1])]
        for i in range(left[0])
    ]
    pooled = torch.stack([torch.stack(row, dim=-1) for row in means], dim=-2)
    narrow = F.relu(head.narrow_norm(torch.einsum("bchw,fc->bfhw", pooled, head.narrow.weight[:, :, 0, 0])))
    one = torch.einsum("bchw,fchw->bf", narrow, head.reduce.weight)[:, :, None, None]
    expected = head.output(F.relu(head.reduce_norm(one))[:, :, 0, 0])
    assert torch.allclose(head(x), expected, atol=1e-4)
    assert head.eval()(x) is None


def test_the_auxiliary_head_hangs_before_the_second_reduction() -> None:
    layers = recipe(layers=9).layers
    place = [layer.name for layer in layers].index("aux_head")
    assert [layer.name for layer in layers[place - 1 : place + 2]] == ["cells.5", "aux_head", "reductions.1"]
    assert [value.layer for value in layers[place].takes or ()] == ["cells.5"]
    assert [value.layer for value in layers[place + 1].takes or ()] == ["cells.5"]
    assert [value.layer for value in layers[-1].takes or ()] == ["cells.8", "aux_head"]


def test_training_gives_both_heads_logits_evaluation_one() -> None:
    model = recipe()
    modules = built(model)
    images = torch.randn(4, 3, 12, 12)
    logits, auxiliary = run(model, modules, images)["classifier"]
    assert logits.shape == auxiliary.shape == (4, 5)
    for module in modules.values():
        module.eval()
    assert run(model, modules, images)["classifier"].shape == (4, 5)


def test_the_classifier_averages_what_is_above_zero() -> None:
    head = Classifier(3, 2, dropout=0.5).eval()
    x = torch.randn(2, 3, 4, 5)
    means = torch.tensor([[[max(v, 0.0) for v in row.flatten().tolist()] for row in one] for one in x]).mean(-1)
    assert torch.allclose(head(x), means @ head.output.weight.T, atol=1e-6)
    assert not torch.equal(head.train()(x), head(x))


def test_the_loss_smooths_both_heads_and_skips_padding() -> None:
    logits, auxiliary, targets = torch.randn(3, 4), torch.randn(3, 4), torch.tensor([1, -100, 3])

    def by_hand(logits: Tensor) -> float:
        logs = logits.log_softmax(1)
        return -sum(float(0.9 * logs[i, c] + 0.1 * logs[i].mean()) for i, c in ((0, 1), (2, 3)))

    settings = {"label_smoothing": 0.1, "aux_weight": 0.4}
    assert float(loss_sum(logits, (targets,), **settings)) == pytest.approx(by_hand(logits), rel=1e-5)
    both = loss_sum((logits, auxiliary), (targets,), **settings)
    assert float(both) == pytest.approx(by_hand(logits) + 0.4 * by_hand(auxiliary), rel=1e-5)
    assert recipe().count((targets,)) == 2


def test_the_settings_reach_batchnorm_and_the_loss() -> None:
    model = recipe(bn_momentum=0.25, bn_eps=0.5, label_smoothing=0.0, aux_weight=2.0)
    norms = [part for module in built(model).values() for part in module.modules() if isinstance(part, nn.BatchNorm2d)]
    assert {(norm.momentum, norm.eps) for norm in norms} == {(0.25, 0.5)}
    logits, targets = torch.randn(3, 5), torch.tensor([1, 0, 3])
    expected = 3 * F.cross_entropy(logits, targets, reduction="sum")
    assert float(model.loss_sum((logits, logits), (targets,))) == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize(
    ("size", "stem", "text"),
    [
        (
            (32, 32),
            "imagenet",
            "images of 32x32 are too small for model.stem=imagenet: halved 5 times they are 1x1, and the last cells "
            "need 2x2; use images of 33x33 or more, or model.stem=small",
        ),
        ((4, 64), "small", "images of 4x64 are too small for model.stem=small: halved 2 times they are 1x16, and"),
        ((4, 64), "imagenet", "use images of 33x33 or more"),
    ],
)
def test_images_that_are_too_small(size: tuple[int, int], stem: str, text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        recipe(image_size=size, stem=stem)
    assert text in str(caught.value)
    assert "small" not in str(caught.value).split("2x2")[-1] or size == (32, 32)
    check_image_size((33, 33), "imagenet")
    check_image_size((5, 5), "small")


@pytest.mark.slow
@pytest.mark.parametrize("genotype", GENOTYPES)
def test_the_same_bits_for_every_cut_and_recompute(genotype: str) -> None:
    """With dropout, drop-path that follows the steps, BatchNorm, both heads, odd sizes and uneven micro-batches."""
    model = recipe(
        genotype=genotype, image_size=(9, 7), channels=2, drop_path=0.5, drop_path_steps=2, forwards_per_step=3
    )
    data = [(torch.randn(7, 2, 9, 7), torch.randint(0, 5, (7,))) for _ in range(3)]
    expected = train(model, (8,), data, num_microbatches=3, recompute=False)
    assert expected.buffers["cells.0.keep_probability.steps"] == pytest.approx(3)
    for balance, recompute in itertools.product([(8,), (4, 4), (3, 2, 3), (1, 3, 1, 1, 2), (1,) * 8], [True, False]):
        got = train(model, balance, data, num_microbatches=3, recompute=recompute)
        case = f"balance {balance}, recompute {recompute}"
        assert [r.loss_sum for r in got.reports] == [r.loss_sum for r in expected.reports], case
        assert [r.grad_norm for r in got.reports] == [r.grad_norm for r in expected.reports], case
        for kind in ("parameters", "buffers"):
            for name, value in getattr(expected, kind).items():
                assert torch.equal(getattr(got, kind)[name], value), f"{case}: {name}"


def test_the_page_has_the_numbers_and_the_picture_of_the_code() -> None:
    page = (DOCS / "amoebanet.md").read_text()
    for size, (count, _) in {**AMOEBANET_D_SIZES, (18, 512): AMOEBANET_B_SIZE}.items():
        assert f"| ({size[0]}, {size[1]}) | {count:,} |" in page
    assert (DOCS / "amoebanet.svg").read_text() == drawing(AMOEBANET_D), "run scripts/draw_amoebanet.py"


@pytest.mark.parametrize("genotype", GENOTYPES.values(), ids=GENOTYPES)
def test_the_drawing_has_every_operation_and_every_line(genotype: Any) -> None:
    root = ElementTree.fromstring(drawing(genotype))
    words = Counter(text.text for text in root.iter("{http://www.w3.org/2000/svg}text"))
    paths = list(root.iter("{http://www.w3.org/2000/svg}path"))
    expected: Counter[str | None] = Counter()
    lines = 0
    for kind in (genotype.normal, genotype.reduction):
        terms = [term for pair in kind.pairs for term in pair]
        expected.update(SHORT.get(term.operation, term.operation) for term in terms)
        expected.update(f"+ {state}" for state in range(2, 7))
        expected["output: concat of " + ", ".join(map(str, kind.concat))] += 1
        lines += 2 * len(terms) + len(kind.concat)  # into a box and out of it; into the output
    assert expected <= words
    assert len(paths) == lines
    boxes = [rect for rect in root.iter("{http://www.w3.org/2000/svg}rect") if "x" in rect.attrib]
    corners = [[float(box.attrib[side]) for side in ("x", "y", "width", "height")] for box in boxes]
    for (x, y, w, h), (x2, y2, w2, h2) in itertools.combinations(corners, 2):
        assert x + w <= x2 or x2 + w2 <= x or y + h <= y2 or y2 + h2 <= y, "boxes overlap"
