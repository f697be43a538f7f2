"""The way into a sandbox: who asks, and the agent of its host, found in one read.

It is on the path of every command and every file. It asks the same parts as everybody else, so
nobody comes in here who would be refused there.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from sqlalchemy import select

from sandmartin.control import tables
from sandmartin.control.caller import Caller
from sandmartin.control.db import Database
from sandmartin.control.sandboxes import Sandboxes
from sandmartin.transport.agent import Agent


async def enter(
    db: Database, sandboxes: Sandboxes, who: Callable[[], Awaitable[Caller]], sandbox_id: str
) -> Agent:
    """The agent of a running sandbox of the team of `who`.

    Raises Unauthenticated, Denied, NotFound, Conflict, Unavailable.
    """
    row, host = tables.Sandbox, tables.Host
    near = select(row, host).outerjoin(host, host.host_id == row.host_id)
    async with db.one_read() as session:
        caller = await who()
        # What this loads, and for as long as it is held, is not read again below.
        held = (await session.execute(near.where(row.sandbox_id == sandbox_id))).one_or_none()
        agent = await sandboxes.reach(caller, sandbox_id)
        del held
    return agent
