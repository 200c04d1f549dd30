"""Where randomness comes from: every seed is a hash of what it is for.

A layer is initialised from (run seed, layer name); a random layer draws from (run seed, step, layer name,
micro-batch). No generator is ever carried from one to the next, so no draw depends on the number of
stages, on the schedule or on a recompute.
"""

import hashlib


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed that is a pure function of the parts, in order."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1
