"""Who sees which records of what was done."""

from __future__ import annotations

from dataclasses import replace

import pytest

from sandmartin.control import audit
from sandmartin.control.caller import ActorKind, Caller, Role
from sandmartin.control.platform import Platform
from sandmartin.errors import Denied
from tests.control.conftest import Team
from tests.control.test_sandboxes import create


async def test_records_are_paged_and_filtered(team: Team, other_team: Team) -> None:
    made = await create(team)
    path = f"/v1/sandboxes/{made['id']}"
    await team.http.post(f"{path}/pause")
    await team.http.delete(path)
    await create(other_team)
    pages, query = [], "limit=1"
    while True:
        page = (await team.http.get(f"/v1/audit-logs?{query}")).json()
        pages.append(page["items"])
        if page["next"] is None:
            break
        query = f"limit=1&before={page['next']}"
    assert [len(each) for each in pages] == [1, 1, 1]
    records = [each[0] for each in pages]
    assert [each["action"] for each in records] == [
        "sandbox.destroyed",
        "sandbox.paused",
        "sandbox.created",
    ]
    assert {each["resource_id"] for each in records} == {made["id"]}
    assert records[0]["actor_type"] == "key"
    assert records[0]["request_id"].startswith("rq")
    chosen = (await team.http.get("/v1/audit-logs?action=sandbox.paused")).json()["items"]
    assert chosen == [records[1]]
    nothing = (await team.http.get("/v1/audit-logs?resource_type=channel")).json()
    assert nothing == {"items": [], "next": None}
    for wrong in ("limit=0", "limit=1000", "before=-1", "before=x"):
        assert (await team.http.get(f"/v1/audit-logs?{wrong}")).status_code == 400
    refused = await team.http.get("/v1/admin/audit-logs")
    assert (refused.status_code, refused.json()["error"]["code"]) == (403, "denied")


async def test_members_see_what_concerns_all(
    platform: Platform, team: Team, other_team: Team
) -> None:
    member = Caller(
        kind=ActorKind.USER, actor_id="u", name="u", team_id=team.team_id, role=Role.MEMBER
    )
    async with platform.db.write() as session:
        audit.record(session, member, "member.added", "member", "u", scope="admin")
        audit.record(session, member, "channel.created", "channel", "c")
        audit.record(
            session, member, "host.added", "host", "h", scope="admin", team_id=other_team.team_id
        )

    async def seen(caller: Caller) -> list[str]:
        page = await audit.list_records(platform.db, caller, audit.Filter())
        return [row.action for row in page.rows]

    everything = ["channel.created", "member.added"]
    assert await seen(member) == ["channel.created"]
    assert await seen(replace(member, kind=ActorKind.KEY, role=None)) == ["channel.created"]
    for caller in (
        replace(member, role=Role.ADMIN),
        replace(member, role=Role.OWNER),
        replace(member, is_admin=True),
    ):
        assert await seen(caller) == everything
    with pytest.raises(Denied):
        await audit.list_all_records(
            platform.db, replace(member, role=Role.OWNER), audit.Filter(), other_team.team_id
        )
    admin = replace(member, is_admin=True)
    rows = (await audit.list_all_records(platform.db, admin, audit.Filter())).rows
    assert [row.action for row in rows] == ["host.added", *everything]
    theirs = await audit.list_all_records(platform.db, admin, audit.Filter(), other_team.team_id)
    assert [row.action for row in theirs.rows] == ["host.added"]
