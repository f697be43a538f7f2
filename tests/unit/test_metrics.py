"""Rings and sampling with clocks of the test's own, on plain files that look like a v2 group."""

from __future__ import annotations

import asyncio
import itertools
import os
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from sandmartin.agent.metrics import (
    MEMORY_PERIOD_S,
    PATIENCE_S,
    Point,
    Rings,
    Sampler,
    Usage,
    next_deadline,
)
from sandmartin.agent.proc import ProcessId
from sandmartin.agent.vmm.balloon import Balloon
from sandmartin.errors import Invalid, ToolFailed, Unavailable

_DEADLINE_S = 20.0
#: A multiple of each window's width, as a time of the wall clock.
_MIDNIGHT = 1_700_006_400
_MB = 2**20


def _fill(rings: Rings, begin: float, usages: list[Usage], step_s: float = 0.5) -> None:
    for number, usage in enumerate(usages):
        rings.add(begin + number * step_s, usage)


def _flat(cpu_pct: float, mem_bytes: int | None = 0, disk_bytes: int = 0) -> Usage:
    return Usage(cpu_pct, mem_bytes, disk_bytes)


# Rings.


def test_windows_end_exactly_at_their_boundaries() -> None:
    rings = Rings()
    # Ten minutes: the first half-minute at 10, the next at 20, and so on.
    _fill(rings, _MIDNIGHT, [_flat(10.0 * (n // 60 + 1), n // 60, 7) for n in range(1200)])
    half_minutes = rings.get("2h")
    assert half_minutes == [Point(_MIDNIGHT + 30 * n, 10.0 * (n + 1), n, 7) for n in range(20)]
    five_minutes = [(p.timestamp_unix, p.cpu_pct) for p in rings.get("24h")]
    # Each is the mean of ten half-minutes: 10 to 100, and 110 to 200.
    assert five_minutes == [(_MIDNIGHT, 55.0), (_MIDNIGHT + 300, 155.0)]
    rings.add(_MIDNIGHT + 600, _flat(1000))
    assert [p.cpu_pct for p in rings.get("24h")] == [55.0, 155.0, 1000.0]
    assert len(rings.get("2h")) == 21


def test_every_ring_holds_its_newest_points_in_their_order() -> None:
    rings = Rings()
    # More than two days, one sample in half a minute.
    last = 6000
    _fill(rings, _MIDNIGHT, [_flat(n) for n in range(last)], step_s=30)
    for name, capacity in (("10m", 1200), ("2h", 240)):
        assert [p.cpu_pct for p in rings.get(name)] == [*map(float, range(last - capacity, last))]
    points = rings.get("24h")
    assert [p.timestamp_unix for p in points] == [
        _MIDNIGHT + 300 * n for n in range(last // 10 - 288, last // 10)
    ]
    assert points[-1].cpu_pct == last - 5.5


def test_flush_gives_open_windows_too_and_forgets_all() -> None:
    rings = Rings()
    _fill(rings, _MIDNIGHT + 29, [_flat(0, 100, 10), _flat(50, 100, 10), _flat(100, 400, 40)])
    assert rings.flush() == {
        "10m": [
            Point(_MIDNIGHT + 29, 0, 100, 10),
            Point(_MIDNIGHT + 29, 50, 100, 10),
            Point(_MIDNIGHT + 30, 100, 400, 40),
        ],
        "2h": [Point(_MIDNIGHT + 29, 25, 100, 10), Point(_MIDNIGHT + 30, 100, 400, 40)],
        "24h": [Point(_MIDNIGHT + 29, 50, 200, 20)],
    }
    assert rings.flush() == {"10m": [], "2h": [], "24h": []}
    # The rest of a window that was flushed is a point of its own, with its own time.
    rings.add(_MIDNIGHT + 31, _flat(7))
    assert [p[:2] for p in rings.flush()["24h"]] == [(_MIDNIGHT + 31, 7)]


def test_clock_that_jumps_mixes_nothing_and_loses_nothing() -> None:
    rings = Rings()
    times = (_MIDNIGHT, _MIDNIGHT + 10, _MIDNIGHT + 86_400, _MIDNIGHT + 5, -1, _MIDNIGHT + 6)
    for number, at in enumerate(times):
        rings.add(at, _flat(number))
    # Back in a window of before is not that window: what was between lies in another one.
    stamps = [int(at) for at in times]
    expected = [(stamps[0], 0.5), (stamps[2], 2), (stamps[3], 3), (stamps[4], 4), (stamps[5], 5)]
    for name in ("2h", "24h"):
        assert [p[:2] for p in rings.get(name)] == expected
    assert [p.timestamp_unix for p in rings.get("10m")] == stamps


def test_memory_that_is_not_known_yet_does_not_lower_the_mean() -> None:
    rings = Rings()
    _fill(rings, _MIDNIGHT, [_flat(0, None), _flat(0, None), _flat(0, 300), _flat(0, 500)])
    assert [p.mem_bytes for p in rings.get("10m")] == [0, 0, 300, 500]
    assert [p.mem_bytes for p in rings.get("2h")] == [400]


def test_unknown_range_is_told_which_there_are() -> None:
    with pytest.raises(Invalid, match="1h") as caught:
        Rings().get("1h")
    assert caught.value.hint == "use one of 10m, 2h, 24h"
    with pytest.raises(Invalid):
        Sampler().get("sbnone", "")


# Sampling.


@dataclass
class Clock:
    """Time as the test has it."""

    now: float = 1000.0
    wall: float = float(_MIDNIGHT)

    def monotonic(self) -> float:
        return self.now

    def date(self) -> float:
        return self.wall

    def go_on(self, seconds: float) -> None:
        self.now += seconds
        self.wall += seconds

    async def sleep(self, seconds: float) -> None:
        self.go_on(seconds)
        await asyncio.sleep(0)


@dataclass
class Vm:
    """A VM in a v2 group made of plain files, with this process in place of its own."""

    directory: Path
    groups: tuple[Path, ...] = ()
    layers: tuple[Path, ...] = ()
    process: ProcessId = field(default_factory=lambda: _me())
    answers: list[int | Exception | None] = field(default_factory=list)
    #: When it was asked for its memory.
    asked_at: list[float] = field(default_factory=list)
    clock: Clock | None = None

    def __post_init__(self) -> None:
        self.groups = (self.directory,)
        self.use(0)

    def use(self, usec: int) -> None:
        (self.directory / "cpu.stat").write_text(
            f"usage_usec {usec}\nuser_usec {usec}\nsystem_usec 0\nnr_periods 0\n"
        )

    async def memory(self) -> int | None:
        self.asked_at.append(self.clock.now if self.clock else 0)
        answer = self.answers.pop(0) if self.answers else None
        if isinstance(answer, Exception):
            raise answer
        return answer


def _me() -> ProcessId:
    me = ProcessId.of(os.getpid())
    assert me is not None
    return me


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def vm(tmp_path: Path, clock: Clock) -> Vm:
    return Vm(tmp_path, clock=clock)


@pytest.fixture
async def sampler(clock: Clock) -> AsyncIterator[Sampler]:
    # Not waiting for memory, which most of the tests are not about.
    sampler = Sampler(patience_s=0, monotonic=clock.monotonic, wall=clock.date, sleep=clock.sleep)
    yield sampler
    sampler.close()


async def test_share_is_of_the_time_that_passed(sampler: Sampler, vm: Vm, clock: Clock) -> None:
    vm.use(5_000_000)
    sampler.add("sbone", vm)
    # What was used before is none of it; a sample that comes late covers all of its time, and a
    # wall clock that jumps meanwhile has no part in it.
    for seconds, used_usec in ((0.5, 250_000), (0.5, 1_000_000), (2.0, 250_000)):
        clock.go_on(seconds)
        before = int((vm.directory / "cpu.stat").read_text().split()[1])
        vm.use(before + used_usec)
        sampler.sample()
        clock.wall -= 3600
    assert [p.cpu_pct for p in sampler.get("sbone", "10m")] == pytest.approx([50, 200, 12.5])


async def test_counter_set_back_gives_no_point(sampler: Sampler, vm: Vm, clock: Clock) -> None:
    vm.use(9_000_000)
    sampler.add("sbone", vm)
    for usec in (100, 250_100):
        clock.go_on(0.5)
        vm.use(usec)
        sampler.sample()
    assert [p.cpu_pct for p in sampler.get("sbone", "10m")] == pytest.approx([50])


async def test_disk_is_what_the_layers_take(sampler: Sampler, vm: Vm, clock: Clock) -> None:
    first, second = vm.directory / "first", vm.directory / "second"
    vm.layers = (first, vm.directory / "gone")
    with first.open("wb") as file:
        file.truncate(100 * _MB)
        file.write(os.urandom(_MB))
    sampler.add("sbone", vm)
    clock.go_on(0.5)
    sampler.sample()
    # A snapshot puts another layer on top while the VM runs.
    second.write_bytes(os.urandom(2 * _MB))
    vm.layers = (first, second)
    clock.go_on(0.5)
    sampler.sample()
    before, after = (p.disk_bytes for p in sampler.get("sbone", "10m"))
    assert _MB <= before < 1.1 * _MB
    assert 3 * _MB <= after < 3.3 * _MB


async def test_suspended_keeps_its_points_and_gets_no_more(
    sampler: Sampler, vm: Vm, clock: Clock
) -> None:
    sampler.add("sbone", vm)
    clock.go_on(0.5)
    sampler.sample()
    sampler.suspend("sbone")
    clock.go_on(3600)
    sampler.sample()
    assert len(sampler.get("sbone", "10m")) == 1
    # Resumed, it goes on behind them; the pause has no part in the next share.
    vm.use(7_000_000)
    sampler.add("sbone", vm)
    clock.go_on(0.5)
    vm.use(7_500_000)
    sampler.sample()
    points = sampler.flush("sbone")["10m"]
    assert [(p.timestamp_unix - _MIDNIGHT, p.cpu_pct) for p in points] == [
        (0, 0),
        (3601, pytest.approx(100)),
    ]
    assert sampler.get("sbone", "10m") == []


async def test_removed_is_forgotten_and_holds_no_descriptor(
    sampler: Sampler, vm: Vm, clock: Clock
) -> None:
    before = os.listdir("/proc/self/fd")  # noqa: PTH208 names are what is compared
    sampler.add("sbone", vm)
    sampler.add("sbone", vm)
    sampler.remove("sbone")
    sampler.remove("sbone")
    clock.go_on(0.5)
    sampler.sample()
    assert sampler.flush("sbone") == {"10m": [], "2h": [], "24h": []}
    assert os.listdir("/proc/self/fd") == before  # noqa: PTH208


async def test_what_cannot_be_read_stops_nobody_else(
    sampler: Sampler, vm: Vm, clock: Clock, tmp_path: Path
) -> None:
    process = os.posix_spawn("/bin/true", ["true"], {})
    ended = ProcessId(process, start_ticks=1)
    os.waitpid(process, 0)
    nowhere = tmp_path / "nowhere"
    nowhere.mkdir()
    dead = Vm(nowhere, process=ended)
    dead.groups = ()
    damaged = Vm(nowhere)
    for sandbox_id, source in (("sbdead", dead), ("sbdamaged", damaged), ("sbone", vm)):
        sampler.add(sandbox_id, source)
    (nowhere / "cpu.stat").write_text("usage_usec much\n")
    for _ in range(2):
        clock.go_on(0.5)
        sampler.sample()
    counts = {i: len(sampler.get(i, "10m")) for i in ("sbdead", "sbdamaged", "sbone")}
    assert counts == {"sbdead": 0, "sbdamaged": 0, "sbone": 2}


async def _run_for(sampler: Sampler, clock: Clock, seconds: float) -> None:
    """Let `run` go on for so much of the test's time, then cancel it."""
    running = asyncio.ensure_future(sampler.run())
    until = clock.now + seconds
    async with asyncio.timeout(_DEADLINE_S):
        while clock.now < until and not running.done():
            await asyncio.sleep(0)
    running.cancel()
    await asyncio.wait({running})
    assert running.cancelled()


async def test_passes_that_take_time_do_not_shift_the_next(
    sampler: Sampler, vm: Vm, clock: Clock
) -> None:
    class Slow(Vm):
        @property
        def layers(self) -> tuple[Path, ...]:
            clock.go_on(0.125)
            return ()

        @layers.setter
        def layers(self, _: tuple[Path, ...]) -> None: ...

    sampler.add("sbone", Slow(vm.directory))
    clock.wall += 0.5
    await _run_for(sampler, clock, 120)
    stamps = [p.timestamp_unix - _MIDNIGHT for p in sampler.get("sbone", "10m")]
    assert stamps == [n // 2 + 1 for n in range(len(stamps))]
    assert len(stamps) >= 239


async def test_memory_is_asked_for_slowly_and_stands_between(
    sampler: Sampler, vm: Vm, clock: Clock
) -> None:
    vm.answers = [None, 100, Unavailable("busy"), 300]
    sampler.add("sbone", vm)
    begin = clock.now
    await _run_for(sampler, clock, 60)
    waits = [b - a for a, b in itertools.pairwise(vm.asked_at)]
    # More often at first, while a new VM has not told yet.
    assert 1.0 <= vm.asked_at[0] - begin <= 1.5
    assert waits[:4] == [1, 2, 4, 8]
    assert set(waits[4:]) == {MEMORY_PERIOD_S}
    told = [p.mem_bytes for p in sampler.get("sbone", "10m")]
    # Unknown, then the first answer until the next one that is any.
    assert [value for value, _ in itertools.groupby(told)] == [0, 100, 300]


async def test_no_point_says_that_a_guest_uses_no_memory(vm: Vm, clock: Clock) -> None:
    sampler = Sampler(monotonic=clock.monotonic, wall=clock.date, sleep=clock.sleep)
    vm.answers = [None, None, 100 * _MB]
    sampler.add("sbone", vm)
    await _run_for(sampler, clock, 20)
    told = {name: sampler.get("sbone", name) for name in ("10m", "2h", "24h")}
    assert len(told["10m"]) > 10
    assert {p.mem_bytes for points in told.values() for p in points} == {100 * _MB}
    # Resumed, the last figure stands until the guest, which may have other things to do, tells.
    sampler.suspend("sbone")
    sampler.add("sbone", vm)
    before = len(told["10m"])
    clock.go_on(0.5)
    sampler.sample()
    assert [p.mem_bytes for p in sampler.get("sbone", "10m")[before:]] == [100 * _MB]


async def test_a_guest_that_never_tells_is_sampled_all_the_same(vm: Vm, clock: Clock) -> None:
    sampler = Sampler(monotonic=clock.monotonic, wall=clock.date, sleep=clock.sleep)
    sampler.add("sbone", vm)
    began = int(clock.wall)
    await _run_for(sampler, clock, 2 * PATIENCE_S)
    points = sampler.get("sbone", "10m")
    assert {p.mem_bytes for p in points} == {0}
    assert points[0].timestamp_unix - began in {30, 31}


async def test_many_are_not_asked_at_once(sampler: Sampler, clock: Clock, tmp_path: Path) -> None:
    vms = []
    for number in range(50):
        directory = tmp_path / str(number)
        directory.mkdir()
        vms.append(Vm(directory, clock=clock))
        sampler.add(f"sb{number}", vms[-1])
    await _run_for(sampler, clock, 60)
    asked = sorted(at for vm in vms for at in vm.asked_at)
    assert max(len(list(group)) for _, group in itertools.groupby(asked)) <= 5
    # None is left out for it: each had its answers at the pace it should.
    assert min(len(vm.asked_at) for vm in vms) >= 5


async def test_answer_of_a_vm_that_was_replaced_is_dropped(
    sampler: Sampler, vm: Vm, clock: Clock
) -> None:
    asked, go_on = asyncio.Event(), asyncio.Event()

    class Slow(Vm):
        async def memory(self) -> int | None:
            asked.set()
            await go_on.wait()
            return 111

    sampler.add("sbone", Slow(vm.directory))
    running = asyncio.ensure_future(sampler.run())
    async with asyncio.timeout(_DEADLINE_S):
        await asked.wait()
        vm.answers = [222]
        sampler.add("sbone", vm)
        while not vm.asked_at:
            await asyncio.sleep(0)
        go_on.set()
        sampler.flush("sbone")
        while len(sampler.get("sbone", "10m")) < 20:
            await asyncio.sleep(0)
    running.cancel()
    await asyncio.wait({running})
    assert {p.mem_bytes for p in sampler.get("sbone", "10m")} == {222}


@pytest.mark.parametrize(
    ("now", "expected"),
    [
        (100.0, 100.5),
        # A pass that took a while moves no later deadline.
        (100.2, 100.5),
        # One that took too long leaves out what it missed.
        (100.5, 101.0),
        (103.7, 104.0),
        # A clock that went back does not repeat.
        (99.0, 100.5),
    ],
)
def test_deadlines_do_not_drift(now: float, expected: float) -> None:
    assert next_deadline(100.0, now) == expected


# The balloon's statistics.


def _answer(total: object, available: object) -> dict[str, object]:
    stats = {"stat-total-memory": total, "stat-available-memory": available, "stat-swap-in": 0}
    return {"stats": stats, "last-update": 1}


_UNTOLD = 2**64 - 1


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (_answer(500 * _MB, 400 * _MB), 100 * _MB),
        (_answer(500 * _MB, 500 * _MB), 0),
        (_answer(_UNTOLD, _UNTOLD), None),
        # A guest says what it likes.
        (_answer(500 * _MB, _UNTOLD), None),
        (_answer(2**63, 0), None),
        (_answer(512 * _MB + 1, 0), None),
        (_answer(1, 2), None),
        (_answer("1", None), None),
        ({"stats": {}}, None),
        ({}, None),
        ([], None),
    ],
)
async def test_balloon_is_believed_within_reason(answer: object, expected: int | None) -> None:
    calls: list[tuple[str, object, object]] = []
    failures = [ToolFailed("not yet")]

    async def execute(command: str, arguments: Mapping[str, object] | None = None, /) -> object:
        assert arguments is not None
        if command == "qom-set" and failures:
            raise failures.pop()
        calls.append((command, arguments["property"], arguments.get("value")))
        return answer

    balloon = Balloon(execute, 512 * _MB)
    with pytest.raises(ToolFailed):
        await balloon.used_bytes()
    assert await balloon.used_bytes() == expected
    assert await balloon.used_bytes() == expected
    # The interval is set once it was taken, and not with each question.
    assert calls == [
        ("qom-set", "guest-stats-polling-interval", int(MEMORY_PERIOD_S)),
        ("qom-get", "guest-stats", None),
        ("qom-get", "guest-stats", None),
    ]
