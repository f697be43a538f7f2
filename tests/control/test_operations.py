"""Operations against each other: a destroy wins, two replicas do each once, quotas hold.

Databases that go away and hosts that do, in the middle of an operation, are in `test_outages`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import select

from sandmartin.agent.guest import Identity
from sandmartin.control import tables
from sandmartin.control.caller import system
from sandmartin.control.leader import Leader
from sandmartin.control.platform import Platform
from sandmartin.control.requests import NewRow
from sandmartin.errors import NotFound, SandmartinError
from sandmartin.model import State
from tests.control.conftest import (
    Gate,
    RunningHost,
    Team,
    client_of,
    eventually,
    make_team,
    running_host,
    running_platform,
)
from tests.control.test_sandboxes import NEW, create
from tests.control.truth import agree, open_operations, rows_of, state_of, templates_of
from tests.waiting import until

pytestmark = pytest.mark.qemu_img


@pytest.fixture
def gate() -> Gate:
    return Gate()


@pytest.fixture
async def host(gate: Gate) -> AsyncIterator[RunningHost]:
    async with running_host(step=gate) as host:
        yield host


class Introductions:
    """Keeps whoever wakes up from being told who it is, while closed."""

    def __init__(self, host: RunningHost) -> None:
        self._open = asyncio.Event()
        self.waiting = 0
        host.fakes.guests.introducing = self._introduce

    async def _introduce(self, _: Identity) -> None:
        self.waiting += 1
        await self._open.wait()
        self.waiting -= 1

    async def reached(self) -> None:
        await until(lambda: self.waiting > 0, "an introduction")

    def open(self) -> None:
        self._open.set()


async def begin(team: Team, what: str, sandbox_id: str, more: dict[str, Any]) -> httpx.Response:
    path = f"/v1/sandboxes/{sandbox_id}"
    match what:
        case "create":
            return await team.http.post("/v1/sandboxes", json=NEW)
        case "snapshot" | "live":
            body = {"sandbox_id": sandbox_id, "name": "frozen", "live": what == "live"}
            return await team.http.post("/v1/snapshots", json=body)
        case "rollback":
            return await team.http.post(f"{path}/checkpoints/{more['checkpoint']}/rollback")
        case "checkpoint":
            return await team.http.post(f"{path}/checkpoints", json={})
        case "fork":
            return await team.http.post(f"{path}/fork", json={"count": 2})
    return await team.http.post(f"{path}/{what}")


WAKING = {"create", "resume", "rollback"}


@pytest.mark.parametrize(
    "what",
    ["create", "pause", "resume", "snapshot", "live", "fork", "checkpoint", "rollback"],
)
async def test_destroy_wins(
    what: str, team: Team, platform: Platform, host: RunningHost, gate: Gate
) -> None:
    path, more = "", {}
    if what != "create":
        path = f"/v1/sandboxes/{(await create(team))['id']}"
    if what == "resume":
        await team.http.post(f"{path}/pause")
    if what == "rollback":
        more["checkpoint"] = (await team.http.post(f"{path}/checkpoints", json={})).json()["id"]
    keeper: Gate | Introductions = Introductions(host) if what in WAKING else gate
    if keeper is gate:
        gate.close()
    asking = asyncio.create_task(begin(team, what, path.rpartition("/")[2], more))
    await keeper.reached()
    (sandbox_id,) = [i for i, row in (await rows_of(platform)).items() if row.parent_id is None]
    ending = asyncio.create_task(team.http.delete(f"/v1/sandboxes/{sandbox_id}"))
    await until_state(platform, sandbox_id, State.STOPPING)
    keeper.open()
    assert (await ending).status_code == 204
    answer = await asking
    # What was made beside the sandbox is there; of the sandbox itself there is nothing.
    beside = what in {"snapshot", "live", "fork"}
    assert answer.status_code < 300 if beside else answer.status_code == 409, answer.text
    await agree(platform, host)
    rows = await rows_of(platform)
    assert rows.pop(sandbox_id).state == State.STOPPED
    children = [row.state for row in rows.values()]
    assert children == ([State.RUNNING] * 2 if what == "fork" else [])
    made = ["frozen"] if what in {"snapshot", "live"} else []
    assert [each.name for each in await templates_of(platform)] == made


async def until_state(platform: Platform, sandbox_id: str, state: State) -> None:
    async def reached() -> bool:
        return await state_of(platform, sandbox_id) == state

    await eventually(reached, f"{sandbox_id} is {state}")


async def test_a_child_is_destroyed_while_it_is_born(
    team: Team, platform: Platform, host: RunningHost, gate: Gate
) -> None:
    # Its row carries the operation of the fork, which is its parent's and goes on.
    made = await create(team)
    gate.close()
    asking = asyncio.create_task(begin(team, "fork", made["id"], {}))
    await gate.reached()
    children = [i for i, row in (await rows_of(platform)).items() if row.parent_id == made["id"]]
    assert (await team.http.delete(f"/v1/sandboxes/{children[0]}")).status_code == 204
    gate.open()
    items = {each["id"]: each["status"] for each in (await asking).json()["items"]}
    assert items == {children[0]: "stopped", children[1]: "running"}
    await agree(platform, host)
    assert await state_of(platform, made["id"]) == State.RUNNING


async def test_a_child_whose_fork_is_over_is_what_it_is(
    team: Team, platform: Platform, host: RunningHost
) -> None:
    # As a row whose operation ended without it: the reconciler asks the host.
    made = await create(team)
    agent = await platform.hosts.agent(str((await rows_of(platform))[made["id"]].host_id))
    children = (await begin(team, "fork", made["id"], {})).json()["items"]
    await agent.destroy(children[1]["id"])
    async with platform.db.write() as session:
        for each in children:
            row = await session.get(tables.Sandbox, each["id"])
            assert row is not None
            row.state, row.operation_id, row.started_at = State.STARTING, "opgone", None
    await until_state(platform, children[0]["id"], State.RUNNING)
    await until_state(platform, children[1]["id"], State.ERROR)
    row = (await rows_of(platform))[children[0]["id"]]
    assert (row.operation_id, row.started_at is not None) == (None, True)


async def test_of_two_pauses_one_is_a_conflict(team: Team, platform: Platform) -> None:
    path = f"/v1/sandboxes/{(await create(team))['id']}"
    answers = await asyncio.gather(*(team.http.post(f"{path}/pause") for _ in range(2)))
    assert sorted(each.status_code for each in answers) == [200, 409]


async def test_a_quota_holds_against_many_at_once(
    database_url: str, tmp_path: Path, host: RunningHost
) -> None:
    async with running_platform(database_url, tmp_path, host, max_sandboxes=5) as platform:
        _, key = await make_team(platform)
        async with client_of(platform, **{"x-api-key": key}) as http:
            asked = (http.post("/v1/sandboxes", json=NEW) for _ in range(20))
            answers = await asyncio.gather(*asked)
            codes = [each.status_code for each in answers]
            assert (codes.count(201), codes.count(429)) == (5, 15)
            # What sleeps is not counted, and so must be when it wakes up.
            ids = [each.json()["id"] for each in answers if each.status_code == 201]
            await http.post(f"/v1/sandboxes/{ids[0]}/pause")
            assert (await http.post("/v1/sandboxes", json=NEW)).status_code == 201
            woken = await http.post(f"/v1/sandboxes/{ids[0]}/resume")
            assert (woken.status_code, woken.json()["error"]["code"]) == (429, "exhausted")
            forked = await http.post(f"/v1/sandboxes/{ids[1]}/fork", json={"count": 1})
            assert forked.status_code == 429
            await agree(platform, host)


@pytest.fixture
async def replicas(
    database_url: str, tmp_path: Path, host: RunningHost
) -> AsyncIterator[tuple[Platform, Platform]]:
    async with (
        running_platform(database_url, tmp_path, host) as one,
        running_platform(database_url, tmp_path, host) as other,
    ):
        yield one, other


Replicas = tuple[Platform, Platform]


def new_row() -> NewRow:
    return NewRow(memory_mb=128, disk_size_mb=8)


async def both(replicas: Replicas, act: Callable[[Platform], Awaitable[Any]]) -> list[Any]:
    return await asyncio.gather(*(act(each) for each in replicas), return_exceptions=True)


async def test_two_replicas_do_each_operation_once(
    replicas: Replicas, host: RunningHost, gate: Gate
) -> None:
    one, other = replicas
    caller = system((await make_team(one))[0])
    made = await both(replicas, lambda each: each.sandboxes.create(caller, new_row(), "once"))
    (sandbox_id,) = {getattr(each, "sandbox_id", each) for each in made}
    paused = await both(replicas, lambda each: each.sandboxes.pause(caller, sandbox_id))
    assert sorted(type(each).__name__ for each in paused) == ["Conflict", "Sandbox"]
    await one.sandboxes.resume(caller, sandbox_id)
    # A destroy at one overtakes a pause at the other.
    gate.close()
    pausing = asyncio.create_task(one.sandboxes.pause(caller, sandbox_id))
    await gate.reached()
    ending = asyncio.create_task(other.sandboxes.destroy(caller, sandbox_id))
    await until_state(one, sandbox_id, State.STOPPING)
    # Twice is once: the second waits for the first.
    again = asyncio.create_task(one.sandboxes.destroy(caller, sandbox_id))
    gate.open()
    await asyncio.gather(ending, again)
    with pytest.raises(SandmartinError) as refusal:
        await pausing
    assert refusal.value.code == "overtaken"
    await agree(other, host)
    assert (await state_of(other, sandbox_id), len(await rows_of(other))) == (State.STOPPED, 1)
    async with one.db.read() as session:
        attempts = (await session.scalars(select(tables.Operation.attempts))).all()
    assert list(attempts) == [1] * 5


async def test_a_stalled_replica_is_taken_over_and_changes_nothing_any_more(
    replicas: Replicas, host: RunningHost, gate: Gate
) -> None:
    one, other = replicas
    caller = system((await make_team(one))[0])
    sandbox_id = (await one.sandboxes.create(caller, new_row())).sandbox_id
    gate.close()
    pausing = asyncio.create_task(one.sandboxes.pause(caller, sandbox_id))
    await gate.reached()
    async with one.db.write() as session:
        (operation,) = await session.scalars(
            select(tables.Operation).where(tables.Operation.finished_at.is_(None))
        )
        operation.lease_expires_at = 0.0
        token = operation.lease_token

    async def taken() -> bool:
        async with one.db.read() as session:
            row = await session.get(tables.Operation, operation.operation_id)
            return row is not None and row.lease_token != token

    await eventually(taken, "the other replica takes it over")
    gate.open()
    # Whoever asked hears how it ended, whoever ended it.
    assert (await pausing).state == State.PAUSED
    await agree(other, host)


async def test_a_failed_create_is_told_again(team: Team, host: RunningHost) -> None:
    host.fakes.vmm.failure = NotFound("no kernel")
    headers = {"Idempotency-Key": "once"}
    first = await team.http.post("/v1/sandboxes", json=NEW, headers=headers)
    again = await team.http.post("/v1/sandboxes", json=NEW, headers=headers)
    assert (first.status_code, again.status_code) == (404, 404)
    assert again.json()["error"]["message"] == first.json()["error"]["message"]


async def test_the_leader_fails_over(database_url: str, tmp_path: Path) -> None:
    async with running_platform(database_url, tmp_path, working=False) as platform:
        leads: list[str] = []

        def work(name: str, *, dies: bool = False) -> Callable[[], Awaitable[None]]:
            async def run() -> None:
                leads.append(name)
                if dies and leads.count(name) == 1:
                    raise ZeroDivisionError
                await asyncio.Event().wait()

            return run

        one, other = (Leader(platform.db, name, lease_s=0.3) for name in ("one", "other"))
        first = asyncio.create_task(one.lead(work("one", dies=True)))
        # Work that dies of a bug is begun again.
        await until(lambda: leads == ["one", "one"], "the first leads, and again")
        second = asyncio.create_task(other.lead(work("other")))
        assert not await other.claim()
        first.cancel()
        await until(lambda: leads[-1] == "other", "the second leads")
        assert not await one.claim()
        second.cancel()
        await asyncio.wait({first, second})
        # One that is killed gives nothing up; its claim ends by itself.
        assert await one.claim()
        await eventually(other.claim, "the claim ends")


async def test_nothing_is_left_open(team: Team, platform: Platform) -> None:
    made = await create(team)
    await team.http.delete(f"/v1/sandboxes/{made['id']}")
    assert await open_operations(platform) == []
    async with platform.db.read() as session:
        rows = (await session.scalars(select(tables.Operation))).all()
    # What an operation needed to know may hold secrets.
    assert [row.arguments for row in rows] == [{}, {}]
