"""The clock of an operation."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from sandmartin.phases import Clock, Phase


@pytest.fixture
def time_s(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What the time is, which stands still."""
    now = [100.0]
    monkeypatch.setattr("sandmartin.phases.time", SimpleNamespace(monotonic=lambda: now[0]))
    return now


def test_marks_end_phases_which_add_up(time_s: list[float]) -> None:
    clock = Clock()
    for name, took_s in (("record", 1), ("slot", 2), ("record", 3), ("nothing", 0)):
        time_s[0] += took_s
        clock.mark(name)
    assert clock.phases == (Phase("record", 4), Phase("slot", 2))


def test_what_another_clock_tells_is_part_of_the_time_since_the_last_mark(
    time_s: list[float],
) -> None:
    clock = Clock()
    time_s[0] += 1
    clock.mark("queue")
    time_s[0] += 5
    clock.include([Phase("slot", 1), Phase("restore", 3)], "call")
    told = [Phase("queue", 1), Phase("slot", 1), Phase("restore", 3), Phase("call", 1)]
    assert clock.phases == tuple(told)


def test_a_clock_that_tells_more_than_there_was_leaves_nothing(time_s: list[float]) -> None:
    clock = Clock()
    time_s[0] += 1
    clock.include([Phase("slot", 2)], "call")
    assert clock.phases == (Phase("slot", 2),)
