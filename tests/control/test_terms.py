"""What a sandbox is held to: noted in its row, known by its host, told again if it was not told."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

from sandmartin.control.caller import Caller, system
from sandmartin.control.platform import Platform
from sandmartin.control.tables import AuditRecord
from sandmartin.errors import Unavailable
from sandmartin.model import INTERNET, NetworkPolicy, State
from sandmartin.transport.agent import Agent
from tests.control.conftest import (
    RunningHost,
    Team,
    client_of,
    eventually,
    facts_of,
    make_team,
    running_platform,
    start_host,
)
from tests.control.test_sandboxes import create
from tests.control.truth import agree, state_of
from tests.fakes_agent import machine_directory

pytestmark = pytest.mark.qemu_img

BODY: dict[str, Any] = {
    "allow_internet_access": True,
    "allow_out": ["*.example.com", "203.0.113.7"],
    "deny_out": ["0.0.0.0/0"],
}
POLICY = NetworkPolicy(deny_out=("0.0.0.0/0",), allow_out=("*.example.com", "203.0.113.7"))
CLOSED = NetworkPolicy(allow_internet_access=False)


def has(host: RunningHost, sandbox_id: str) -> NetworkPolicy:
    """What the rules of a sandbox's slot are."""
    netns = host.fakes.vmm.vms[sandbox_id].netns
    number = int(netns.rpartition("-")[2])
    return host.fakes.network.policy(host.fakes.network._slot(number))


async def network(team: Team, sandbox_id: str) -> dict[str, Any]:
    answer = await team.http.get(f"/v1/sandboxes/{sandbox_id}/network")
    assert answer.status_code == 200, answer.text
    body: dict[str, Any] = answer.json()
    return body


async def test_a_policy_goes_from_the_request_to_the_rules(team: Team, host: RunningHost) -> None:
    plain, made = await create(team), await create(team, network=BODY)
    assert (await network(team, plain["id"]))["deny_out"] == []
    assert has(host, plain["id"]) == INTERNET
    assert await network(team, made["id"]) == BODY
    assert has(host, made["id"]) == POLICY
    path = f"/v1/sandboxes/{made['id']}"
    answer = await team.http.put(f"{path}/network", json={"allow_internet_access": False})
    assert answer.status_code == 200
    assert await network(team, made["id"]) == answer.json() == CLOSED.to_dict()
    assert has(host, made["id"]) == CLOSED
    timeline = (await team.http.get(f"{path}/timeline")).json()
    (told,) = [each for each in timeline if each["kind"] == "sandbox.network_changed"]
    assert told["data"] == {"state": "running", "allow_internet_access": False, "rules": 0}


async def test_who_changed_it_is_noted(team: Team, platform: Platform) -> None:
    made = await create(team)
    path = f"/v1/sandboxes/{made['id']}"
    await team.http.put(f"{path}/network", json=BODY)
    await team.http.post(f"{path}/timeout", json={"timeout_sec": 77})
    query = select(AuditRecord.action, AuditRecord.data).where(
        AuditRecord.resource_id == made["id"], AuditRecord.action != "sandbox.created"
    )
    async with platform.db.read() as session:
        found = {action: data for action, data in await session.execute(query)}
    assert found == {
        "sandbox.network_changed": {"network": BODY},
        "sandbox.timeout_changed": {"timeout_s": 77},
    }


async def test_forks_templates_and_those_that_sleep_have_it_too(
    team: Team, host: RunningHost
) -> None:
    made = await create(team, network=BODY)
    path = f"/v1/sandboxes/{made['id']}"
    (child,) = (await team.http.post(f"{path}/fork", json={"count": 1})).json()["items"]
    snapshot = {"sandbox_id": made["id"], "name": "restricted", "live": True}
    assert (await team.http.post("/v1/snapshots", json=snapshot)).status_code == 201
    started = await create(team, template="restricted")
    other = await create(team, template="restricted", network=CLOSED.to_dict())
    for each in (child, started):
        assert await network(team, each["id"]) == BODY and has(host, each["id"]) == POLICY
    assert has(host, other["id"]) == CLOSED
    checkpoint = (await team.http.post(f"{path}/checkpoints", json={})).json()["id"]
    await team.http.post(f"{path}/pause")
    # It is only noted, and it wakes up with it, whichever way.
    for policy, wake in ((CLOSED, "resume"), (INTERNET, f"checkpoints/{checkpoint}/rollback")):
        answer = await team.http.put(f"{path}/network", json=policy.to_dict())
        assert answer.status_code == 200
        assert (await team.http.post(f"{path}/{wake}")).status_code == 200
        assert has(host, made["id"]) == policy
        await team.http.post(f"{path}/pause")


async def test_an_idle_limit_is_changed(team: Team, platform: Platform) -> None:
    made = await create(team, timeout_sec=900)
    path = f"/v1/sandboxes/{made['id']}"
    assert (await team.http.post(f"{path}/timeout", json={"timeout_sec": 1})).json()[
        "timeout_sec"
    ] == 1

    async def paused() -> bool:
        return await state_of(platform, made["id"]) == State.PAUSED

    await eventually(paused, "it has idled")
    answer = await team.http.post(f"{path}/timeout", json={"timeout_sec": 700})
    assert answer.status_code == 200
    await team.http.post(f"{path}/resume")
    (host,) = await platform.hosts.list_reachable()
    agent = await platform.hosts.agent(host.host_id)
    assert [each.timeout_s for each in await agent.list_sandboxes()] == [700]


