"""Cutting a mini-batch into micro-batches."""

import torch
from torch import Tensor

from pipetrain.engine.structure import aligned


def split(batch: tuple[Tensor, ...], num_microbatches: int) -> list[tuple[Tensor, ...]]:
    """Cuts every tensor along its first dimension; sizes differ by at most one, larger ones first.

    `torch.chunk` may return fewer pieces than asked for (5 rows in 4: 3 pieces); this never does.

    Raises:
        ValueError: if the tensors differ in rows, or there are fewer rows than micro-batches.
    """
    rows = {len(tensor) for tensor in batch}
    if len(rows) != 1:
        raise ValueError(f"the tensors of a mini-batch must have the same number of rows (got {sorted(rows)})")
    (num_rows,) = rows
    if num_rows < num_microbatches:
        raise ValueError(f"{num_rows} rows cannot be cut into {num_microbatches} micro-batches of at least one row")
    pieces = [map(aligned, torch.tensor_split(tensor, num_microbatches)) for tensor in batch]
    return list(zip(*pieces, strict=True))
