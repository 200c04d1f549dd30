"""Draws a model from its layer list: the layers in order, what each takes of whom, and where it is cut.

    .venv/bin/python scripts/draw_layers.py            docs/seq2seq.svg: T(3, H, A) on three stages

A value that goes to the next layer only is an arrow. One that goes further is a line beside the layers, with a branch
to each that takes it; where it crosses a cut it is a message, straight to the stage that needs it.
"""

from collections.abc import Sequence
from html import escape
from pathlib import Path

from pipetrain import models
from pipetrain.models import BATCH, Recipe, Value
from pipetrain.partition.split import stage_of_each_layer

WIDTH, HEIGHT, GAP, LANE, MARGIN = 170, 26, 16, 26, 12
FILLS = ("#dbe9f6", "#fde4cf", "#dff0d8", "#eadcf4", "#fff3bf", "#f4d9dc")
DOCS = Path(__file__).parent.parent / "docs"


def picture(recipe: Recipe, balance: Sequence[int], inputs: Sequence[str]) -> str:
    """The model as SVG.

    Args:
        inputs: what to call the tensors of the mini-batch.
    """
    names = [layer.name for layer in recipe.layers]
    place = {name: number for number, name in enumerate(names)}
    stages = stage_of_each_layer(balance)
    taken_by: dict[Value, list[int]] = {}
    for number in range(len(names)):
        for value in recipe.taken_by(number):
            taken_by.setdefault(value, []).append(number)
    lanes = [value for value, takers in taken_by.items() if value.layer != BATCH and takers != [place[value.layer] + 1]]
    x = MARGIN + 130
    right = x + WIDTH
    width = right + LANE * (len(lanes) + 1) + 130
    height = _y(len(names)) + MARGIN
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
        'font-size="12">',
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0L8 4L0 8z"/></marker></defs>',
    ]
    for number, name in enumerate(names):
        y, fill = _y(number), FILLS[stages[number] % len(FILLS)]
        parts.append(f'<rect x="{x}" y="{y}" width="{WIDTH}" height="{HEIGHT}" rx="4" fill="{fill}" stroke="#555"/>')
        parts.append(f'<text x="{x + WIDTH / 2}" y="{y + 17}" text-anchor="middle">{escape(name)}</text>')
        if number == 0 or stages[number] != stages[number - 1]:
            parts.append(f'<text x="{MARGIN}" y="{y + 17}">stage {stages[number]}</text>')
    for cut in range(1, len(names)):
        if stages[cut] != stages[cut - 1]:
            y = _y(cut) - GAP / 2
            parts.append(f'<path d="M{MARGIN} {y}H{width - MARGIN}" stroke="#999" stroke-dasharray="5 4"/>')
    for value, takers in taken_by.items():
        if value in lanes:
            number = lanes.index(value) + 1
            start = _y(place[value.layer])
            parts += _lane(value, start, [*map(_y, takers)], right, number, HEIGHT * number / (len(lanes) + 1))
        elif value.layer == BATCH:
            for y in map(_y, takers):
                parts.append(f'<path d="M{x - 30} {y + HEIGHT / 2}H{x}" stroke="#333" marker-end="url(#tip)"/>')
                label = inputs[int(value.element or 0)]
                parts.append(f'<text x="{x - 34}" y="{y + 17}" font-size="10" text-anchor="end">{escape(label)}</text>')
        else:
            middle, end = x + WIDTH / 2, _y(takers[0])
            parts.append(f'<path d="M{middle} {end - GAP}V{end}" stroke="#333" marker-end="url(#tip)"/>')
    return "\n".join([*parts, "</svg>\n"])


def _lane(value: Value, start: int, ends: Sequence[int], right: int, number: int, height: float) -> list[str]:
    """A value that goes past layers.

    Args:
        start, ends: upper edges of the layer that gives it and of those that take it.
        right: where layers end.
        number: which line beside them it is, from 1 on.
        height: of its ends below the upper edges.
    """
    x, label = right + LANE * number, value.layer + (f" [{value.element}]" if value.element is not None else "")
    return [
        f'<path d="M{right} {start + height}H{x}V{ends[-1] + height}" fill="none" stroke="#333"/>',
        *(f'<path d="M{x} {end + height}H{right}" stroke="#333" marker-end="url(#tip)"/>' for end in ends),
        f'<text x="{x + 5}" y="{start + height - 4}" font-size="10" fill="#333">{escape(label)}</text>',
    ]


def _y(number: int) -> int:
    """The upper edge of a layer."""
    return MARGIN + number * (HEIGHT + GAP)


def seq2seq() -> str:
    recipe = models.build(
        name="seq2seq",
        layers=3,
        d_model=64,
        d_ff=128,
        heads=2,
        head_width=32,
        dropout=0.1,
        embeddings="all",
        norm="pre",
        init_scale="none",
        label_smoothing=0.1,
        vocab_size=100,
        max_tokens=64,
    )
    return picture(recipe, (3, 3, 3), ("source", "target"))


if __name__ == "__main__":
    (DOCS / "seq2seq.svg").write_text(seq2seq())
