"""How far a long work is, on one line of a terminal; silent where stderr is none."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from sandmartin.cli.talk import plain

_EVERY_S = 0.1
_MIB = 2**20


class Progress:
    """The progress of one thing after the other."""

    def __init__(self) -> None:
        self._shown = sys.stderr is not None and sys.stderr.isatty()
        self._name = ""
        self._total = self._done = 0
        self._next_at = 0.0
        self._width = 0

    @contextmanager
    def of(self, name: str, total_bytes: int) -> Iterator[None]:
        """Show the progress of `name`, of 0 bytes if their number is not known."""
        self._name, self._total, self._done = plain(name).replace("\n", " "), total_bytes, 0
        try:
            yield
        finally:
            self._clear()

    def add(self, count: int) -> None:
        """So many bytes more are done."""
        self._done += count
        if self._shown and time.monotonic() >= self._next_at:
            self._next_at = time.monotonic() + _EVERY_S
            self._draw()

    def _draw(self) -> None:
        done, total = self._done / _MIB, self._total / _MIB
        figures = f"{done:.1f} MiB"
        if total:
            figures = f"{done:.1f} of {total:.1f} MiB ({done / total:.0%})"
        room = shutil.get_terminal_size().columns - len(figures) - 3
        line = f"{self._name[-room:] if room > 0 else ''}  {figures}"
        self._write("\r" + line.ljust(self._width))
        self._width = len(line)

    def _clear(self) -> None:
        if self._width:
            self._write("\r" + " " * self._width + "\r")
            self._width = 0

    def _write(self, text: str) -> None:
        with suppress(OSError):
            sys.stderr.write(text)
            sys.stderr.flush()
