"""The way into a sandbox, on both databases: one transaction, and nobody who may not."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from sqlalchemy import event, select

from sandmartin.control import tables
from sandmartin.control.platform import Platform
from tests.control.conftest import Team, client_of
from tests.control.test_sandboxes import create

RUN = {"cmd": "echo", "args": ["hi"]}


@contextmanager
def connections_used(platform: Platform) -> Iterator[list[object]]:
    """The connections of the database that this very task takes out of the pool."""
    taken: list[object] = []
    me = asyncio.current_task()

    def note(_connection: object, record: object, _proxy: object) -> None:
        if asyncio.current_task() is me:
            taken.append(record)

    pool = platform.db.engine.sync_engine.pool
    event.listen(pool, "checkout", note)
    try:
        yield taken
    finally:
        event.remove(pool, "checkout", note)


async def test_a_new_key_used_by_many_at_once(team: Team, platform: Platform) -> None:
    """Each reads, and notes the key's use: more of them than there are connections."""
    path = f"/v1/sandboxes/{(await create(team))['id']}/exec"
    async with platform.db.write() as session:
        key = await session.scalar(select(tables.ApiKey).where(tables.ApiKey.name == "test"))
        assert key is not None
        key.last_used_at = None
    answers = await asyncio.gather(*(team.http.post(path, json=RUN) for _ in range(30)))
    assert {each.status_code for each in answers} == {200}, answers[0].text
    assert {each.json()["stdout"] for each in answers} == {"hi"}


async def test_a_command_reads_once(team: Team, platform: Platform) -> None:
    path = f"/v1/sandboxes/{(await create(team))['id']}"
    with connections_used(platform) as taken:
        assert (await team.http.post(f"{path}/exec", json=RUN)).status_code == 200
        assert len(taken) == 1
        assert (await team.http.post(f"{path}/ping")).status_code == 204
        assert len(taken) == 2
        # The same, found piece by piece.
        assert (await team.http.get(f"{path}/checkpoints")).status_code == 200
        assert len(taken) == 5


async def test_who_may_not_comes_in_nowhere(
    team: Team, other_team: Team, platform: Platform
) -> None:
    path = f"/v1/sandboxes/{(await create(team))['id']}"
    routes = [("POST", f"{path}/exec"), ("POST", f"{path}/exec/stream"), ("GET", f"{path}/console")]
    async with client_of(platform) as nobody:
        for method, url in routes:
            assert (await nobody.request(method, url, json=RUN)).status_code == 401, url
            assert (await other_team.http.request(method, url, json=RUN)).status_code == 404, url
    keys = {"x-api-key": "e2b_" + "0" * 40}
    async with client_of(platform, **keys) as unknown:
        assert (await unknown.post(f"{path}/exec", json=RUN)).status_code == 401
    async with client_of(platform, authorization=f"Bearer {team.key}") as bearer:
        assert (await bearer.post(f"{path}/exec", json=RUN)).json()["stdout"] == "hi"
