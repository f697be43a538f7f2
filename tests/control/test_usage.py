"""What teams held and used, by events that happened at known times."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import func, select

from sandmartin.control import tables
from sandmartin.control.bootstrap import ensure_platform
from sandmartin.control.platform import Platform, open_platform
from sandmartin.control.retention import Keep, Retention
from sandmartin.control.settings import ControlSettings
from sandmartin.control.usage import Usage, Used
from sandmartin.errors import Invalid
from sandmartin.model import State
from tests.control.conftest import Team, make_team
from tests.control.test_sandboxes import create

HOUR = 3600.0
#: 2026-03-10 is the present day, at noon.
TODAY = date(2026, 3, 10)
NOW = datetime(2026, 3, 10, 12, tzinfo=UTC).timestamp()
DAY = timedelta(days=1)


@pytest.fixture
async def quiet(database_url: str, tmp_path: Path) -> AsyncIterator[Platform]:
    """A replica that does nothing by itself: it would roll up and forget by the real clock."""
    settings = ControlSettings(data_dir=tmp_path / "control", database_url=database_url)
    async with open_platform(settings) as platform:
        await ensure_platform(platform.db)
        yield platform


def at(day: int, hour: float) -> float:
    """So many hours into a day of March 2026."""
    return datetime(2026, 3, day, tzinfo=UTC).timestamp() + hour * HOUR


async def live(
    platform: Platform,
    team_id: str,
    sandbox_id: str,
    *steps: tuple[float, State],
    vcpus: int = 2,
    memory_mb: int = 512,
) -> None:
    """A sandbox that went through states at times."""
    over = steps[-1][1] is State.STOPPED
    async with platform.db.write() as session:
        session.add(
            tables.Sandbox(
                sandbox_id=sandbox_id,
                team_id=team_id,
                template="base",
                agent_template="base",
                state=steps[-1][1],
                state_at=steps[-1][0],
                vcpus=vcpus,
                memory_mb=memory_mb,
                disk_size_mb=8,
                created_at=steps[0][0],
                ended_at=steps[-1][0] if over else None,
            )
        )
        for when, state in steps:
            session.add(
                tables.Event(
                    team_id=team_id,
                    kind=f"sandbox.{state}",
                    sandbox_id=sandbox_id,
                    at=when,
                    data={"state": state},
                )
            )


async def some_days(platform: Platform, team_id: str) -> None:
    """One goes over midnight with a pause, one runs on, one is missing for a while."""
    await live(
        platform,
        team_id,
        "over",
        (at(8, 22), State.STARTING),
        (at(8, 22.5), State.RUNNING),
        (at(9, 1), State.PAUSING),
        (at(9, 1.5), State.PAUSED),
        (at(9, 20), State.RESUMING),
        (at(9, 20.5), State.RUNNING),
        (at(9, 21), State.SNAPSHOTTING),
        (at(9, 21.25), State.RUNNING),
        (at(9, 21.5), State.STOPPING),
        (at(9, 21.75), State.STOPPED),
    )
    await live(platform, team_id, "on", (at(9, 23), State.RUNNING), vcpus=1, memory_mb=128)
    await live(
        platform,
        team_id,
        "missing",
        (at(9, 10), State.RUNNING),
        (at(9, 11), State.MISSING),
        (at(10, 6), State.RUNNING),
        (at(10, 7), State.ERROR),
        vcpus=4,
        memory_mb=1024,
    )


#: By day: what "over", "on" and "missing" used, in minutes of vCPUs and of MiB.
EXPECTED = [
    Used(day=date(2026, 3, 8), cpu_minutes=90 * 2, memory_mb_minutes=90 * 512),
    Used(
        day=date(2026, 3, 9),
        cpu_minutes=(90 + 60) * 2 + 60 + 60 * 4,
        memory_mb_minutes=(90 + 60) * 512 + 60 * 128 + 60 * 1024,
    ),
    Used(
        day=TODAY,
        cpu_minutes=12 * 60 + 60 * 4,
        memory_mb_minutes=12 * 60 * 128 + 60 * 1024,
    ),
]


async def test_each_sandbox_has_its_share(quiet: Platform) -> None:
    team_id, _ = await make_team(quiet)
    await some_days(quiet, team_id)
    usage, first = Usage(quiet.db), TODAY - 2 * DAY
    shares = []
    for sandbox_id in ("over", "on", "missing"):
        async with quiet.db.read() as session:
            row = await session.get(tables.Sandbox, sandbox_id)
        assert row is not None
        shares.append(await usage.days_of(row, first, TODAY, NOW))
        with pytest.raises(Invalid):
            await usage.days_of(row, TODAY, first, NOW)
    # Together they are the team's, day by day, also when that is kept by day already.
    await usage.roll_up(NOW)
    team = await usage.days(team_id, first, TODAY, NOW)
    for number, day in enumerate(team):
        assert day == EXPECTED[number]
        assert sum(each[number].cpu_minutes for each in shares) == day.cpu_minutes
        assert sum(each[number].memory_mb_minutes for each in shares) == day.memory_mb_minutes
    assert [each.cpu_minutes for each in shares[0]] == [90 * 2, 150 * 2, 0]


async def test_days_are_exact_before_and_after_they_are_rolled_up(quiet: Platform) -> None:
    (team_id, _), (other_id, _) = await make_team(quiet), await make_team(quiet, "others")
    await some_days(quiet, team_id)
    await live(quiet, other_id, "theirs", (at(9, 0), State.RUNNING), (at(9, 1), State.STOPPED))
    usage = Usage(quiet.db)
    first = TODAY - 2 * DAY
    assert await usage.days(team_id, first, TODAY, NOW) == EXPECTED
    await usage.roll_up(NOW)
    await usage.roll_up(NOW)
    async with quiet.db.write() as session:
        # What is kept stands by itself.
        for row in await session.scalars(select(tables.Event).where(tables.Event.at < at(9, 10))):
            await session.delete(row)
    assert await usage.days(team_id, first, TODAY, NOW) == EXPECTED
    theirs = await usage.days(other_id, first - DAY, TODAY + DAY, NOW)
    assert [each.cpu_minutes for each in theirs] == [0, 0, 120, 0, 0]
    async with quiet.db.read() as session:
        days = select(func.count(func.distinct(tables.UsageDay.day)))
        assert await session.scalar(days) == 2


async def test_too_many_days_are_refused(platform: Platform, team: Team) -> None:
    usage = Usage(platform.db)
    assert len(await usage.days(team.team_id, TODAY - 91 * DAY, TODAY, NOW)) == 92
    for first, last in [(TODAY - 92 * DAY, TODAY), (TODAY, TODAY - DAY)]:
        with pytest.raises(Invalid):
            await usage.days(team.team_id, first, last, NOW)
    for query in ("from=2026-01-01&to=2026-12-31", "from=yesterday", "to=9999-99-99"):
        assert (await team.http.get(f"/v1/sandboxes/usage?{query}")).status_code == 400
    for query in ("to=0001-01-01", "from=9999-12-31&to=9999-12-31"):
        assert (await team.http.get(f"/v1/sandboxes/usage?{query}")).status_code == 200


async def test_sandboxes_that_live_are_counted(
    platform: Platform, team: Team, other_team: Team
) -> None:
    began_at = time.time()
    made = await create(team, vcpus=2)
    await create(team)
    stats = (await team.http.get("/v1/sandboxes/stats?range=5m")).json()
    assert stats["current"] == {"running": 2, "vcpus": 3, "memory_mb": 256}
    default = {"max_sandboxes": 100, "max_vcpus": 200, "max_memory_mb": 204800}
    assert stats["quotas"] == default
    async with platform.db.write() as session:
        (await session.get_one(tables.Team, team.team_id)).max_vcpus = 4
    await platform.usage.sample(time.time())
    await platform.usage.sample(time.time())
    await team.http.delete(f"/v1/sandboxes/{made['id']}")
    stats = (await team.http.get("/v1/capsules/stats?range=5m")).json()
    assert stats["current"]["running"] == 1
    assert stats["peaks"] == {"running": 2, "vcpus": 3, "memory_mb": 256}
    assert stats["quotas"] == {**default, "max_vcpus": 4}
    assert max(each["running"] for each in stats["series"]) == 2
    assert len(stats["series"]) in {30, 31}
    used = (await team.http.get("/v1/sandboxes/usage")).json()["items"]
    most = (time.time() - began_at) / 60
    assert len(used) == 30
    assert 0 < sum(each["cpu_minutes"] for each in used) < 3 * most
    theirs = (await other_team.http.get("/v1/sandboxes/stats")).json()
    assert theirs["current"]["running"] == theirs["peaks"]["running"] == 0
    assert (await team.http.get("/v1/sandboxes/stats?range=2y")).status_code == 400


async def test_curves_keep_their_peaks(quiet: Platform) -> None:
    team_id, _ = await make_team(quiet)
    async with quiet.db.write() as session:
        for ago, running in [(86400 * 29, 9), (5 * HOUR, 7), (200, 5), (190, 6), (20, 4)]:
            load = {"running": running, "vcpus": running, "memory_mb": running}
            session.add(tables.TeamSample(team_id=team_id, at=NOW - ago, **load))
    usage = Usage(quiet.db)
    peaks = {each: (await usage.stats(team_id, each, NOW)).peaks.running for each in PEAKS}
    assert peaks == PEAKS
    series = (await usage.stats(team_id, "1h", NOW)).series
    assert [load.running for _, load in series if load.running] == [6, 4]
    assert series[-1][0] == NOW


PEAKS = {"5m": 6, "1h": 6, "6h": 7, "24h": 7, "30d": 9}


async def test_what_is_old_is_forgotten_and_usage_stays_right(quiet: Platform) -> None:
    team_id, _ = await make_team(quiet)
    await some_days(quiet, team_id)
    expected = (await Usage(quiet.db).days(team_id, TODAY, TODAY, NOW))[0]
    async with quiet.db.write() as session:
        for hours in (1, 1000):
            ago = NOW - hours * HOUR
            session.add(tables.TeamSample(team_id=team_id, at=ago, running=1, vcpus=1, memory_mb=1))
            session.add(
                tables.MetricBlock(
                    sandbox_id="on", tier="10m", begins_at=ago, ends_at=ago, points=b""
                )
            )
            session.add(
                tables.Operation(
                    operation_id=f"op{hours}",
                    sandbox_id="on",
                    kind="pause",
                    state_before="running",
                    created_at=ago,
                    lease_owner="",
                    lease_token="",
                    lease_expires_at=ago,
                    finished_at=ago,
                )
            )
    keep = Keep(samples=1, metrics=1, events=0.5, operations=1, deliveries=1)
    # Of the sandboxes that are over all; of the others what is not followed: running, missing.
    assert await Retention(quiet.db, keep).prune(NOW) == 3 + 10 + 1
    assert (await Usage(quiet.db).days(team_id, TODAY, TODAY, NOW))[0] == expected
    assert await Retention(quiet.db, keep).prune(NOW) == 0
    async with quiet.db.read() as session:
        for table in (tables.TeamSample, tables.MetricBlock, tables.Operation):
            rows: Any = select(func.count()).select_from(table)
            assert await session.scalar(rows) == 1
