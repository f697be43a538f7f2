"""Teams through the API: roles, invitations, leaving, and how a team ends."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

from sqlalchemy import select

from sandmartin.control import tables
from sandmartin.control.caller import Role
from sandmartin.control.platform import Platform
from tests.control.conftest import (
    DEADLINE_S,
    Person,
    Team,
    add_member,
    client_of,
    logged_in,
    make_team,
    make_user,
    new_person,
    running_platform,
    start_host,
)
from tests.control.test_sandboxes import create
from tests.fakes_agent import machine_directory


async def role_in(platform: Platform, team_id: str, user_id: str) -> str | None:
    async with platform.db.read() as session:
        member = await session.get(tables.Member, (team_id, user_id))
        return member.role if member else None


async def test_roles(platform: Platform) -> None:
    team_id, _ = await make_team(platform)
    path = f"/v1/teams/{team_id}"
    async with (
        new_person(platform, team_id, Role.OWNER) as owner,
        new_person(platform, team_id, Role.ADMIN) as admin,
        new_person(platform, team_id, Role.ADMIN) as other_admin,
        new_person(platform, team_id, Role.MEMBER) as member,
    ):

        async def give(by: Person, to: Person, role: str) -> int:
            answer = await by.http.patch(f"{path}/members/{to.user_id}", json={"role": role})
            return answer.status_code

        assert await give(member, member, "owner") == 403
        assert await give(admin, admin, "owner") == 403
        assert await give(admin, other_admin, "member") == 403
        assert await give(admin, owner, "member") == 403
        assert await give(admin, member, "owner") == 403
        assert await give(admin, member, "admin") == 204
        assert await give(owner, member, "member") == 204
        assert await give(owner, owner, "admin") == 409, "the last owner"
        assert (await admin.http.patch(path, json={"name": "gulls"})).json()["name"] == "gulls"
        for by, invites in ((member, "member"), (admin, "owner")):
            answer = await by.http.post(f"{path}/invitations", json={"role": invites})
            assert answer.status_code == 403
        for by, gone in ((member, admin), (admin, owner), (admin, other_admin)):
            answer = await by.http.delete(f"{path}/members/{gone.user_id}")
            assert answer.status_code == 403
        assert (await admin.http.delete(path)).status_code == 403
        assert (await owner.http.post(f"{path}/leave")).status_code == 409
        assert await give(owner, admin, "owner") == 204
        # Of two owners who leave at once one stays.
        both = await asyncio.gather(*(by.http.post(f"{path}/leave") for by in (owner, admin)))
        assert sorted(each.status_code for each in both) == [204, 409]
        stays = owner if both[0].status_code == 409 else admin
        assert await role_in(platform, team_id, stays.user_id) == "owner"


async def test_an_invitation_is_used_once(platform: Platform) -> None:
    team_id, _ = await make_team(platform)
    home, _ = await make_team(platform, "home")
    path = f"/v1/teams/{team_id}/invitations"
    async with (
        new_person(platform, team_id, Role.OWNER) as owner,
        new_person(platform, home, Role.OWNER, email="bo@example.org") as bo,
        new_person(platform, home, Role.OWNER) as eve,
    ):
        made = (await owner.http.post(path, json={"role": "admin"})).json()
        bound = (await owner.http.post(path, json={"email": "Bo@example.org"})).json()
        listed = await owner.http.get(path)
        assert {each["id"] for each in listed.json()} == {made["id"], bound["id"]}
        assert made["token"] not in listed.text
        assert made["url"].endswith(f"#invitation={made['token']}")
        accept = "/v1/invitations/accept"
        refused = await eve.http.post(accept, json={"token": bound["token"]})
        assert refused.status_code == 400
        answers = await asyncio.gather(
            *(by.http.post(accept, json={"token": made["token"]}) for by in (bo, eve))
        )
        assert sorted(each.status_code for each in answers) == [200, 400]
        joined = next(each.json() for each in answers if each.status_code == 200)
        assert (joined["id"], joined["role"]) == (team_id, "admin")
        gone = await owner.http.delete(f"{path}/{bound['id']}")
        assert gone.status_code == 204
        assert (await bo.http.post(accept, json={"token": bound["token"]})).status_code == 400
        late = (await owner.http.post(path, json={})).json()
        async with platform.db.write() as session:
            row = await session.get_one(tables.Invitation, late["id"])
            row.expires_at = time.time() - 1
        assert (await eve.http.post(accept, json={"token": late["token"]})).status_code == 400


async def test_who_leaves_takes_nothing_along(platform: Platform) -> None:
    team_id, _ = await make_team(platform)
    home, _ = await make_team(platform, "home")
    user_id = await make_user(platform, "bo@example.org")
    for each in (team_id, home):
        await add_member(platform, each, user_id, Role.ADMIN)
    async with (
        new_person(platform, team_id, Role.OWNER) as owner,
        logged_in(platform, user_id, team_id) as bo,
        logged_in(platform, user_id, home) as bo_at_home,
        client_of(platform) as http,
    ):
        key = (await bo.http.post("/v1/api-keys", json={"name": "mine"})).json()["key"]
        invited = await bo.http.post(f"/v1/teams/{team_id}/invitations", json={"role": "admin"})
        switched = await bo_at_home.http.post("/v1/auth/switch-team", json={"team_id": team_id})
        assert switched.json()["team_id"] == team_id
        back = await bo_at_home.http.post("/v1/auth/switch-team", json={"team_id": home})
        assert back.status_code == 200
        path = f"/v1/teams/{team_id}/members/{user_id}"
        assert (await owner.http.delete(path)).status_code == 204
        assert (await bo.http.get("/v1/me")).status_code == 401
        assert (await http.get("/v1/sandboxes", headers={"x-api-key": key})).status_code == 401
        assert (await bo_at_home.http.get("/v1/me")).status_code == 200
        assert (await bo_at_home.http.get(f"/v1/teams/{team_id}")).status_code == 404
        for url, body in (
            ("/v1/invitations/accept", {"token": invited.json()["token"]}),
            ("/v1/auth/switch-team", {"team_id": team_id}),
        ):
            assert (await bo_at_home.http.post(url, json=body)).status_code in {400, 404}
        assert await role_in(platform, team_id, user_id) is None


async def test_a_deleted_team_leaves_nothing(platform: Platform, team: Team) -> None:
    made = await create(team)
    paused = await create(team)
    await team.http.post(f"/v1/sandboxes/{paused['id']}/pause")
    snapshot = {"sandbox_id": made["id"], "name": "mine", "live": True}
    assert (await team.http.post("/v1/snapshots", json=snapshot)).status_code == 201
    async with new_person(platform, team.team_id, Role.OWNER) as owner:
        assert (await owner.http.delete(f"/v1/teams/{team.team_id}")).status_code == 204
        assert (await owner.http.get("/v1/me")).status_code == 401
    assert (await team.http.get("/v1/sandboxes")).status_code == 401
    assert await left_of(platform, team.team_id) == []


async def left_of(platform: Platform, team_id: str) -> list[str]:
    row, template = tables.Sandbox, tables.Template
    async with platform.db.read() as session:
        ids = await session.scalars(
            select(row.sandbox_id).where(row.team_id == team_id, row.state != "stopped")
        )
        names = await session.scalars(select(template.name).where(template.team_id == team_id))
        return [*ids, *names]


async def test_what_could_not_be_destroyed_is_destroyed_later(
    database_url: str, tmp_path: Path
) -> None:
    """The host is away while a team is deleted."""
    with machine_directory() as directory:
        host = await start_host(directory)
        async with running_platform(database_url, tmp_path, host) as platform:
            team_id, key = await make_team(platform)
            async with client_of(platform, **{"x-api-key": key}) as http:
                team = Team(team_id, key, http)
                made = await create(team)
                snapshot = {"sandbox_id": made["id"], "name": "mine", "live": True}
                assert (await http.post("/v1/snapshots", json=snapshot)).status_code == 201
                await host.stop()
                async with new_person(platform, team_id, Role.OWNER) as owner:
                    deleted = await owner.http.delete(f"/v1/teams/{team_id}")
                    assert deleted.status_code == 204, deleted.text
                assert (await http.get("/v1/sandboxes")).status_code == 401
            assert set(await left_of(platform, team_id)) == {made["id"], "mine"}
            host = await start_host(directory)
            deadline = time.monotonic() + DEADLINE_S
            while await left_of(platform, team_id):
                assert time.monotonic() < deadline
                await asyncio.sleep(0.05)
            [row] = await platform.hosts.list_reachable()
            found = await (await platform.hosts.agent(row.host_id)).list_templates()
            assert [each.name for each in found] == ["base"]
        await host.stop()


async def test_teams_do_not_come_for_nothing(platform: Platform) -> None:
    team_id, _ = await make_team(platform)
    async with new_person(platform, team_id, Role.OWNER) as person:
        codes = [
            (await person.http.post("/v1/teams", json={"name": f"t{n}"})).status_code
            for n in range(10)
        ]
        assert codes == [201] * 9 + [429]
        assert len((await person.http.get("/v1/teams")).json()) == 10
