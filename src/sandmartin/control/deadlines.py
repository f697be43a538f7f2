"""Deadlines: sandboxes that run for a time, and what becomes of them when it is over.

The end stands in the row (`ends_at`), so it survives whoever set it. One replica looks for those
that are due; each is paused or destroyed by an ordinary operation, and only if it still is as it
was when it was due, so that who extends its time at the last moment wins.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

from sqlalchemy import or_, select, update

from sandmartin.control import audit
from sandmartin.control.caller import Caller, system
from sandmartin.control.db import Database, uncut
from sandmartin.control.operations import Overtaken
from sandmartin.control.rows import Row, find
from sandmartin.control.sandboxes import Sandboxes
from sandmartin.errors import Conflict, SandmartinError
from sandmartin.model import State

_log = logging.getLogger(__name__)

#: While it has a time that goes by.
RUNS = frozenset({State.RUNNING, State.SNAPSHOTTING})
#: How many are ended at the same time.
_AT_ONCE = 100
#: One that could not be ended is tried again after so long.
_RETRY_S = 10.0


class Deadlines:
    """The ends of sandboxes' lives."""

    def __init__(self, db: Database, sandboxes: Sandboxes, period_s: float = 0.5) -> None:
        self._db = db
        self._sandboxes = sandboxes
        self._period_s = period_s
        self._ending: dict[str, asyncio.Task[None]] = {}
        #: When one that could not be ended is tried again.
        self._not_before: dict[str, float] = {}

    # Setting them.

    async def set(self, caller: Caller, sandbox_id: str, lifetime_s: int) -> Row:
        """Let a running sandbox end after so long from now; 0 ends it at once.

        Raises NotFound, Conflict when it does not run.
        """
        row = await self._set(caller, sandbox_id, lifetime_s)
        if lifetime_s == 0:
            await self._end(row)
            # Whoever looks for those that are due may have been faster.
            row = await self._sandboxes.settled(caller, sandbox_id)
        return row

    async def extend(self, caller: Caller, sandbox_id: str, lifetime_s: int) -> Row:
        """Let it run for so long from now at least. Raises NotFound, Conflict."""
        return await self._set(
            caller, sandbox_id, lifetime_s, Row.ends_at < time.time() + lifetime_s
        )

    async def _set(self, caller: Caller, sandbox_id: str, lifetime_s: int, *conditions: Any) -> Row:
        now = time.time()
        # What is woken up again lives as long as it was last told to, and not for no time.
        kept = {"lifetime_s": lifetime_s} if lifetime_s else {}
        async with self._db.write() as session:
            row = await find(session, caller, sandbox_id, to_change=True)
            if row.state not in RUNS:
                raise Conflict(
                    f"sandbox {sandbox_id} is {row.state}, and its time does not go by",
                    hint="connect to it first",
                )
            done = await session.execute(
                update(Row)
                .where(Row.sandbox_id == sandbox_id, *conditions)
                .values(ends_at=now + lifetime_s, **kept)
                .execution_options(synchronize_session=False)
            )
            if done.rowcount:  # type: ignore[attr-defined]
                audit.record(
                    session,
                    caller,
                    "sandbox.timeout_set",
                    "sandbox",
                    sandbox_id,
                    lifetime_s=lifetime_s,
                )
        return await self._sandboxes.get(caller, sandbox_id)

    # Keeping them.

    async def run(self) -> None:
        """End what is due, for ever: for the leader alone."""
        try:
            while True:
                try:
                    await uncut(self.tick())
                except SandmartinError as error:
                    _log.warning("what is due is not ended: %s", error)
                await asyncio.sleep(self._period_s)
        finally:
            # The operations that they began go on.
            tasks = [*self._ending.values()]
            for task in tasks:
                task.cancel()
            if tasks:
                await asyncio.wait(tasks)

    async def tick(self) -> None:
        """Begin to end all that is due, each on its own: a slow one keeps nobody waiting."""
        now = time.monotonic()
        for sandbox_id in [each for each, at in self._not_before.items() if at <= now]:
            del self._not_before[sandbox_id]
        for row in await self._due():
            task = asyncio.create_task(self._end(row), name=f"end of {row.sandbox_id}")
            self._ending[row.sandbox_id] = task
            task.add_done_callback(partial(self._ended, row.sandbox_id))

    def _ended(self, sandbox_id: str, task: asyncio.Task[None]) -> None:
        del self._ending[sandbox_id]
        if task.cancelled() or (error := task.exception()) is None:
            return
        self._not_before[sandbox_id] = time.monotonic() + _RETRY_S
        # What is no error of ours is a bug.
        bug = None if isinstance(error, SandmartinError) else error
        _log.error("sandbox %s is due and is not ended: %s", sandbox_id, error, exc_info=bug)

    async def _due(self) -> Sequence[Row]:
        """Those that are due, and are not being ended; the longest due first."""
        room = _AT_ONCE - len(self._ending)
        if room <= 0:
            return []
        # One whose host is lost cannot be put to sleep, but it can be given up.
        lost = (Row.state == State.MISSING) & (Row.on_timeout == "kill")
        query = (
            select(Row)
            .where(
                Row.ends_at <= time.time(),
                or_(Row.state == State.RUNNING, lost),
                Row.operation_id.is_(None),
                Row.sandbox_id.not_in([*self._ending, *self._not_before]),
            )
            .order_by(Row.ends_at)
            .limit(room)
        )
        async with self._db.read() as session:
            return (await session.scalars(query)).all()

    async def _end(self, row: Row) -> None:
        """Do what is to be done at its end, if it still is as it was read."""
        caller = system(row.team_id)
        try:
            if row.on_timeout == "kill":
                await self._sandboxes.destroy(caller, row.sandbox_id, seen=row)
            else:
                await self._sandboxes.pause(caller, row.sandbox_id, seen=row)
        except Overtaken as error:
            _log.info("sandbox %s is not ended: %s", row.sandbox_id, error)
