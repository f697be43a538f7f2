"""The life of sandboxes through the API, on both databases."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from sandmartin.control.platform import Platform
from tests.control.conftest import RunningHost, Team

#: Small, for the fakes.
NEW = {"memory_mb": 128, "disk_size_mb": 8}


async def create(team: Team, **more: Any) -> dict[str, Any]:
    answer = await team.http.post("/v1/sandboxes", json={**NEW, **more})
    assert answer.status_code == 201, answer.text
    made: dict[str, Any] = answer.json()
    return made


async def state(team: Team, sandbox_id: str) -> str:
    return str((await team.http.get(f"/v1/sandboxes/{sandbox_id}")).json()["status"])


async def test_a_sandbox_lives(team: Team, host: RunningHost) -> None:
    made = await create(team, metadata={"colour": "sand"})
    path = f"/v1/sandboxes/{made['id']}"
    assert made["status"] == "running"
    assert (await team.http.post(f"{path}/pause")).json()["status"] == "paused"
    again = await team.http.post(f"{path}/pause")
    assert (again.status_code, again.json()["error"]["code"]) == (409, "conflict")
    assert (await team.http.post(f"{path}/resume")).json()["status"] == "running"
    children = (await team.http.post(f"{path}/fork", json={"count": 2})).json()["items"]
    assert [each["status"] for each in children] == ["running", "running"]
    checkpoint = (await team.http.post(f"{path}/checkpoints", json={})).json()
    back = await team.http.post(f"{path}/checkpoints/{checkpoint['id']}/rollback")
    assert back.json()["status"] == "running"
    snapshot = {"sandbox_id": made["id"], "name": "frozen", "live": True}
    assert (await team.http.post("/v1/snapshots", json=snapshot)).status_code == 201
    assert await state(team, made["id"]) == "running"
    started = await create(team, template="frozen")
    for each in (made, started, *children):
        assert (await team.http.delete(f"/v1/sandboxes/{each['id']}")).status_code == 204
        assert await state(team, each["id"]) == "stopped"
    assert (await team.http.delete(path)).status_code == 204
    assert (await team.http.delete("/v1/templates/frozen")).status_code == 204
    kinds = [each["kind"] for each in (await team.http.get(f"{path}/timeline")).json()]
    assert kinds[:4] == ["sandbox.starting", "sandbox.running", "sandbox.pausing", "sandbox.paused"]


async def test_the_timeline_tells_what_the_time_went_to(team: Team, host: RunningHost) -> None:
    began_at = time.time()
    made = await create(team)
    took_ms = (time.time() - began_at) * 1000
    path = f"/v1/sandboxes/{made['id']}"
    await team.http.post(f"{path}/pause")
    await team.http.post(f"{path}/resume")
    (child,) = (await team.http.post(f"{path}/fork", json={})).json()["items"]
    await team.http.delete(path)

    timeline = (await team.http.get(f"{path}/timeline")).json()
    told = {each["kind"]: each["data"].get("phases", []) for each in timeline}
    names = {kind: [each["name"] for each in phases] for kind, phases in told.items()}
    assert not names["sandbox.starting"]
    assert {"queue", "slot", "vmm", "boot", "call"} <= set(names["sandbox.running"])
    assert names["sandbox.running"][0] == "queue"
    assert sum(each["ms"] for each in told["sandbox.running"]) <= took_ms
    assert {"freeze", "write", "end"} <= set(names["sandbox.paused"])
    assert {"restore", "guest"} <= set(names["sandbox.resumed"])
    assert "fork" in names["sandbox.forked"]
    assert "end" in names["sandbox.stopped"]
    (_, running) = (await team.http.get(f"/v1/sandboxes/{child['id']}/timeline")).json()
    assert {"freeze", "restore"} <= {each["name"] for each in running["data"]["phases"]}


async def test_lists_are_paged_and_filtered(team: Team) -> None:
    made = [await create(team, metadata={"n": str(number % 2)}) for number in range(3)]
    first = (await team.http.get("/v1/sandboxes", params={"limit": 2})).json()
    second = (
        await team.http.get("/v1/sandboxes", params={"limit": 2, "cursor": first["next"]})
    ).json()
    listed = [each["id"] for each in first["items"] + second["items"]]
    assert listed == [each["id"] for each in reversed(made)]
    assert second["next"] == ""
    even = (await team.http.get("/v1/sandboxes", params={"metadata": "n=0"})).json()["items"]
    assert {each["id"] for each in even} == {made[0]["id"], made[2]["id"]}
    paused = (await team.http.get("/v1/sandboxes", params={"state": "paused"})).json()["items"]
    assert paused == []


async def test_a_key_makes_a_create_safe_to_repeat(team: Team) -> None:
    headers = {"Idempotency-Key": "once"}
    answers = await asyncio.gather(
        *(team.http.post("/v1/sandboxes", json=NEW, headers=headers) for _ in range(3))
    )
    assert {each.status_code for each in answers} == {201}
    assert len({each.json()["id"] for each in answers}) == 1
    other = await team.http.post("/v1/sandboxes", json={**NEW, "memory_mb": 256}, headers=headers)
    assert (other.status_code, other.json()["error"]["code"]) == (409, "conflict")


async def test_a_failed_create_is_told(team: Team, host: RunningHost) -> None:
    answer = await team.http.post("/v1/sandboxes", json={**NEW, "template": "nope"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found")
    assert (await team.http.get("/v1/sandboxes")).json()["items"] == []


async def test_another_team_sees_nothing(team: Team, other_team: Team, platform: Platform) -> None:
    made = await create(team)
    path = f"/v1/sandboxes/{made['id']}"
    for method, url in [("GET", path), ("DELETE", path), ("POST", f"{path}/pause")]:
        answer = await other_team.http.request(method, url)
        assert answer.status_code == 404, (method, url)
    assert (await other_team.http.get("/v1/sandboxes")).json()["items"] == []
    assert await state(team, made["id"]) == "running"
