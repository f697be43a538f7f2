"""Accounts through the API: how people come in, what they may do with theirs, how they go."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import select, update

from sandmartin.control import bootstrap, tables
from sandmartin.control.caller import Role, Whence
from sandmartin.control.db import Base
from sandmartin.control.keys import add_key
from sandmartin.control.limits import Limits, Rate, TooMany, Use
from sandmartin.control.platform import Platform
from sandmartin.control.seal import digest
from sandmartin.control.settings import ControlSettings
from sandmartin.control.tables import PLATFORM_TEAM_ID
from sandmartin.errors import Invalid
from tests.control.conftest import (
    RunningHost,
    Team,
    add_member,
    client_of,
    logged_in,
    make_team,
    make_user,
    new_person,
    running_platform,
)

PASSWORD = "a nest in the bank"


@pytest.fixture
async def open_platform(
    database_url: str, tmp_path: Path, host: RunningHost
) -> AsyncIterator[Platform]:
    """One at which anybody may sign up."""
    async with running_platform(database_url, tmp_path, host, sign_up="open") as platform:
        yield platform


async def sign_up(http: httpx.AsyncClient, email: str, **more: Any) -> dict[str, Any]:
    """A new account; the client is logged in from now on."""
    body = {"email": email, "password": PASSWORD, **more}
    answer = await http.post("/v1/auth/signup", json=body)
    assert answer.status_code == 201, answer.text
    return take_session(http, answer)


def take_session(http: httpx.AsyncClient, answer: httpx.Response) -> dict[str, Any]:
    me: dict[str, Any] = answer.json()
    http.headers["x-csrf-token"] = me["csrf_token"]
    return me


async def log_in(http: httpx.AsyncClient, email: str, password: str = PASSWORD) -> httpx.Response:
    answer = await http.post("/v1/auth/login", json={"email": email, "password": password})
    if answer.status_code == 200:
        take_session(http, answer)
    return answer


async def test_an_account_lives(open_platform: Platform) -> None:
    async with client_of(open_platform) as http, client_of(open_platform) as elsewhere:
        me = await sign_up(http, " Ann@Example.org ", name="Ann")
        assert (me["email"], me["admin"], me["has_password"]) == ("ann@example.org", True, True)
        assert [(team["name"], team["role"]) for team in me["teams"]] == [("Ann's team", "owner")]
        cookie = http.cookies["sandmartin_session"]
        made = await http.post("/v1/sandboxes", json={"memory_mb": 128, "disk_size_mb": 8})
        assert made.status_code == 201, made.text
        assert (await log_in(elsewhere, "ann@example.org")).status_code == 200
        body = {"current": "wrong", "new": "another nest"}
        assert (await http.post("/v1/me/password", json=body)).status_code == 403
        body["current"] = PASSWORD
        assert (await http.post("/v1/me/password", json=body)).status_code == 204
        # It goes on here, and ends elsewhere.
        assert (await http.get("/v1/me")).status_code == 200
        assert (await elsewhere.get("/v1/me")).status_code == 401
        assert (await log_in(elsewhere, "ann@example.org")).status_code == 401
        assert (await http.post("/v1/auth/logout")).status_code == 204
        assert "sandmartin_session" not in http.cookies
        again = await http.get("/v1/me", headers={"cookie": f"sandmartin_session={cookie}"})
        assert again.status_code == 401


async def test_a_deleted_account_takes_with_it_what_was_its_own(open_platform: Platform) -> None:
    async with client_of(open_platform) as first, client_of(open_platform) as http:
        await sign_up(first, "admin@example.org")
        refused = await first.request("DELETE", "/v1/me", json={"confirm": "admin@example.org"})
        assert refused.status_code == 409, "the last administrator"
        me = await sign_up(http, "bo@example.org")
        new = {"memory_mb": 128, "disk_size_mb": 8}
        sandbox_id = (await http.post("/v1/sandboxes", json=new)).json()["id"]
        key = (await http.post("/v1/api-keys", json={"name": "ci"})).json()["key"]
        wrong = await http.request("DELETE", "/v1/me", json={"confirm": "bo"})
        assert wrong.status_code == 400
        gone = await http.request("DELETE", "/v1/me", json={"confirm": "bo@example.org"})
        assert gone.status_code == 204, gone.text
        assert (await first.get("/v1/sandboxes", headers={"x-api-key": key})).status_code == 401
        assert (await log_in(http, "bo@example.org")).status_code == 401
        async with open_platform.db.read() as session:
            sandbox = await session.get_one(tables.Sandbox, sandbox_id)
            user = await session.get_one(tables.User, me["id"])
            emails = list(await session.scalars(select(tables.User.email)))
        assert sandbox.state == "stopped"
        assert (user.password_hash, user.active) == (None, False)
        assert "bo@example.org" not in emails
        # The address is free again, and its new account has nothing of the old one.
        assert (await sign_up(http, "bo@example.org"))["id"] != me["id"]


async def test_the_first_account_is_the_administrators(platform: Platform) -> None:
    url = await bootstrap.ensure_first_invitation(platform.db, platform.accounts)
    newer = await bootstrap.ensure_first_invitation(platform.db, platform.accounts)
    old, token = (each.rpartition("=")[2] for each in (url, newer))
    async with client_of(platform) as http:
        body = {"email": "ann@example.org", "password": PASSWORD}
        assert (await http.post("/v1/auth/signup", json=body)).status_code == 403
        withdrawn = await http.post("/v1/auth/signup", json=body | {"invitation": old})
        assert withdrawn.status_code == 400
        me = await sign_up(http, "ann@example.org", invitation=token)
        assert me["admin"]
        assert [(each["name"], each["role"]) for each in me["teams"]] == [("default", "owner")]
        assert await bootstrap.ensure_first_invitation(platform.db, platform.accounts) == ""
        invited = await http.post("/v1/admin/invitations", json={"email": "bo@example.org"})
        token = invited.json()["token"]
        listed = (await http.get("/v1/admin/invitations")).json()
        assert [each["email"] for each in listed] == ["bo@example.org"]
        assert token not in json.dumps(listed)
    async with client_of(platform) as http:
        other = {"email": "eve@example.org", "password": PASSWORD, "invitation": token}
        assert (await http.post("/v1/auth/signup", json=other)).status_code == 400
        assert not (await sign_up(http, "bo@example.org", invitation=token))["admin"]
        again = {"email": "bo2@example.org", "password": PASSWORD, "invitation": token}
        assert (await http.post("/v1/auth/signup", json=again)).status_code == 400
        assert (await http.get("/v1/admin/users")).status_code == 403


async def test_of_many_first_accounts_one_is_the_administrators(open_platform: Platform) -> None:
    async with client_of(open_platform) as http:
        bodies = [{"email": f"u{n}@example.org", "password": PASSWORD} for n in range(4)]
        bodies.append(bodies[0])
        answers = await asyncio.gather(
            *(http.post("/v1/auth/signup", json=body) for body in bodies)
        )
    assert sorted(each.status_code for each in answers) == [201] * 4 + [409]
    assert sum(each.json().get("admin", False) for each in answers) == 1


async def test_a_closed_platform(database_url: str, tmp_path: Path) -> None:
    async with running_platform(database_url, tmp_path, sign_up="closed") as platform:
        async with client_of(platform) as http:
            body = {"email": "ann@example.org", "password": PASSWORD, "invitation": "x"}
            assert (await http.post("/v1/auth/signup", json=body)).status_code == 403
            assert (await http.get("/v1/auth/settings")).json()["sign_up"] == "closed"
        assert await bootstrap.ensure_first_invitation(platform.db, platform.accounts) == ""
    with pytest.raises(Invalid, match="sign_up"):
        async with running_platform(database_url, tmp_path, sign_up="everybody"):
            pass


async def test_bad_sign_ups(open_platform: Platform) -> None:
    good = {"email": "ann@example.org", "password": PASSWORD}
    bad: list[dict[str, Any]] = [
        {"email": "ann"},
        {"email": "an n@example.org"},
        {"email": "ann\x00@example.org"},
        {"password": "short"},
        {"password": "x" * 300},
        {"name": "x\nforged log line"},
        {"admin": True},
    ]
    async with client_of(open_platform) as http:
        for each in bad:
            answer = await http.post("/v1/auth/signup", json={**good, **each})
            assert answer.status_code == 400, each
            assert PASSWORD not in answer.text
        elsewhere = {"origin": "https://evil.example"}
        forged = await http.post("/v1/auth/signup", json=good, headers=elsewhere)
        assert forged.status_code == 403
        assert (await http.get("/v1/me")).status_code == 401


async def test_what_is_disabled_stops_at_once(platform: Platform) -> None:
    team_id, _ = await make_team(platform)
    async with (
        new_person(platform, team_id, Role.OWNER, is_admin=True) as admin,
        new_person(platform, team_id, Role.MEMBER) as member,
    ):
        key = (await member.http.post("/v1/api-keys", json={"name": "mine"})).json()["key"]
        path = f"/v1/admin/users/{member.user_id}/active"

        async def works() -> list[int]:
            by_key = await admin.http.get("/v1/sandboxes", headers={"x-api-key": key})
            return [by_key.status_code, (await member.http.get("/v1/me")).status_code]

        assert await works() == [200, 200]
        assert (await admin.http.put(path, json={"active": False})).status_code == 200
        assert await works() == [401, 401]
        assert (await admin.http.put(path, json={"active": True})).status_code == 200
        assert await works() == [200, 401], "a session does not come back, a key does"
        own = f"/v1/admin/users/{admin.user_id}"
        for path, body in (
            (f"{own}/active", {"active": False}),
            (f"{own}/admin", {"admin": False}),
        ):
            assert (await admin.http.put(path, json=body)).status_code == 409


async def test_a_key_is_no_stronger_than_its_maker(platform: Platform) -> None:
    team_id, plain = await make_team(platform)
    async with (
        new_person(platform, team_id, Role.OWNER, is_admin=True) as admin,
        new_person(platform, team_id, Role.MEMBER) as member,
        client_of(platform) as http,
    ):
        new = {"name": "admin", "admin": True}
        assert (await member.http.post("/v1/api-keys", json=new)).status_code == 403
        made = (await admin.http.post("/v1/api-keys", json=new)).json()
        of_admin = {"x-api-key": made["key"]}
        assert (await http.get("/v1/admin/users", headers=of_admin)).status_code == 200
        child = (await http.post("/v1/api-keys", json=new, headers=of_admin)).json()
        assert child["created_by"] == admin.user_id
        for key in (plain, "e2b_" + "0" * 40):
            answer = await http.post("/v1/api-keys", json=new, headers={"x-api-key": key})
            assert answer.status_code in {401, 403}
        refused = await member.http.delete(f"/v1/api-keys/{made['id']}")
        assert refused.status_code == 403
        async with platform.db.write() as session:
            await session.execute(
                update(tables.User)
                .where(tables.User.user_id == admin.user_id)
                .values(is_admin=False)
            )
        for key in (made["key"], child["key"]):
            headers = {"x-api-key": key}
            assert (await http.get("/v1/admin/users", headers=headers)).status_code == 403
            assert (await http.get("/v1/sandboxes", headers=headers)).status_code == 200
        gone = await admin.http.delete(f"/v1/api-keys/{child['id']}")
        assert gone.status_code == 403, "only administrators of the platform end those of one"


async def test_a_session_is_new_with_each_login(open_platform: Platform) -> None:
    async with client_of(open_platform) as http:
        await sign_up(http, "ann@example.org")
        for given in ("chosen-by-an-attacker", http.cookies["sandmartin_session"]):
            http.cookies.clear()
            headers = {"cookie": f"sandmartin_session={given}"}
            body = {"email": "ann@example.org", "password": PASSWORD}
            answer = await http.post("/v1/auth/login", json=body, headers=headers)
            assert answer.cookies["sandmartin_session"] != given
            http.cookies.clear()
            assert (await http.get("/v1/me", headers=headers)).status_code == 401
        expired = answer.cookies["sandmartin_session"]
        async with open_platform.db.write() as session:
            row = await session.get_one(tables.BrowserSession, digest(expired))
            row.expires_at = time.time() - 1
        headers = {"cookie": f"sandmartin_session={expired}"}
        assert (await http.get("/v1/me", headers=headers)).status_code == 401


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
async def test_cookies(database_url: str, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"sign_up": "open", "public_url": "https://sand.example/"}
    async with (
        running_platform(database_url, tmp_path, **settings) as platform,
        client_of(platform) as http,
    ):
        body = {"email": "ann@example.org", "password": PASSWORD}
        answer = await http.post("/v1/auth/signup", json=body)
        name, _, rest = answer.headers["set-cookie"].partition("=")
        flags = {each.strip().lower() for each in rest.split(";")[1:]}
        assert name == "__Host-sandmartin"
        assert {"httponly", "secure", "samesite=lax", "path=/"} <= flags
        assert not any(each.startswith("domain") for each in flags)


async def test_guesses_are_limited(open_platform: Platform) -> None:
    async with client_of(open_platform) as http:
        await sign_up(http, "ann@example.org")
        http.cookies.clear()
        codes = [(await log_in(http, "ann@example.org", "wrong")).status_code for _ in range(12)]
        assert codes == [401] * 10 + [429] * 2
        answer = await log_in(http, "ann@example.org")
        assert answer.status_code == 429, "the right one too"
        assert 0 < int(answer.headers["retry-after"]) <= 60
        assert answer.json()["error"]["code"] == "exhausted"
        # Another account is not locked out by it.
        assert (await log_in(http, "bo@example.org")).status_code == 401


async def test_tries_are_counted_by_all_at_once(open_platform: Platform) -> None:
    now = 1000.0
    limits = Limits(open_platform.db, lambda: now)
    use = Use(Rate("test", 5, 10.0), "somebody")

    async def take() -> bool:
        try:
            await limits.take(use)
        except TooMany:
            return False
        return True

    assert sum(await asyncio.gather(*(take() for _ in range(12)))) == 5
    with pytest.raises(TooMany) as caught:
        await limits.take(Use(use.rate, "2001:db8::1"), use)
    assert caught.value.retry_after_s == 10.0
    await limits.give_back(use)
    assert [await take(), await take()] == [True, False]
    now += 20.0
    assert [await take(), await take(), await take()] == [True, True, False]
    # One with many addresses of its own network is one; what was refused above took nothing.
    for number in range(5):
        await limits.take(Use(use.rate, f"2001:db8::{number}"))
    with pytest.raises(TooMany):
        await limits.take(Use(use.rate, "2001:db8::ffff"))


async def test_who_has_an_account_shows_not_in_time(open_platform: Platform) -> None:
    async with client_of(open_platform) as http:
        await sign_up(http, "ann@example.org")

    async def fastest(email: str) -> float:
        times = []
        for _ in range(4):
            began = time.perf_counter()
            with pytest.raises(Exception, match="the e-mail address or the password is wrong"):
                await open_platform.accounts.log_in(email, "wrong password", Whence())
            times.append(time.perf_counter() - began)
        return min(times)

    known, unknown = await fastest("ann@example.org"), await fastest("bo@example.org")
    assert 0.5 < known / unknown < 2.0, (known, unknown)


async def test_secrets_are_nowhere(
    open_platform: Platform, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    async with client_of(open_platform) as http:
        me = await sign_up(http, "ann@example.org")
        await log_in(http, "ann@example.org", "a wrong password")
        await log_in(http, "ann@example.org")
        await http.post("/v1/auth/login", json={"email": 1, "password": "a wrong password"})
        await http.post("/v1/me/password", json={"current": "a wrong password", "new": PASSWORD})
        key = (await http.post("/v1/api-keys", json={"name": "ci"})).json()["key"]
        path = f"/v1/teams/{me['team_id']}/invitations"
        token = (await http.post(path, json={})).json()["token"]
        await http.post("/v1/invitations/accept", json={"token": token})
        secrets = [PASSWORD, "a wrong password", key, token, http.cookies["sandmartin_session"]]
    kept = []
    async with open_platform.db.read() as session:
        for table in Base.metadata.sorted_tables:
            kept += [str(tuple(row)) for row in await session.execute(select(table))]
    assert any("key.created" in row for row in kept)
    assert "a login failed" in caplog.text
    for secret in secrets:
        assert secret not in caplog.text
        assert not [row for row in kept if secret in row]
    secret_settings = ControlSettings(github_client_secret="hush", secret_key="hush")
    assert "hush" not in repr(secret_settings)


async def test_administrators_see_all_teams(platform: Platform) -> None:
    team_id, key = await make_team(platform)
    user_id = await make_user(platform, "admin@example.org", is_admin=True)
    own_team, _ = await make_team(platform, "admins")
    await add_member(platform, own_team, user_id, Role.MEMBER)
    async with client_of(platform, **{"x-api-key": key}) as theirs:
        new = {"memory_mb": 128, "disk_size_mb": 8}
        sandbox_id = (await theirs.post("/v1/sandboxes", json=new)).json()["id"]
        async with logged_in(platform, user_id, own_team) as admin:
            assert (await admin.http.get(f"/v1/sandboxes/{sandbox_id}")).status_code == 404
            listed = (await admin.http.get("/v1/admin/sandboxes")).json()["items"]
            assert [(each["id"], each["team_id"]) for each in listed] == [(sandbox_id, team_id)]
            first = (await admin.http.get("/v1/admin/teams", params={"limit": 2})).json()
            rest = {"limit": 2, "cursor": first["next"]}
            second = (await admin.http.get("/v1/admin/teams", params=rest)).json()
            teams = {each["id"]: each for each in first["items"] + second["items"]}
            assert teams.keys() >= {team_id, own_team}
            assert [teams[team_id][name] for name in ("sandboxes", "running")] == [1, 1]
            assert teams[own_team]["members"] == 1
            assert first["defaults"]["max_sandboxes"] == platform.settings.max_sandboxes
            users = (await admin.http.get("/v1/admin/users")).json()["items"]
            mine = next(each for each in users if each["id"] == user_id)
            assert [each["id"] for each in mine["teams"]] == [own_team]
            quotas = {"max_sandboxes": 1, "max_vcpus": None, "max_memory_mb": None}
            path = f"/v1/admin/teams/{team_id}/quotas"
            assert (await admin.http.put(path, json=quotas)).json()["max_sandboxes"] == 1
            assert (await theirs.post("/v1/sandboxes", json=new)).status_code == 429
            gone = await admin.http.delete(f"/v1/admin/sandboxes/{sandbox_id}")
            assert gone.status_code == 204
            assert (await theirs.post("/v1/sandboxes", json=new)).status_code == 201
            assert (await admin.http.delete(f"/v1/admin/teams/{team_id}")).status_code == 204
        assert (await theirs.get("/v1/sandboxes")).status_code == 401
    async with platform.db.read() as session:
        query = select(tables.Sandbox.state).where(tables.Sandbox.team_id == team_id)
        assert set(await session.scalars(query)) == {"stopped"}
        actors = select(tables.AuditRecord.actor_id).where(
            tables.AuditRecord.resource_id == sandbox_id,
            tables.AuditRecord.action == "sandbox.destroyed",
            tables.AuditRecord.team_id == team_id,
        )
        assert list(await session.scalars(actors)) == [user_id]


async def test_the_platforms_templates(platform: Platform, team: Team) -> None:
    async with platform.db.write() as session:
        _, key = add_key(session, PLATFORM_TEAM_ID, "test", "test")
    async with (
        client_of(platform, **{"x-api-key": key}) as publisher,
        new_person(platform, team.team_id, Role.MEMBER, is_admin=True) as admin,
    ):
        new = {"memory_mb": 128, "disk_size_mb": 8}
        made = (await publisher.post("/v1/sandboxes", json=new)).json()
        snapshot = {"sandbox_id": made["id"], "name": "golden"}
        assert (await publisher.post("/v1/snapshots", json=snapshot)).status_code == 201
        assert (await publisher.delete(f"/v1/sandboxes/{made['id']}")).status_code == 204

        async def names(http: httpx.AsyncClient, path: str) -> set[str]:
            return {each["name"] for each in (await http.get(path)).json()}

        assert await names(team.http, "/v1/templates") == {"base", "golden"}
        for http in (team.http, admin.http):
            for name in ("base", "golden"):
                assert (await http.delete(f"/v1/templates/{name}")).status_code == 403
        assert (await team.http.delete("/v1/admin/templates/golden")).status_code == 403
        assert (await admin.http.delete("/v1/admin/templates/base")).status_code == 403
        assert (await admin.http.delete("/v1/admin/templates/nope")).status_code == 404
        assert (await admin.http.delete("/v1/admin/templates/golden")).status_code == 204
        assert await names(admin.http, "/v1/admin/templates") == {"base"}
