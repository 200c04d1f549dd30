"""Values as a user would type them."""

from typing import Any


def plain(value: Any) -> str:
    return "null" if value is None else str(value)


def shown(value: Any) -> str:
    return "[" + ",".join(map(str, value)) + "]" if isinstance(value, list | tuple) else plain(value)
