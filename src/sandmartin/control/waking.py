"""Waking sandboxes up for traffic that is for them.

However many requests come at once, a replica asks for one resume; whoever comes while another
replica does it waits for its end. A host puts to sleep what has idled, and the row says so only
later: what the host says of it is then written down here, so that it can be woken.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging

from sandmartin.control.caller import system
from sandmartin.control.db import Database
from sandmartin.control.entrance import Found, find
from sandmartin.control.events import Events
from sandmartin.control.hosts import Hosts
from sandmartin.control.limits import WAKE, WAKE_OF_TEAM, Limits, Use
from sandmartin.control.operations import Overtaken
from sandmartin.control.rows import Row, observe, tell
from sandmartin.control.sandboxes import Sandboxes
from sandmartin.errors import Conflict, SandmartinError, TimedOut
from sandmartin.model import State
from sandmartin.relay.refusal import Refusal

_log = logging.getLogger(__name__)

_LOOK_S = 0.1
#: What leads to a sandbox that runs, or that can be woken.
_WORTH_WAITING = frozenset({State.PAUSING, State.RESUMING})


class Waking:
    """The sandboxes that this replica is waking up."""

    def __init__(
        self,
        db: Database,
        hosts: Hosts,
        sandboxes: Sandboxes,
        events: Events,
        limits: Limits,
        deadline_s: float,
    ) -> None:
        self._db = db
        self._hosts = hosts
        self._sandboxes = sandboxes
        self._events = events
        self._limits = limits
        self._deadline_s = deadline_s
        self._resuming: dict[str, asyncio.Task[None]] = {}

    def can_wake(self, row: Row) -> bool:
        """Whether traffic wakes a sandbox, or will once it sleeps."""
        return row.auto_resume and (row.state == State.PAUSED or row.state in _WORTH_WAITING)

    async def wake(self, found: Found, *, by_anybody: bool) -> Found | None:
        """Have a sandbox run; None when it is over.

        What anybody can send wakes only so often. Raises TimedOut, TooMany, and whatever keeps it
        from being resumed.
        """
        sandbox_id = found.row.sandbox_id
        try:
            async with asyncio.timeout(self._deadline_s):
                while True:
                    if found.row.state == State.PAUSED:
                        await self._resume(found.row, by_anybody)
                    else:
                        await asyncio.sleep(_LOOK_S)
                    now = await find(self._db, self._hosts, sandbox_id)
                    if now is None or not self.can_wake(now.row):
                        return now
                    found = now
        except TimeoutError as error:
            raise TimedOut("the sandbox did not wake up in time") from error

    async def _resume(self, row: Row, by_anybody: bool) -> None:
        """One resume, whoever else waits for it."""
        if by_anybody and row.sandbox_id not in self._resuming:
            await self._limits.take(Use(WAKE, row.sandbox_id), Use(WAKE_OF_TEAM, row.team_id))
        task = self._resuming.get(row.sandbox_id)
        if task is None:
            task = asyncio.create_task(self._do_resume(row), name=f"wake {row.sandbox_id}")
            self._resuming[row.sandbox_id] = task
            task.add_done_callback(lambda _: self._resuming.pop(row.sandbox_id, None))
        await asyncio.shield(task)

    async def _do_resume(self, row: Row) -> None:
        try:
            await self._sandboxes.resume(system(row.team_id), row.sandbox_id)
        except Conflict as error:
            # Somebody else is at it.
            _log.info("sandbox %s is not woken here: %s", row.sandbox_id, error)
            await asyncio.sleep(_LOOK_S)
        except SandmartinError as error:
            _log.warning("sandbox %s cannot be woken: %s", row.sandbox_id, error)
            raise

    async def note(self, row: Row, refusal: Refusal) -> bool:
        """Why its host did not pass a request on; whether to try again."""
        ends_by_idling = row.on_timeout == "kill" and row.timeout_s > 0
        if not row.auto_resume or ends_by_idling:
            return False
        if refusal is Refusal.PAUSED:
            await self._note_sleep(row)
            return True
        if refusal is Refusal.MOVING:
            await asyncio.sleep(_LOOK_S)
            return True
        return False

    async def _note_sleep(self, row: Row) -> None:
        if row.state != State.RUNNING:
            await asyncio.sleep(_LOOK_S)
            return
        # Who has begun something with it meanwhile knows better.
        with contextlib.suppress(Overtaken):
            async with self._db.write() as session:
                await observe(session, row, State.PAUSED, host_ip="")
                tell(session, row, "sandbox.paused", seen=True)
        self._events.wake()
