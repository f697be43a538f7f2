"""How E2B's packages build templates, call by call; what a build does is shown elsewhere.

The replica only does what it is asked for, so that builds wait.
"""

from __future__ import annotations

import io
import tarfile
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from uuid import UUID, uuid4

import httpx
import pytest

from sandmartin.control import tables
from sandmartin.control.builds.request import NewBuild
from sandmartin.control.builds.service import AWAITED_S
from sandmartin.control.caller import system
from sandmartin.control.e2b.uploads import LIFE_S, Ticket
from sandmartin.control.platform import Platform
from sandmartin.control.states import BuildState, TemplateState
from sandmartin.errors import Conflict
from tests.control.conftest import RunningHost, Team, running_platform
from tests.control.test_e2b import refused

pytestmark = pytest.mark.one_database

HASH = "5f" * 32


@pytest.fixture
async def platform(database_url: str, tmp_path: Path, host: RunningHost) -> AsyncIterator[Platform]:
    async with running_platform(database_url, tmp_path, host, working=False) as platform:
        yield platform


async def reserve(team: Team, name: str = "app", **body: Any) -> dict[str, Any]:
    answer = await team.http.post("/v3/templates", json={"name": name, **body})
    assert answer.status_code == 202, answer.text
    made: dict[str, Any] = answer.json()
    return made


async def begin(team: Team, build_id: str, name: str = "app", **body: Any) -> httpx.Response:
    return await team.http.post(f"/v2/templates/{name}/builds/{build_id}", json=body)


async def status(team: Team, build_id: str, **params: Any) -> dict[str, Any]:
    answer = await team.http.get(f"/templates/app/builds/{build_id}/status", params=params)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


async def asked_of(platform: Platform, team: Team, build_id: str) -> NewBuild:
    row = await platform.builds.get(system(team.team_id), build_id)
    return NewBuild.from_json(platform.sealer.unseal(row.sealed_request or b""))


async def change(platform: Platform, build_id: str, **fields: Any) -> None:
    async with platform.db.write() as session:
        row = await session.get(tables.Build, build_id)
        for name, value in fields.items():
            setattr(row, name, value)


def archive() -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        member = tarfile.TarInfo("a.txt")
        member.size = 3
        tar.addfile(member, io.BytesIO(b"abc"))
    return packed.getvalue()


async def test_a_build_is_reserved_and_begun(platform: Platform, team: Team) -> None:
    made = await reserve(team, "app:v1", tags=["v2"], cpuCount=2, memoryMB=256, minFreeDiskMb=9000)
    build_id = made["buildID"]
    assert made == {
        "templateID": "app",
        "buildID": build_id,
        "names": ["app"],
        "aliases": ["app"],
        "tags": ["v1", "v2"],
        "public": False,
    }
    assert await status(team, build_id) == {
        "templateID": "app",
        "buildID": build_id,
        "status": "waiting",
        "logs": [],
        "logEntries": [],
    }
    # It is nobody's work yet.
    assert await platform.queue.take() is None
    steps = [
        {"type": "RUN", "args": ["true", "root"], "force": True},
        {"type": "COPY", "args": ["a.txt", "/srv/", "", "0644"], "filesHash": HASH},
    ]
    answer = await begin(
        team,
        build_id,
        fromTemplate="swifts/base:default",
        steps=[*steps, {"type": "ENV", "args": ["A", "1"], "forceUpload": None}],
        startCmd="serve",
        readyCmd="check",
        force=True,
    )
    assert (answer.status_code, answer.content) == (202, b"")
    asked = await asked_of(platform, team, build_id)
    assert (asked.name, asked.all_tags) == ("app:v1", ("v1", "v2"))
    assert (asked.vcpus, asked.memory_mb, asked.disk_size_mb) == (2, 256, 11048)
    assert (asked.from_template, asked.from_image, asked.no_cache) == ("base", "", True)
    assert (asked.source.start_cmd, asked.source.ready_cmd) == ("serve", "check")
    (stage,) = asked.read().stages
    assert [(type(each).__name__, each.force) for each in stage.steps] == [
        ("User", True),
        ("Workdir", False),
        ("Run", True),
        ("Copy", False),
        ("Env", False),
        ("Start", False),
        ("Healthcheck", False),
    ]
    refused(await begin(team, build_id), 409)
    taken = await platform.queue.take()
    assert taken is not None and taken.build_id == build_id


