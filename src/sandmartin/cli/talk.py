"""What the command line says: data on stdout, everything else on stderr, never a colour."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from sandmartin.errors import SandmartinError


def say(text: str) -> None:
    """One line of talk."""
    print(text, file=sys.stderr, flush=True)


def say_error(error: SandmartinError) -> None:
    """An error: its sentence, what else went wrong, and what to try next."""
    say(f"sandmartin: {error.message}")
    for note in getattr(error, "__notes__", ()):
        say(f"note: {note}")
    if error.hint:
        say(f"hint: {error.hint}")


def print_json(data: Any) -> None:
    """`data` as one line of JSON."""
    print(json.dumps(data, separators=(", ", ": ")), flush=True)


def print_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Rows under their heads, columns as wide as they need."""
    lines = [tuple(head), *(tuple(row) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    for line in lines:
        cells = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        print("  ".join(cells).rstrip())
