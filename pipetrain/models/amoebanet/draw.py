"""A genotype as a picture: the normal and the reduction cell side by side, from their inputs down to their outputs.

A sum of two operations is a block: two boxes above the number of the state. A block stands one row below the lowest
block that it takes from. A line has the colour of the state that it comes from, and goes around the blocks on its way.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from html import escape

from pipetrain.models.amoebanet.genotype import NUM_INPUTS, CellGenotype, Genotype

BOX = (100, 28)  # of an operation; all lengths are pixels
STATE = (34, 24)
INPUT = (132, 28)
GAP = 10  # between the boxes of a block
LANE = 44  # between blocks, for lines that go by
ROW = 150  # from one row of blocks to the next
TOP, MARGIN = 60, 30
COLOURS = ("#6b7280", "#b45309", "#1d4ed8", "#047857", "#7c3aed", "#be123c", "#0e7490")  # of the states
SHORT = {
    "1x7_7x1": "1x7, 7x1",
    "avg_pool_3x3": "average 3x3",
    "max_pool_2x2": "max 2x2",
    "max_pool_3x3": "max 3x3",
    "separable_3x3_2": "2 x sep 3x3",
    "dilated_2_separable_5x5_2": "2 x dil sep 5x5",
}
BLOCK = 2 * BOX[0] + GAP

Point = tuple[float, float]


def drawing(genotype: Genotype) -> str:
    """The picture as the text of an SVG file."""
    cells = [_Cell(genotype.normal, MARGIN)]
    cells.append(_Cell(genotype.reduction, cells[0].right + 2 * MARGIN))
    height = max(cell.bottom for cell in cells) + MARGIN
    width = cells[-1].right + MARGIN
    titles = (
        f"{genotype.name}: normal cell",
        f"{genotype.name}: reduction cell (boxes on states 0 and 1: stride 2)",
    )
    parts = [part for cell, title in zip(cells, titles, strict=True) for part in cell.parts(title)]
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" width="{width:g}" '
            f'height="{height:g}" font-family="sans-serif" font-size="13">',
            f'<rect width="{width:g}" height="{height:g}" fill="white"/>',
            *parts,
            "</svg>\n",
        ]
    )


@dataclass
class _Place:
    """Where a state is: the middle of its number, and the row of its block; inputs are in row 0."""

    x: float
    y: float
    row: int


class _Cell:
    def __init__(self, genotype: CellGenotype, left: float) -> None:
        self._genotype = genotype
        self._left = left
        self._rows = _rows(genotype)
        widest = max(len(row) for row in self._rows)
        self.right = left + LANE + widest * (BLOCK + LANE)
        self._concat_y = TOP + ROW * len(self._rows) + 70
        self.bottom = self._concat_y + BOX[1]
        self._places = self._placed()

    def _placed(self) -> dict[int, _Place]:
        """The two inputs on top, state 1 on the left as in the papers' figures, and each row of blocks centred."""
        middle = (self._left + self.right) / 2
        places = {1: _Place(middle - INPUT[0], TOP, 0), 0: _Place(middle + INPUT[0], TOP, 0)}
        for number, row in enumerate(self._rows, 1):
            first = middle - (len(row) - 1) * (BLOCK + LANE) / 2
            for place, state in enumerate(row):
                places[state] = _Place(first + place * (BLOCK + LANE), TOP + ROW * number, number)
        return places

    def parts(self, title: str) -> Iterator[str]:
        """The elements: lines first, so that they end under the boxes."""
        yield _text((self._left + self.right) / 2, 26, title, bold=True)
        for state, pair in enumerate(self._genotype.pairs, NUM_INPUTS):
            for side, term in zip((-1, 1), pair, strict=True):
                x, y = self._box(state, side)
                yield self._line(term.state, (x, y - BOX[1] / 2), self._places[state].row)
                yield _curve([(x, y + BOX[1] / 2), (self._places[state].x, self._places[state].y)], COLOURS[state])
        for state, x in self._ends():
            yield self._line(state, (x, self._concat_y - BOX[1] / 2), len(self._rows) + 1)
        for state, pair in enumerate(self._genotype.pairs, NUM_INPUTS):
            for side, term in zip((-1, 1), pair, strict=True):
                x, y = self._box(state, side)
                yield _box(x, y, BOX, SHORT.get(term.operation, term.operation), COLOURS[term.state], "#f8fafc")
            yield _box(self._places[state].x, self._places[state].y, STATE, f"+ {state}", COLOURS[state], "white")
        for state, name in enumerate(("0: input", "1: previous input")):
            yield _box(self._places[state].x, self._places[state].y, INPUT, name, COLOURS[state], "white")
        concat = "output: concat of " + ", ".join(map(str, self._genotype.concat))
        middle = (self._left + self.right) / 2
        yield _box(middle, self._concat_y, (BLOCK + LANE, BOX[1]), concat, "#111827", "#f1f5f9")

    def _box(self, state: int, side: int) -> Point:
        """The middle of the left (-1) or the right (1) box of a block."""
        place = self._places[state]
        return place.x + side * (BOX[0] + GAP) / 2, place.y - 56

    def _ends(self) -> list[tuple[int, float]]:
        """Where the lines of the concatenated states end, by state."""
        states = self._genotype.concat
        step = BLOCK / len(states)
        middle = (self._left + self.right) / 2
        return [(state, middle + (place - (len(states) - 1) / 2) * step) for place, state in enumerate(states)]

    def _line(self, state: int, end: Point, row: int) -> str:
        """From a state to a box of a later row, through the lanes of the rows between."""
        source = self._places[state]
        height = INPUT[1] if state < NUM_INPUTS else STATE[1]
        points = [(source.x, source.y + height / 2)]
        for between in range(source.row + 1, row):
            x = self._lane(between, points[-1][0], end[0]) + 5 * (state - 3)
            y = TOP + ROW * between
            points += [(x, y - 84), (x, y + 18)]
        return _curve([*points, end], COLOURS[state])

    def _lane(self, row: int, start: float, end: float) -> float:
        """The lane of a row that is the smallest way round: the middle of a gap between blocks, or beside them."""
        blocks = [self._places[state].x for state in self._rows[row - 1]]
        half = (BLOCK + LANE) / 2
        lanes = [blocks[0] - half, *(x + half for x in blocks)]
        return min(lanes, key=lambda x: (abs(x - start) + abs(x - end), x))


