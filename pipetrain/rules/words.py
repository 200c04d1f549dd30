"""Values as a user would type them."""

from collections.abc import Sequence
from typing import Any


def plain(value: Any) -> str:
    return "null" if value is None else str(value)


def shown(numbers: Sequence[int]) -> str:
    return "[" + ",".join(map(str, numbers)) + "]"
