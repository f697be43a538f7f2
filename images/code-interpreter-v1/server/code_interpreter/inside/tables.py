"""A table as data: its columns by name, each a list of what JSON can hold."""

from __future__ import annotations

import math
from typing import Any

#: Of more cells than this only the text and the HTML are told.
_MAX_CELLS = 100_000


def describe(frame: Any) -> dict[str, list[Any]] | None:
    """The columns of a DataFrame; None when it is too large."""
    if frame.size > _MAX_CELLS:
        return None
    return {
        str(name): [plain(value) for value in frame.iloc[:, at].tolist()]
        for at, name in enumerate(frame.columns)
    }


def plain(value: Any) -> Any:
    """A value as JSON has it: None for what is no number, text for what it does not know."""
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        value = value.item()
    match value:
        case None | bool() | int() | str():
            return value
        case float():
            return value if math.isfinite(value) else None
    if hasattr(value, "isoformat"):
        # What is no time at all has no such form.
        return value.isoformat() if value == value else None
    return str(value)
