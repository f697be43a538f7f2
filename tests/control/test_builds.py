"""Builds: the queue, leases, layers, cancelling and limits, on fake VMs with real disks."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import io
import json
import os
import signal
import sys
import tarfile
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import select

from sandmartin.agent.guest import Command, Ended, Output, ProcessEvent, Started
from sandmartin.control import tables
from sandmartin.control.builds.log import LogLimits
from sandmartin.control.platform import Platform
from sandmartin.control.states import ALIVE, TemplateState
from tests.control.conftest import (
    BUILDING,
    RunningHost,
    Team,
    client_of,
    eventually,
    make_team,
    running_platform,
)

pytestmark = pytest.mark.qemu_img
SHAPE = {"memory_mb": 128, "disk_size_mb": 8}
HOSTILE = b"\x1b]0;title\x07\x1b[1;31mse\x1b[0mcret\x1b[K \x1b(Band \xe2\x80\xaethat\x00\n"


@dataclass
class Shell:
    """What the fake guests do with a line of a recipe."""

    ran: list[str] = field(default_factory=list)
    hanging: int = 0
    release: asyncio.Event = field(default_factory=asyncio.Event)

    async def __call__(self, command: Command) -> AsyncGenerator[ProcessEvent, None]:
        line = command.args[-1] if command.args else command.cmd
        yield Started(7)
        if line != "sync":
            self.ran.append(line)
        word, _, rest = line.partition(" ")
        match word:
            case "fail":
                yield Output(b"as it must\n")
                yield Ended(exit_code=3)
                return
            case "hang":
                self.hanging += 1
                await self.release.wait()
            case "many":
                for number in range(int(rest)):
                    yield Output(f"line {number}\n".encode())
            case "say":
                yield Output(rest.encode())
            case "shine":
                yield Output(HOSTILE)
                yield Ended(exit_code=3)
                return
        yield Ended(exit_code=0)


@pytest.fixture
def shell(host: RunningHost) -> Shell:
    shell = Shell()
    host.fakes.guests.running = shell
    return shell


def wanted(name: str, text: str, **more: Any) -> dict[str, Any]:
    source = {"kind": "recipe", "text": text, "file": "recipe"}
    return {"name": name, "source": source, "skip_pre_post": True, **SHAPE, **more}


async def begin(http: httpx.AsyncClient, name: str, text: str, **more: Any) -> str:
    answer = await http.post("/v1/builds", json=wanted(name, text, **more))
    assert answer.status_code == 202, answer.text
    return str(answer.json()["id"])


async def get(http: httpx.AsyncClient, build_id: str) -> dict[str, Any]:
    found: dict[str, Any] = (await http.get(f"/v1/builds/{build_id}")).json()
    return found


async def end(http: httpx.AsyncClient, build_id: str) -> dict[str, Any]:
    async def over() -> bool:
        return (await get(http, build_id))["finished_at"] is not None

    await eventually(over, f"the end of build {build_id}")
    return await get(http, build_id)


async def log_of(http: httpx.AsyncClient, build_id: str) -> list[str]:
    lines = (await http.get(f"/v1/builds/{build_id}/logs?limit=1000")).json()["items"]
    assert [each["number"] for each in lines] == list(range(1, len(lines) + 1))
    return [each["message"] for each in lines]


async def nothing_left(platform: Platform) -> None:
    """No sandbox of a build, nothing half made, nothing that only one build needed."""

    async def is_clean() -> bool:
        async with platform.db.read() as session:
            sandboxes = await session.scalars(
                select(tables.Sandbox.sandbox_id).where(
                    tables.Sandbox.build_id.is_not(None), tables.Sandbox.state.in_(ALIVE)
                )
            )
            templates = await session.scalars(
                select(tables.Template.name).where(
                    (tables.Template.state == TemplateState.MAKING)
                    | (tables.Template.layer_key == "")
                )
            )
            return not sandboxes.all() and not templates.all()

    await eventually(is_clean, "everything of the builds is gone")


async def test_a_build_becomes_a_template(team: Team, platform: Platform, shell: Shell) -> None:
    build_id = await begin(team.http, "app", "RUN one\nENV A=b\nRUN say hello\n", tags=["v1"])
    built = await end(team.http, build_id)
    assert (built["state"], built["error"]) == ("ready", None)
    assert (built["steps_total"], built["steps_done"], built["steps_cached"]) == (2, 2, 0)
    assert shell.ran == ["one", "say hello"]
    assert "hello" in await log_of(team.http, build_id)
    names = {each["name"] for each in (await team.http.get("/v1/templates")).json()}
    assert names == {"base", "app:v1"}
    assert (await team.http.get("/v1/sandboxes")).json()["items"] == []
    made = await team.http.post("/v1/sandboxes", json={"template": "app:v1", **SHAPE})
    assert made.status_code == 201, made.text
    kinds = [each.kind for each in await platform.events.since(0, team_id=team.team_id)]
    assert [kind for kind in kinds if kind.startswith("build.")] == [
        "build.created",
        "build.started",
        "build.finished",
    ]
    async with platform.db.read() as session:
        row = await session.get(tables.Build, build_id)
    assert row is not None and row.sealed_request is None
    await nothing_left(platform)


async def test_what_was_built_is_not_built_again(
    team: Team, platform: Platform, shell: Shell
) -> None:
    await end(team.http, await begin(team.http, "app", "RUN one\nRUN two\n"))
    again = await end(team.http, await begin(team.http, "app", "RUN one\nRUN three\n"))
    assert again["steps_cached"] == 1
    assert shell.ran == ["one", "two", "three"]
    # What failed is kept by nobody.
    failed = await end(team.http, await begin(team.http, "app", "RUN one\nRUN fail\n"))
    assert (failed["state"], failed["error"]["code"]) == ("failed", "build_failed")
    assert failed["error"]["step"] == 2 and "3: as it must" in failed["error"]["message"]
    await end(team.http, await begin(team.http, "app", "RUN one\nRUN fail\n"))
    assert shell.ran == ["one", "two", "three", "fail", "fail"]
    await end(team.http, await begin(team.http, "app", "RUN one\n", no_cache=True))
    assert shell.ran[-1] == "one"
    await nothing_left(platform)


@pytest.mark.one_database
async def test_a_layer_is_the_team_s_own(
    team: Team, other_team: Team, platform: Platform, shell: Shell
) -> None:
    await end(team.http, await begin(team.http, "app", "RUN one\n"))
    other = await end(other_team.http, await begin(other_team.http, "app", "RUN one\n"))
    assert other["steps_cached"] == 0 and shell.ran == ["one", "one"]
    assert (await other_team.http.get(f"/v1/builds/{other['id']}")).status_code == 200
    assert (await team.http.get(f"/v1/builds/{other['id']}")).status_code == 404


async def test_a_build_is_cancelled_wherever_it_is(
    team: Team, platform: Platform, shell: Shell
) -> None:
    running = [await begin(team.http, f"a{number}", "RUN hang\n") for number in range(2)]

    async def both_hang() -> bool:
        return shell.hanging == 2

    await eventually(both_hang, "both hang")
    waiting = await begin(team.http, "late", "RUN one\n")
    assert (await get(team.http, waiting))["state"] == "waiting"
    for build_id in (waiting, *running):
        assert (await team.http.post(f"/v1/builds/{build_id}/cancel")).status_code == 200
        ended = await end(team.http, build_id)
        assert (ended["state"], ended["error"]) == ("cancelled", None)
    assert shell.ran == ["hang", "hang"]
    await nothing_left(platform)


@pytest.mark.one_database
async def test_teams_take_turns(database_url: str, tmp_path: Path, host: RunningHost) -> None:
    shell = host.fakes.guests.running = Shell()
    building = replace(BUILDING, at_once=1)
    async with contextlib.AsyncExitStack() as stack:
        platform = await stack.enter_async_context(
            running_platform(database_url, tmp_path, host, building=building)
        )
        clients = []
        for name in ("swifts", "swallows"):
            _, key = await make_team(platform, name)
            opened = client_of(platform, **{"x-api-key": key})
            clients.append(await stack.enter_async_context(opened))
        first = await begin(clients[0], "a", "RUN hang\n")
        rest = [await begin(clients[0], f"b{each}", f"RUN b{each}\n") for each in range(2)]
        rest.append(await begin(clients[1], "c", "RUN c\n"))
        shell.release.set()
        for client, build_id in zip((clients[0],) * 3 + (clients[1],), (first, *rest), strict=True):
            assert (await end(client, build_id))["state"] == "ready"
        assert shell.ran[:1] == ["hang"] and sorted(shell.ran[1:]) == ["b0", "b1", "c"]


# Replicas that die.

_REPLICA = """
import asyncio, json, sys
from pathlib import Path
from sandmartin.control.platform import open_platform
from sandmartin.control.settings import ControlSettings
from tests.control.conftest import BUILDING, PACE, TIMING