def _rows(genotype: CellGenotype) -> list[list[int]]:
    """The states that are sums, by how many sums they build on."""
    depth = {0: 0, 1: 0}
    for state, (left, right) in enumerate(genotype.pairs, NUM_INPUTS):
        depth[state] = 1 + max(depth[left.state], depth[right.state])
    return [[state for state in depth if depth[state] == row] for row in range(1, max(depth.values()) + 1)]


def _curve(points: list[Point], colour: str) -> str:
    """A line that leaves and arrives at every point vertically."""
    path = f"M{points[0][0]:g} {points[0][1]:g}"
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        middle = (y0 + y1) / 2
        path += f" C{x0:g} {middle:g} {x1:g} {middle:g} {x1:g} {y1:g}"
    return f'<path d="{path}" fill="none" stroke="{colour}" stroke-width="1.6"/>'


def _box(x: float, y: float, size: tuple[float, float], text: str, stroke: str, fill: str) -> str:
    corner = f'x="{x - size[0] / 2:g}" y="{y - size[1] / 2:g}" width="{size[0]:g}" height="{size[1]:g}"'
    return f'<rect {corner} rx="6" fill="{fill}" stroke="{stroke}" stroke-width="1.4"/>' + _text(x, y + 5, text)


def _text(x: float, y: float, text: str, *, bold: bool = False) -> str:
    weight = ' font-weight="bold"' if bold else ""
    return f'<text x="{x:g}" y="{y:g}" text-anchor="middle"{weight}>{escape(text)}</text>'
