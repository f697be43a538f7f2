"""What sandboxes use: samples of processor, memory and disk, kept in rings of three tiers.

Sampling asks the host alone, never the guest agent, and is no activity. One pass over all
sandboxes runs on the event loop, so it makes only a handful of system calls for each: counters
are read from descriptors that stay open. Memory as the guest sees it comes at a slower pace from
the VM; between two answers the last one stands, over a pause too. Nothing here fails an operation
on a sandbox: what cannot be read is not sampled.
"""

from __future__ import annotations

import asyncio
import logging
import os
import select
import struct
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple, Protocol

from sandmartin.agent.disk import allocated_bytes
from sandmartin.agent.proc import ProcessId
from sandmartin.errors import Invalid, SandmartinError

_log = logging.getLogger(__name__)

PERIOD_S = 0.5
#: How often a guest's memory is asked for, once the first answers of a new VM are in.
MEMORY_PERIOD_S = 10.0
_FIRST_MEMORY_WAIT_S = 1.0
#: Without a figure of its memory there is no point of a VM, unless none has come for so long.
PATIENCE_S = 30.0
#: The kernel counts running time in ticks of some milliseconds: over less, a share says little.
_SHORTEST_S = 0.05


# Rings.


class Usage(NamedTuple):
    """One sample. `cpu_pct` is 100 for one busy processor; `mem_bytes` is None until known."""

    cpu_pct: float
    mem_bytes: int | None
    disk_bytes: int


class Point(NamedTuple):
    """What a ring holds: a sample or the mean of some, and when the first of them was taken."""

    timestamp_unix: int
    cpu_pct: float
    mem_bytes: int
    disk_bytes: int


_PACKED = struct.Struct("<qdqq")


class Ring:
    """The newest points, up to `capacity`, packed: 32 bytes each."""

    def __init__(self, capacity: int) -> None:
        self._size = capacity * _PACKED.size
        self._packed = bytearray()
        self._oldest = 0

    def push(self, point: Point) -> None:
        if len(self._packed) < self._size:
            self._packed += _PACKED.pack(*point)
            return
        _PACKED.pack_into(self._packed, self._oldest, *point)
        self._oldest = (self._oldest + _PACKED.size) % self._size

    def points(self) -> list[Point]:
        """The points in the order in which they were added."""
        ordered = self._packed[self._oldest :] + self._packed[: self._oldest]
        return [Point._make(values) for values in _PACKED.iter_unpack(ordered)]


class Samples(Ring):
    """A ring of samples as they were taken."""

    def add(self, at: float, usage: Usage) -> None:
        self.push(Point(int(at), usage.cpu_pct, usage.mem_bytes or 0, usage.disk_bytes))


@dataclass(slots=True)
class _Window:
    """The samples of one span of time, summed up."""

    index: int
    begin: float
    count: int = 0
    cpu: float = 0.0
    disk: int = 0
    mem: int = 0
    mem_count: int = 0

    def add(self, usage: Usage) -> None:
        self.count += 1
        self.cpu += usage.cpu_pct
        self.disk += usage.disk_bytes
        if usage.mem_bytes is not None:
            self.mem += usage.mem_bytes
            self.mem_count += 1

    def mean(self) -> Point:
        return Point(
            timestamp_unix=int(self.begin),
            cpu_pct=self.cpu / self.count,
            mem_bytes=self.mem // self.mem_count if self.mem_count else 0,
            disk_bytes=self.disk // self.count,
        )


