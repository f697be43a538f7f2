"""Events as they happen: over the network, through several replicas, in order, none missed."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import text

from sandmartin.control import events
from sandmartin.control.caller import Role, system
from sandmartin.control.db import Database
from sandmartin.control.events import Events
from sandmartin.control.platform import Platform
from sandmartin.control.requests import NewRow
from tests.control.conftest import (
    DEADLINE_S,
    RunningHost,
    make_team,
    running_platform,
    served_platform,
)

NEW = NewRow(memory_mb=128, disk_size_mb=8)


@contextlib.asynccontextmanager
async def stream(
    url: str, key: str, **headers: str
) -> AsyncIterator[AsyncIterator[dict[str, Any]]]:
    """Events that a client hears; the stream has begun."""
    async with (
        httpx.AsyncClient(headers={"x-api-key": key, **headers}, timeout=DEADLINE_S) as http,
        http.stream("GET", url) as answer,
    ):
        assert answer.status_code == 200, await answer.aread()
        lines = answer.aiter_lines()
        assert (await anext(lines)).startswith("retry:")

        async def heard() -> AsyncIterator[dict[str, Any]]:
            number = 0
            async for line in lines:
                if line.startswith("id: "):
                    number = int(line.removeprefix("id: "))
                if line.startswith("data: "):
                    event: dict[str, Any] = json.loads(line.removeprefix("data: "))
                    assert event["id"] == number
                    yield event

        yield heard()


async def until(heard: AsyncIterator[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    found = []
    async with asyncio.timeout(DEADLINE_S):
        async for event in heard:
            found.append(event)
            if event["kind"] == kind:
                return found
    raise AssertionError(f"the stream ended before {kind}: {found}")


async def test_events_of_all_replicas_are_heard(
    database_url: str, tmp_path: Path, host: RunningHost
) -> None:
    async with (
        served_platform(database_url, tmp_path, host) as (here, url),
        running_platform(database_url, tmp_path) as elsewhere,
    ):
        team_id, key = await make_team(here)
        other_id, other_key = await make_team(here, "swallows")
        caller = system(team_id)
        async with (
            stream(f"{url}/v1/events", key) as heard,
            stream(f"{url}/v1/events", other_key) as others,
        ):
            first = await elsewhere.sandboxes.create(caller, NEW)
            started = await until(heard, "sandbox.running")
            assert [each["kind"] for each in started] == ["sandbox.starting", "sandbox.running"]
            assert {each["sandbox_id"] for each in started} == {first.sandbox_id}
            second = await elsewhere.sandboxes.create(caller, NEW)
            await elsewhere.sandboxes.pause(caller, first.sandbox_id)
            async with elsewhere.db.write() as session:
                events.record(session, other_id, "template.deleted", name="theirs")
            assert len(await until(others, "template.deleted")) == 1
        one = f"{url}/v1/events?sandbox_id={first.sandbox_id}"
        async with stream(one, key, **{"Last-Event-ID": str(started[0]["id"])}) as heard:
            later = await until(heard, "sandbox.paused")
        assert [each["kind"] for each in later] == [
            "sandbox.running",
            "sandbox.pausing",
            "sandbox.paused",
        ]
        async with stream(f"{url}/v1/events?after=0", key) as heard:
            everything = await until(heard, "sandbox.paused")
        assert {each["sandbox_id"] for each in everything} == {first.sandbox_id, second.sandbox_id}


async def test_a_stream_ends_with_its_key_its_client_and_its_server(
    database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with served_platform(database_url, tmp_path) as (platform, url):
        team_id, key = await make_team(platform)
        async with stream(f"{url}/v1/events", key) as heard:
            assert platform.events.listeners(team_id) == 1
            caller = await platform.keys.caller(key)
            owner = replace(caller, role=Role.OWNER)
            await platform.keys.revoke(owner, caller.actor_id)
            # Also while nothing happens that could be told.
            async with asyncio.timeout(1):
                assert [each async for each in heard] == []
        team_id, key = await make_team(platform, "swallows")
        async with stream(f"{url}/v1/events", key):
            assert platform.events.listeners(team_id) == 1
        async with asyncio.timeout(DEADLINE_S):
            while platform.events.listeners(team_id):
                await asyncio.sleep(0.01)
        refused = await _get(f"{url}/v1/events?sandbox_id=sb{'0' * 20}", key)
        assert refused.status_code == 404
        monkeypatch.setattr("sandmartin.control.api.events._MAX_STREAMS", 0)
        assert (await _get(f"{url}/v1/events", key)).status_code == 429
        monkeypatch.setattr("sandmartin.control.api.events._MAX_STREAMS", 1)
        last = contextlib.AsyncExitStack()
        heard = await last.enter_async_context(stream(f"{url}/v1/events", key))
        began_at = time.monotonic()
    async with last:
        assert [each async for each in heard] == []
        # Well before the server's grace for requests under way is over.
        assert time.monotonic() - began_at < 5


async def _get(url: str, key: str) -> httpx.Response:
    async with httpx.AsyncClient(headers={"x-api-key": key}, timeout=DEADLINE_S) as http:
        return await http.get(url)


async def test_no_event_is_passed_over(platform: Platform) -> None:
    """Ids are given before the commit; one that commits late must not be below what was read."""
    team_id, _ = await make_team(platform)

    async def write_another() -> None:
        async with platform.db.write() as session:
            events.record(session, team_id, "number.two")

    async with platform.db.write() as session:
        events.record(session, team_id, "number.one")
        await session.run_sync(events._write_told)
        await session.flush()
        # Has its id now, and is not committed.
        another = asyncio.create_task(write_another())
        await asyncio.wait({another}, timeout=0.3)
        read = await platform.events.since(0, team_id=team_id)
    await another
    read += await platform.events.since(read[-1].event_id if read else 0, team_id=team_id)
    assert [each.kind for each in read] == ["number.one", "number.two"]


async def test_what_is_undone_is_not_told(platform: Platform) -> None:
    team_id, _ = await make_team(platform)
    with pytest.raises(RuntimeError):
        async with platform.db.write() as session:
            events.record(session, team_id, "sandbox.paused")
            raise RuntimeError
    assert await platform.events.since(0, team_id=team_id) == []


async def test_postgresql_wakes_other_replicas(postgres_server: Any) -> None:
    """Without the poll: a notification alone brings it, and a connection that is cut is noticed."""
    url = await asyncio.to_thread(postgres_server.create, "notified", template="migrated")
    here, there = Database.open(url), Database.open(url)
    heard = Events(here)
    watching = asyncio.create_task(heard._hear())
    try:
        async with asyncio.timeout(DEADLINE_S):
            while not await _listeners(there):
                await asyncio.sleep(0.01)
        waiting = asyncio.ensure_future(heard.changed(DEADLINE_S))
        await asyncio.sleep(0)
        began_at = time.monotonic()
        async with there.write() as session:
            events.record(session, "nobody", "number.one")
        await waiting
        assert time.monotonic() - began_at < DEADLINE_S / 2
        async with there.write() as session:
            await session.execute(text(_CUT))
        async with asyncio.timeout(DEADLINE_S):
            await asyncio.wait({watching})
        assert watching.exception() is None
    finally:
        watching.cancel()
        await asyncio.wait({watching})
        await here.close()
        await there.close()
        await asyncio.to_thread(postgres_server.drop, "notified")


_LISTENING = "FROM pg_stat_activity WHERE datname = current_database() AND query LIKE 'LISTEN%'"
_CUT = f"SELECT pg_terminate_backend(pid) {_LISTENING}"


async def _listeners(db: Database) -> int:
    async with db.read() as session:
        return int(await session.scalar(text(f"SELECT count(*) {_LISTENING}")) or 0)
