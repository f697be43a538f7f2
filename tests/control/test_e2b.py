"""E2B's interface, as its clients use it: every call, right and wrong, on both databases."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

import httpx
import pytest

from sandmartin.control.app import create_app
from sandmartin.control.e2b.bodies import CLIENT_ID
from sandmartin.control.e2b.envd import ENVD_VERSION
from sandmartin.control.hosts import Hosts
from sandmartin.control.platform import Platform
from sandmartin.errors import GuestSilent, NotFound
from sandmartin.model import State
from sandmartin.transport.agent import Agent
from tests.control.conftest import (
    RunningHost,
    Team,
    eventually,
    make_team,
    running_host,
    running_platform,
)
from tests.control.test_operations import until_state
from tests.control.test_sandboxes import NEW
from tests.control.truth import agree, templates_of

pytestmark = [pytest.mark.qemu_img, pytest.mark.one_database]


def ids(listed: httpx.Response) -> list[str]:
    return [each["sandboxID"] for each in listed.json()]


async def make(team: Team, version: str = "/v2", **body: Any) -> dict[str, Any]:
    answer = await team.http.post(f"{version}/sandboxes", json={"templateID": "base", **body})
    assert answer.status_code == 201, answer.text
    made: dict[str, Any] = answer.json()
    return made


async def look(team: Team, sandbox_id: str) -> dict[str, Any]:
    answer = await team.http.get(f"/sandboxes/{sandbox_id}")
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def left_s(detail: Mapping[str, Any]) -> float:
    return (datetime.fromisoformat(detail["endAt"]) - datetime.now(UTC)).total_seconds()


def refused(answer: httpx.Response, status: int, *, should_retry: bool = False) -> str:
    """The message of an error, which has the form that clients read."""
    assert answer.status_code == status, answer.text
    told = answer.json()
    assert set(told) == {"code", "message", "error_code"} and told["code"] == status
    assert answer.headers["should-retry"] == ("true" if should_retry else "false")
    return str(told["message"])


async def test_what_a_create_answers(team: Team, platform: Platform) -> None:
    made = await make(team, metadata={"a": "b"}, envVars={"C": "d"}, timeout=60)
    one = made["sandboxID"]
    assert made == {
        "templateID": "base",
        "alias": "base",
        "sandboxID": one,
        "clientID": CLIENT_ID,
        "envdVersion": ENVD_VERSION,
        "envdAccessToken": platform.tokens.access(one),
    }
    detail = await look(team, one)
    assert 50 < left_s(detail) <= 60
    assert (detail["state"], detail["metadata"]) == ("running", {"a": "b"})
    assert detail["lifecycle"] == {"autoResume": False, "onTimeout": "kill"}
    assert (detail["cpuCount"], detail["memoryMB"], detail["diskSizeMB"]) == (1, 512, 5120)
    old = await make(team, version="", secure=False)
    assert 5 < left_s(await look(team, old["sandboxID"])) <= 15
    # Tokens are a sandbox's own, and it is ours in our own interface, too.
    assert old["envdAccessToken"] != made["envdAccessToken"]
    native = (await team.http.get(f"/v1/sandboxes/{one}")).json()
    assert (native["status"], native["metadata"]) == ("running", {"a": "b"})


async def test_the_guest_protocol_is_as_its_host_says(team: Team, host: RunningHost) -> None:
    host.fakes.guests.envd_version = "0.5.9"
    made = await make(team)
    assert made["envdVersion"] == "0.5.9"
    path = f"/sandboxes/{made['sandboxID']}"
    (child,) = (await team.http.post(f"{path}/fork")).json()
    assert child["sandbox"]["envdVersion"] == "0.5.9"
    await team.http.post(f"{path}/pause")
    host.fakes.guests.envd_version = "0.6.0"
    assert (await team.http.post(f"{path}/connect")).json()["envdVersion"] == "0.6.0"
    assert (await look(team, made["sandboxID"]))["envdVersion"] == "0.6.0"


async def test_private_traffic_and_waking(team: Team, platform: Platform) -> None:
    made = await make(
        team,
        network={"allowPublicTraffic": False},
        autoPause=True,
        autoResume={"enabled": True},
    )
    token = platform.tokens.traffic(made["sandboxID"])
    assert made["trafficAccessToken"] == token != made["envdAccessToken"]
    detail = await look(team, made["sandboxID"])
    assert detail["lifecycle"] == {"autoResume": True, "onTimeout": "pause"}
    assert detail["network"] == {"allowPublicTraffic": False}
    (child,) = (await team.http.post(f"/sandboxes/{made['sandboxID']}/fork")).json()
    assert child["sandbox"]["trafficAccessToken"] not in {token, None}


async def test_what_may_be_reached(team: Team, platform: Platform, host: RunningHost) -> None:
    one = (await make(team))["sandboxID"]
    assert "allowInternetAccess" not in await look(team, one)
    closed = (await make(team, allow_internet_access=False))["sandboxID"]
    assert (await look(team, closed))["allowInternetAccess"] is False
    rules = {"allowOut": ["Example.com", "192.0.2.1/32"], "denyOut": ["0.0.0.0/0"]}
    made = (await make(team, network=rules))["sandboxID"]
    known = {"allowOut": ["example.com", "192.0.2.1"], "denyOut": ["0.0.0.0/0"]}
    assert (await look(team, made))["network"] == {"allowPublicTraffic": True, **known}
    ours = (await team.http.get(f"/v1/sandboxes/{made}/network")).json()
    assert ours["allow_out"] == known["allowOut"]
    # All is replaced, of one that sleeps too.
    for each in (one, made):
        path = f"/sandboxes/{each}/network"
        answer = await team.http.put(path, json={"denyOut": ["192.0.2.0/24"]})
        assert answer.status_code == 204, answer.text
        detail = await look(team, each)
        assert detail["network"]["denyOut"] == ["192.0.2.0/24"]
        assert "allowOut" not in detail["network"]
        await team.http.post(f"/sandboxes/{each}/pause")
        closing = await team.http.put(path, json={"allow_internet_access": False})
        assert closing.status_code == 204
        assert (await look(team, each))["allowInternetAccess"] is False
        refused(await team.http.put(path, json={"denyOut": ["example.com"]}), 400)
        refused(await team.http.put(path, json={"allowOut": ["x"] * 500}), 400)
        refused(await team.http.put(path, json={"dnsServers": []}), 501)
    await agree(platform, host)


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({}, 400),
        ({"templateID": "nope"}, 404),
        ({"templateID": "base:other"}, 404),
        ({"templateID": "elsewhere/base"}, 404),
        ({"templateID": "../base"}, 404),
        ({"templateID": "Base!"}, 400),
        ({"timeout": 0}, 400),
        ({"timeout": -1}, 400),
        ({"timeout": 24 * 3600 + 1}, 400),
        ({"timeout": "soon"}, 400),
        ({"metadata": {"a": 1}}, 400),
        ({"metadata": {"a": "\x00"}}, 400),
        ({"envVars": {"a=b": "c"}}, 400),
        ({"mcp": {"x": {}}}, 501),
        ({"iam": {"tokens": {"a": {}}}}, 501),
        ({"volumeMounts": [{"name": "a", "path": "/a"}]}, 501),
        ({"autoPause": True, "autoPauseMemory": False}, 501),
        ({"network": {"denyOut": ["example.com"]}}, 400),
        ({"network": {"allowOut": ["300.1.1.1"]}}, 400),
        ({"network": {"dnsServers": []}}, 501),
        ({"network": {"egressProxy": {"address": "a"}}}, 501),
        ({"network": {"rules": {"a.example": []}}}, 501),
        ({"network": {"maskRequestHost": "a"}}, 501),
        ({"network": {"httpsPorts": [8443]}}, 501),
    ],
)
async def test_creates_that_are_refused(team: Team, body: dict[str, Any], status: int) -> None:
    sent = {"templateID": "base", **body} if body else body
    for version in ("", "/v2"):
        refused(await team.http.post(f"{version}/sandboxes", json=sent), status)
    assert (await team.http.get("/v2/sandboxes")).json() == []


async def test_who_asks(team: Team, platform: Platform) -> None:
    for headers in ({}, {"X-API-KEY": "e2b_" + "0" * 40}):
        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(create_app(platform)), base_url="http://control"
        ) as nobody:
            refused(await nobody.get("/v2/sandboxes", headers=headers), 401)
            nobody.headers.update({"X-Api-kEY": team.key})
            assert (await nobody.get("/v2/sandboxes")).status_code == 200
    (ours,) = (await team.http.get("/teams")).json()
    assert ours == {"teamID": team.team_id, "name": "swifts", "apiKey": "", "isDefault": True}
    for path in ("/sandboxes/x/nowhere", "/v2/nowhere", "/templates/a/b/c/d"):
        refused(await team.http.get(path), 404)
    refused(await team.http.put("/v2/sandboxes"), 405)
    # Ours beside it keeps its own form.
    assert set((await team.http.get("/v1/sandboxes/x")).json()) == {"error"}


async def test_a_key_makes_one(team: Team) -> None:
    body, headers = {"templateID": "base"}, {"Idempotency-Key": "once-1"}
    both = [team.http.post("/v2/sandboxes", json=body, headers=headers) for _ in range(3)]
    assert len({each.json()["sandboxID"] for each in await asyncio.gather(*both)}) == 1
    other = {**body, "timeout": 10}
    refused(await team.http.post("/v2/sandboxes", json=other, headers=headers), 409)
    wrong = {"Idempotency-Key": "a b"}
    refused(await team.http.post("/v2/sandboxes", json=body, headers=wrong), 400)


async def test_lists(team: Team, other_team: Team) -> None:
    labels = {"who?": "me & you", "n": "1", "plus": "a+b%20c"}
    made = [(await make(team, metadata={**labels, "n": str(n)}))["sandboxID"] for n in range(3)]
    await make(other_team)
    await team.http.post(f"/sandboxes/{made[1]}/pause")
    listed = await team.http.get("/v2/sandboxes")
    assert ids(listed) == made[::-1] and "x-next-token" not in listed.headers
    assert [each["state"] for each in listed.json()] == ["running", "paused", "running"]
    assert listed.headers["x-total-running"] == "2"
    paused = await team.http.get("/v2/sandboxes?state=paused")
    assert ids(paused) == [made[1]] and "x-total-running" not in paused.headers
    assert len(ids(await team.http.get("/v2/sandboxes?state=running,paused"))) == 3
    assert ids(await team.http.get("/v2/sandboxes?state=running&state=paused")) == made[::-1]
    # Page by page, the oldest first.
    first = await team.http.get("/v2/sandboxes?limit=2&order=asc")
    following = {"order": "asc", "nextToken": first.headers["x-next-token"]}
    second = await team.http.get("/v2/sandboxes?limit=2", params=following)
    assert ids(first) + ids(second) == made and "x-next-token" not in second.headers
    # As clients write it: each name and value encoded, then as a query, then as one value of it.
    query = urlencode({quote(name): quote(value) for name, value in {**labels, "n": "2"}.items()})
    for path in ("/sandboxes", "/v2/sandboxes"):
        assert ids(await team.http.get(path, params={"metadata": query})) == [made[2]]
        assert ids(await team.http.get(path, params={"metadata": "n=9"})) == []
    assert set(ids(await team.http.get("/sandboxes"))) == {made[0], made[2]}
    started = (await look(team, made[2]))["startedAt"]
    between = datetime.fromisoformat(started) - timedelta(microseconds=1)
    late = await team.http.get("/v2/sandboxes", params={"startedAfter": between.isoformat()})
    assert made[0] not in ids(late) and ids(late)
    for template, count in (("base", 3), ("base:default", 3), ("other", 0)):
        found = await team.http.get("/v2/sandboxes", params={"template": template})
        assert len(ids(found)) == count
    for wrong in ("state=asleep", "limit=0", "limit=101", "order=up", "nextToken=x", "metadata=a"):
        refused(await team.http.get(f"/v2/sandboxes?{wrong}"), 400)


async def test_time_is_set_and_extended(team: Team) -> None:
    one = (await make(team, timeout=100))["sandboxID"]
    for path, body, least, most in (
        ("/v2/sandboxes/{}/connect", {"timeout": 10}, 90, 100),
        ("/v2/sandboxes/{}/connect", {}, 290, 300),
        ("/sandboxes/{}/timeout", {"timeout": 20}, 10, 20),
        ("/sandboxes/{}/connect", {"timeout": 30}, 20, 30),
        ("/sandboxes/{}/refreshes", {"duration": 10}, 20, 30),
        ("/sandboxes/{}/refreshes", {"duration": 50}, 40, 50),
    ):
        answer = await team.http.post(path.format(one), json=body)
        assert answer.status_code == (200 if "connect" in path else 204), answer.text
        assert least < left_s(await look(team, one)) <= most, path
    for wrong in ({}, {"timeout": -1}, {"timeout": 10**6}):
        refused(await team.http.post(f"/sandboxes/{one}/timeout", json=wrong), 400)
    await team.http.post(f"/sandboxes/{one}/pause")
    refused(await team.http.post(f"/sandboxes/{one}/timeout", json={"timeout": 9}), 404)
    # One of ours, whose time is not limited, has an end that never comes.
    native = (await team.http.post("/v1/sandboxes", json=NEW)).json()["id"]
    await team.http.post(f"/v2/sandboxes/{native}/connect", json={"timeout": 5})
    assert left_s(await look(team, native)) > 10**9


async def test_pause_and_connect(team: Team) -> None:
    made = await make(team, timeout=60)
    path = f"/sandboxes/{made['sandboxID']}"
    assert (await team.http.post(f"{path}/pause")).status_code == 204
    assert (await look(team, made["sandboxID"]))["pauseMode"] == "full"
    refused(await team.http.post(f"{path}/pause", json={}), 409)
    # Whoever comes first wakes it, the others find it awake.
    connects = [team.http.post(f"/v2{path}/connect", json={"timeout": 30}) for _ in range(4)]
    answers = await asyncio.gather(*connects)
    assert sorted(each.status_code for each in answers) == [200, 200, 200, 201]
    assert [each.json() for each in answers] == [made] * 4
    assert 20 < left_s(await look(team, made["sandboxID"])) <= 30
    refused(await team.http.post(f"{path}/resume", json={}), 409)
    pauses = [team.http.post(f"{path}/pause", json={"memory": True}) for _ in range(2)]
    assert sorted(each.status_code for each in await asyncio.gather(*pauses)) == [204, 409]
    woken = await team.http.post(f"{path}/resume", json={"timeout": 40, "autoPause": True})
    assert (woken.status_code, woken.json()) == (201, made)
    for call in ("pause", "connect", "snapshots"):
        refused(await team.http.post(f"{path}/{call}", json={"memory": False}), 501)
    assert (await look(team, made["sandboxID"]))["state"] == "running"


async def test_kills(team: Team) -> None:
    one, two = [(await make(team))["sandboxID"] for _ in range(2)]
    await team.http.post(f"/sandboxes/{one}/pause")
    for each in (one, two):
        assert (await team.http.delete(f"/sandboxes/{each}")).status_code == 204
        refused(await team.http.delete(f"/sandboxes/{each}"), 404)
        refused(await team.http.get(f"/sandboxes/{each}"), 404)
        for call in ("pause", "connect", "fork", "snapshots"):
            refused(await team.http.post(f"/sandboxes/{each}/{call}", json={}), 404)
        refused(await team.http.post(f"/sandboxes/{each}/timeout", json={"timeout": 1}), 404)
    assert ids(await team.http.get("/v2/sandboxes")) == []


async def test_forks(team: Team, host: RunningHost) -> None:
    one = await make(team, timeout=200)
    path = f"/sandboxes/{one['sandboxID']}"
    answer = await team.http.post(f"{path}/fork", json={"count": 2, "timeout": 30})
    children = [each["sandbox"] for each in answer.json()]
    assert answer.status_code == 201 and len(children) == 2
    assert len({each["envdAccessToken"] for each in (one, *children)}) == 3
    for each in children:
        assert 20 < left_s(await look(team, each["sandboxID"])) <= 30
    (heir,) = (await team.http.post(f"{path}/fork")).json()
    assert 190 < left_s(await look(team, heir["sandbox"]["sandboxID"])) <= 200
    # One that cannot be made is an error in its place, and nothing of it stays.
    host.fakes.guests.introducing = _refuse_once()
    mixed = (await team.http.post(f"{path}/fork", json={"count": 2})).json()
    errors = [each["error"] for each in mixed if "error" in each]
    assert [set(each) for each in errors] == [{"code", "message"}]
    listed = (await team.http.get("/v1/sandboxes?state=error")).json()["items"]
    assert listed == []
    for wrong in ({"count": 0}, {"count": 101}, {"timeout": 0}, {"timeout": 10**6}):
        refused(await team.http.post(f"{path}/fork", json=wrong), 400)
    await team.http.post(f"{path}/pause")
    refused(await team.http.post(f"{path}/fork", json={}), 409)


def _refuse_once() -> Any:
    refusals = iter([True])

    async def introduce(_: object) -> None:
        if next(refusals, False):
            raise GuestSilent("it says nothing")

    return introduce


async def test_snapshots(
    team: Team, other_team: Team, platform: Platform, host: RunningHost
) -> None:
    one = (await make(team))["sandboxID"]
    made = []
    for name in ("mine", f"{team.team_id}/ours:default", "swifts/theirs"):
        answer = await team.http.post(f"/sandboxes/{one}/snapshots", json={"name": name})
        assert answer.status_code == 201, answer.text
        made.append(answer.json()["snapshotID"])
    assert made == ["mine:default", "ours:default", "theirs:default"]
    unnamed = (await team.http.post(f"/sandboxes/{one}/snapshots")).json()
    assert unnamed["names"] == [unnamed["snapshotID"]]
    for wrong, status in (("mine", 409), ("base", 409), ("a:b", 400), ("x/a", 404), ("A b", 400)):
        answer = await team.http.post(f"/sandboxes/{one}/snapshots", json={"name": wrong})
        refused(answer, status)
    first = await team.http.get("/snapshots?limit=3")
    second = await team.http.get(f"/snapshots?nextToken={first.headers['x-next-token']}")
    every = [each["snapshotID"] for each in (*first.json(), *second.json())]
    assert every == [unnamed["snapshotID"], *made[::-1]]
    assert len((await team.http.get("/snapshots", params={"sandboxID": one})).json()) == 4
    assert (await team.http.get("/snapshots?sandboxID=sbother")).json() == []
    named = await team.http.get("/snapshots", params={"name": "mine:default"})
    assert [each["snapshotID"] for each in named.json()] == made[:1]
    assert (await other_team.http.get("/snapshots")).json() == []
    # A sandbox of one, by each of its names.
    for name in ("mine", "mine:default", "swifts/mine", f"{team.team_id}/mine:default"):
        again = await make(team, templateID=name)
        assert again["templateID"] == "mine"
        await team.http.delete(f"/sandboxes/{again['sandboxID']}")
    used = await make(team, templateID="ours")
    # Names come as one segment of a path, encoded. What was made of one goes on without it.
    for name in ("mine:default", "swifts/ours:default", f"{team.team_id}/theirs"):
        path = f"/templates/{quote(name, safe='')}"
        refused(await other_team.http.delete(path), 404)
        assert (await team.http.delete(path)).status_code == 204
        refused(await team.http.delete(path), 404)
    refused(await team.http.delete("/templates/base"), 403)
    assert (await look(team, used["sandboxID"]))["state"] == "running"
    anew = await team.http.post(f"/sandboxes/{one}/snapshots", json={"name": "ours"})
    assert anew.json()["snapshotID"] == "ours:default"
    await team.http.post(f"/sandboxes/{one}/pause")
    refused(await team.http.post(f"/sandboxes/{one}/snapshots", json={}), 409)
    # When nothing needs them any more, the hosts have nothing of them.
    for each in (one, used["sandboxID"]):
        await team.http.delete(f"/sandboxes/{each}")
    await agree(platform, host)
    assert {each.name for each in await templates_of(platform)} >= {"ours"}


async def test_templates(team: Team, other_team: Team) -> None:
    one = (await make(team))["sandboxID"]
    await team.http.post(f"/sandboxes/{one}/snapshots", json={"name": "mine"})
    listed = {each["templateID"]: each for each in (await team.http.get("/templates")).json()}
    assert {name: each["public"] for name, each in listed.items()} == {"mine": False, "base": True}
    assert listed["mine"]["names"] == ["mine:default"]
    assert [each["templateID"] for each in (await other_team.http.get("/templates")).json()] == [
        "base"
    ]
    for name, public in (("base", True), ("mine", False), ("swifts%2Fmine%3Adefault", False)):
        found = (await team.http.get(f"/templates/aliases/{name}")).json()
        assert found == {"templateID": name.removeprefix("swifts%2F")[:4], "public": public}
    for name in ("nope", "swallows%2Fmine", "mine%3Aother"):
        refused(await team.http.get(f"/templates/aliases/{name}"), 404)
    refused(await other_team.http.get("/templates/aliases/mine"), 404)
    kept = await team.http.patch("/v2/templates/mine", json={"public": False})
    assert kept.json() == {"names": ["mine:default"]}
    refused(await team.http.patch("/v2/templates/mine", json={"public": True}), 501)
    refused(await team.http.patch("/v2/templates/base", json={"public": False}), 403)


async def test_metrics_and_logs(team: Team, host: RunningHost) -> None:
    one = (await make(team))["sandboxID"]
    path = f"/sandboxes/{one}"
    await eventually(lambda: _has_points(team, path), "points")
    point = (await team.http.get(f"{path}/metrics")).json()[-1]
    assert (point["cpuCount"], point["memTotal"], point["diskTotal"]) == (1, 512 << 20, 5120 << 20)
    at = datetime.fromisoformat(point["timestamp"]).timestamp()
    assert at == point["timestampUnix"] and 0 <= point["cpuUsedPct"] <= 100
    assert (await team.http.get(f"{path}/metrics?end=1")).json() == []
    await team.http.post(f"{path}/pause")
    # What it used until it slept.
    assert (await team.http.get(f"{path}/metrics?start=0")).status_code == 200
    assert (await team.http.get(f"{path}/metrics")).json() != []
    told = (await team.http.get(f"{path}/logs")).json()
    said = [each["message"] for each in told["logEntries"]]
    assert said[:2] == ["sandbox.starting", "sandbox.running"]
    assert [each["line"] for each in told["logs"]] == said
    assert len((await team.http.get(f"{path}/logs?limit=1")).json()["logs"]) == 1
    assert (await team.http.get(f"{path}/logs?start={1 << 49}")).json()["logs"] == []


async def _has_points(team: Team, path: str) -> bool:
    return bool((await team.http.get(f"{path}/metrics")).json())


async def test_another_team_finds_nothing(team: Team, other_team: Team) -> None:
    path = f"/sandboxes/{(await make(team))['sandboxID']}"
    calls = [("GET", path), ("DELETE", path), ("GET", f"{path}/metrics"), ("GET", f"{path}/logs")]
    calls += [("PUT", f"{path}/network")]
    posts = ("pause", "connect", "resume", "fork", "snapshots", "refreshes", "timeout")
    calls += [("POST", f"{path}/{each}") for each in posts]
    for method, url in calls:
        body = {"timeout": 1} if method in {"POST", "PUT"} else None
        refused(await other_team.http.request(method, url, json=body), 404)
    assert (await team.http.get(path)).json()["state"] == "running"


async def test_too_much_is_not_tried_again(database_url: str, tmp_path: Path) -> None:
    async with (
        running_host() as host,
        running_platform(database_url, tmp_path, host, max_sandboxes=2) as platform,
    ):
        team_id, key = await make_team(platform)
        transport = httpx.ASGITransport(create_app(platform))
        async with httpx.AsyncClient(
            transport=transport, base_url="http://control", headers={"x-api-key": key}
        ) as http:
            team = Team(team_id, key, http)
            one = (await make(team))["sandboxID"]
            spare = (await make(team))["sandboxID"]
            refused(await http.post("/v2/sandboxes", json={"templateID": "base"}), 429)
            refused(await http.post(f"/sandboxes/{one}/fork"), 429)
            await http.delete(f"/sandboxes/{spare}")
            await host.stop()
            await until_state(platform, one, State.MISSING)
            # Still there for whoever lists, and somebody may try again.
            assert ids(await http.get("/v2/sandboxes")) == [one]
            told = refused(await http.post(f"/sandboxes/{one}/pause"), 503, should_retry=True)
            assert "cannot be reached" in told
            answer = await http.post("/v2/sandboxes", json={"templateID": "base"})
            refused(answer, 503, should_retry=True)


class Silent(Hosts):
    """Hosts whose guests do not answer."""

    def __init__(self, hosts: Hosts) -> None:
        vars(self).update(vars(hosts))

    async def agent(self, host_id: str) -> Agent:
        agent = await super().agent(host_id)

        class Deaf:
            def __getattr__(self, name: str) -> Any:
                if name in {"list_sandboxes", "describe", "flush_metrics"}:
                    return getattr(agent, name)

                async def fail(*_: object, **__: object) -> None:
                    error = GuestSilent("it says nothing")
                    error.answered = True
                    raise error

                return fail

        return Deaf()  # type: ignore[return-value]


async def test_a_guest_that_does_not_answer(team: Team, platform: Platform) -> None:
    one = (await make(team))["sandboxID"]
    platform.sandboxes._hosts = Silent(platform.hosts)
    path = f"/sandboxes/{one}"
    told = await team.http.post(f"{path}/snapshots", json={})
    refused(told, 409)
    assert told.json()["error_code"] == "sandbox_snapshot_guest_agent_unresponsive"
    # A 409 to a pause would say that it is paused.
    strict = await team.http.post(f"{path}/pause", json={"requireHealthyGuest": True})
    assert "does not answer" in refused(strict, 503, should_retry=True)
    with pytest.raises(NotFound):
        await platform.sandboxes.settled(platform_caller(), one)


def platform_caller() -> Any:
    from sandmartin.control.caller import system

    return system("elsewhere")
