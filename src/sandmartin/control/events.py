"""Events: what happened, in order, for whoever listens.

An event is written in the transaction of the change that it tells of. Listeners read the table
from where they were; the hub only wakes them up.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncSession

from sandmartin.control.db import Database
from sandmartin.control.tables import Event

#: Another replica's events are found at the latest after so long.
_POLL_S = 1.0
_BATCH = 200


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
    session.add(row)


class Events:
    """The events of one database."""

    def __init__(self, db: Database) -> None:
        self._db = db
        self._changed = asyncio.Event()

    def wake(self) -> None:
        """Something was committed."""
        self._changed.set()
        self._changed = asyncio.Event()

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
        self, event_id: int, *, team_id: str | None = None, sandbox_id: str | None = None
    ) -> AsyncGenerator[Happening | None, None]:
        """Events after one as they come; None now and then while there are none."""
        while True:
            changed = self._changed
            batch = await self.since(event_id, team_id=team_id, sandbox_id=sandbox_id)
            for happening in batch:
                event_id = happening.event_id
                yield happening
            if not batch:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_POLL_S):
                        await changed.wait()
                yield None
