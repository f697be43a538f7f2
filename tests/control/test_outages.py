"""What an operation needs goes away in its middle: the database, the agent, the agent's answer."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import sqlite3
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from sandmartin.control import db
from sandmartin.control.caller import system
from sandmartin.control.platform import Platform
from sandmartin.control.requests import NewRow
from sandmartin.errors import Unavailable
from sandmartin.model import State
from sandmartin.transport import agent as agent_module
from tests import postgres
from tests.control.agent_process import dying_agent
from tests.control.conftest import (
    TIMING,
    Gate,
    RunningHost,
    Team,
    client_of,
    eventually,
    make_team,
    running_host,
    running_platform,
    start_host,
)
from tests.control.test_sandboxes import NEW, create
from tests.control.truth import agree, state_of, templates_of
from tests.fakes_agent import machine_directory
from tests.fakes_vmm import SCRATCH

pytestmark = pytest.mark.qemu_img
MARK = b"not to be lost"
#: Longer than a lease, so that whoever works loses it.
_OUTAGE_S = 1.5 * TIMING.lease_s


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Nobody else can write to a SQLite database."""
    connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    connection.execute("BEGIN EXCLUSIVE")
    try:
        yield
    finally:
        connection.rollback()
        connection.close()


@contextlib.contextmanager
def _stopped(server: postgres.Server) -> Iterator[None]:
    server.stop()
    try:
        yield
    finally:
        server.start()


Outage = Callable[[], contextlib.AbstractContextManager[None]]


@contextlib.asynccontextmanager
async def _off_the_loop(outage: Outage) -> AsyncIterator[None]:
    """Who is in the middle of a transaction must be able to end it."""
    context = outage()
    await asyncio.to_thread(context.__enter__)
    try:
        yield
    finally:
        await asyncio.to_thread(context.__exit__, None, None, None)


@pytest.fixture(params=["sqlite", "postgresql"])
def fragile(
    request: pytest.FixtureRequest, quick_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[str, Outage]]:
    """A database of its own, and how it goes away."""
    monkeypatch.setattr(db, "_BUSY_S", 0.3)
    if request.param == "sqlite":
        path = quick_disk / "control.sqlite3"
        yield f"sqlite:///{path}", lambda: _locked(path)
        return
    with postgres.running_server(careful=True) as server:
        yield server.create("control"), lambda: _stopped(server)


async def test_a_database_that_goes_away_and_comes_back(
    fragile: tuple[str, Outage], tmp_path: Path
) -> None:
    await _outlive(*fragile, tmp_path, _OUTAGE_S)


@pytest.mark.full
@pytest.mark.parametrize("fragile", ["postgresql"], indirect=True)
async def test_a_server_that_is_gone_for_ten_seconds(
    fragile: tuple[str, Outage], tmp_path: Path
) -> None:
    await _outlive(*fragile, tmp_path, 10.0)


async def _outlive(url: str, outage: Outage, tmp_path: Path, outage_s: float) -> None:
    """Ask all the time while a database is away, and see that all is as it was said to be."""
    gate = Gate()
    async with running_host(step=gate) as host, running_platform(url, tmp_path, host) as platform:
        _, key = await make_team(platform)
        async with client_of(platform, **{"x-api-key": key}) as http:
            team = Team("", key, http)
            ids = [(await create(team))["id"] for _ in range(3)]
            gate.close()
            asking = asyncio.create_task(http.post(f"/v1/sandboxes/{ids[0]}/pause"))
            await gate.reached()
            async with _off_the_loop(outage):
                gate.open()
                until = time.monotonic() + outage_s
                codes = await _try_all(http, ids)
                while time.monotonic() < until:
                    codes |= await _try_all(http, ids)
            # Nothing but "not now", and nothing said to be done that is not.
            assert codes == {503}
            assert (await asking).status_code in {200, 503}

            async def served() -> bool:
                answer = await http.post(f"/v1/sandboxes/{ids[1]}/pause")
                return answer.status_code in {200, 409}

            await eventually(served, "requests are served again")
            await agree(platform, host)
            states = [await state_of(platform, each) for each in ids]
            assert states == [State.PAUSED, State.PAUSED, State.RUNNING]


async def _try_all(http: httpx.AsyncClient, ids: list[str]) -> set[int]:
    """The codes of what must be written down before it is done."""
    answers = await asyncio.gather(
        http.post("/v1/sandboxes", json=NEW),
        http.post(f"/v1/sandboxes/{ids[1]}/pause"),
        http.delete(f"/v1/sandboxes/{ids[2]}"),
    )
    for each in answers:
        assert each.json()["error"]["retryable"] is True
    return {each.status_code for each in answers}


#: At which step the agent dies, and what it finds the sandbox to be when it comes back.
_DEATHS = {
    "pause": {"pause:recorded": State.RUNNING, "pause:written": State.PAUSED},
    "snapshot": {"pause:frozen": State.RUNNING, "pause:paused": State.PAUSED},
    "live": {"snapshot:frozen": State.RUNNING},
}