@pytest.mark.parametrize(
    ("ground", "image", "template"),
    [
        ({"fromImage": "docker.io/library/debian:12"}, "docker.io/library/debian:12", ""),
        ({"fromImage": "e2bdev/base"}, "", "base"),
        ({"fromImage": "e2bdev/code-interpreter:latest"}, "", "code-interpreter-v1"),
        ({}, "", ""),
    ],
)
async def test_what_a_build_starts_from(
    platform: Platform, team: Team, ground: dict[str, str], image: str, template: str
) -> None:
    await add_template(platform, team, "code-interpreter-v1")
    build_id = (await reserve(team))["buildID"]
    registry = {"type": "registry", "username": "u", "password": "hush"}
    answer = await begin(team, build_id, **ground, fromImageRegistry=registry)
    assert answer.status_code == 202, answer.text
    asked = await asked_of(platform, team, build_id)
    assert (asked.from_image, asked.from_template) == (image, template)
    assert asked.registry == ("u", "hush")


async def test_what_cannot_be_built_is_refused(team: Team, other_team: Team) -> None:
    build_id = (await reserve(team))["buildID"]
    told = refused(await begin(team, build_id, steps=[{"type": "NO", "args": []}]), 400)
    assert "steps:1:1: 'NO' is no step" in told
    aws = {"type": "aws", "awsAccessKeyId": "a", "awsSecretAccessKey": "b", "awsRegion": "c"}
    refused(await begin(team, build_id, fromImage="a/b", fromImageRegistry=aws), 501)
    refused(await begin(team, build_id, fromImage="a/b", fromTemplate="base"), 400)
    refused(await begin(team, build_id, name="other"), 404)
    refused(await begin(other_team, build_id), 404)
    refused(await other_team.http.get(f"/templates/app/builds/{build_id}/status"), 404)
    refused(await team.http.get(f"/templates/other/builds/{build_id}/logs"), 404)
    # After all that it can still be begun.
    assert (await begin(team, build_id)).status_code == 202
    refused(await team.http.post("/v3/templates", json={}), 400)
    refused(await team.http.post("/v3/templates", json={"name": "Not A Name"}), 400)
    refused(await team.http.post("/v3/templates", json={"name": "base"}), 403)
    refused(await team.http.post("/v3/templates", json={"name": "swallows/app"}), 404)
    refused(await team.http.post("/templates", json={"dockerfile": "FROM a"}), 501)
    assert (await team.http.post("/v2/templates", json={"alias": "app"})).status_code == 202


async def test_the_log_is_read_from_an_offset_to_an_empty_page(
    platform: Platform, team: Team
) -> None:
    build_id = (await reserve(team))["buildID"]
    async with platform.db.write() as session:
        for number in range(1, 106):
            session.add(
                tables.BuildLine(
                    build_id=build_id,
                    number=number,
                    at=1700000000.0,
                    level="warn",
                    message=f"line {number}",
                    step=number % 2,
                    phase="build",
                )
            )
    await change(
        platform,
        build_id,
        state=BuildState.FAILED,
        error_message="steps:3:1: it broke",
        error_step=5,
        finished_at=2.0,
    )
    found = await status(team, build_id)
    assert (found["status"], len(found["logEntries"])) == ("error", 100)
    assert found["reason"] == {"message": "it broke", "step": "3"}
    assert found["logEntries"][:2] == [
        {"timestamp": "2023-11-14T22:13:20Z", "message": "line 1", "level": "warn", "step": "1"},
        {"timestamp": "2023-11-14T22:13:20Z", "message": "line 2", "level": "warn"},
    ]
    rest = (await status(team, build_id, logsOffset=100))["logEntries"]
    assert [each["message"] for each in rest] == [f"line {number}" for number in range(101, 106)]
    assert (await status(team, build_id, logsOffset=105))["logEntries"] == []
    answer = await team.http.get(f"/templates/app/builds/{build_id}/logs", params={"limit": 1})
    assert [each["message"] for each in answer.json()["logs"]] == ["line 1"]
    await change(platform, build_id, state=BuildState.CANCELLED)
    assert (await status(team, build_id))["reason"] == {"message": "the build was cancelled"}


async def test_a_build_that_is_never_begun_is_over_some_day(platform: Platform, team: Team) -> None:
    build_id = (await reserve(team))["buildID"]
    await platform.builds.prune(time.time() + AWAITED_S - 10, 1e9)
    assert (await status(team, build_id))["status"] == "waiting"
    await platform.builds.prune(time.time() + AWAITED_S + 10, 1e9)
    assert (await status(team, build_id))["status"] == "error"
    with pytest.raises(Conflict):
        await platform.builds.begin(system(team.team_id), build_id, lambda new: new)


# Files.


async def place(team: Team, digest: str = HASH) -> dict[str, Any]:
    answer = await team.http.get(f"/templates/app/files/{digest}")
    assert answer.status_code == 201, answer.text
    found: dict[str, Any] = answer.json()
    return found


async def send(team: Team, url: str, content: bytes) -> httpx.Response:
    """Without a key."""
    path = urlsplit(url).path
    headers = {"content-type": "application/octet-stream", "x-api-key": ""}
    return await team.http.put(path, content=content, headers=headers)


