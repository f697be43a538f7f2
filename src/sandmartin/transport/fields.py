"""Fields of a JSON message that another side answered; one that is absent or null has its default.

Each raises SandmartinError where the field is of another kind.
"""

from __future__ import annotations

import base64
from typing import Any

from sandmartin.errors import SandmartinError

Message = dict[str, Any]


def text(message: Message, name: str) -> str:
    """The text in field `name`."""
    value = message.get(name)
    if value is not None and not isinstance(value, str):
        raise SandmartinError(f"the answer has no text in {name}")
    return value or ""


def integer(message: Message, name: str) -> int:
    """The whole number in field `name`, which JSON may hold as text."""
    try:
        return int(message.get(name) or 0)
    # Python reads `Infinity` as JSON, too.
    except (TypeError, ValueError, OverflowError) as error:
        raise SandmartinError(f"the answer has no number in {name}") from error


def number(message: Message, name: str) -> float:
    """The number in field `name`."""
    try:
        return float(message.get(name) or 0.0)
    except (TypeError, ValueError, OverflowError) as error:
        raise SandmartinError(f"the answer has no number in {name}") from error


def texts(message: Message, name: str) -> tuple[str, ...]:
    """The list of texts in field `name`."""
    values = message.get(name) or []
    if not isinstance(values, list) or not all(isinstance(each, str) for each in values):
        raise SandmartinError(f"the answer has no list of texts in {name}")
    return tuple(values)


def octets(message: Message, name: str) -> bytes:
    """The bytes in field `name`, which are base64."""
    try:
        return base64.b64decode(message.get(name) or "", validate=True)
    except (TypeError, ValueError) as error:
        raise SandmartinError(f"the answer has no base64 in {name}") from error


def part(message: Message, name: str) -> Message | None:
    """The message in field `name`, None when the field is absent."""
    part = message.get(name)
    if part is not None and not isinstance(part, dict):
        raise SandmartinError(f"the answer has no object in {name}")
    return part


def parts(message: Message, name: str) -> list[Message]:
    """The list of messages in field `name`."""
    parts = message.get(name) or []
    if not isinstance(parts, list) or not all(isinstance(part, dict) for part in parts):
        raise SandmartinError(f"the answer has no list of objects in {name}")
    return parts
