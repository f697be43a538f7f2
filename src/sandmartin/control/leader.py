"""The leader: of several replicas the one that looks after what only one must.

For moments there may be two, when one comes late to renew its claim: whatever they do is guarded
by the rows that it changes. Work that dies of a bug is told, and begun again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable

from sqlalchemy import select, update
from sqlalchemy.exc import IntegrityError

from sandmartin.control import tables
from sandmartin.control.db import Database, uncut
from sandmartin.errors import Unavailable

_log = logging.getLogger(__name__)

_NAME = "leader"


class Leader:
    """One replica's claim to lead."""

    def __init__(self, db: Database, owner: str, *, lease_s: float = 15.0) -> None:
        self._db = db
        self._owner = owner
        self._lease_s = lease_s

    async def lead(self, work: Callable[[], Awaitable[None]]) -> None:
        """Do `work` for as long as this replica leads, and wait for the lead otherwise."""
        working: asyncio.Task[None] | None = None
        try:
            while True:
                leads = False
                with contextlib.suppress(Unavailable):
                    leads = await uncut(self.claim())
                if leads and working is None:
                    _log.info("this replica leads")
                    working = asyncio.ensure_future(work())
                elif not leads and working is not None:
                    _log.info("this replica leads no more")
                    await _end(working)
                    working = None
                elif working is not None and working.done():
                    _log.critical("the leader's work died", exc_info=working.exception())
                    working = None
                await asyncio.sleep(self._lease_s / 3)
        finally:
            if working is not None:
                await _end(working)
                await self.give_up()

    async def claim(self) -> bool:
        """Whether this replica leads from now on, for the time of a lease."""
        now = time.time()
        row = tables.Lease
        values = {"owner": self._owner, "expires_at": now + self._lease_s}
        try:
            async with self._db.write() as session:
                done = await session.execute(
                    update(row)
                    .where(row.name == _NAME, (row.owner == self._owner) | (row.expires_at < now))
                    .values(values)
                )
                if done.rowcount:  # type: ignore[attr-defined]
                    return True
                if await session.scalar(select(row.name).where(row.name == _NAME)) is None:
                    session.add(row(name=_NAME, **values))
                    return True
        except IntegrityError:
            # Another replica was the first.
            return False
        return False

    async def give_up(self) -> None:
        """Let another replica lead at once."""
        row = tables.Lease
        with contextlib.suppress(Unavailable):
            async with self._db.write() as session:
                await session.execute(
                    update(row)
                    .where(row.name == _NAME, row.owner == self._owner)
                    .values(expires_at=0.0)
                )


async def _end(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.wait({task})
