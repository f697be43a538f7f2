"""Sandboxes end when their time is over, on whichever replica, and only then.

And how E2B's clients, who know of no states in between, wait for what is under way.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import update

from sandmartin.control import tables
from sandmartin.control.caller import system
from sandmartin.control.platform import Platform
from sandmartin.control.requests import NewRow
from sandmartin.errors import Conflict
from sandmartin.model import State
from tests.control.conftest import (
    Gate,
    RunningHost,
    Team,
    eventually,
    make_team,
    running_host,
    running_platform,
)
from tests.control.test_e2b import left_s, look, make, refused
from tests.control.test_operations import until_state
from tests.control.truth import agree, rows_of, state_of

pytestmark = pytest.mark.qemu_img


@pytest.fixture
def gate() -> Gate:
    return Gate()


@pytest.fixture
async def host(gate: Gate) -> AsyncIterator[RunningHost]:
    async with running_host(step=gate) as host:
        yield host


def new_row(**more: Any) -> NewRow:
    return NewRow(memory_mb=128, disk_size_mb=8, on_timeout="kill", **more)


async def test_at_its_end_it_is_killed_or_paused(
    team: Team, platform: Platform, host: RunningHost
) -> None:
    began = time.monotonic()
    killed = (await make(team, timeout=1))["sandboxID"]
    paused = (await make(team, timeout=1, autoPause=True))["sandboxID"]
    stays = (await make(team, timeout=100))["sandboxID"]
    await until_state(platform, killed, State.STOPPED)
    await until_state(platform, paused, State.PAUSED)
    assert time.monotonic() - began >= 1
    assert await state_of(platform, stays) == State.RUNNING
    refused(await team.http.get(f"/sandboxes/{killed}"), 404)
    (listed,) = (await team.http.get("/v2/sandboxes?state=paused")).json()
    assert (listed["sandboxID"], listed["state"]) == (paused, "paused")
    # Woken without a word of its time it has it again, and not the end that is past.
    await team.http.post(f"/v1/sandboxes/{paused}/resume")
    assert 0 < left_s(await look(team, paused)) <= 1
    await until_state(platform, paused, State.PAUSED)
    await agree(platform, host)


async def test_no_time_at_all_ends_it_at_once(team: Team, platform: Platform) -> None:
    for auto_pause, after in ((False, State.STOPPED), (True, State.PAUSED)):
        one = (await make(team, autoPause=auto_pause))["sandboxID"]
        answer = await team.http.post(f"/sandboxes/{one}/timeout", json={"timeout": 0})
        assert answer.status_code == 204
        if auto_pause:
            assert await state_of(platform, one) == State.PAUSED
        else:
            refused(await team.http.get(f"/sandboxes/{one}"), 404)
        await until_state(platform, one, after)
    # It sleeps, and does not end as soon as it wakes.
    await team.http.post(f"/v1/sandboxes/{one}/resume")
    assert left_s(await look(team, one)) > 250


async def test_an_end_survives_whoever_set_it(database_url: str, tmp_path: Path) -> None:
    async with running_host() as host:
        async with running_platform(database_url, tmp_path, host, working=False) as platform:
            caller = system((await make_team(platform))[0])
            made = await platform.sandboxes.create(caller, new_row(lifetime_s=1))
            await asyncio.sleep(0)
            assert await state_of(platform, made.sandbox_id) == State.RUNNING
        async with running_platform(database_url, tmp_path, host) as another:
            await until_state(another, made.sandbox_id, State.STOPPED)
            await agree(another, host)


async def test_who_extends_at_the_last_moment_wins(
    database_url: str, tmp_path: Path, host: RunningHost
) -> None:
    async with running_platform(database_url, tmp_path, host, working=False) as platform:
        caller = system((await make_team(platform))[0])
        rows = [await platform.sandboxes.create(caller, new_row(lifetime_s=1)) for _ in range(2)]
        await _make_due(platform)
        due = await platform.deadlines._due()
        assert {each.sandbox_id for each in due} == {each.sandbox_id for each in rows}
        await platform.deadlines.extend(caller, rows[0].sandbox_id, 100)
        for each in due:
            await platform.deadlines._end(each)
        assert await state_of(platform, rows[0].sandbox_id) == State.RUNNING
        assert await state_of(platform, rows[1].sandbox_id) == State.STOPPED
        with pytest.raises(Conflict):
            await platform.deadlines.set(caller, rows[1].sandbox_id, 100)


async def _make_due(platform: Platform) -> None:
    async with platform.db.write() as session:
        await session.execute(update(tables.Sandbox).values(ends_at=1.0))


async def test_a_slow_end_keeps_no_other_waiting(
    database_url: str, tmp_path: Path, host: RunningHost, gate: Gate
) -> None:
    async with running_platform(database_url, tmp_path, host) as platform:
        caller = system((await make_team(platform))[0])
        gate.close()
        slow = NewRow(memory_mb=128, disk_size_mb=8, lifetime_s=1, on_timeout="pause")
        first = await platform.sandboxes.create(caller, slow)
        await gate.reached()
        second = await platform.sandboxes.create(caller, new_row(lifetime_s=1))
        await until_state(platform, second.sandbox_id, State.STOPPED)
        assert await state_of(platform, first.sandbox_id) == State.PAUSING
        gate.open()
        await until_state(platform, first.sandbox_id, State.PAUSED)


async def test_what_is_lost_is_given_up_or_kept(database_url: str, tmp_path: Path) -> None:
    async with (
        running_host() as host,
        running_platform(database_url, tmp_path, host) as platform,
    ):
        caller = system((await make_team(platform))[0])
        lost = await platform.sandboxes.create(caller, new_row(lifetime_s=1000))
        pausing = NewRow(memory_mb=128, disk_size_mb=8, lifetime_s=1000)
        kept = await platform.sandboxes.create(caller, pausing)
        await host.stop()
        for each in (lost, kept):
            await until_state(platform, each.sandbox_id, State.MISSING)
        await _make_due(platform)
        await until_state(platform, lost.sandbox_id, State.STOPPING)
        assert await state_of(platform, kept.sandbox_id) == State.MISSING


async def test_many_at_once(team: Team, platform: Platform, host: RunningHost) -> None:
    caller = system(team.team_id)
    new = new_row(lifetime_s=2)
    made = await asyncio.gather(*(platform.sandboxes.create(caller, new) for _ in range(8)))
    await _make_due(platform)

    async def gone() -> bool:
        rows = await rows_of(platform)
        return all(rows[each.sandbox_id].state == State.STOPPED for each in made)

    await eventually(gone, "all eight are over")
    await agree(platform, host)


async def test_a_pause_under_way_is_waited_for(team: Team, gate: Gate) -> None:
    one = (await make(team))["sandboxID"]
    gate.close()
    pausing = asyncio.create_task(team.http.post(f"/sandboxes/{one}/pause"))
    await gate.reached()
    assert (await look(team, one))["state"] == "paused"
    connecting = asyncio.create_task(team.http.post(f"/v2/sandboxes/{one}/connect", json={}))
    gate.open()
    assert (await pausing).status_code == 204
    assert (await connecting).status_code == 201
