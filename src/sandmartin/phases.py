"""Phases: what the time of an operation went to, as those measured it who did the work."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass

#: What takes less is not worth telling.
_SHORTEST_S = 0.0001


@dataclass(frozen=True)
class Phase:
    """One part of an operation."""

    name: str
    duration_s: float


class Clock:
    """Runs from when it is made; each mark ends the phase that began at the mark before."""

    def __init__(self) -> None:
        self._since = time.monotonic()
        self._took: dict[str, float] = {}

    def mark(self, name: str) -> None:
        """The time since the last mark went to `name`; what it had before is added up."""
        now = time.monotonic()
        self._add(name, now - self._since)
        self._since = now

    def include(self, phases: Iterable[Phase], rest: str) -> None:
        """The time since the last mark went to what another clock tells, and else to `rest`."""
        now, left_s = time.monotonic(), 0.0
        for each in phases:
            self._add(each.name, each.duration_s)
            left_s -= each.duration_s
        self._add(rest, max(0.0, left_s + now - self._since))
        self._since = now

    def _add(self, name: str, duration_s: float) -> None:
        self._took[name] = self._took.get(name, 0.0) + duration_s

    @property
    def phases(self) -> tuple[Phase, ...]:
        """In the order in which they first ended."""
        told = (Phase(name, took_s) for name, took_s in self._took.items())
        return tuple(each for each in told if each.duration_s >= _SHORTEST_S)
