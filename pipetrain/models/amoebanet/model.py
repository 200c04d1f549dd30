"""AmoebaNet for image classification, as a list of layers: stem, cells, auxiliary head, classifier.

Real et al. 2019 found the cells, GPipe (Huang et al. 2019, Table 1) sizes the networks by (L, D): L normal cells in
three stacks of L / 3 and D filters in the first stack. A reduction cell before the second and the third stack halves
the picture and doubles the filters. Between cells goes a pair: a cell's output and that of the cell before.

Two stems. `imagenet`: a convolution of D / 4 filters with stride 2, then two reduction cells of D / 2 and D filters, so
that a picture is a 32nd as wide in the last stack. `small`, for pictures of some 28 to 64 pixels: a convolution of D
filters with stride 1 and no reduction cells, so that it is a quarter as wide.

Where the sources disagree, see docs/amoebanet.md.
"""

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

from torch import nn

from pipetrain.errors import ConfigError
from pipetrain.models.amoebanet.cell import Cell
from pipetrain.models.amoebanet.droppath import DropPathSchedule
from pipetrain.models.amoebanet.genotype import GENOTYPES, CellGenotype, Genotype
from pipetrain.models.amoebanet.heads import AuxiliaryHead, Classifier, Stem, loss_sum
from pipetrain.models.amoebanet.operations import Norm
from pipetrain.models.losses import ACCURACY, count_targets
from pipetrain.models.recipe import LayerRecipe, Recipe, Value

NUM_STACKS = 3
SMALLEST_STATE = 2  # pixels of the last stack's states; below, a normalisation has next to nothing to look at

Size = tuple[int, int]  # height, width


class _PlannedCell(NamedTuple):
    """One cell of the network: its kind, and what comes in and goes out."""

    name: str
    is_reduction: bool
    genotype: CellGenotype
    filters: int
    channels: int  # of the state that comes in
    previous_channels: int
    halve_previous: bool  # the previous state is twice as wide as the state
    size: Size  # of the state that goes out

    @property
    def channels_out(self) -> int:
        return self.filters * len(self.genotype.concat)


def amoebanet(
    *,
    genotype: str,
    layers: int,
    filters: int,
    stem: str,
    dropout: float,
    drop_path: float,
    drop_path_steps: int,
    aux_weight: float,
    label_smoothing: float,
    bn_momentum: float,
    bn_eps: float,
    channels: int,
    image_size: Size,
    num_classes: int,
    forwards_per_step: int = 1,
) -> Recipe:
    """The recipe of a network.

    Args:
        genotype: a key of `GENOTYPES`.
        layers: normal cells, GPipe's L.
        filters: of the first stack, GPipe's D.
        stem: imagenet or small.
        dropout: before the classifier.
        drop_path, drop_path_steps, forwards_per_step: see `DropPathSchedule`.
        aux_weight: of the auxiliary head's loss; 0 is no such head.
        bn_momentum: share of a mini-batch in BatchNorm's running statistics.
        channels: of the images.
        image_size: (height, width) of the images.

    Raises:
        ConfigError: if the images are too small for the stem and the reduction cells.
    """
    check_image_size(image_size, stem)
    norm: Norm = partial(nn.BatchNorm2d, momentum=bn_momentum, eps=bn_eps)
    schedule = DropPathSchedule(drop_path, drop_path_steps, forwards_per_step)
    cells = list(_cells(GENOTYPES[genotype], layers, filters, stem, image_size))
    stem_stride = 1 if stem == "small" else 2
    recipes = [LayerRecipe("stem", partial(Stem, channels, cells[0].channels, stem_stride, norm))]
    aux_behind = f"cells.{2 * layers // NUM_STACKS - 1}" if aux_weight else ""
    for number, cell in enumerate(cells, 1):
        drop = schedule.scaled(number / len(cells))
        takes = (Value(cells[number - 2].name if number > 1 else "stem"),)
        recipes.append(LayerRecipe(cell.name, partial(_build_cell, cell, norm, drop), takes))
        if cell.name == aux_behind:
            head = partial(AuxiliaryHead, cell.channels_out, cell.size, num_classes, norm)
            recipes.append(LayerRecipe("aux_head", head, (Value(cell.name, 0),)))
    aux_logits = (Value("aux_head"),) if aux_weight else ()
    classifier = partial(Classifier, cells[-1].channels_out, num_classes, dropout)
    recipes.append(LayerRecipe("classifier", classifier, (Value(cells[-1].name, 0), *aux_logits)))
    loss = partial(loss_sum, label_smoothing=label_smoothing, aux_weight=aux_weight)
    return Recipe(tuple(recipes), loss_sum=loss, count=count_targets, measures=ACCURACY)


def _build_cell(cell: _PlannedCell, norm: Norm, drop_path: DropPathSchedule) -> Cell:
    return Cell(
        cell.genotype,
        channels=cell.channels,
        previous_channels=cell.previous_channels,
        filters=cell.filters,
        stride=2 if cell.is_reduction else 1,
        halve_previous=cell.halve_previous,
        norm=norm,
        drop_path=drop_path,
    )


def check_image_size(image_size: Size, stem: str) -> None:
    """
    Raises:
        ConfigError: if less than 2x2 pixels are left for the last stack.
    """
    halvings = _num_halvings(stem)
    left = image_size
    for _ in range(halvings):
        left = _halved(left)
    if min(left) >= SMALLEST_STATE:
        return
    least = (SMALLEST_STATE - 1) * 2**halvings + 1
    small = (SMALLEST_STATE - 1) * 2 ** _num_halvings("small") + 1
    way_out = f"images of {least}x{least} or more"
    if stem != "small" and min(image_size) >= small:
        way_out += ", or model.stem=small"
    raise ConfigError(
        f"images of {_shown(image_size)} are too small for model.stem={stem}: halved {halvings} times they are "
        f"{_shown(left)}, and the last cells need {SMALLEST_STATE}x{SMALLEST_STATE}; use {way_out}"
    )


def _num_halvings(stem: str) -> int:
    return NUM_STACKS - 1 + (0 if stem == "small" else 3)


def _cells(genotype: Genotype, layers: int, filters: int, stem: str, image_size: Size) -> Iterator[_PlannedCell]:
    """The cells in their order, each with what the ones before it give."""
    channels = previous = filters if stem == "small" else filters // 4
    size = image_size if stem == "small" else _halved(image_size)
    halve_previous = False
    for name, width in _names(layers, filters, stem):
        is_reduction = not name.startswith("cells.")
        kind = genotype.reduction if is_reduction else genotype.normal
        size = _halved(size) if is_reduction else size
        cell = _PlannedCell(name, is_reduction, kind, width, channels, previous, halve_previous, size)
        yield cell
        channels, previous, halve_previous = cell.channels_out, channels, is_reduction


def _names(layers: int, filters: int, stem: str) -> Iterator[tuple[str, int]]:
    """The cells by name and filters; the normal ones are called `cells`."""
    if stem != "small":
        yield "stem_cells.0", filters // 2
        yield "stem_cells.1", filters
    for stack in range(NUM_STACKS):
        if stack:
            yield f"reductions.{stack - 1}", filters * 2**stack
        for number in range(layers // NUM_STACKS):
            yield f"cells.{stack * layers // NUM_STACKS + number}", filters * 2**stack


def _halved(size: Size) -> Size:
    return -(-size[0] // 2), -(-size[1] // 2)


def _shown(size: Size) -> str:
    return f"{size[0]}x{size[1]}"
