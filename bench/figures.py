"""What a run measured: figures by name, each with a unit and all of its values.

A value is kept as it was measured; what is told of it is worked out at the end.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from random import Random


@dataclass
class Figure:
    """What was measured of one thing."""

    name: str
    unit: str
    values: list[float] = field(default_factory=list)

    def quantile(self, share: float) -> float:
        ordered = sorted(self.values)
        return ordered[min(len(ordered) - 1, round(share * (len(ordered) - 1)))]

    @property
    def median(self) -> float:
        return statistics.median(self.values)


class Figures:
    """All figures of a run, in the order in which they were first measured."""

    def __init__(self) -> None:
        self.by_name: dict[str, Figure] = {}

    def __getitem__(self, name: str) -> Figure:
        return self.by_name[name]

    def __contains__(self, name: str) -> bool:
        return name in self.by_name

    def add(self, name: str, value: float, unit: str = "ms") -> None:
        self.by_name.setdefault(name, Figure(name, unit)).values.append(value)

    @contextmanager
    def timed(self, *names: str) -> Iterator[None]:
        """Add how long the context took, unless it failed."""
        began = time.monotonic()
        yield
        took_ms = (time.monotonic() - began) * 1000
        for name in names:
            self.add(name, took_ms)

    def resampled(self, random: Random) -> Figures:
        """As if measured again: as many values of each figure, drawn from those there are."""
        drawn = Figures()
        for figure in self.by_name.values():
            values = random.choices(figure.values, k=len(figure.values))
            drawn.by_name[figure.name] = Figure(figure.name, figure.unit, values)
        return drawn

    def table(self) -> str:
        """One line a figure."""
        lines = [f"{'figure':<58}{'n':>4}{'p50':>10}{'p95':>10}{'p99':>10}  unit"]
        for figure in self.by_name.values():
            cells = "".join(f"{figure.quantile(share):10.1f}" for share in (0.5, 0.95, 0.99))
            lines.append(f"{figure.name:<58}{len(figure.values):>4}{cells}  {figure.unit}")
        return "\n".join(lines)

    def to_json(self) -> dict[str, object]:
        return {
            figure.name: {"unit": figure.unit, "values": figure.values}
            for figure in self.by_name.values()
        }
