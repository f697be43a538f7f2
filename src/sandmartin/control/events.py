"""Events: what happened, in order, for whoever listens.

An event is written in the transaction of the change that it tells of, as the last thing in it, and
on PostgreSQL one such transaction after the other: so ids become visible in their order, and a
listener that goes on after the last id it saw misses nothing. Listeners read the table from where
they were; the hub only wakes them up.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import Counter
from collections.abc import AsyncGenerator, Iterator
from dataclasses import dataclass
from typing import Any

from sqlalchemy import event, func, select, text
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from sandmartin.control.db import Database
from sandmartin.control.tables import Event
from sandmartin.errors import Exhausted, SandmartinError

_log = logging.getLogger(__name__)

#: Another replica's events are found at the latest after so long, notified or not.
_POLL_S = 1.0
#: A listener that was not woken looks by itself after so long.
_IDLE_S = 10.0
_BATCH = 200
_CHANNEL = "sandmartin_events"
_TOLD = "sandmartin_told"
#: Any number, the same for all replicas.
_ORDER_LOCK = 0x73616E64


@dataclass(frozen=True, kw_only=True)
class Happening:
    """One event."""

    event_id: int
    team_id: str
    kind: str
    sandbox_id: str | None
    at: float
    data: dict[str, Any]

    @classmethod
    def of(cls, row: Event) -> Happening:
        return cls(
            event_id=row.event_id,
            team_id=row.team_id,
            kind=row.kind,
            sandbox_id=row.sandbox_id,
            at=row.at,
            data=row.data,
        )


def record(
    session: AsyncSession,
    team_id: str,
    kind: str,
    sandbox_id: str | None = None,
    **data: Any,
) -> None:
    """Tell of a change, in its own transaction."""
    row = Event(team_id=team_id, kind=kind, sandbox_id=sandbox_id, at=time.time(), data=data)
    session.sync_session.info.setdefault(_TOLD, []).append(row)


@event.listens_for(Session, "before_commit")
def _write_told(session: Session) -> None:
    """Write a transaction's events when nothing else is left to be done in it."""
    told = session.info.pop(_TOLD, None)
    if not told:
        return
    # All that may wait for a row's lock comes before the lock that everybody waits for.
    session.flush()
    if session.get_bind().dialect.name == "postgresql":
        session.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": _ORDER_LOCK})
        session.execute(text("SELECT pg_notify(:channel, '')"), {"channel": _CHANNEL})
    session.add_all(told)


class Events:
    """The events of one database."""

    def __init__(self, db: Database) -> None:
        self._db = db
        self._changed = asyncio.Event()
        self._closed = False
        #: Listeners by team.
        self._listeners: Counter[str] = Counter()

    def wake(self) -> None:
        """Something was committed."""
        self._changed.set()
        self._changed = asyncio.Event()

    def close(self) -> None:
        """Let everybody stop listening."""
        self._closed = True
        self.wake()

    @contextlib.contextmanager
    def listening(self, team_id: str, most: int) -> Iterator[None]:
        """One more listens for a team. Raises Exhausted when enough do."""
        if self._listeners[team_id] >= most:
            raise Exhausted(f"{most} listen to the team's events", hint="end some of them")
        self._listeners[team_id] += 1
        try:
            yield
        finally:
            self._listeners[team_id] -= 1

    def listeners(self, team_id: str) -> int:
        return self._listeners[team_id]

    async def changed(self, timeout_s: float) -> None:
        """Wait until something is committed, or for so long."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._changed.wait()

    async def watch(self) -> None:
        """Wake this replica's listeners for what other replicas commit, for ever."""
        seen = 0
        listening = asyncio.ensure_future(self._listen())
        try:
            while True:
                with contextlib.suppress(SandmartinError):
                    if (last := await self.last_id()) != seen:
                        seen = last
                        self.wake()
                await asyncio.sleep(_POLL_S)
        finally:
            listening.cancel()
            await asyncio.wait({listening})

    async def _listen(self) -> None:
        """Be woken by PostgreSQL itself, where there is one; the poll does the rest."""
        while not self._db.is_sqlite:
            try:
                await self._hear()
            except (SQLAlchemyError, SandmartinError, OSError) as error:
                _log.debug("the database does not notify: %s", type(error).__name__)
            await asyncio.sleep(_POLL_S)

    async def _hear(self) -> None:
        """Wake listeners at each notification, until the connection ends."""
        ended = asyncio.Event()
        async with self._db.engine.connect() as connection:
            connection = await connection.execution_options(isolation_level="AUTOCOMMIT")
            driver: Any = (await connection.get_raw_connection()).driver_connection
            driver.add_termination_listener(lambda *_: ended.set())
            await driver.add_listener(_CHANNEL, lambda *_: self.wake())
            try:
                await ended.wait()
            finally:
                # Nobody else is to get a connection that listens.
                await connection.invalidate()

    async def last_id(self, team_id: str | None = None) -> int:
        """The newest event's id; 0 before the first."""
        query = select(func.max(Event.event_id))
        if team_id is not None:
            query = query.where(Event.team_id == team_id)
        async with self._db.read() as session:
            return await session.scalar(query) or 0

    async def since(
        self, event_id: int, *, team_id: str | None = None, sandbox_id: str | None = None
    ) -> list[Happening]:
        """The next events after one, oldest first, some hundreds at most."""
        query = select(Event).where(Event.event_id > event_id)
        if team_id is not None:
            query = query.where(Event.team_id == team_id)
        if sandbox_id is not None:
            query = query.where(Event.sandbox_id == sandbox_id)
        async with self._db.read() as session:
            rows = await session.scalars(query.order_by(Event.event_id).limit(_BATCH))
            return [Happening.of(row) for row in rows]

    async def follow(
        self,
        event_id: int,
        *,
        team_id: str | None = None,
        sandbox_id: str | None = None,
        idle_s: float = _IDLE_S,
    ) -> AsyncGenerator[Happening | None, None]:
        """Events after one as they come, None now and then while there are none; ends at `close`.

        Nothing is kept for a slow listener: it goes on reading where it was.
        """
        while not self._closed:
            changed = self._changed
            batch = await self.since(event_id, team_id=team_id, sandbox_id=sandbox_id)
            for happening in batch:
                event_id = happening.event_id
                yield happening
            if batch:
                continue
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(idle_s):
                    # Of before the look: what was committed meanwhile has set it.
                    await changed.wait()
            yield None
