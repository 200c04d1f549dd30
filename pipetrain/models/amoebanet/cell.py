"""A cell: what its genotype says, made of modules."""

from torch import Tensor, nn

from pipetrain.models.amoebanet.droppath import DropPath, DropPathSchedule, KeepProbability
from pipetrain.models.amoebanet.genotype import NUM_INPUTS, CellGenotype
from pipetrain.models.amoebanet.operations import OPERATIONS, FactorizedReduction, Norm, cat_channels, conv_1x1

States = tuple[Tensor, Tensor]  # output of a cell, and of the one before it


class Cell(nn.Module):
    """(state [B, C, h, w], previous state [B, C', h', w']) -> (new state, state).

    The new state has `filters` channels for each state that the genotype concatenates; it is half as high and wide,
    rounded up, if `stride` is 2. The previous state is twice as high and wide as the state if `halve_previous`.
    """

    def __init__(
        self,
        genotype: CellGenotype,
        *,
        channels: int,
        previous_channels: int,
        filters: int,
        stride: int,
        halve_previous: bool,
        norm: Norm,
        drop_path: DropPathSchedule,
    ) -> None:
        super().__init__()
        self._genotype = genotype
        self.enter = conv_1x1(channels, filters, norm)
        self.match: nn.Module = nn.Identity()
        if halve_previous:
            self.match = FactorizedReduction(previous_channels, filters, norm)
        elif previous_channels != filters:
            self.match = conv_1x1(previous_channels, filters, norm)
        terms = [term for pair in genotype.pairs for term in pair]
        self.operations = nn.ModuleList(
            OPERATIONS[term.operation](filters, stride if term.state < NUM_INPUTS else 1, norm) for term in terms
        )
        self.keep_probability = KeepProbability(drop_path) if drop_path.rate else None
        self.drop_path = DropPath()

    def forward(self, states: States) -> States:
        state, previous = states
        keep = self.keep_probability() if self.training and self.keep_probability is not None else None
        known = [self.enter(state), self.match(previous)]
        operations = iter(self.operations)
        for pair in self._genotype.pairs:
            left, right = (self._drop(term.operation, next(operations)(known[term.state]), keep) for term in pair)
            known.append(left + right)
        return cat_channels(*(known[number] for number in self._genotype.concat)), state

    def _drop(self, operation: str, result: Tensor, keep: Tensor | float | None) -> Tensor:
        return result if keep is None or operation == "none" else self.drop_path(result, keep)
