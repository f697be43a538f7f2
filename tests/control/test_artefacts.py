"""Templates that go from host to host through the artefact store, on both databases."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select, update

from sandmartin.artefacts.store import Store
from sandmartin.control import artefacts, tables
from sandmartin.control.garbage import Garbage
from sandmartin.control.hosts import _templates_only_on
from sandmartin.control.moves import Moves
from sandmartin.control.operations import Overtaken
from sandmartin.control.platform import Platform
from sandmartin.control.states import TemplateState
from sandmartin.errors import Exhausted, Unavailable
from sandmartin.transport.agent import Agent
from tests.contract.stores import KINDS, TestStore, store_of
from tests.control.conftest import (
    RunningHost,
    Team,
    client_of,
    eventually,
    make_team,
    running_host,
    running_platform,
)
from tests.fakes_agent import IMAGE, find_leaks
from tests.fakes_vmm import PLATFORM, SCRATCH

pytestmark = [pytest.mark.qemu_img, pytest.mark.one_database]

MARK = b"remember this"
SHAPE = {"memory_mb": 128, "disk_size_mb": 8}


@dataclass
class Town:
    """Two hosts with a store between them, and a team."""

    platform: Platform
    one: RunningHost
    two: RunningHost
    team: Team
    kept: TestStore

    async def row(self, name: str) -> tables.Artefact | None:
        template = tables.Template
        query = select(tables.Artefact).join(
            template, template.template_id == tables.Artefact.template_id
        )
        async with self.platform.db.read() as session:
            found: tables.Artefact | None = await session.scalar(query.where(template.name == name))
            return found

    async def is_known(self) -> bool:
        """Whether it is known that both hosts have what they bring."""
        placed = tables.TemplatePlacement
        async with self.platform.db.read() as session:
            return len((await session.scalars(select(placed.host_id))).all()) == 2

    async def is_stored(self, name: str) -> bool:
        row = await self.row(name)
        return row is not None and row.artefact_id is not None

    async def stored(self, name: str) -> str:
        """The artefact of a template, once it is there."""
        await eventually(lambda: self.is_stored(name), f"{name} in the store")
        row = await self.row(name)
        assert row is not None and row.artefact_id is not None
        return row.artefact_id

    async def drain(self, host: RunningHost, *, undo: bool = False) -> None:
        async with self.platform.db.write() as session:
            await session.execute(
                update(tables.Host).where(tables.Host.name == host.name).values(draining=not undo)
            )

    async def make(self, name: str, mark: bytes = MARK) -> None:
        """A template of a sandbox on the first host that remembers something and is gone."""
        await self.drain(self.two)
        answer = await self.team.http.post("/v1/sandboxes", json=SHAPE)
        assert answer.status_code == 201, answer.text
        sandbox = answer.json()["id"]
        self.one.fakes.vmm.vms[sandbox].write(SCRATCH, mark)
        body = {"sandbox_id": sandbox, "name": name}
        answer = await self.team.http.post("/v1/snapshots", json=body)
        assert answer.status_code == 201, answer.text
        await self.team.http.delete(f"/v1/sandboxes/{sandbox}")
        await self.drain(self.two, undo=True)

    async def create(self, template: str) -> tuple[int, dict[str, Any]]:
        answer = await self.team.http.post("/v1/sandboxes", json={**SHAPE, "template": template})
        return answer.status_code, answer.json()

    async def events(self, sandbox_id: str) -> list[str]:
        async with self.platform.db.read() as session:
            event = tables.Event
            query = select(event.kind).where(event.sandbox_id == sandbox_id)
            return list(await session.scalars(query.order_by(event.event_id)))


@asynccontextmanager
async def town_of(
    database_url: str, directory: Path, kept: TestStore, url: str | None = None, **second: Any
) -> AsyncIterator[Town]:
    async with running_host("one") as one, running_host("two", **second) as two:
        store = {"artefact_store": kept.url if url is None else url}
        settings: dict[str, Any] = {**store, "artefact_grace_s": 0.0}
        async with running_platform(database_url, directory, one, two, **settings) as platform:
            team_id, key = await make_team(platform)
            async with client_of(platform, **{"x-api-key": key}) as http:
                town = Town(platform, one, two, Team(team_id, key, http), kept)
                # Two that tell of the same for the first time take turns.
                await eventually(town.is_known, "what both hosts bring")
                yield town


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[TestStore]:
    with store_of("folder", tmp_path) as kept:
        yield kept


@pytest.fixture
async def town(database_url: str, tmp_path: Path, folder: TestStore) -> AsyncIterator[Town]:
    async with town_of(database_url, tmp_path, folder) as town:
        yield town


@pytest.mark.parametrize("kind", KINDS)
async def test_a_template_of_one_host_starts_on_another(
    database_url: str, tmp_path: Path, kind: str
) -> None:
    with store_of(kind, tmp_path) as kept:
        async with town_of(database_url, tmp_path, kept) as town:
            await town.make("mine")
            await town.stored("mine")
            # Where it is already, it is started while there is room.
            status, first = await town.create("mine")
            assert status == 201 and first["id"] in town.one.fakes.vmm.vms
            await town.drain(town.one)
            status, second = await town.create("mine")
            assert status == 201, second
            assert town.two.fakes.vmm.vms[second["id"]].read(SCRATCH, len(MARK)) == MARK
            told = await town.events(second["id"])
            assert told == [
                "sandbox.starting",
                "sandbox.fetching",
                "sandbox.fetched",
                "sandbox.running",
            ]
            # It is there now.
            status, third = await town.create("mine")
            assert status == 201 and "sandbox.fetching" not in await town.events(third["id"])
            for each in (first, second, third):
                await town.team.http.delete(f"/v1/sandboxes/{each['id']}")
            assert (await town.team.http.delete("/v1/templates/mine")).status_code == 204
            for host in (town.one, town.two):
                await eventually(partial(_tidy, host), "nothing left")
            swept = await town.platform.garbage.sweep()
            assert swept is not None and swept.removed == swept.objects > 0
            assert kept.files("chunks") == [] and kept.files("artefacts") == []


async def _tidy(host: RunningHost) -> bool:
    return not {each for each in find_leaks(host.directory) if "templates" in each}


async def test_many_creates_at_once_fetch_once(town: Town) -> None:
    await town.make("mine")
    await town.stored("mine")
    await town.drain(town.one)
    made = await asyncio.gather(*(town.create("mine") for _ in range(4)))
    assert [status for status, _ in made] == [201] * 4
    for _, body in made:
        assert town.two.fakes.vmm.vms[body["id"]].read(SCRATCH, len(MARK)) == MARK


async def test_what_is_damaged_is_told_and_stored_anew(town: Town) -> None:
    await town.make("mine")
    artefact_id = await town.stored("mine")
    for path in town.kept.files("chunks"):
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
    await town.drain(town.one)
    status, body = await town.create("mine")
    assert status == 503 and "damaged" in body["error"]["message"], body
    assert await town.stored("mine") == artefact_id

    async def starts() -> bool:
        # What else was damaged is found one by one.
        await town.stored("mine")
        return (await town.create("mine"))[0] == 201

    await eventually(starts, "a sandbox of what was stored anew")


@pytest.mark.s3
async def test_a_store_that_is_away_is_told_and_waited_for(
    database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sandmartin.artefacts.store._MAX_RETRIES", 0)
    with store_of("s3", tmp_path) as kept:
        assert kept.server is not None
        async with town_of(database_url, tmp_path, kept) as town:
            kept.server.kill()
            await town.make("mine")

            async def failed() -> bool:
                row = await town.row("mine")
                return row is not None and row.attempts > 1 and "cannot be used" in row.error

            await eventually(failed, "a push that failed twice")
            kept.server.start()
            await town.stored("mine")
            kept.server.kill()
            await town.drain(town.one)
            status, body = await town.create("mine")
            assert status == 503 and "artefact store" in body["error"]["message"], body
            await town.drain(town.one, undo=True)
            # Where it is, it needs no store.
            assert (await town.create("mine"))[0] == 201
            kept.server.start()
            await town.drain(town.one)
            assert (await town.create("mine"))[0] == 201


async def test_hosts_that_cannot_run_it_are_passed_over(
    database_url: str, tmp_path: Path, folder: TestStore
) -> None:
    other: dict[str, Any] = {"platform": replace(PLATFORM, tsc_khz=PLATFORM.tsc_khz + 10_000)}
    async with town_of(database_url, tmp_path, folder, **other) as town:
        await town.make("mine")
        await town.stored("mine")
        await town.drain(town.one)
        status, body = await town.create("mine")
        assert status == 503 and "kHz" in body["error"]["message"], body
        row = await town.row("mine")
        assert row is not None and row.artefact_id is not None


async def test_what_another_replica_left_is_taken_up_and_its_late_word_is_not(
    town: Town, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(artefacts, "LEASE_S", 1.0)
    going, asked = asyncio.Event(), 0
    push = Agent.push_template

    async def slow(self: Agent, *words: Any) -> AsyncIterator[Any]:
        nonlocal asked
        asked += 1
        if asked == 1:
            # As long as it says nothing, nobody renews its lease.
            await going.wait()
        async for each in push(self, *words):
            yield each

    monkeypatch.setattr(Agent, "push_template", slow)
    await town.make("mine")
    await town.stored("mine")
    assert asked == 2
    row = await town.row("mine")
    going.set()
    await asyncio.sleep(0)
    after = await town.row("mine")
    assert row is not None and after is not None
    assert (after.artefact_id, after.stored_at) == (row.artefact_id, row.stored_at)


async def test_without_a_store_templates_stay_where_they_are(
    database_url: str, tmp_path: Path, folder: TestStore
) -> None:
    async with town_of(database_url, tmp_path, folder, "") as town:
        assert not town.platform.artefacts.stores
        await town.make("mine")
        await town.drain(town.one)
        status, body = await town.create("mine")
        assert status == 429 and "lacks the template" in body["error"]["message"]
        assert await town.row("mine") is None
        assert not folder.objects.exists()


async def test_what_the_store_has_is_not_lost_with_a_host(town: Town) -> None:
    await town.make("mine")
    async with town.platform.db.read() as session:
        query = select(tables.Host.host_id).where(tables.Host.name == "one")
        host_id = (await session.scalars(query)).one()
    await town.stored("mine")
    async with town.platform.db.read() as session:
        assert list(await _templates_only_on(session, host_id)) == []


# Garbage.


def objects(town: Town) -> set[str]:
    return {path.name for path in town.kept.files()}


async def test_only_what_nothing_refers_to_is_swept(town: Town) -> None:
    await town.make("mine", b"one mark")
    await town.make("other", b"another mark")
    await town.stored("mine")
    kept = await town.stored("other")
    before = objects(town)
    swept = await town.platform.garbage.sweep()
    assert swept is not None and swept.removed == 0 and objects(town) == before
    assert (await town.team.http.delete("/v1/templates/mine")).status_code == 204
    # Uploads of others lie in the same store.
    store = Store.open(town.kept.url)
    await store.put("contexts/x", b"an upload")
    # What is young may be of a push that goes on.
    young = Garbage(town.platform.db, store, "other", grace_s=3600.0, period_s=1.0)
    swept = await young.sweep()
    assert swept is not None and swept.removed == 0 and objects(town) == before | {"x"}
    swept = await town.platform.garbage.sweep()
    assert swept is not None and 0 < swept.removed < swept.objects
    assert kept in objects(town) and "x" in objects(town)
    await town.drain(town.one)
    status, body = await town.create("other")
    assert status == 201, body


async def test_nothing_is_swept_while_somebody_pushes_and_nobody_pushes_meanwhile(
    town: Town,
) -> None:
    garbage = town.platform.garbage
    await town.make("mine")
    await town.stored("mine")
    async with town.platform.db.write() as session:
        values = {"artefact_id": None, "lease_token": "x", "lease_expires_at": time.time() + 60}
        await session.execute(update(tables.Artefact).values(values))
    assert await garbage.sweep() is None
    assert len(town.kept.files("chunks")) > 0
    async with town.platform.db.write() as session:
        await session.execute(update(tables.Artefact).values(lease_expires_at=0.0, next_at=1e12))
    async with artefacts.sweeping(town.platform.db, "somebody", 60.0) as mine:
        assert mine
        async with artefacts.sweeping(town.platform.db, "another", 60.0) as theirs:
            assert not theirs
        async with town.platform.db.write() as session:
            await session.execute(update(tables.Artefact).values(next_at=0.0))
        for _ in range(3):
            await town.platform.artefacts._look(town.platform.artefacts._store)  # type: ignore[arg-type]
        assert not await town.is_stored("mine")
    await town.stored("mine")


async def test_a_sweep_that_lost_its_lease_removes_nothing_more(
    town: Town, monkeypatch: pytest.MonkeyPatch
) -> None:
    await town.make("mine")
    await town.stored("mine")
    await town.team.http.delete("/v1/templates/mine")
    mark = Garbage._mark

    async def slow(self: Garbage, store: Store) -> Any:
        marked = await mark(self, store)
        async with town.platform.db.write() as session:
            lease = tables.Lease
            await session.execute(
                update(lease).where(lease.name == artefacts.SWEEP).values(owner="another")
            )
        return marked

    before = objects(town)
    monkeypatch.setattr(Garbage, "_mark", slow)
    with pytest.raises(Unavailable, match="lease"):
        await _swept(town)
    assert objects(town) == before


async def _swept(town: Town) -> None:
    """A sweep, once nobody pushes."""

    async def done() -> bool:
        return await town.platform.garbage.sweep() is not None

    await eventually(done, "a sweep")


async def test_an_artefact_that_is_gone_is_stored_anew(town: Town) -> None:
    await town.make("mine")
    await town.stored("mine")
    (path,) = town.kept.files("artefacts")
    path.unlink()
    await town.platform.garbage.sweep()
    await eventually(lambda: town.is_stored("mine"), "the artefact again")
    # Its host may have folded it meanwhile: then it is another one.
    assert [each.name for each in town.kept.files("artefacts")] == [await town.stored("mine")]


# Sandboxes that sleep.


async def asleep(town: Town) -> str:
    """A paused sandbox on the first host that remembers something."""
    await town.drain(town.two)
    status, body = await town.create(IMAGE)
    assert status == 201, body
    town.one.fakes.vmm.vms[body["id"]].write(SCRATCH, MARK)
    path = f"/v1/sandboxes/{body['id']}"
    assert (await town.team.http.post(f"{path}/pause")).status_code == 200
    await town.drain(town.two, undo=True)
    return str(body["id"])


async def resumed(town: Town, sandbox: str) -> tuple[int, dict[str, Any]]:
    answer = await town.team.http.post(f"/v1/sandboxes/{sandbox}/resume")
    return answer.status_code, answer.json()


def owners(town: Town, sandbox: str) -> list[str]:
    """The hosts that have a sandbox, by name."""
    hosts = (town.one, town.two)
    return [each.name for each in hosts if (each.fakes.data.sandboxes / sandbox).exists()]


async def test_a_paused_sandbox_wakes_up_elsewhere_when_its_host_is_drained(town: Town) -> None:
    sandbox = await asleep(town)
    # Where it is, as long as that takes anything new.
    assert (await resumed(town, sandbox))[0] == 200
    assert owners(town, sandbox) == ["one"]
    for source, target in ((town.one, town.two), (town.two, town.one)):
        path = f"/v1/sandboxes/{sandbox}"
        assert (await town.team.http.post(f"{path}/pause")).status_code == 200
        await town.drain(source)
        status, body = await resumed(town, sandbox)
        assert status == 200 and body["status"] == "running", body
        assert target.fakes.vmm.vms[sandbox].read(SCRATCH, len(MARK)) == MARK
        assert owners(town, sandbox) == [target.name]
        await town.drain(source, undo=True)
    told = [each for each in await town.events(sandbox) if each.startswith("sandbox.mov")]
    assert told == ["sandbox.moving", "sandbox.moved"] * 2
    # What the first move left is gone, and with the sandbox the rest.
    assert await _tidy(town.two)
    await town.team.http.delete(f"/v1/sandboxes/{sandbox}")
    await eventually(partial(_tidy, town.one), "nothing left")
    await _swept(town)
    assert town.kept.files("chunks") == []


async def test_one_that_cannot_be_moved_wakes_up_where_it_is(
    town: Town, monkeypatch: pytest.MonkeyPatch
) -> None:
    sandbox = await asleep(town)
    await town.drain(town.one)

    async def failing(*_: object) -> None:
        raise Unavailable("the store is away")

    with monkeypatch.context() as patch:
        patch.setattr(Agent, "fetch_template", failing)
        assert (await resumed(town, sandbox))[0] == 200
    assert owners(town, sandbox) == ["one"]
    path = f"/v1/sandboxes/{sandbox}"
    answer = await town.team.http.post(f"{path}/checkpoints", json={})
    assert answer.status_code < 300, answer.text
    assert (await town.team.http.post(f"{path}/pause")).status_code == 200
    assert (await resumed(town, sandbox))[0] == 200
    assert owners(town, sandbox) == ["one"]
    async with town.platform.db.read() as session:
        retired = tables.Template.state == TemplateState.RETIRED
        assert (await session.scalars(select(tables.Template).where(retired))).all() == []


async def test_a_host_without_room_gives_it_to_another(
    town: Town, monkeypatch: pytest.MonkeyPatch
) -> None:
    sandbox = await asleep(town)
    resume, asked = Agent.resume, 0

    async def full(self: Agent, *words: Any) -> Any:
        nonlocal asked
        asked += 1
        if asked == 1:
            raise Exhausted("too little memory is left")
        return await resume(self, *words)

    monkeypatch.setattr(Agent, "resume", full)
    assert (await resumed(town, sandbox))[0] == 200
    assert owners(town, sandbox) == ["two"]


@pytest.mark.parametrize("before", [True, False])
async def test_a_move_that_is_cut_off_leaves_one_owner(
    town: Town, monkeypatch: pytest.MonkeyPatch, before: bool
) -> None:
    sandbox = await asleep(town)
    await town.drain(town.one)
    hand_over, cut = Moves._hand_over, False

    async def dying(self: Moves, *words: Any) -> None:
        nonlocal cut
        if not before:
            await hand_over(self, *words)
        if not cut:
            cut = True
            # As if this replica had died: the next finds the row as it is.
            raise Overtaken("cut off")
        if before:
            await hand_over(self, *words)

    async def lost(self: Moves, *words: Any) -> Any:
        try:
            return await bring(self, *words)
        except Overtaken:
            raise Unavailable("the replica is gone") from None

    bring = Moves.bring
    monkeypatch.setattr(Moves, "_hand_over", dying)
    monkeypatch.setattr(Moves, "bring", lost)
    await resumed(town, sandbox)

    async def runs() -> bool:
        answer = await town.team.http.get(f"/v1/sandboxes/{sandbox}")
        return bool(answer.json()["status"] == "running")

    await eventually(runs, "a sandbox that was taken up again")
    await eventually(partial(_has_one_owner, town, sandbox), "one owner")
    assert owners(town, sandbox) == ["two"]
    assert town.two.fakes.vmm.vms[sandbox].read(SCRATCH, len(MARK)) == MARK


async def _has_one_owner(town: Town, sandbox: str) -> bool:
    return len(owners(town, sandbox)) == 1
