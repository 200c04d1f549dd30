"""Where randomness comes from: every seed is a hash of what it is for.

A layer is initialised from (run seed, layer name); a random layer or module draws from (run seed, step, its name,
micro-batch). No generator is ever carried from one to the next, so no draw depends on the number of
stages, on the schedule or on a recompute.

A user's own module may draw from three generators: torch's, Python's `random` and numpy's global one. All three get
the same number.
"""

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed that is a pure function of the parts, in order."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def name_of_call(module: str, call: int) -> str:
    """What a module's draws are seeded with where it is called several times in one forward of the model.

    Calls count from 1; a `module` such as `drop@3`, a part of the model that starts with the third call, counts on.

    >>> name_of_call("drop", 1), name_of_call("drop", 2), name_of_call("drop@3", 2)
    ('drop', 'drop@2', 'drop@4')
    """
    base, _, first = module.partition("@")
    number = int(first or 1) + call - 1
    return base if number == 1 else f"{base}@{number}"


def seed_pythons_generators(number: int) -> None:
    """Seeds the two generators that are not torch's."""
    random.seed(number)
    np.random.seed(number & 0xFFFFFFFF)


@contextmanager
def pythons_generators_preserved() -> Iterator[None]:
    """Gives the two generators that are not torch's back as they were."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """The CPU's generators, torch's, Python's and numpy's, start from a seed and are given back as they were."""
    with torch.random.fork_rng(devices=[]), pythons_generators_preserved():
        torch.default_generator.manual_seed(seed)
        seed_pythons_generators(seed)
        yield
