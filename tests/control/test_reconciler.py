"""Rows and VMs become one again, whatever happened to either. And what the contract is for:

1. snapshot and pause are guarded: `test_snapshot_race.test_a_snapshot_is_guarded`;
2. `test_platform_template_is_denied_before_any_agent_hears_of_it`, below;
3. sparse stays sparse: the agent's, `tests/unit/test_disk.py` and `tests/vm/test_disk.py`;
4. `test_default_disk_is_5_gb_everywhere`, below;
5. the dashboard's split button: with the dashboard, which is not there yet;
6. `test_missing_hosts_and_their_return`, below.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from uuid import uuid4

import httpx
import pytest
from sqlalchemy import delete, update

from sandmartin.control import tables
from sandmartin.control.api.sandboxes import NewSandbox
from sandmartin.control.caller import system
from sandmartin.control.hosts import HostFacts, Hosts
from sandmartin.control.platform import Platform
from sandmartin.control.reconciler import Reconciler
from sandmartin.control.requests import NewRow, spec_of
from sandmartin.control.states import HostState, TemplateState
from sandmartin.errors import Unavailable
from sandmartin.model import DEFAULT_DISK_SIZE_MB, SandboxSpec, State
from sandmartin.transport import NewSandbox as NewVm
from sandmartin.transport import SandboxInfo
from sandmartin.transport.agent import Agent
from tests.control.conftest import (
    PACE,
    RunningHost,
    Team,
    eventually,
    make_team,
    running_host,
    running_platform,
    start_host,
)
from tests.control.test_operations import until_state
from tests.control.test_sandboxes import create
from tests.control.truth import agree, rows_of, state_of, templates_of
from tests.fakes_agent import find_vms, machine_directory
from tests.fakes_vmm import SCRATCH
from tests.waiting import until

pytestmark = pytest.mark.qemu_img
MARK = b"not to be lost"


def new_row(**more: object) -> NewRow:
    return NewRow(memory_mb=128, disk_size_mb=8, **more)  # type: ignore[arg-type]


async def agent_of(platform: Platform) -> Agent:
    (host,) = await platform.hosts.list_reachable()
    return await platform.hosts.agent(host.host_id)


async def test_missing_hosts_and_their_return(database_url: str, tmp_path: Path) -> None:
    with machine_directory() as directory:
        async with running_host("other") as other:
            one = await start_host(directory, "one")
            async with running_platform(database_url, tmp_path, one, other) as platform:
                caller = system((await make_team(platform))[0])
                made = [await platform.sandboxes.create(caller, new_row()) for _ in range(6)]
                names = {h.host_id: h.name for h in await platform.hosts.list_reachable()}
                ours = [r.sandbox_id for r in made if names[str(r.host_id)] == "one"]
                assert 0 < len(ours) < len(made)
                awake, asleep, dies, *_ = ours
                one.fakes.vmm.vms[awake].write(SCRATCH, MARK)
                await platform.sandboxes.pause(caller, asleep)
                await one.stop()
                for each in (awake, dies):
                    await until_state(platform, each, State.MISSING)
                # What sleeps lies on its disk; others' sandboxes are not touched.
                assert await state_of(platform, asleep) == State.PAUSED
                elsewhere = [r.sandbox_id for r in made if r.sandbox_id not in ours]
                assert {await state_of(platform, each) for each in elsewhere} == {State.RUNNING}
                with pytest.raises(Unavailable):
                    await platform.sandboxes.resume(caller, asleep)
                # Nothing new is placed there.
                placed = await platform.sandboxes.create(caller, new_row())
                assert names[str(placed.host_id)] == "other"
                one.fakes.vmm.vms[dies].record.process.kill()
                back = await start_host(directory, "one")
                try:
                    await until_state(platform, awake, State.RUNNING)
                    await until_state(platform, asleep, State.RUNNING)
                    await eventually(lambda: _is_settled(platform, dies), "what died is known")
                    assert back.fakes.vmm.vms[awake].read(SCRATCH, len(MARK)) == MARK
                    hosts = await platform.hosts.list_reachable()
                    assert {each.state for each in hosts} == {HostState.ONLINE}
                finally:
                    await back.stop()


async def _is_settled(platform: Platform, sandbox_id: str) -> bool:
    return await state_of(platform, sandbox_id) in {State.ERROR, State.PAUSED}


async def test_what_changes_by_itself_is_found(
    team: Team, platform: Platform, host: RunningHost
) -> None:
    idle = await create(team, timeout_sec=1)
    over = await create(team, timeout_sec=1, on_timeout="kill")
    dies = await create(team)
    # Put to sleep for another reason than its idle time, it is not to be killed.
    spared = await create(team, on_timeout="kill")
    await (await agent_of(platform)).pause(spared["id"])
    host.fakes.vmm.vms[dies["id"]].record.process.kill()
    await until_state(platform, dies["id"], State.ERROR)
    await until_state(platform, idle["id"], State.PAUSED)
    await until_state(platform, over["id"], State.STOPPED)
    await until_state(platform, spared["id"], State.PAUSED)
    rows = await rows_of(platform)
    assert rows[dies["id"]].reason and rows[over["id"]].ended_at
    assert (await team.http.delete(f"/v1/sandboxes/{dies['id']}")).status_code == 204
    await agree(platform, host)


async def test_what_nobody_knows_is_ended_after_its_grace(
    team: Team, platform: Platform, host: RunningHost
) -> None:
    agent = await agent_of(platform)
    made = await create(team)
    stray = NewVm(sandbox_id="sbstray", memory_mb=128, disk_size_mb=8)
    await agent.create(stray)
    await agent.create_snapshot("sbstray", "t-stray", live=True)
    await platform.reconciler.tick()
    # It may be that its row is only to be seen in a moment.
    assert {each.sandbox_id for each in await agent.list_sandboxes()} == {"sbstray", made["id"]}
    await agree(platform, host)
    assert [each.sandbox_id for each in await agent.list_sandboxes()] == [made["id"]]


async def test_one_that_is_being_created_is_never_unknown(
    team: Team, platform: Platform, host: RunningHost
) -> None:
    waiting = asyncio.Event()

    async def introduce(_: object) -> None:
        await waiting.wait()

    host.fakes.guests.introducing = introduce
    asking = asyncio.create_task(create(team))
    # Much longer than an unknown VM may be there, and than a row may be in between.
    async with asyncio.timeout(10):
        while not find_vms(host.directory):
            await asyncio.sleep(0.01)
        end = asyncio.get_running_loop().time() + 2 * PACE.unknown_s
        while asyncio.get_running_loop().time() < end:
            await platform.reconciler.tick()
            assert {row.state for row in (await rows_of(platform)).values()} == {State.STARTING}
    waiting.set()
    assert (await asking)["status"] == "running"
    await agree(platform, host)


class Delayed(Hosts):
    """Answers of agents arrive after `meanwhile` happened."""

    def __init__(self, hosts: Hosts, meanwhile: object) -> None:
        vars(self).update(vars(hosts))
        self._meanwhile = meanwhile

    async def agent(self, host_id: str) -> Agent:
        agent = await super().agent(host_id)
        meanwhile = self._meanwhile

        class Late:
            async def list_sandboxes(self) -> Sequence[SandboxInfo]:
                found = await agent.list_sandboxes()
                await meanwhile()  # type: ignore[operator]
                return found

            list_templates = agent.list_templates
            describe = agent.describe
            destroy = agent.destroy

        return Late()  # type: ignore[return-value]


async def test_what_a_host_said_before_a_row_changed_is_not_believed(
    database_url: str, tmp_path: Path, host: RunningHost
) -> None:
    async with running_platform(database_url, tmp_path, host, working=False) as platform:
        caller = system((await make_team(platform))[0])
        ids = []
        for on_timeout in ("kill", "pause"):
            new = new_row(on_timeout=on_timeout, timeout_s=1000)
            ids.append((await platform.sandboxes.create(caller, new)).sandbox_id)
            await (await agent_of(platform)).pause(ids[-1])
        born: list[str] = []

        async def meanwhile() -> None:
            # The rows leave their state and come back to it, and another sandbox is made.
            for each in ids:
                await _believe_paused(platform, each)
                await platform.sandboxes.resume(caller, each)
            born.append((await platform.sandboxes.create(caller, new_row())).sandbox_id)

        parts = (platform.sandboxes, platform.templates, platform.events, PACE)
        late = Reconciler(platform.db, Delayed(platform.hosts, meanwhile), *parts)
        # It hears that they sleep, and so one is to be killed; of the third it hears nothing.
        await late.tick()
        for each in (*ids, *born):
            assert await state_of(platform, each) == State.RUNNING
        await agree(platform, host)


async def _believe_paused(platform: Platform, sandbox_id: str) -> None:
    """As another replica would that has looked as well, of a sandbox that may sleep."""
    async with platform.db.write() as session:
        query = update(tables.Sandbox).where(tables.Sandbox.sandbox_id == sandbox_id)
        await session.execute(query.values(state=State.PAUSED))


async def test_a_template_that_is_half_deleted_is_deleted(
    team: Team, platform: Platform, host: RunningHost
) -> None:
    made = await create(team)
    for name in ("kept", "gone"):
        body = {"sandbox_id": made["id"], "name": name, "live": True}
        assert (await team.http.post("/v1/snapshots", json=body)).status_code == 201
    # As long as it is there, it needs what they are made of.
    refused = await team.http.delete("/v1/templates/gone")
    assert refused.status_code == 409
    assert [each.state for each in await templates_of(platform)] == [TemplateState.READY] * 2
    await team.http.delete(f"/v1/sandboxes/{made['id']}")
    async with platform.db.write() as session:
        # A replica died between this and its call.
        query = update(tables.Template).where(tables.Template.name == "gone")
        await session.execute(query.values(state=TemplateState.DELETING))
    await agree(platform, host)
    assert [each.name for each in await templates_of(platform)] == ["kept"]
    # And one of two that have the same name at once.
    made = await create(team)
    bodies = [{"sandbox_id": made["id"], "name": "twice", "live": True}] * 2
    answers = await asyncio.gather(*(team.http.post("/v1/snapshots", json=b) for b in bodies))
    assert sorted(each.status_code for each in answers) == [201, 409]


async def test_what_was_on_a_deleted_host_is_over(
    team: Team, platform: Platform, host: RunningHost
) -> None:
    made, ended = await create(team), await create(team)
    async with platform.db.write() as session:
        await session.execute(update(tables.Host).values(state=HostState.DELETED))
    answer = await team.http.delete(f"/v1/sandboxes/{ended['id']}")
    assert answer.status_code == 204
    for each in (made, ended):
        await until_state(platform, each["id"], State.STOPPED)


async def test_platform_template_is_denied_before_any_agent_hears_of_it(
    team: Team, platform: Platform, host: RunningHost
) -> None:
    made = await create(team)
    await team.http.post(f"/v1/sandboxes/{made['id']}/pause")
    await host.stop()
    snapshot = {"sandbox_id": made["id"], "name": "base"}
    build = {"name": "base", "source": {"kind": "recipe", "text": "RUN true"}}
    calls = [
        ("DELETE", "/v1/templates/base", None, 403),
        ("DELETE", "/v1/snapshots/base", None, 403),
        ("DELETE", "/v1/admin/templates/base", None, 403),
        ("DELETE", "/templates/base", None, 403),
        ("DELETE", "/templates/base%3Adefault", None, 403),
        ("PATCH", "/v2/templates/base", {"public": False}, 403),
        ("PUT", "/v1/templates/base/content", None, 403),
        # To overwrite it is no way around: a name of the platform's is taken.
        ("POST", "/v1/snapshots", snapshot, 409),
        ("POST", "/v1/snapshots", {**snapshot, "live": True}, 409),
        # Nor is it to build another of that name, or to have its tags point elsewhere.
        ("POST", "/v1/builds", build, 403),
        ("POST", "/v3/templates", {"name": "base"}, 403),
        ("POST", "/v2/templates/base/builds/bd1", {}, 404),
        ("PUT", "/v1/templates/base/tags/mine", {"source": "default"}, 403),
        ("DELETE", "/v1/templates/base/tags/default", None, 403),
        ("POST", "/templates/tags", {"target": "base", "tags": ["mine"]}, 403),
        ("DELETE", "/templates/tags", {"name": "base", "tags": ["default"]}, 403),
        # An upload is a team's, by a ticket that we have sealed.
        ("PUT", "/templates/uploads/base", None, 401),
    ]
    for method, url, body, code in calls:
        # No agent is there to answer: who asks one gets 503.
        answer = await team.http.request(method, url, json=body)
        assert answer.status_code == code, url
    (base,) = (await team.http.get("/v1/templates")).json()
    assert (base["name"], base["platform"]) == ("base", True)
    assert _routes_that_name_a_template(team.http) == {
        ("/v1/snapshots", "post"),
        ("/v1/snapshots/{name}", "delete"),
        ("/v1/templates/{name}", "delete"),
        ("/v1/templates/{name}/content", "put"),
        ("/v1/admin/templates/{name}", "delete"),
        ("/v1/templates/{name}/tags/{tag}", "put"),
        ("/v1/templates/{name}/tags/{tag}", "delete"),
        ("/v1/builds", "post"),
        ("/templates/{name}", "delete"),
        ("/templates/tags", "post"),
        ("/templates/tags", "delete"),
        ("/templates/uploads/{ticket}", "put"),
        ("/v2/templates/{name}", "patch"),
        ("/v2/templates/{name}/builds/{build_id}", "post"),
        ("/v3/templates", "post"),
    }


def _routes_that_name_a_template(http: httpx.AsyncClient) -> set[tuple[str, str]]:
    """All that could change one; a new one must be added to the test above."""
    app = http._transport.app  # type: ignore[attr-defined]
    paths = app.openapi()["paths"]
    return {
        (path, method)
        for path, methods in paths.items()
        for method in methods
        if method != "get"
        and ("/templates" in path or path.startswith("/v1/snapshots") or path == "/v1/builds")
    }


def test_default_disk_is_5_gb_everywhere() -> None:
    template = tables.Template(
        agent_name="base", kind="image", disk_size_mb=8, vcpus=0, memory_mb=0
    )
    assert DEFAULT_DISK_SIZE_MB == 5 * 1024
    assert SandboxSpec(sandbox_id="sb1", template="base").disk_size_mb == DEFAULT_DISK_SIZE_MB
    # The API leaves it to the service, and the service asks every agent for it by name.
    assert NewSandbox.model_validate({}).disk_size_mb is None
    assert spec_of(NewRow(), template).disk_size_mb == DEFAULT_DISK_SIZE_MB


async def test_one_host_that_fails_does_not_hide_another(
    team: Team, platform: Platform, host: RunningHost
) -> None:
    made = await create(team)
    async with platform.db.write() as session:
        session.add(
            tables.Host(
                host_id=str(uuid4()),
                name="a broken one",
                address="nonsense:",
                state=HostState.ONLINE,
                created_at=0.0,
            )
        )
    await (await agent_of_named(platform, "one")).pause(made["id"])
    await until_state(platform, made["id"], State.PAUSED)
    async with platform.db.write() as session:
        await session.execute(delete(tables.Host).where(tables.Host.name == "a broken one"))


async def agent_of_named(platform: Platform, name: str) -> Agent:
    (host,) = [each for each in await platform.hosts.list_reachable() if each.name == name]
    return await platform.hosts.agent(host.host_id)


async def test_a_host_that_never_answers_keeps_nobody_waiting(
    database_url: str, tmp_path: Path, host: RunningHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes connections and says nothing, for much longer than the others may be left alone."""
    pace = replace(PACE, answer_s=60.0, patience_s=0.1)
    monkeypatch.setattr("tests.control.conftest.PACE", pace)
    asked: list[asyncio.StreamWriter] = []

    async def listen(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.append(writer)

    path = tmp_path / "mute.sock"
    async with (
        await asyncio.start_unix_server(listen, path),
        running_platform(database_url, tmp_path, host) as platform,
    ):
        caller = system((await make_team(platform))[0])
        await platform.hosts.ensure_local(HostFacts(name="mute", address=f"unix:{path}"))
        await until(lambda: len(asked) > 0, "the mute one is asked")
        for _ in range(3):
            row = await platform.sandboxes.create(caller, new_row())
            host.fakes.vmm.vms[row.sandbox_id].record.process.kill()
            began_at = time.monotonic()
            await until_state(platform, row.sandbox_id, State.ERROR)
            assert time.monotonic() - began_at < 5
        # One look at a time, which is not given up yet.
        assert len(asked) == 1
        assert await _mute_state(platform) == HostState.ONLINE
        # With a deadline of its own it becomes unreachable.
        platform.reconciler._pace = replace(pace, answer_s=0.2)
        for writer in asked:
            writer.close()

        async def unreachable() -> bool:
            return await _mute_state(platform) == HostState.UNREACHABLE

        await eventually(unreachable, "the mute one is unreachable")
        await until(lambda: len(asked) > 2, "it is looked at again, each time until its deadline")
        for writer in asked:
            writer.close()


async def _mute_state(platform: Platform) -> str:
    hosts = await platform.hosts.list_reachable()
    return next(each.state for each in hosts if each.name == "mute")
