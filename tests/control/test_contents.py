"""Templates on their way between users and hosts, on both databases."""

from __future__ import annotations

import asyncio
import gzip
from pathlib import Path

import pytest
from sqlalchemy import select

from sandmartin import AsyncTemplates, Templates
from sandmartin.cli import main
from sandmartin.control import tables
from sandmartin.control.platform import Platform
from sandmartin.transport.agent import Agent
from tests.control.conftest import (
    RunningHost,
    Team,
    eventually,
    make_team,
    served_platform,
)
from tests.fakes_agent import IMAGE, find_leaks
from tests.fakes_vmm import SCRATCH

pytestmark = [pytest.mark.qemu_img, pytest.mark.one_database]

MARK = b"remember this"


async def pushed(team: Team, name: str, content: bytes, **headers: str) -> tuple[int, str]:
    """Status of an upload, and the code of its error."""
    answer = await team.http.put(f"/v1/templates/{name}/content", content=content, headers=headers)
    told = answer.json()
    return answer.status_code, told.get("error", {}).get("code", "")


async def made(team: Team, host: RunningHost, name: str) -> bytes:
    """The archive of a template of a sandbox that remembers something and is gone."""
    body = {"memory_mb": 128, "disk_size_mb": 8, "network": {"deny_out": ["10.0.0.0/8"]}}
    sandbox = (await team.http.post("/v1/sandboxes", json=body)).json()["id"]
    host.fakes.vmm.vms[sandbox].write(SCRATCH, MARK)
    answer = await team.http.post("/v1/snapshots", json={"sandbox_id": sandbox, "name": name})
    assert answer.status_code == 201, answer.text
    content = (await team.http.get(f"/v1/templates/{name}/content")).content
    await team.http.delete(f"/v1/sandboxes/{sandbox}")
    return content


async def actions(platform: Platform, team: Team) -> list[str]:
    async with platform.db.read() as session:
        query = select(tables.AuditRecord.action).where(tables.AuditRecord.team_id == team.team_id)
        return list(await session.scalars(query.order_by(tables.AuditRecord.audit_id)))


async def test_down_away_and_up_again(platform: Platform, team: Team, host: RunningHost) -> None:
    content = await made(team, host, "mine")
    before = await row_of(platform, "mine")
    assert (await team.http.delete("/v1/templates/mine")).status_code == 204
    assert (await team.http.get("/v1/templates/mine/content")).status_code == 404
    packed = gzip.compress(content, 1)
    assert await pushed(team, "back", packed, **{"content-encoding": "gzip"}) == (201, "")
    after = await row_of(platform, "back")
    for field in ("kind", "vcpus", "memory_mb", "disk_size_mb", "network", "team_id"):
        assert getattr(after, field) == getattr(before, field), field
    assert after.network is not None
    body = {"template": "back", "memory_mb": 128, "disk_size_mb": 8}
    created = (await team.http.post("/v1/sandboxes", json=body)).json()
    assert created["status"] == "running", created
    assert host.fakes.vmm.vms[created["id"]].read(SCRATCH, len(MARK)) == MARK
    answer = await team.http.get(
        "/v1/templates/back/content", headers={"accept-encoding": "gzip;q=0.5, br"}
    )
    assert answer.headers["content-encoding"] == "gzip"
    assert await pushed(team, "again", answer.content) == (201, "")
    told = [each for each in await actions(platform, team) if each.startswith("template.")]
    loaded = ["template.downloaded", "template.uploaded"]
    assert told[:3] == ["template.created", loaded[0], "template.deleted"]
    assert told[3:] == [loaded[1], loaded[0], loaded[1]]


async def row_of(platform: Platform, name: str) -> tables.Template:
    async with platform.db.read() as session:
        row = await session.scalar(select(tables.Template).where(tables.Template.name == name))
    assert row is not None
    return row


async def test_what_may_not_be_never_reaches_a_host(
    platform: Platform,
    team: Team,
    other_team: Team,
    host: RunningHost,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    content = await made(team, host, "mine")
    assert (await other_team.http.get("/v1/templates/mine/content")).status_code == 404
    # The platform's own may be read by all.
    assert (await other_team.http.get(f"/v1/templates/{IMAGE}/content")).status_code == 200
    with monkeypatch.context() as patch:
        patch.delattr(Agent, "write_template")
        assert await pushed(team, IMAGE, content) == (403, "denied")
        assert await pushed(team, "mine", content) == (409, "already_exists")
        assert await pushed(team, "No.", content) == (400, "invalid")
        assert await pushed(team, "new", content, **{"x-api-key": "e2b_no"}) == (
            401,
            "unauthenticated",
        )
    # A name of another team's is free.
    assert await pushed(other_team, "mine", content) == (201, "")


async def test_what_is_damaged_leaves_nothing(
    platform: Platform, team: Team, host: RunningHost
) -> None:
    content = await made(team, host, "mine")
    await team.http.delete("/v1/templates/mine")
    await eventually(lambda: _settled(host), "nothing left of it")
    at = len(content) // 2
    packed = gzip.compress(content, 1)
    encoded = {"content-encoding": "gzip"}
    for bad, headers in (
        (content[:at], {}),
        (content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :], {}),
        (packed[: len(packed) // 2], encoded),
        (content, encoded),
        (content, {"content-encoding": "br"}),
        (b"", {}),
    ):
        assert await pushed(team, "bad", bad, **headers) == (400, "invalid")
        # Of an upload that breaks off its host hears a moment later.
        await eventually(lambda: _settled(host), "nothing left of it")
    names = {each["name"] for each in (await team.http.get("/v1/templates")).json()}
    assert names == {IMAGE}


async def _settled(host: RunningHost) -> bool:
    return not find_leaks(host.directory)


async def test_a_row_that_cannot_be_written_takes_the_template_with_it(
    platform: Platform, team: Team, host: RunningHost
) -> None:
    """Two at once under one name: one is there, and of the other nothing."""
    content = await made(team, host, "mine")
    results = await asyncio.gather(*(pushed(team, "one", content) for _ in range(2)))
    assert sorted(results) == [(201, ""), (409, "already_exists")]
    agent = await platform.hosts.agent((await platform.hosts.list_reachable())[0].host_id)
    names = {each.name for each in await agent.list_templates()}
    kept = {(await row_of(platform, name)).agent_name for name in ("mine", "one")}
    assert names == kept | {IMAGE}


async def test_the_sdk_and_the_command_line(
    database_url: str, tmp_path: Path, host: RunningHost, capsys: pytest.CaptureFixture[str]
) -> None:
    async with served_platform(database_url, tmp_path, host) as (platform, url):
        _, key = await make_team(platform)
        at = {"url": url, "api_key": key}
        file = tmp_path / "base.tar"
        pull = ["template", "pull", IMAGE, "-o", str(file), "--server", url]
        environment = pytest.MonkeyPatch()
        environment.setenv("SANDMARTIN_API_KEY", key)
        environment.setenv("SANDMARTIN_URL", url)
        with environment.context():
            assert await asyncio.to_thread(main, pull) == 0
            assert await asyncio.to_thread(main, [*pull[:2], "none", *pull[3:]]) != 0
            capsys.readouterr()
        environment.undo()
        templates = AsyncTemplates(**at)
        content = b"".join([piece async for piece in templates.download(IMAGE)])
        assert file.read_bytes()[: 1 << 14] == content[: 1 << 14]
        assert not list(tmp_path.glob(".base.tar*"))

        def blockingly() -> bytes:
            return b"".join(Templates(**at).download(IMAGE))

        assert len(await asyncio.to_thread(blockingly)) == len(content)