@pytest.mark.parametrize("method", ["network", "timeout"])
async def test_what_cannot_be_changed(team: Team, other_team: Team, method: str) -> None:
    made = await create(team)
    path = f"/v1/sandboxes/{made['id']}/{method}"
    verb, body = ("PUT", {}) if method == "network" else ("POST", {"timeout_sec": 5})
    assert (await other_team.http.request(verb, path, json=body)).status_code == 404
    wrong = [{"allow_out": ["a b"]}, {"deny_out": ["example.com"]}, {"rules": []}]
    if method == "timeout":
        wrong = [{}, {"timeout_sec": -1}, {"timeout_sec": "soon"}]
    for each in wrong:
        assert (await team.http.request(verb, path, json=each)).status_code == 400, each
    await team.http.delete(f"/v1/sandboxes/{made['id']}")
    assert (await team.http.request(verb, path, json=body)).status_code == 409


async def test_a_host_that_was_not_told_is_told_again(
    team: Team, platform: Platform, host: RunningHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = await create(team)
    path = f"/v1/sandboxes/{made['id']}"

    async def lost(*_: object) -> None:
        raise Unavailable("the answer was lost")

    with monkeypatch.context() as patched:
        patched.setattr(Agent, "update_network", lost)
        patched.setattr(Agent, "set_timeout", lost)
        for verb, what, body in (
            ("PUT", "network", BODY),
            ("POST", "timeout", {"timeout_sec": 600}),
        ):
            answer = await team.http.request(verb, f"{path}/{what}", json=body)
            assert (answer.status_code, answer.json()["error"]["retryable"]) == (503, True)
        assert has(host, made["id"]) == INTERNET

    async def told() -> bool:
        (row,) = await platform.hosts.list_reachable()
        (info,) = await (await platform.hosts.agent(row.host_id)).list_sandboxes()
        return (info.network, info.timeout_s) == (POLICY, 600)

    await eventually(told, "the host knows")
    assert has(host, made["id"]) == POLICY
    await agree(platform, host)


async def test_what_is_noted_last_is_what_the_host_has(team: Team, host: RunningHost) -> None:
    made = await create(team)
    path = f"/v1/sandboxes/{made['id']}/network"
    bodies = [{"deny_out": [f"203.0.113.{number}"]} for number in range(12)]
    answers = await asyncio.gather(*(team.http.put(path, json=each) for each in bodies))
    assert {each.status_code for each in answers} == {200}
    assert has(host, made["id"]) == NetworkPolicy(
        deny_out=tuple((await network(team, made["id"]))["deny_out"])
    )


@pytest.fixture
async def hosts() -> AsyncIterator[tuple[RunningHost, RunningHost]]:
    with machine_directory() as first, machine_directory() as second:
        one, other = await start_host(first, "one"), await start_host(second, "other")
        yield one, other
        await one.stop()
        await other.stop()


async def test_a_drained_host_takes_nothing_new_and_keeps_what_it_has(
    database_url: str, tmp_path: Path, hosts: tuple[RunningHost, RunningHost]
) -> None:
    async with running_platform(database_url, tmp_path, hosts[0]) as platform:
        team_id, key = await make_team(platform)
        (row,) = await platform.hosts.list_reachable()
        async with client_of(platform, **{"x-api-key": key}) as http:
            team = Team(team_id, key, http)
            made, asleep = await create(team), await create(team)
            await http.post(f"/v1/sandboxes/{asleep['id']}/pause")
            admin = _admin(team_id)
            await platform.hosts.drain(admin, row.host_id)
            path = f"/v1/sandboxes/{made['id']}"
            new = {"memory_mb": 128, "disk_size_mb": 8}
            for url, body, status in (
                ("/v1/sandboxes", new, 429),
                (f"{path}/fork", {"count": 1}, 409),
            ):
                error = (answer := await http.post(url, json=body)).json()["error"]
                assert answer.status_code == status
                assert "drained" in error["message"] and "one" in error["message"]
                assert "host drain NAME --undo" in error["hint"]
            # It can live nowhere else.
            for url in (f"/v1/sandboxes/{asleep['id']}/resume", f"{path}/checkpoints"):
                assert (await http.post(url, json={})).status_code in {200, 201}
            assert (await http.post(f"{path}/pause")).status_code == 200
            assert (await http.post(f"{path}/resume")).status_code == 200
            # Where there is another host, that one takes what is new.
            await _add_host(platform, hosts[1])
            elsewhere = (await http.post("/v1/sandboxes", json=new)).json()
            assert elsewhere["host_id"] != row.host_id
            await platform.hosts.drain(admin, row.host_id, undo=True)
            answer = await http.post(f"{path}/fork", json={"count": 1})
            assert answer.status_code == 201
            await agree(platform, *hosts)


def _admin(team_id: str) -> Caller:
    return replace(system(team_id), is_admin=True)


async def _add_host(platform: Platform, host: RunningHost) -> None:
    await platform.hosts.ensure_local(facts_of(host))
    await platform.reconciler.tick()
