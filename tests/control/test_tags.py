"""Tags of templates: `app:v2` beside `app`, on both databases."""

from __future__ import annotations

from dataclasses import replace

import pytest

from sandmartin.control import tables
from sandmartin.control.caller import Caller, system
from sandmartin.control.platform import Platform
from sandmartin.control.states import TemplateState
from sandmartin.errors import Denied, Invalid, NotFound
from tests.control.conftest import RunningHost, Team
from tests.control.test_builds import Shell, begin, end, shell
from tests.control.test_sandboxes import create

pytestmark = pytest.mark.qemu_img
__all__ = ["shell"]


async def built(team: Team, name: str, *tags: str, text: str = "RUN one\n") -> str:
    ended = await end(team.http, await begin(team.http, name, text, tags=list(tags)))
    assert ended["state"] == "ready", ended
    return str(ended["template_id"])


async def tags_of(platform: Platform, caller: Caller, name: str) -> dict[str, str]:
    return {each.tag: each.template_id for each in await platform.tags.list(caller, name)}


async def test_a_name_moves_to_what_was_built_last(
    team: Team, platform: Platform, shell: Shell
) -> None:
    caller = system(team.team_id)
    first = await built(team, "app:v1", "default")
    assert await tags_of(platform, caller, "app") == {"v1": first, "default": first}
    sandbox = await create(team, template="app")
    second = await built(team, "app", text="RUN two\n")
    assert await tags_of(platform, caller, "app") == {"v1": first, "default": second}
    assert (await platform.templates.get(caller, "app")).template_id == second
    assert (await platform.templates.get(caller, "app:v1")).name == "app:v1"
    # The last tag of the first one goes: nobody sees it any more, and what was made of it runs.
    third = await built(team, "app:v1", text="RUN three\n")
    assert (await platform.templates.get(caller, "app:v1")).template_id == third
    async with platform.db.read() as session:
        row = await session.get(tables.Template, first)
    assert row is None or row.state == TemplateState.RETIRED
    found = await team.http.get(f"/v1/sandboxes/{sandbox['id']}")
    assert found.json()["status"] == "running"


async def test_tags_are_given_and_taken(team: Team, platform: Platform, host: RunningHost) -> None:
    caller = system(team.team_id)
    sandbox = await create(team)
    snapshot = {"sandbox_id": sandbox["id"], "name": "frozen", "live": True}
    assert (await team.http.post("/v1/snapshots", json=snapshot)).status_code == 201
    (before,) = (await tags_of(platform, caller, "frozen")).values()
    await platform.tags.assign(caller, "frozen", ["v1", "v2"])
    assert set(await tags_of(platform, caller, "frozen")) == {"default", "v1", "v2"}
    await platform.tags.remove(caller, "frozen", ["default"])
    with pytest.raises(NotFound):
        await platform.templates.get(caller, "frozen")
    found = await platform.templates.get(caller, "frozen:v2")
    assert (found.name, found.template_id) == ("frozen:v1", before)
    assert await platform.tags.of([before]) == {before: ["v1", "v2"]}
    told = [each.kind for each in await platform.events.since(0, team_id=team.team_id)]
    assert told[-2:] == ["template.tagged", "template.untagged"]
    refused = await team.http.delete("/v1/templates/frozen:v2")
    assert refused.status_code == 409
    said = f"template 'frozen:v1' is needed by {sandbox['id']}"
    assert refused.json()["error"]["message"] == said
    await platform.sandboxes.destroy(caller, sandbox["id"])
    assert (await team.http.delete("/v1/templates/frozen:v2")).status_code == 204
    with pytest.raises(NotFound):
        await platform.templates.get(caller, "frozen:v1")


@pytest.mark.one_database
async def test_only_one_s_own_is_tagged(
    team: Team, other_team: Team, platform: Platform, shell: Shell
) -> None:
    await built(team, "app")
    caller, other = system(team.team_id), system(other_team.team_id)
    with pytest.raises(Denied):
        await platform.tags.assign(caller, "base", ["v1"])
    with pytest.raises(NotFound):
        await platform.tags.assign(other, "app", ["v1"])
    with pytest.raises(NotFound):
        await platform.tags.remove(replace(other), "app", ["default"])
    for tags in ([], ["a b"], ["x" * 200]):
        with pytest.raises(Invalid):
            await platform.tags.assign(caller, "app", tags)
