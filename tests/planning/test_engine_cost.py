"""What the engine takes for an action."""

import math

import pytest
import torch

from pipetrain.engine.local import run_ranks
from pipetrain.planning.engine_cost import engine_s


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_all_ranks_find_the_same(num_ranks: int) -> None:
    found = run_ranks(num_ranks, lambda transport: engine_s(transport, torch.device("cpu")))
    assert len(set(found)) == 1
    assert 0 <= found[0] < math.inf
