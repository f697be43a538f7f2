"""The snapshot race: a slow snapshot, a reconciler that looks all the time, a client that hangs up.

The mistake it guards against: a reconciler that does not know of the operation takes what a host
says meanwhile for the end of it. The test shows that mistake with the guard taken away.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.ext.asyncio import AsyncSession

from sandmartin.control.platform import Platform
from sandmartin.control.reconciler import Reconciler
from sandmartin.model import State
from tests.control.conftest import (
    PACE,
    Gate,
    RunningHost,
    Team,
    client_of,
    make_team,
    running_host,
    running_platform,
)
from tests.control.test_sandboxes import create
from tests.control.truth import agree, state_of, templates_of
from tests.fakes_vmm import SCRATCH

pytestmark = pytest.mark.qemu_img
MARK = b"not to be lost"


class Unguarded(Reconciler):
    """Judges rows to which something is being done, too."""

    async def _worked_on(self, session: AsyncSession, ids: list[str | None]) -> set[str]:
        return set()


@pytest.fixture
def gate() -> Gate:
    return Gate()


@pytest.fixture
async def host(gate: Gate) -> AsyncIterator[RunningHost]:
    async with running_host(step=gate) as host:
        yield host


@pytest.fixture
async def platform(database_url: str, tmp_path: Path, host: RunningHost) -> AsyncIterator[Platform]:
    # It does not look by itself: the test's own reconciler does.
    async with running_platform(database_url, tmp_path, host, working=False) as platform:
        yield platform


@pytest.fixture
async def team(platform: Platform) -> AsyncIterator[Team]:
    team_id, key = await make_team(platform)
    async with client_of(platform, **{"x-api-key": key}) as http:
        yield Team(team_id, key, http)


def reconciler(platform: Platform, kind: type[Reconciler]) -> Reconciler:
    parts = (platform.db, platform.hosts, platform.sandboxes, platform.templates, platform.events)
    return kind(*parts, PACE)


async def race(
    team: Team, platform: Platform, gate: Gate, kind: type[Reconciler], **body: Any
) -> set[str]:
    """What states the row had while the host was at it, and its client had gone."""
    gate.close()
    asking = asyncio.create_task(team.http.post("/v1/snapshots", json=body))
    await gate.reached()
    asking.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await asking
    looking, seen = reconciler(platform, kind), set()
    for _ in range(20):
        await looking.tick()
        await asyncio.sleep(2 * PACE.grace_s / 20)
        seen.add(await state_of(platform, body["sandbox_id"]))
    gate.open()
    return seen


@pytest.mark.parametrize("live", [True, False], ids=["live", "sleeping"])
async def test_a_snapshot_is_guarded(
    live: bool, team: Team, platform: Platform, host: RunningHost, gate: Gate
) -> None:
    made = await create(team)
    host.fakes.vmm.vms[made["id"]].write(SCRATCH, MARK)
    wanted = {"sandbox_id": made["id"], "name": "frozen", "live": live}
    assert await race(team, platform, gate, Reconciler, **wanted) == {State.SNAPSHOTTING}
    await agree(platform, host)
    after = State.RUNNING if live else State.PAUSED
    assert await state_of(platform, made["id"]) == after
    if not live:
        await team.http.post(f"/v1/sandboxes/{made['id']}/resume")
    assert host.fakes.vmm.vms[made["id"]].read(SCRATCH, len(MARK)) == MARK
    child = await create(team, template="frozen")
    assert host.fakes.vmm.vms[child["id"]].read(SCRATCH, len(MARK)) == MARK


async def test_without_the_guard_it_is_lost(
    team: Team, platform: Platform, host: RunningHost, gate: Gate
) -> None:
    made = await create(team)
    wanted = {"sandbox_id": made["id"], "name": "frozen", "live": True}
    seen = await race(team, platform, gate, Unguarded, **wanted)
    # The row was taken for running, and open to anything else, while the host was at it.
    assert State.RUNNING in seen
    # Even so nothing stays half done: the operation settles its template.
    await agree(platform, host)
    assert [each.name for each in await templates_of(platform)] == ["frozen"]