class Means:
    """A ring of means over windows of `width_s`, which begin at its multiples.

    A window ends when a sample falls into another one, later or (the clock was set) earlier.
    """

    def __init__(self, width_s: int, capacity: int) -> None:
        self._width_s = width_s
        # One more is the open window.
        self._closed = Ring(capacity - 1)
        self._open: _Window | None = None

    def add(self, at: float, usage: Usage) -> None:
        index = int(at // self._width_s)
        window = self._open
        if window is None or window.index != index:
            if window is not None:
                self._closed.push(window.mean())
            window = self._open = _Window(index, begin=at)
        window.add(usage)

    def points(self) -> list[Point]:
        """The means, oldest first; the last one is of the window that is still open."""
        closed = self._closed.points()
        return closed if self._open is None else [*closed, self._open.mean()]


class _Tier(Protocol):
    def add(self, at: float, usage: Usage) -> None: ...
    def points(self) -> list[Point]: ...


_TIERS: Mapping[str, Callable[[], _Tier]] = {
    "10m": partial(Samples, 1200),
    "2h": partial(Means, 30, 240),
    "24h": partial(Means, 300, 288),
}


class Rings:
    """The points of one sandbox: full ones take some 60 kB, empty ones next to nothing."""

    def __init__(self) -> None:
        self._tiers = _empty_tiers()

    def add(self, at: float, usage: Usage) -> None:
        """Take a sample of the time `at`, in seconds of the wall clock."""
        for tier in self._tiers.values():
            tier.add(at, usage)

    def get(self, name: str) -> list[Point]:
        """The points of a range, oldest first. Raises Invalid."""
        check_range(name)
        return self._tiers[name].points()

    def flush(self) -> dict[str, list[Point]]:
        """The points of every range, which are then forgotten here."""
        full, self._tiers = self._tiers, _empty_tiers()
        return {name: tier.points() for name, tier in full.items()}


def _empty_tiers() -> dict[str, _Tier]:
    return {name: make() for name, make in _TIERS.items()}


def check_range(name: str) -> None:
    """Raises Invalid when there is no such range."""
    if name not in _TIERS:
        raise Invalid(f"there is no range {name[:20]!r}", hint=f"use one of {', '.join(_TIERS)}")


# Processor time.


class _GroupMeter:
    """Processor time of a control group: `cpuacct.usage` in v1, `cpu.stat` in v2."""

    def __init__(self, file: Path) -> None:
        self._descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
        try:
            self.read_ns()
        except BaseException:
            self.close()
            raise

    def read_ns(self) -> int:
        """Raises OSError once the group is gone, ValueError when the file has no such counter."""
        content = os.pread(self._descriptor, 64, 0)
        if content.startswith(b"usage_usec "):
            return int(content.split(maxsplit=2)[1]) * 1000
        return int(content)

    def close(self) -> None:
        os.close(self._descriptor)


class _ProcessMeter:
    """Processor time of a process, all of its threads, to the nanosecond.

    For hosts whose groups do not count it: v1 with `cpuacct` apart from `cpu`. The clock is that
    of clock_getcpuclockid(3), which Python does not offer; /proc/PID/stat counts in steps of 10 ms.
    """

    def __init__(self, process: ProcessId) -> None:
        self._clock = (~process.pid << 3) | 2
        self._handle = os.pidfd_open(process.pid)
        # Asked when the handle is there: it is of this very process, not of a later one.
        if not process.alive():
            self.close()
            raise ProcessLookupError(f"process {process.pid} has ended")
        self._ended = select.poll()
        self._ended.register(self._handle, select.POLLIN)

    def read_ns(self) -> int:
        """Raises OSError once the process has ended."""
        if self._ended.poll(0):
            raise ProcessLookupError("its process has ended")
        return time.clock_gettime_ns(self._clock)

    def close(self) -> None:
        os.close(self._handle)


_Meter = _GroupMeter | _ProcessMeter


def _open_meter(process: ProcessId, groups: Sequence[Path]) -> _Meter:
    """The best counter there is. Raises OSError."""
    for group in groups:
        for name in ("cpuacct.usage", "cpu.stat"):
            try:
                return _GroupMeter(group / name)
            except (FileNotFoundError, ValueError):
                # In v1 `cpu.stat` is there too, but tells of throttling alone.
                continue
    return _ProcessMeter(process)


# Sampling.


class Source(Protocol):
    """A running VM, as the sampler sees it."""

    @property
    def process(self) -> ProcessId: ...

    @property
    def groups(self) -> Sequence[Path]:
        """Directories of its control group."""
        ...

    @property
    def layers(self) -> Sequence[Path]:
        """The disk files that are the sandbox's own; read anew for each sample."""
        ...

    async def memory(self) -> int | None:
        """Bytes in use as the guest sees it, None when it has not told yet.

        Has a deadline of its own, and is no activity. Raises SandmartinError.
        """
        ...


class _Probe:
    """What is open and remembered of a VM while it runs."""

    def __init__(self, source: Source, now: float) -> None:
        self.source = source
        self._meter = _open_meter(source.process, source.groups)
        try:
            self._cpu_ns = self._meter.read_ns()
        except BaseException:
            self.close()
            raise
        self._taken_at = now
        # Not at once: the guest then has its first command to run.
        self.ask_at = now + _FIRST_MEMORY_WAIT_S
        self._wait_s = _FIRST_MEMORY_WAIT_S
        self.asking = False
        self.began_at = now

    def cpu_pct(self, now: float) -> float | None:
        """The share since the last call, None when too little is known. Raises OSError."""
        elapsed_s = now - self._taken_at
        if elapsed_s < _SHORTEST_S:
            return None
        before_ns, self._cpu_ns = self._cpu_ns, self._meter.read_ns()
        self._taken_at = now
        used_ns = self._cpu_ns - before_ns
        # A counter that was set back says nothing.
        return used_ns / elapsed_s / 1e7 if used_ns >= 0 else None

    def asked(self, now: float) -> None:
        """Memory is asked for. A new VM has no figure at first, so it is asked again sooner."""
        self.asking = True
        self.ask_at = now + self._wait_s
        self._wait_s = min(2 * self._wait_s, MEMORY_PERIOD_S)

    def close(self) -> None:
        self._meter.close()


@dataclass
class _Track:
    """A sandbox: its rings, and its probe unless it is paused."""

    rings: Rings = field(default_factory=Rings)
    mem_bytes: int | None = None
    probe: _Probe | None = None


class Sampler:
    """Samples the running sandboxes of a host, and keeps the points of these and of paused ones.

    Belongs to the event loop. `monotonic` measures time, in which `sleep` waits; `wall` dates the
    points. For `patience_s` a guest is waited for to tell its memory: a point would say it uses
    none.
    """

    def __init__(
        self,
        *,
        patience_s: float = PATIENCE_S,
        monotonic: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._patience_s = patience_s
        self._monotonic = monotonic
        self._wall = wall
        self._sleep = sleep
        self._tracks: dict[str, _Track] = {}

    def add(self, sandbox_id: str, source: Source) -> None:
        """Sample a sandbox from now on. One that was suspended goes on with its old points."""
        self.suspend(sandbox_id)
        track = self._tracks.setdefault(sandbox_id, _Track())
        try:
            track.probe = _Probe(source, self._monotonic())
        except (OSError, ValueError) as error:
            _log.warning("sandbox %s is not sampled: %s", sandbox_id, error)

    def suspend(self, sandbox_id: str) -> None:
        """Sample a sandbox no more, and keep its points. Idempotent."""
        track = self._tracks.get(sandbox_id)
        if track is not None and track.probe is not None:
            probe, track.probe = track.probe, None
            probe.close()

    def remove(self, sandbox_id: str) -> None:
        """Forget a sandbox. Idempotent."""
        self.suspend(sandbox_id)
        self._tracks.pop(sandbox_id, None)

    def get(self, sandbox_id: str, tier: str) -> list[Point]:
        """The points of a range, oldest first; none when nothing is known. Raises Invalid."""
        check_range(tier)
        track = self._tracks.get(sandbox_id)
        return [] if track is None else track.rings.get(tier)

    def flush(self, sandbox_id: str) -> dict[str, list[Point]]:
        """The points of every range, which are then forgotten here."""
        track = self._tracks.get(sandbox_id)
        return (Rings() if track is None else track.rings).flush()

    def close(self) -> None:
        """Suspend every sandbox."""
        for sandbox_id in self._tracks:
            self.suspend(sandbox_id)

    async def run(self) -> None:
        """Sample until cancelled, then close."""
        try:
            async with asyncio.TaskGroup() as asking:
                deadline = self._monotonic()
                while True:
                    self.sample()
                    for sandbox_id, track, probe in self._due():
                        probe.asked(self._monotonic())
                        work = _ask_memory(sandbox_id, track, probe)
                        asking.create_task(work, name=f"memory of {sandbox_id}")
                    deadline = next_deadline(deadline, self._monotonic())
                    await self._sleep(deadline - self._monotonic())
        finally:
            self.close()

    def sample(self) -> None:
        """Take one sample of every running sandbox."""
        at = self._wall()
        for sandbox_id, track in self._tracks.items():
            if track.probe is None:
                continue
            now = self._monotonic()
            told = track.mem_bytes is not None or now - track.probe.began_at >= self._patience_s
            try:
                cpu_pct = track.probe.cpu_pct(now)
                if cpu_pct is not None and told:
                    disk_bytes = sum(map(allocated_bytes, track.probe.source.layers))
                    track.rings.add(at, Usage(cpu_pct, track.mem_bytes, disk_bytes))
            except (OSError, ValueError) as error:
                _log.info("sandbox %s is not sampled any more: %s", sandbox_id, error)
                self.suspend(sandbox_id)

    def _due(self) -> list[tuple[str, _Track, _Probe]]:
        """Whom to ask for memory now: a few at a time, so that many do not burst."""
        probes = [(i, t, t.probe) for i, t in self._tracks.items() if t.probe is not None]
        now = self._monotonic()
        due = [row for row in probes if row[2].ask_at <= now and not row[2].asking]
        due.sort(key=lambda row: row[2].ask_at)
        return due[: 1 + len(probes) // 12]


async def _ask_memory(sandbox_id: str, track: _Track, probe: _Probe) -> None:
    try:
        mem_bytes = await probe.source.memory()
    except SandmartinError as error:
        _log.debug("sandbox %s: its memory is not known: %s", sandbox_id, error)
        return
    finally:
        probe.asking = False
    # An answer that comes after the VM was replaced is of the old one.
    if mem_bytes is not None and track.probe is probe:
        track.mem_bytes = mem_bytes


def next_deadline(deadline: float, now: float) -> float:
    """The first of the deadlines, one a period, that is still to come.

    Counted from the last one and not from now, so that they do not drift; missed ones are left
    out.
    """
    missed = max(0.0, (now - deadline) // PERIOD_S)
    return deadline + (missed + 1) * PERIOD_S


# Memory of a VM under QEMU.
