"""Usage: what sandboxes used, what teams held, and what that comes to by day.

A host keeps the newest metric points in memory; they are fetched before a sandbox leaves it, and
kept packed, a block for each tier and time.

What a team used is not sampled but reckoned from its events, each of which has the state that a
sandbox was in from then on: exact to the event. A sandbox counts while it has a host's processors.
A day (UTC) that is over is reckoned once and kept; the platform team's own row says that it was.
Samples are for the curves alone.
"""

from __future__ import annotations

import asyncio
import logging
import struct
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta

from sqlalchemy import BigInteger, Select, cast, func, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession

from sandmartin.control import tables
from sandmartin.control.db import Database
from sandmartin.control.tables import PLATFORM_TEAM_ID, Event, Sandbox, TeamSample, UsageDay
from sandmartin.errors import Invalid, SandmartinError
from sandmartin.model import State
from sandmartin.transport import MetricPoint
from sandmartin.transport.agent import Agent

_log = logging.getLogger(__name__)
#: Time in seconds, CPU in percent, memory and disk in bytes.
_POINT = struct.Struct("<ddqq")

#: While a sandbox has processors of its host, or is just losing them.
COUNTED = frozenset({State.RUNNING, State.PAUSING, State.SNAPSHOTTING})
SAMPLE_S = 10
MAX_DAYS = 92
_ROLL_UP_S = 3600.0
_DAY = timedelta(days=1)
#: Seconds that a range covers, and of each point of its curve.
RANGES: Mapping[str, tuple[int, int]] = {
    "5m": (300, 10),
    "1h": (3600, 30),
    "6h": (6 * 3600, 180),
    "24h": (24 * 3600, 720),
    "30d": (30 * 86400, 21600),
}


@dataclass(frozen=True, kw_only=True)
class Load:
    """What a team held, at a moment or at most."""

    running: int = 0
    vcpus: int = 0
    memory_mb: int = 0


@dataclass(frozen=True, kw_only=True)
class Stats:
    """What a team holds now, at most in a range, and over it: by the begin of each bucket."""

    current: Load
    peaks: Load
    series: Sequence[tuple[int, Load]]


@dataclass(frozen=True, kw_only=True)
class Used:
    """What was used on one day."""

    day: date
    cpu_minutes: float = 0.0
    memory_mb_minutes: float = 0.0


@dataclass(frozen=True, kw_only=True)
class _Span:
    """A sandbox counted from one time to another."""

    team_id: str
    vcpus: int
    memory_mb: int
    begins: float
    ends: float