@pytest.mark.parametrize(
    ("what", "step"), [(what, step) for what, steps in _DEATHS.items() for step in steps]
)
async def test_an_agent_that_dies_meanwhile(
    what: str, step: str, database_url: str, tmp_path: Path
) -> None:
    with machine_directory() as directory:
        first = await start_host(directory)
        async with running_platform(database_url, tmp_path, first) as platform:
            caller = system((await make_team(platform))[0])
            new = NewRow(memory_mb=128, disk_size_mb=8)
            sandbox_id = (await platform.sandboxes.create(caller, new)).sandbox_id
            first.fakes.vmm.vms[sandbox_id].write(SCRATCH, MARK)
            await first.stop()
            async with dying_agent(directory, step) as process:
                # It may have been missed meanwhile.
                async def found() -> bool:
                    await platform.reconciler.tick()
                    return await state_of(platform, sandbox_id) == State.RUNNING

                await eventually(found, "the sandbox is found again")
                with pytest.raises(Unavailable, match="not finished"):
                    await _ask(platform, what, caller, sandbox_id)
                await process.wait()
            # Neither running over a dead VM, nor paused without a snapshot.
            during = State.PAUSING if what == "pause" else State.SNAPSHOTTING
            assert await state_of(platform, sandbox_id) == during
            second = await start_host(directory)
            try:
                await agree(platform, second)
                # Where nothing was done it is done now; where it was, it is found.
                after = State.RUNNING if what == "live" else State.PAUSED
                assert await state_of(platform, sandbox_id) == after
                made = [] if what == "pause" else ["frozen"]
                assert [each.name for each in await templates_of(platform)] == made
                if after is State.PAUSED:
                    await platform.sandboxes.resume(caller, sandbox_id)
                assert second.fakes.vmm.vms[sandbox_id].read(SCRATCH, len(MARK)) == MARK
                await agree(platform, second)
            finally:
                await second.stop()


async def _ask(platform: Platform, what: str, caller: Any, sandbox_id: str) -> None:
    if what == "pause":
        await platform.sandboxes.pause(caller, sandbox_id)
    else:
        await platform.sandboxes.snapshot(caller, sandbox_id, "frozen", live=what == "live")


@pytest.fixture
def database_url(tmp_path: Path, migrated_sqlite: Path) -> str:
    """What becomes of a host is the same on either database."""
    path = tmp_path / "control.sqlite3"
    shutil.copy(migrated_sqlite, path)
    return f"sqlite:///{path}"


@pytest.fixture
def gate() -> Gate:
    return Gate()


@pytest.fixture
async def host(gate: Gate) -> AsyncIterator[RunningHost]:
    async with running_host(step=gate) as host:
        yield host


@pytest.mark.parametrize("what", ["pause", "snapshot", "live", "fork", "checkpoint"])
async def test_an_answer_that_comes_too_late(
    what: str,
    team: Team,
    platform: Platform,
    host: RunningHost,
    gate: Gate,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = await create(team)
    monkeypatch.setattr(agent_module, "_SNAPSHOT_S", 0.2)
    gate.close()
    path = f"/v1/sandboxes/{made['id']}"
    url, body = {
        "pause": (f"{path}/pause", {}),
        "fork": (f"{path}/fork", {"count": 2}),
        "checkpoint": (f"{path}/checkpoints", {}),
    }.get(what, ("/v1/snapshots", {"sandbox_id": made["id"], "name": "f", "live": what == "live"}))
    answer = await team.http.post(url, json=body)
    # It is taken up again by itself: to ask once more would be to ask for another.
    assert (answer.status_code, answer.json()["error"]["retryable"]) == (503, False)
    monkeypatch.setattr(agent_module, "_SNAPSHOT_S", 20.0)
    gate.open()
    await agree(platform, host)
    after = State.PAUSED if what in {"pause", "snapshot"} else State.RUNNING
    assert await state_of(platform, made["id"]) == after
    rows = (await team.http.get("/v1/sandboxes")).json()["items"]
    children = [each["status"] for each in rows if each["parent_id"]]
    assert children == (["running"] * 2 if what == "fork" else [])
    assert len(await templates_of(platform)) == (what in {"snapshot", "live"})
    checkpoints = (await team.http.get(f"{path}/checkpoints")).json()
    assert len(checkpoints) == (what == "checkpoint")


async def test_a_destroy_without_its_agent_is_done_later(database_url: str, tmp_path: Path) -> None:
    with machine_directory() as directory:
        first = await start_host(directory)
        async with running_platform(database_url, tmp_path, first) as platform:
            caller = system((await make_team(platform))[0])
            new = NewRow(memory_mb=128, disk_size_mb=8)
            sandbox_id = (await platform.sandboxes.create(caller, new)).sandbox_id
            await first.stop()
            async with asyncio.timeout(5):
                # The second does not wait for a host that is not there either.
                await platform.sandboxes.destroy(caller, sandbox_id)
                await platform.sandboxes.destroy(caller, sandbox_id)
            assert await state_of(platform, sandbox_id) == State.STOPPING
            second = await start_host(directory)
            try:
                await agree(platform, second)
                assert await state_of(platform, sandbox_id) == State.STOPPED
            finally:
                await second.stop()
