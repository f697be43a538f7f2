"""Connections that rest between two requests, so that the next one needs no handshake.

A line is kept only after a whole exchange, under the name of whom it was used for, and nobody
else gets it: nothing of one sandbox can be left over for another. One on which anything happens
while it rests is never used again.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterator

from sandmartin.relay.line import Line

#: Far shorter than any server's own patience, so that hardly one ends just as it is used again.
_IDLE_S = 10.0
_MAX_LINES = 256
_MAX_EACH = 8


class KeptLines:
    """At most `max_lines` resting connections, `max_each` of one name, for `idle_s` each."""

    def __init__(
        self, *, idle_s: float = _IDLE_S, max_lines: int = _MAX_LINES, max_each: int = _MAX_EACH
    ) -> None:
        self._idle_s = idle_s
        self._max_lines = max_lines
        self._max_each = max_each
        self._resting: dict[str, deque[tuple[Line, asyncio.TimerHandle]]] = {}

    def __len__(self) -> int:
        return sum(map(len, self._resting.values()))

    def keep(self, name: str, line: Line) -> None:
        """Have a line rest, or end it where there are enough."""
        resting = self._resting.get(name, ())
        if not line.rests or len(resting) >= self._max_each or len(self) >= self._max_lines:
            line.abort()
            return
        timer = asyncio.get_running_loop().call_later(self._idle_s, self._expire, name)
        self._resting.setdefault(name, deque()).append((line, timer))

    def take(self, name: str) -> Line | None:
        """The line of a name that rested last, if one is as it was left."""
        for line in self._taken(name):
            if line.rests:
                return line
            line.abort()
        return None

    def _taken(self, name: str) -> Iterator[Line]:
        while resting := self._resting.get(name):
            line, timer = resting.pop()
            timer.cancel()
            if not resting:
                del self._resting[name]
            yield line

    def _expire(self, name: str) -> None:
        """The one that has rested longest has done so for long enough."""
        resting = self._resting[name]
        line, _ = resting.popleft()
        if not resting:
            del self._resting[name]
        line.abort()

    def abort(self) -> None:
        """End all of them."""
        for name in list(self._resting):
            for line in self._taken(name):
                line.abort()
