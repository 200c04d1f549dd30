"""The second half of an error message: what the user may have meant."""

import difflib
from collections.abc import Sequence


def did_you_mean(given: str, known: Sequence[str]) -> str:
    """`" Did you mean 'model'?"` with the nearest known word (or its last dotted part), or nothing."""
    lowered = {word.lower(): word for word in known}
    tails = {word.lower().rsplit(".", 1)[-1]: word for word in known if "." in word}
    if given.lower() in tails:
        return f" Did you mean '{tails[given.lower()]}'?"
    near = difflib.get_close_matches(given.lower(), lowered, n=1, cutoff=0.6)
    if near:
        return f" Did you mean '{lowered[near[0]]}'?"
    near = difflib.get_close_matches(given.lower(), tails, n=1, cutoff=0.8)
    return f" Did you mean '{tails[near[0]]}'?" if near else ""


def one_of(given: str, allowed: Sequence[str]) -> str:
    """The suggestion and the whole list: `Did you mean 'x'? Choose one of: ...`."""
    return f"{did_you_mean(str(given), allowed)} Choose one of: {', '.join(allowed)}".strip()