async def test_files_are_sent_once_without_a_key(
    platform: Platform, team: Team, other_team: Team
) -> None:
    refused(await team.http.get(f"/templates/app/files/{HASH}"), 404)
    for each in (team, other_team):
        await reserve(each)
    found = await place(team)
    assert found["present"] is False
    assert found["url"].startswith("http://control/templates/uploads/")
    answer = await send(team, found["url"], archive() + b"\0" * (2 << 20))
    assert answer.status_code == 201, answer.text
    assert (await place(team))["present"] is True
    # Each team has its own.
    assert (await place(other_team))["present"] is False
    async with platform.builds.contexts.open(team.team_id, HASH) as kept:
        assert list(kept.tree.entries) == ["a.txt"]


async def test_an_address_holds_for_what_it_was_made(platform: Platform, team: Team) -> None:
    await reserve(team)
    now = time.time()
    late = Ticket(team.team_id, HASH, now - 1).sealed(platform.sealer)
    told = refused(await send(team, f"/templates/uploads/{late}", archive()), 403)
    assert "too old" in told
    found = await place(team)
    ticket = Ticket.unsealed(platform.sealer, found["url"].rpartition("/")[2])
    assert (ticket.team_id, ticket.files_hash) == (team.team_id, HASH)
    assert now + LIFE_S <= ticket.expires_at < now + LIFE_S + 60
    # What was sealed for something else is none.
    other = platform.sealer.seal([team.team_id, HASH, now + 60]).decode()
    for word in (found["url"].rpartition("/")[2][:-3] + "abc", other, "x", "%2e%2e", "a" * 2000):
        refused(await send(team, f"/templates/uploads/{word}", archive()), 401)
    refused(await team.http.get("/templates/app/files/not-a-hash"), 400)
    assert (await place(team))["present"] is False


async def test_the_address_is_that_by_which_the_client_came(team: Team) -> None:
    await reserve(team)
    answer = await team.http.get(f"/templates/app/files/{HASH}", headers={"host": "127.0.0.1:99"})
    assert answer.json()["url"].startswith("http://127.0.0.1:99/templates/uploads/")


# Tags.


async def add_template(platform: Platform, team: Team, name: str) -> str:
    row = tables.Template(
        template_id=str(uuid4()),
        team_id=team.team_id,
        name=name,
        agent_name=f"t-{uuid4().hex[:20]}",
        kind="image",
        state=TemplateState.READY,
        created_at=time.time(),
        vcpus=0,
        memory_mb=0,
        disk_size_mb=5120,
    )
    async with platform.db.write() as session:
        session.add(row)
    return str(row.template_id)


async def test_tags_name_what_was_built(platform: Platform, team: Team, other_team: Team) -> None:
    made = await add_template(platform, team, "app")
    body = {"target": "swifts/app:default", "tags": ["v1", "Stable"]}
    answer = await team.http.post("/templates/tags", json=body)
    assert (answer.status_code, answer.json()) == (201, {"buildID": made, "tags": ["v1", "Stable"]})
    listed = (await team.http.get("/templates/app/tags")).json()
    assert {each["tag"] for each in listed} == {"default", "v1", "Stable"}
    assert {UUID(each["buildID"]) for each in listed} == {UUID(made)}
    for name in ("app", "app%3Av1", "swifts%2Fapp%3AStable"):
        assert (await team.http.get(f"/templates/aliases/{name}")).status_code == 200
    refused(await team.http.get("/templates/aliases/app%3Av2"), 404)
    answer = await team.http.request(
        "DELETE", "/templates/tags", json={"name": "app", "tags": ["default", "v1"]}
    )
    assert answer.status_code == 204, answer.text
    # The name alone has none now, and yet there is one.
    assert (await team.http.get("/templates/aliases/app")).json()["templateID"] == "app"
    refused(await team.http.post("/templates/tags", json={"target": "app", "tags": ["x"]}), 404)
    refused(await team.http.post("/templates/tags", json={"target": "base", "tags": ["x"]}), 403)
    refused(await team.http.post("/templates/tags", json={"target": "app", "tags": []}), 400)
    refused(await other_team.http.get("/templates/app/tags"), 404)
    native = (await team.http.get("/v1/templates/app/tags")).json()["items"]
    assert [(each["tag"], each["template_id"]) for each in native] == [("Stable", made)]
    answer = await team.http.put("/v1/templates/app/tags/v3", json={"source": "Stable"})
    assert (answer.status_code, answer.json()["template_id"]) == (200, made)
    assert (await team.http.delete("/v1/templates/app/tags/v3")).status_code == 204
    assert (await team.http.delete("/v1/templates/app/tags/v3")).status_code == 404
