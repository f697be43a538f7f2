"""The way into a sandbox: who asks, and the agent of its host, found in one read.

It is on the path of every command and every file. It asks the same parts as everybody else, so
nobody comes in here who would be refused there.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import select

from sandmartin.control import tables
from sandmartin.control.caller import Caller
from sandmartin.control.db import Database
from sandmartin.control.hosts import Hosts
from sandmartin.control.rows import Row
from sandmartin.control.sandboxes import Sandboxes
from sandmartin.control.states import ALIVE
from sandmartin.errors import NotFound, Unavailable
from sandmartin.model import State
from sandmartin.transport.agent import Agent


async def enter(
    db: Database, sandboxes: Sandboxes, who: Callable[[], Awaitable[Caller]], sandbox_id: str
) -> tuple[Agent, Mapping[str, Any]]:
    """The agent of a running sandbox of the team of `who`, and what its template says.

    Raises Unauthenticated, Denied, NotFound, Conflict, Unavailable.
    """
    row, host = tables.Sandbox, tables.Host
    near = select(row, host).outerjoin(host, host.host_id == row.host_id)
    async with db.one_read() as session:
        caller = await who()
        # What this loads, and for as long as it is held, is not read again below.
        held = (await session.execute(near.where(row.sandbox_id == sandbox_id))).one_or_none()
        agent = await sandboxes.reach(caller, sandbox_id)
        defaults = held[0].defaults if held is not None else {}
    return agent, defaults


@dataclass(frozen=True)
class Found:
    """A sandbox, whosever it is, and the agent of its host, if there is a way to it."""

    row: Row
    agent: Agent | None


async def find(db: Database, hosts: Hosts, sandbox_id: str) -> Found | None:
    """A sandbox that is not over, for traffic: what is asked for there is a token, not a caller.

    Raises Unavailable when the database does not answer.
    """
    row, host = tables.Sandbox, tables.Host
    near = select(row, host).outerjoin(host, host.host_id == row.host_id)
    async with db.one_read() as session:
        near = near.where(row.sandbox_id == sandbox_id, row.state.in_(ALIVE))
        held = (await session.execute(near)).one_or_none()
        if held is None:
            return None
        found: Row = held[0]
        if found.host_id is None:
            return Found(found, None)
        try:
            # Its host is held, and is not read again.
            return Found(found, await hosts.agent(found.host_id))
        except (NotFound, Unavailable):
            return Found(found, None)


async def list_running(db: Database) -> list[str]:
    """Ids of all sandboxes that run. Raises Unavailable."""
    query = select(tables.Sandbox.sandbox_id).where(tables.Sandbox.state == State.RUNNING)
    async with db.read() as session:
        return list(await session.scalars(query))
