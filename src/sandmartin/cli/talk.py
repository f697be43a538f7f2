"""What the command line says: data on stdout, everything else on stderr, in no colour.

Much of it was said by others first, guests among them: what would steer a terminal is taken out.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any

from sandmartin.errors import SandmartinError


def say(text: str) -> None:
    """One line of talk; that nobody can hear it is no reason to stop."""
    if sys.stderr is None:
        return
    with suppress(OSError):
        print(plain(text), file=sys.stderr, flush=True)


def say_error(error: SandmartinError) -> None:
    """An error: its sentence, what else went wrong, and what to try next."""
    say(f"sandmartin: {error.message}")
    say_notes(error)
    if error.hint:
        say(f"hint: {error.hint}")


def say_notes(error: BaseException) -> None:
    """What went wrong besides."""
    for note in getattr(error, "__notes__", ()):
        say(f"note: {note}")


def plain(text: str) -> str:
    """`text` with everything replaced that a terminal does not simply print."""
    return "".join(
        c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text
    )


def print_json(data: Any) -> None:
    """`data` as one line of JSON."""
    print(json.dumps(data, separators=(", ", ": ")), flush=True)


def print_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Rows under their heads, columns as wide as they need."""
    lines = [tuple(head), *(tuple(plain(cell) for cell in row) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    for line in lines:
        cells = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        print("  ".join(cells).rstrip())


def print_fields(fields: Mapping[str, str]) -> None:
    """Names and values, one a line."""
    width = max(map(len, fields))
    for name, value in fields.items():
        print(f"{name.ljust(width)}  {plain(value)}")


def moment(seconds: int) -> str:
    """A time of the wall clock as tables show it."""
    try:
        return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    except (ValueError, OverflowError, OSError):
        return "-"
