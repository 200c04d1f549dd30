"""What an AmoebaNet cell computes, as data: which operations on which states, and which states are its output.

State 0 is the cell's input, state 1 the input of the cell before, both brought to the cell's number of filters. Each
pair of terms adds one more state, (operation of a state) + (operation of a state), five in all: 2 to 6. The output is
the channels of some states, one after the other. In a reduction cell operations on states 0 and 1 have stride 2.
"""

from dataclasses import dataclass
from typing import NamedTuple

NUM_INPUTS = 2


class Term(NamedTuple):
    """One operation on one state."""

    operation: str
    state: int

    def __str__(self) -> str:
        return f"{self.operation}({self.state})"


@dataclass(frozen=True)
class CellGenotype:
    """One kind of cell.

    Attributes:
        pairs: the two terms of state 2, 3, ...
        concat: the states that are the output.
    """

    pairs: tuple[tuple[Term, Term], ...]
    concat: tuple[int, ...]

    @property
    def num_states(self) -> int:
        """Inputs and sums."""
        return NUM_INPUTS + len(self.pairs)

    def __str__(self) -> str:
        """The cell as equations, one a line."""
        sums = [f"{number} = {left} + {right}" for number, (left, right) in enumerate(self.pairs, NUM_INPUTS)]
        return "\n".join([*sums, "output = concat of " + ", ".join(map(str, self.concat))])


@dataclass(frozen=True)
class Genotype:
    """A network's two kinds of cells."""

    name: str
    normal: CellGenotype
    reduction: CellGenotype


def _cell(*terms: tuple[str, int], concat: tuple[int, ...]) -> CellGenotype:
    named = [Term(*term) for term in terms]
    return CellGenotype(tuple(zip(named[::2], named[1::2], strict=True)), concat)


# Source: the authors' TensorFlow code, tensorflow/tpu models/official/amoeba_net. The figure in Real et al. 2019 ends
# the normal cell of AmoebaNet-D with states 4, 5 and 6: a model of 18 cells and 208 filters then has 71 million
# parameters. With 0, 3, 4 and 6, as in the code, it has the 82 million of GPipe's Table 1.
AMOEBANET_D = Genotype(
    "AmoebaNet-D",
    normal=_cell(
        ("1x1", 1),
        ("max_pool_3x3", 1),
        ("none", 1),
        ("1x7_7x1", 0),
        ("1x1", 0),
        ("1x7_7x1", 0),
        ("max_pool_3x3", 2),
        ("none", 2),
        ("avg_pool_3x3", 1),
        ("1x1", 5),
        concat=(0, 3, 4, 6),
    ),
    reduction=_cell(
        ("max_pool_2x2", 0),
        ("max_pool_3x3", 0),
        ("none", 2),
        ("3x3", 1),
        ("1x7_7x1", 2),
        ("max_pool_3x3", 2),
        ("none", 3),
        ("max_pool_2x2", 1),
        ("avg_pool_3x3", 2),
        ("1x1", 3),
        concat=(4, 5, 6),
    ),
)

# Source: as above. Of Real et al. 2019, and of GPipe's 557 million parameters for ImageNet.
AMOEBANET_B = Genotype(
    "AmoebaNet-B",
    normal=_cell(
        ("1x1", 1),
        ("max_pool_3x3", 1),
        ("none", 1),
        ("separable_3x3_2", 0),
        ("1x1", 1),
        ("separable_3x3_2", 0),
        ("1x1", 2),
        ("none", 2),
        ("avg_pool_3x3", 1),
        ("1x1", 5),
        concat=(0, 3, 4, 6),
    ),
    reduction=_cell(
        ("max_pool_2x2", 0),
        ("max_pool_3x3", 0),
        ("none", 2),
        ("3x3", 1),
        ("dilated_2_separable_5x5_2", 2),
        ("max_pool_3x3", 2),
        ("none", 3),
        ("separable_3x3_2", 1),
        ("avg_pool_3x3", 4),
        ("1x1", 3),
        concat=(5, 6),
    ),
)

GENOTYPES = {"D": AMOEBANET_D, "B": AMOEBANET_B}
