"""The random order of an epoch's samples."""

import numpy as np
import numpy.typing as npt

from pipetrain.seeds import derive_seed


def permutation(seed: int, split: str, epoch: int, number: int) -> npt.NDArray[np.int64]:
    """0 .. number - 1 in the order of one epoch. Sorts raw PCG64 numbers, a stream that no numpy release changes."""
    raw = np.random.PCG64(derive_seed(seed, "data", split, epoch)).random_raw(number)
    return np.argsort(raw, kind="stable")