class Usage:
    """What sandboxes used, as the database has it."""

    def __init__(self, db: Database) -> None:
        self._db = db

    async def flush(self, agent: Agent, row: tables.Sandbox) -> None:
        """Keep what a host knows of a sandbox that is about to leave it; never in its way."""
        try:
            tiers = await agent.flush_metrics(row.sandbox_id)
        except SandmartinError as error:
            _log.info("metrics of sandbox %s are lost: %s", row.sandbox_id, error)
            return
        async with self._db.write() as session:
            for tier, points in tiers.items():
                if points:
                    session.add(
                        tables.MetricBlock(
                            sandbox_id=row.sandbox_id,
                            tier=tier,
                            begins_at=points[0].timestamp,
                            ends_at=points[-1].timestamp,
                            points=pack(points),
                        )
                    )

    async def points(self, sandbox_id: str, tier: str, since: float) -> list[MetricPoint]:
        """Points that were kept, oldest first."""
        block = tables.MetricBlock
        query = select(block).where(
            block.sandbox_id == sandbox_id, block.tier == tier, block.ends_at >= since
        )
        async with self._db.read() as session:
            blocks = (await session.scalars(query.order_by(block.begins_at))).all()
        points = [point for each in blocks for point in unpack(each.points)]
        return [point for point in points if point.timestamp >= since]

    # Curves.

    async def run(self) -> None:
        """Sample, and roll up days that are over, for ever: for the leader alone."""
        rolled_at = 0.0
        while True:
            try:
                await self.sample(time.time())
                if time.time() - rolled_at >= _ROLL_UP_S:
                    await self.roll_up(time.time())
                    rolled_at = time.time()
            except SandmartinError as error:
                _log.warning("usage is not noted: %s", error)
            await asyncio.sleep(SAMPLE_S - time.time() % SAMPLE_S)

    async def sample(self, now: float) -> None:
        """Note what each team holds, once for each ten seconds whoever does it."""
        at = float(now // SAMPLE_S * SAMPLE_S)
        query = _loads()
        try:
            async with self._db.write() as session:
                done = set(
                    await session.scalars(select(TeamSample.team_id).where(TeamSample.at == at))
                )
                for team_id, running, vcpus, memory_mb in await session.execute(query):
                    if team_id not in done:
                        load = {"running": running, "vcpus": vcpus, "memory_mb": memory_mb}
                        session.add(TeamSample(team_id=team_id, at=at, **load))
        except IntegrityError:
            # The leader before us did it.
            return

    async def stats(self, team_id: str, range_: str, now: float | None = None) -> Stats:
        """What a team holds, and held. Raises Invalid."""
        if range_ not in RANGES:
            raise Invalid(f"the range is {range_[:20]!r}", hint=f"use one of {', '.join(RANGES)}")
        length, width = RANGES[range_]
        now = time.time() if now is None else now
        first = (int(now) - length) // width + 1
        row = TeamSample
        bucket = (cast(row.at, BigInteger) // width).label("bucket")
        query = (
            select(bucket, func.max(row.running), func.max(row.vcpus), func.max(row.memory_mb))
            .where(row.team_id == team_id, row.at >= first * width)
            .group_by(bucket)
        )
        async with self._db.read() as session:
            found = {each[0]: _load(each[1:]) for each in await session.execute(query)}
            holds = (await session.execute(_loads().where(Sandbox.team_id == team_id))).all()
        current = _load(holds[0][1:]) if holds else Load()
        # A bucket without samples is one in which nothing ran.
        buckets = range(first, int(now) // width + 1)
        series = [(each * width, found.get(each, Load())) for each in buckets]
        return Stats(current=current, peaks=_most([current, *found.values()]), series=series)

    # Days.

    async def days(
        self, team_id: str, first: date, last: date, now: float | None = None
    ) -> Sequence[Used]:
        """What a team used on each of these days, the present one until now. Raises Invalid."""
        now = time.time() if now is None else now
        days = _days(first, last)
        row = UsageDay
        within = row.day.between(first.isoformat(), last.isoformat())
        async with self._db.read() as session:
            rolled = await session.scalar(_newest_rolled())
            kept = await session.scalars(select(row).where(within, row.team_id == team_id))
            found = {date.fromisoformat(each.day): _used(each) for each in kept}
            unknown = [
                day for day in days if day.isoformat() > (rolled or "") and _begin(day) <= now
            ]
            if unknown:
                reckoned = await self._reckon(session, team_id, unknown[0], unknown[-1], now)
                found |= {day: reckoned[day] for day in unknown if day in reckoned}
        return [found.get(day, Used(day=day)) for day in days]

    async def days_of(
        self, sandbox: Sandbox, first: date, last: date, now: float | None = None
    ) -> Sequence[Used]:
        """What one sandbox used on each of these days, as far back as events are kept.

        Raises Invalid.
        """
        now, days = time.time() if now is None else now, _days(first, last)
        found: Mapping[date, Used] = {}
        if _begin(first) <= now:
            async with self._db.read() as session:
                found = await self._reckon(
                    session, sandbox.team_id, first, last, now, sandbox.sandbox_id
                )
        return [found.get(day, Used(day=day)) for day in days]

    async def roll_up(self, now: float) -> None:
        """Keep what was used on the days that are over and not kept yet."""
        today = datetime.fromtimestamp(now, UTC).date()
        async with self._db.read() as session:
            newest = await session.scalar(_newest_rolled())
            oldest = await session.scalar(select(func.min(Event.at)))
            teams = (await session.scalars(select(tables.Team.team_id))).all()
        if newest is not None:
            day = date.fromisoformat(newest) + _DAY
        elif oldest is not None:
            day = datetime.fromtimestamp(oldest, UTC).date()
        else:
            return
        while day < today:
            await self._roll_up_day(day, teams, now)
            day += _DAY

    async def _roll_up_day(self, day: date, teams: Iterable[str], now: float) -> None:
        rows = {PLATFORM_TEAM_ID: Used(day=day)}
        for team_id in teams:
            async with self._db.read() as session:
                used = (await self._reckon(session, team_id, day, day, now)).get(day)
            if used is not None:
                rows[team_id] = used
        try:
            async with self._db.write() as session:
                for team_id, used in rows.items():
                    session.add(
                        UsageDay(
                            team_id=team_id,
                            day=day.isoformat(),
                            cpu_minutes=used.cpu_minutes,
                            memory_mb_minutes=used.memory_mb_minutes,
                        )
                    )
        except IntegrityError:
            # The leader before us did it.
            return

    async def _reckon(
        self,
        session: AsyncSession,
        team_id: str,
        first: date,
        last: date,
        now: float,
        sandbox_id: str | None = None,
    ) -> Mapping[date, Used]:
        """What a team, or one sandbox of it, used on days that are not kept, by its events."""
        begins, ends = _begin(first), min(_begin(last + _DAY), now)
        cpu: dict[date, float] = defaultdict(float)
        memory: dict[date, float] = defaultdict(float)
        async for span in _spans(session, team_id, begins, ends, sandbox_id):
            for day, minutes in _by_day(span):
                cpu[day] += minutes * span.vcpus
                memory[day] += minutes * span.memory_mb
        return {
            day: Used(day=day, cpu_minutes=cpu[day], memory_mb_minutes=memory[day]) for day in cpu
        }


def _days(first: date, last: date) -> Sequence[date]:
    """The days from one to another. Raises Invalid."""
    if first > last:
        raise Invalid("`from` is after `to`", hint="give the earlier day as `from`")
    if (last - first).days >= MAX_DAYS:
        raise Invalid(f"these are more than {MAX_DAYS} days", hint="ask for fewer at a time")
    return [first + _DAY * number for number in range((last - first).days + 1)]


def _newest_rolled() -> Select[str]:
    """The last day that is kept; so are all before it."""
    return select(func.max(UsageDay.day)).where(UsageDay.team_id == PLATFORM_TEAM_ID)


async def _spans(
    session: AsyncSession, team_id: str, begins: float, ends: float, sandbox_id: str | None
) -> AsyncIterator[_Span]:
    """When sandboxes of a team, or one, counted between two times, each from event to event."""
    known = {}
    there = _there(team_id, begins, ends)
    if sandbox_id is not None:
        there = there.where(Sandbox.sandbox_id == sandbox_id)
    for row in await session.execute(there):
        known[row.sandbox_id] = row
    #: Since when each counts.
    since = {each: begins for each, row in known.items() if row.state_before in COUNTED}
    state = Event.data["state"].as_string()
    query = (
        select(Event.sandbox_id, Event.at, state)
        .where(Event.team_id == team_id, Event.at >= begins, Event.at < ends, state.is_not(None))
        .order_by(Event.event_id)
    )
    if sandbox_id is not None:
        query = query.where(Event.sandbox_id == sandbox_id)

    def span(sandbox_id: str, until: float) -> _Span:
        row = known[sandbox_id]
        return _Span(
            team_id=team_id,
            vcpus=row.vcpus,
            memory_mb=row.memory_mb,
            begins=since.pop(sandbox_id),
            ends=until,
        )

    for sandbox_id, at, now_in in await session.execute(query):
        if sandbox_id not in known:
            continue
        if now_in in COUNTED:
            since.setdefault(sandbox_id, at)
        elif sandbox_id in since:
            yield span(sandbox_id, at)
    for sandbox_id in tuple(since):
        yield span(sandbox_id, ends)


def _there(team_id: str, begins: float, ends: float) -> Select[str, int, int, str]:
    """A team's sandboxes of a time, and the state in which each was at its beginning."""
    state = Event.data["state"].as_string()
    before = (
        select(state)
        .where(Event.sandbox_id == Sandbox.sandbox_id, Event.at < begins, state.is_not(None))
        .order_by(Event.event_id.desc())
        .limit(1)
        .scalar_subquery()
        .label("state_before")
    )
    return select(Sandbox.sandbox_id, Sandbox.vcpus, Sandbox.memory_mb, before).where(
        Sandbox.team_id == team_id,
        Sandbox.created_at < ends,
        Sandbox.ended_at.is_(None) | (Sandbox.ended_at >= begins),
    )


def _by_day(span: _Span) -> Iterator[tuple[date, float]]:
    """The minutes of a span on each of its days."""
    at = span.begins
    while at < span.ends:
        day = datetime.fromtimestamp(at, UTC).date()
        until = min(_begin(day + _DAY), span.ends)
        yield day, (until - at) / 60
        at = until


def _begin(day: date) -> float:
    """The first moment of a day (UTC)."""
    return datetime(day.year, day.month, day.day, tzinfo=UTC).timestamp()


def _used(row: UsageDay) -> Used:
    return Used(
        day=date.fromisoformat(row.day),
        cpu_minutes=row.cpu_minutes,
        memory_mb_minutes=row.memory_mb_minutes,
    )


def _loads() -> Select[str, int, int, int]:
    return (
        select(
            Sandbox.team_id,
            func.count(),
            func.sum(Sandbox.vcpus),
            func.sum(Sandbox.memory_mb),
        )
        .where(Sandbox.state.in_(sorted(COUNTED)))
        .group_by(Sandbox.team_id)
    )


def _load(figures: Sequence[int]) -> Load:
    running, vcpus, memory_mb = figures
    return Load(running=running, vcpus=vcpus, memory_mb=memory_mb)


def _most(loads: Sequence[Load]) -> Load:
    return Load(
        running=max(each.running for each in loads),
        vcpus=max(each.vcpus for each in loads),
        memory_mb=max(each.memory_mb for each in loads),
    )


def pack(points: Sequence[MetricPoint]) -> bytes:
    return b"".join(
        _POINT.pack(each.timestamp, each.cpu_pct, each.mem_bytes, each.disk_bytes)
        for each in points
    )


def unpack(packed: bytes) -> Iterable[MetricPoint]:
    for timestamp, cpu_pct, mem_bytes, disk_bytes in _POINT.iter_unpack(packed):
        yield MetricPoint(
            timestamp=int(timestamp), cpu_pct=cpu_pct, mem_bytes=mem_bytes, disk_bytes=disk_bytes
        )
