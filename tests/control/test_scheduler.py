"""On which host a sandbox is to be, and why."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

import pytest

from sandmartin.control import tables
from sandmartin.control.bootstrap import ensure_platform
from sandmartin.control.db import Database
from sandmartin.control.scheduler import Choice, Need, choose_host
from sandmartin.control.states import HostState
from sandmartin.control.tables import PLATFORM_TEAM_ID
from sandmartin.errors import Exhausted, NotFound, Unavailable
from sandmartin.model import State, new_sandbox_id

TEMPLATE = "33333333-3333-3333-3333-333333333333"
on_one = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)


@dataclass(frozen=True)
class Town:
    """A database of hosts."""

    db: Database

    async def host(self, name: str, *, template: bool = True, **more: Any) -> str:
        host_id = str(uuid4())
        values: dict[str, Any] = {
            "cpus": 4,
            "memory_mb": 8192,
            "disk_free_mb": 100_000,
            "cpu_overcommit": 4.0,
            "memory_overhead_mb": 100,
            "state": HostState.ONLINE,
            **more,
        }
        async with self.db.write() as session:
            session.add(tables.Host(host_id=host_id, name=name, created_at=0.0, **values))
            await session.flush()
            if template:
                placed = tables.TemplatePlacement(template_id=TEMPLATE, host_id=host_id)
                session.add(placed)
        return host_id

    async def sandbox(self, host_id: str, state: State = State.RUNNING, **more: Any) -> None:
        async with self.db.write() as session:
            session.add(_row(host_id, state, **{"vcpus": 1, "memory_mb": 512, **more}))

    async def choose(self, *, without: tuple[str, ...] = (), **more: Any) -> Choice:
        async with self.db.write() as session:
            return await choose_host(session, _need(**more), without=without)

    async def place(self) -> str:
        """Choose, and be there, in one transaction, as a create does."""
        async with self.db.write() as session:
            choice = await choose_host(session, _need())
            session.add(_row(choice.host.host_id, State.STARTING, vcpus=1, memory_mb=512))
            return choice.host.name


def _row(host_id: str, state: State, **shape: int) -> tables.Sandbox:
    return tables.Sandbox(
        sandbox_id=new_sandbox_id(),
        team_id=PLATFORM_TEAM_ID,
        host_id=host_id,
        template="base",
        agent_template="base",
        state=state,
        state_at=time.time(),
        disk_size_mb=100,
        created_at=time.time(),
        **shape,
    )


def _need(**more: Any) -> Need:
    shape: dict[str, Any] = {"vcpus": 1, "memory_mb": 512, **more}
    return Need(template_id=TEMPLATE, template="base", **shape)


@pytest.fixture
async def town(database_url: str) -> AsyncIterator[Town]:
    db = Database.open(database_url)
    await ensure_platform(db)
    async with db.write() as session:
        session.add(
            tables.Template(
                template_id=TEMPLATE,
                team_id=PLATFORM_TEAM_ID,
                name="base",
                agent_name="base",
                kind="image",
                state="ready",
                created_at=0.0,
            )
        )
    try:
        yield Town(db)
    finally:
        await db.close()


async def test_the_scarcest_resource_decides(town: Town) -> None:
    # Each has plenty but of one thing.
    await town.host("few-processors", cpus=1, cpu_overcommit=2.0)
    await town.host("little-memory", memory_mb=1024)
    await town.host("little-disk", disk_free_mb=1100)
    best = await town.host("balanced")
    choice = await town.choose()
    assert (choice.host.host_id, choice.bottleneck) == (best, "memory")
    assert choice.others == {
        "few-processors": 0.5,
        "little-memory": round(612 / 1024, 3),
        "little-disk": round(1024 / 1100, 3),
    }
    assert choice.load == round(612 / 8192, 3)


async def test_all_that_is_on_a_host_counts_and_what_sleeps_does_not(town: Town) -> None:
    busy = await town.host("busy")
    for state in (State.RUNNING, State.STARTING, State.MISSING, State.STOPPING):
        await town.sandbox(busy, state)
    sleepy = await town.host("sleepy")
    for state in (State.PAUSED, State.STOPPED, State.ERROR, State.RUNNING):
        await town.sandbox(sleepy, state)
    choice = await town.choose()
    # Each counts with its memory and with what its monitor takes.
    assert (choice.host.name, choice.load) == ("sleepy", round(2 * 612 / 8192, 3))
    assert choice.others == {"busy": round(5 * 612 / 8192, 3)}


async def test_creates_at_once_see_each_other(town: Town) -> None:
    for name in ("one", "two", "three"):
        await town.host(name)
    names = await asyncio.gather(*(town.place() for _ in range(12)))
    assert sorted(names) == sorted(["one", "two", "three"] * 4)


async def test_the_last_place_is_given_away_once(town: Town) -> None:
    await town.host("small", memory_mb=2 * 612)
    outcomes = await asyncio.gather(*(town.place() for _ in range(6)), return_exceptions=True)
    assert [each for each in outcomes if isinstance(each, str)] == ["small"] * 2
    refusals = [each for each in outcomes if isinstance(each, Exhausted)]
    assert len(refusals) == 4 and "its memory would be used by 150%" in str(refusals[0])


@on_one
async def test_what_does_not_come_into_question_is_told(town: Town) -> None:
    await town.host("chosen")
    await town.host("drained", draining=True)
    await town.host("without-it", template=False)
    await town.host("too-small", memory_mb=600)
    await town.host("gone", state=HostState.UNREACHABLE)
    refuser = await town.host("refuser")
    choice = await town.choose(without=(refuser,))
    assert choice.host.name == "chosen"
    assert choice.others == {
        "drained": "it is drained",
        "without-it": "it lacks the template",
        "too-small": "its memory would be used by 102%",
        "refuser": "it refused",
    }


@on_one
async def test_a_vm_has_no_more_processors_than_its_host(town: Town) -> None:
    await town.host("narrow", cpus=2, cpu_overcommit=32.0)
    wide = await town.host("wide", cpus=8, cpu_overcommit=1.0)
    assert (await town.choose(vcpus=4)).host.host_id == wide
    with pytest.raises(Exhausted, match="vcpus"):
        await town.choose(vcpus=9)


@on_one
async def test_it_says_why_there_is_no_host(town: Town) -> None:
    with pytest.raises(Unavailable, match="no host is online"):
        await town.choose()
    await town.host("empty", template=False)
    with pytest.raises(NotFound, match="template"):
        await town.choose()
    await town.host("away", state=HostState.UNREACHABLE)
    # It is somewhere: another time it will do.
    with pytest.raises(Unavailable, match="reached"):
        await town.choose()
    await town.host("new", cpus=0, memory_mb=0, disk_free_mb=0)
    with pytest.raises(Exhausted):
        await town.choose()
