"""Where randomness comes from: every seed is a hash of what it is for.

A layer is initialised from (run seed, layer name); a random layer or module draws from (run seed, step, its name,
micro-batch). No generator is ever carried from one to the next, so no draw depends on the number of
stages, on the schedule or on a recompute.
"""

import hashlib


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