async def main():
    settings = ControlSettings(data_dir=Path(sys.argv[1]), database_url=sys.argv[2])
    async with open_platform(settings, timing=TIMING, pace=PACE, building=BUILDING) as platform:
        async with platform.working():
            await asyncio.Event().wait()

asyncio.run(main())
"""


async def test_a_build_outlives_its_replica(
    database_url: str, tmp_path: Path, host: RunningHost
) -> None:
    shell = host.fakes.guests.running = Shell()
    async with running_platform(database_url, tmp_path, host, working=False) as platform:
        _, key = await make_team(platform)
        async with client_of(platform, **{"x-api-key": key}) as http:
            build_id = await begin(http, "app", "RUN one\nRUN hang\n")
            words = (sys.executable, "-c", _REPLICA, str(platform.settings.data_dir), database_url)
            replica = await asyncio.create_subprocess_exec(
                *words, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
            )
            try:

                async def hangs() -> bool:
                    return shell.hanging == 1

                await eventually(hangs, "the other replica builds")
            finally:
                replica.send_signal(signal.SIGKILL)
                await replica.wait()
            assert (await get(http, build_id))["state"] == "building"
            shell.release.set()
            async with platform.working():
                built = await end(http, build_id)
                assert built["state"] == "ready", built
                # It went on from what was kept.
                assert shell.ran == ["one", "hang", "hang"] and built["steps_cached"] == 1
                assert any("interrupted" in line for line in await log_of(http, build_id))
                await nothing_left(platform)


@pytest.mark.one_database
async def test_a_host_that_goes_away_fails_the_build_in_the_end(
    team: Team, platform: Platform, shell: Shell, host: RunningHost
) -> None:
    build_id = await begin(team.http, "app", "RUN hang\n")

    async def hangs() -> bool:
        return shell.hanging == 1

    await eventually(hangs, "it hangs")
    await host.stop()
    ended = await end(team.http, build_id)
    assert ended["state"] == "failed" and ended["error"]["code"] == "unavailable", ended


# Limits.


async def test_a_key_makes_a_build_safe_to_repeat(
    team: Team, other_team: Team, shell: Shell
) -> None:
    headers = {"Idempotency-Key": "once"}

    async def ask(http: httpx.AsyncClient, **more: Any) -> httpx.Response:
        body = wanted("app", "RUN one\n", **more)
        return await http.post("/v1/builds", json=body, headers=headers)

    secret = {"secrets": {"token": "hidden"}}
    answers = await asyncio.gather(*(ask(team.http, **secret) for _ in range(3)))
    assert {each.status_code for each in answers} == {202}
    (build_id,) = {each.json()["id"] for each in answers}
    assert (await end(team.http, build_id))["state"] == "ready"
    # Also when it is over.
    assert (await ask(team.http, **secret)).json()["state"] == "ready"
    assert shell.ran == ["one"]
    other = await ask(team.http, secrets={"token": "another"})
    assert (other.status_code, other.json()["error"]["code"]) == (409, "conflict")
    # Keys are a team's own.
    assert (await ask(other_team.http)).json()["id"] != build_id


@pytest.mark.one_database
async def test_builds_have_limits(database_url: str, tmp_path: Path, host: RunningHost) -> None:
    shell = host.fakes.guests.running = Shell()
    building = replace(BUILDING, most_s=2.0, log=LogLimits(lines=20, size_bytes=10_000))
    more = {"building": building, "max_builds_per_team": 2}
    async with running_platform(database_url, tmp_path, host, **more) as platform:  # type: ignore[arg-type]
        _, key = await make_team(platform)
        async with client_of(platform, **{"x-api-key": key}) as http:
            loud = await end(http, await begin(http, "loud", "RUN many 1000\n"))
            assert loud["state"] == "ready"
            lines = await log_of(http, loud["id"])
            assert len(lines) < 30 and any("the log is cut here" in line for line in lines)
            slow = [await begin(http, f"slow{each}", "RUN hang\n") for each in range(2)]
            refused = await http.post("/v1/builds", json=wanted("third", "RUN one\n"))
            assert (refused.status_code, refused.json()["error"]["code"]) == (429, "exhausted")
            for build_id in slow:
                ended = await end(http, build_id)
                assert ended["error"]["code"] == "timed_out", ended
            assert shell.hanging == 2
            await nothing_left(platform)


# Uploads.


def archive(**files: str) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content.encode()))
    return out.getvalue()


@pytest.mark.one_database
async def test_an_upload_is_what_its_digest_says(
    team: Team, other_team: Team, platform: Platform
) -> None:
    content = archive(a="text")
    path = f"/v1/builds/contexts/{hashlib.sha256(content).hexdigest()}"
    assert (await team.http.head(path)).status_code == 404
    wrong = await team.http.put(path, content=content + b"x")
    assert (wrong.status_code, wrong.json()["error"]["code"]) == (400, "invalid")
    assert (await team.http.head(path)).status_code == 404
    for _ in range(2):
        assert (await team.http.put(path, content=content)).status_code == 204
    assert (await team.http.head(path)).status_code == 200
    assert (await other_team.http.head(path)).status_code == 404


@pytest.mark.one_database
async def test_what_is_wrong_is_said_before_it_waits(team: Team, platform: Platform) -> None:
    bodies = [
        (wanted("app", "NOPE\n"), 400, "recipe:1:1"),
        (wanted("App", "RUN a\n"), 400, "template name"),
        (wanted("app:a b", "RUN a\n"), 400, "tag"),
        (wanted("base", "RUN a\n"), 403, "platform"),
        (wanted("app", "RUN a\n", context="0" * 64), 404, "not there"),
    ]
    for body, status, said in bodies:
        answer = await team.http.post("/v1/builds", json=body)
        assert answer.status_code == status, answer.text
        assert said in answer.json()["error"]["message"]
    # What can only be known when it is done.
    ended = await end(team.http, await begin(team.http, "app", "RUN a\n", from_template="none"))
    assert (ended["state"], ended["error"]["code"]) == ("failed", "not_found")
    copied = await end(team.http, await begin(team.http, "app", "COPY a b\n"))
    assert (copied["state"], copied["error"]["code"]) == ("failed", "invalid")


@pytest.mark.one_database
async def test_a_log_is_followed_to_its_end(team: Team, platform: Platform, shell: Shell) -> None:
    build_id = await begin(team.http, "app", "RUN say one\nRUN say two\n")
    headers = {"accept": "text/event-stream"}
    answer = await team.http.get(f"/v1/builds/{build_id}/logs", headers=headers)
    pieces = [piece for piece in answer.text.split("\n\n") if piece.startswith(("id", "event"))]
    told = [json.loads(piece.rpartition("data: ")[2]) for piece in pieces]
    assert [each["message"] for each in told[:-1]] == await log_of(team.http, build_id)
    assert told[-1]["state"] == "ready"


# Secrets stay where they belong.


@pytest.mark.one_database
async def test_what_is_not_seen_is_in_no_log(team: Team, shell: Shell) -> None:
    secrets = {"word": "secret"}
    build_id = await begin(team.http, "app", "RUN shine\n", secrets=secrets)
    ended = await end(team.http, build_id)
    assert ended["error"]["message"].endswith("exited with 3: *** and ?that?")
    assert "*** and ?that?" in await log_of(team.http, build_id)


async def test_builds_and_templates_tell_who_made_them(
    team: Team, platform: Platform, shell: Shell
) -> None:
    async with platform.db.read() as session:
        name = await session.scalar(
            select(tables.ApiKey.name).where(tables.ApiKey.team_id == team.team_id)
        )
    assert name
    built = await end(team.http, await begin(team.http, "app", "RUN one\n", tags=["v1", "v0"]))
    assert built["created_by_name"] == name
    made = (await team.http.post("/v1/sandboxes", json=SHAPE)).json()
    snapshot = {"sandbox_id": made["id"], "name": "frozen"}
    answer = (await team.http.post("/v1/snapshots", json=snapshot)).json()
    assert (answer["created_by_name"], answer["sandbox_id"]) == (name, made["id"])
    found = {each["name"]: each for each in (await team.http.get("/v1/templates")).json()}
    assert found["frozen"] == answer
    assert found["app:v0"]["tags"] == ["v0", "v1"]
    assert found["app:v0"]["build_id"] == built["id"]
    assert found["app:v0"]["id"] == built["template_id"]
    assert found["app:v0"]["created_by_name"] == name
    assert found["app:v0"]["sandbox_id"] is None
    # Of the platform's a team is not told who made them.
    assert (found["base"]["created_by_name"], found["base"]["tags"]) == ("", [])


@pytest.mark.one_database
async def test_a_request_is_sealed_and_forgotten(
    team: Team, platform: Platform, shell: Shell
) -> None:
    word = "a secret argument"
    text = "FROM base\nARG A\nRUN hang $A\n"
    body = wanted("app", "") | {"source": {"kind": "dockerfile", "text": text}}
    answer = await team.http.post("/v1/builds", json=body | {"arguments": {"A": word}})
    build_id = answer.json()["id"]

    async def raw() -> bytes | None:
        async with platform.db.read() as session:
            row = await session.get(tables.Build, build_id)
        assert row is not None
        return row.sealed_request

    sealed = await raw()
    assert sealed is not None and word.encode() not in sealed
    shell.release.set()
    assert (await end(team.http, build_id))["state"] == "ready"
    assert await raw() is None
