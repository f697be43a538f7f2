"""Builds as those see them who ask for them: begun, listed, read, called off.

What is done with them is in `queue` and `engine`, on whichever replica has room.
"""

from __future__ import annotations

import hmac
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import func, select, tuple_
from sqlalchemy.ext.asyncio import AsyncSession

from sandmartin.control import audit, events, tables
from sandmartin.control.builds.contexts import Contexts
from sandmartin.control.builds.request import NewBuild
from sandmartin.control.caller import Caller, system
from sandmartin.control.db import Database
from sandmartin.control.repeats import used_otherwise
from sandmartin.control.rows import read_cursor
from sandmartin.control.seal import Sealer
from sandmartin.control.states import BuildState
from sandmartin.control.tables import PLATFORM_TEAM_ID, BuildLine, Team
from sandmartin.control.templates import find_template
from sandmartin.errors import Conflict, Denied, Exhausted, NotFound
from sandmartin.model import random_id

Row = tables.Build
_FOLLOW_S = 1.0
#: Lines of a log that are given at a time while it is followed.
_BATCH = 500
#: How long a reserved build waits for what it is to do.
AWAITED_S = 3600.0


@dataclass(frozen=True, kw_only=True)
class Page:
    rows: Sequence[Row]
    #: `cursor` of the next page; empty at the end.
    next: str


class Builds:
    """The builds of all teams."""

    def __init__(
        self,
        db: Database,
        sealer: Sealer,
        happenings: events.Events,
        contexts: Contexts,
        *,
        max_open: int,
    ) -> None:
        self._db = db
        self._sealer = sealer
        self._events = happenings
        self.contexts = contexts
        self._max_open = max_open

    async def create(self, caller: Caller, new: NewBuild, idempotency_key: str = "") -> Row:
        """Have a template built; the same key and request give the same build.

        Raises Invalid, NotFound (uploads), Denied, Exhausted; Conflict when the key was used for
        another request.
        """
        await self._check(caller, new)
        return await self._add(caller, new, key=idempotency_key)

    async def reserve(self, caller: Caller, new: NewBuild) -> Row:
        """Note a build that waits for `begin`, and is over if that does not come in time.

        Raises Invalid, Denied, Exhausted.
        """
        return await self._add(caller, new, awaited_until=time.time() + AWAITED_S)

    async def begin(
        self, caller: Caller, build_id: str, complete: Callable[[NewBuild], NewBuild]
    ) -> Row:
        """Let a reserved build begin, with what `complete` makes of what was asked for.

        Raises Invalid, NotFound, and Conflict when it waits for nothing.
        """
        reserved = await self.get(caller, build_id)
        _check_awaited(reserved)
        new = complete(NewBuild.from_json(self._sealer.unseal(reserved.sealed_request or b"")))
        await self._check(caller, new)
        async with self._db.write() as session:
            row = await _find(session, caller, build_id, to_change=True)
            _check_awaited(row)
            row.sealed_request, row.awaited_until = self._sealer.seal(new.to_json()), None
        self._events.wake()
        return row

    async def _check(self, caller: Caller, new: NewBuild) -> None:
        """What can never work is refused before it waits."""
        new.read()
        for digest in filter(None, (new.context, new.from_archive)):
            if not await self.contexts.has(caller, digest):
                raise NotFound(
                    f"the upload {digest} is not there", hint="PUT /v1/builds/contexts/SHA256"
                )

    async def _add(
        self, caller: Caller, new: NewBuild, *, key: str = "", awaited_until: float | None = None
    ) -> Row:
        row = Row(
            build_id=f"bd{random_id(20)}",
            team_id=caller.team_id,
            name=new.base_name,
            tags=list(new.all_tags),
            state=BuildState.WAITING,
            sealed_request=self._sealer.seal(new.to_json()),
            awaited_until=awaited_until,
            created_by=caller.actor_id,
            created_at=time.time(),
            idempotency_key=key or None,
            request_hash=self._hash(new) if key else None,
        )
        async with self._db.write() as session:
            # Where transactions write side by side, those of one team come one after the other.
            await session.get(Team, caller.team_id, with_for_update={"key_share": True})
            if key and (made := await _find_made(session, row)):
                return made
            await self._check_room(session, caller)
            await _check_name(session, caller, new.base_name)
            session.add(row)
            audit.record(
                session,
                caller,
                "build.created",
                "build",
                row.build_id,
                name=row.name,
                tags=row.tags,
            )
            tell(session, row, "build.created")
        self._events.wake()
        return row

    def _hash(self, new: NewBuild) -> str:
        """The same for the same request; without our key nobody can try out its secrets by it."""
        key = self._sealer.derive("requests for builds")
        return hmac.new(key, new.to_json().encode(), "sha256").hexdigest()

    async def _check_room(self, session: AsyncSession, caller: Caller) -> None:
        query = select(func.count()).where(Row.team_id == caller.team_id, Row.finished_at.is_(None))
        if (await session.scalar(query) or 0) >= self._max_open:
            raise Exhausted(
                f"the team has {self._max_open} builds under way, and may have no more",
                hint="wait for one of them, or cancel it",
            )

    async def get(self, caller: Caller, build_id: str) -> Row:
        """A build of the team. Raises NotFound."""
        async with self._db.read() as session:
            return await _find(session, caller, build_id)

    async def list(
        self, caller: Caller, *, name: str = "", limit: int = 100, cursor: str = ""
    ) -> Page:
        """Builds of the team, newest first. Raises Invalid."""
        key = tuple_(Row.created_at, Row.build_id)
        query = select(Row).where(Row.team_id == caller.team_id)
        if name:
            query = query.where(Row.name == name)
        if cursor:
            query = query.where(key < read_cursor(cursor))
        query = query.order_by(Row.created_at.desc(), Row.build_id.desc()).limit(limit + 1)
        async with self._db.read() as session:
            rows = (await session.scalars(query)).all()
        shown = rows[:limit]
        more = len(rows) > limit
        return Page(
            rows=shown, next=f"{shown[-1].created_at!r}_{shown[-1].build_id}" if more else ""
        )

    async def log(
        self, caller: Caller, build_id: str, after: int = 0, limit: int = 100
    ) -> Sequence[BuildLine]:
        """Lines of a build's log after one of them. Raises NotFound."""
        query = select(BuildLine).where(BuildLine.build_id == build_id, BuildLine.number > after)
        async with self._db.read() as session:
            await _find(session, caller, build_id)
            return (await session.scalars(query.order_by(BuildLine.number).limit(limit))).all()

    async def follow(
        self, caller: Caller, build_id: str, after: int = 0
    ) -> AsyncGenerator[BuildLine | None, None]:
        """Lines after one of them as they come, None now and then, to the build's end.

        Raises NotFound.
        """
        while True:
            # Before the lines: those of its end come with its end.
            over = (await self.get(caller, build_id)).finished_at is not None
            lines = await self.log(caller, build_id, after, _BATCH)
            for line in lines:
                after = line.number
                yield line
            if lines:
                continue
            if over:
                return
            await self._events.changed(_FOLLOW_S)
            yield None

    async def cancel(self, caller: Caller, build_id: str) -> Row:
        """Call a build off, which ends soon then. One that is over stays as it is.

        Raises NotFound.
        """
        async with self._db.write() as session:
            row = await _find(session, caller, build_id, to_change=True)
            if row.finished_at is not None or row.cancelling:
                return row
            row.cancelling = True
            if row.state == BuildState.WAITING:
                row.state, row.finished_at = BuildState.CANCELLED, time.time()
                row.sealed_request = None
                tell_end(session, row)
            audit.record(session, caller, "build.cancelled", "build", build_id, name=row.name)
        self._events.wake()
        return row

    async def prune(self, now: float, keep_s: float) -> None:
        """Forget builds that ended long ago, with their logs, and uploads that are too old.

        Those that were reserved and never begun are over.
        """
        async with self._db.write() as session:
            late = select(Row).where(Row.awaited_until < now, Row.finished_at.is_(None))
            for each in (await session.scalars(late.limit(_BATCH))).all():
                each.state, each.finished_at, each.sealed_request = BuildState.CANCELLED, now, None
                tell_end(session, each)
            old = select(Row.build_id).where(Row.finished_at < now - keep_s).limit(_BATCH)
            for build_id in (await session.scalars(old)).all():
                row = await session.get(Row, build_id)
                await session.delete(row)
        await self.contexts.prune(now)

    async def cancel_of_deleted_teams(self) -> None:
        """Call off what deleted teams still have under way."""
        deleted = select(Team.team_id).where(Team.deleted_at.is_not(None))
        query = select(Row).where(
            Row.team_id.in_(deleted), Row.finished_at.is_(None), Row.cancelling.is_(False)
        )
        async with self._db.read() as session:
            rows = (await session.scalars(query)).all()
        for row in rows:
            await self.cancel(system(row.team_id), row.build_id)


def tell(session: AsyncSession, row: Row, kind: str, **more: str) -> None:
    """An event of a build, in the transaction of what it tells."""
    data: dict[str, Any] = {"build_id": row.build_id, "name": row.name, "tags": row.tags}
    events.record(session, row.team_id, kind, **data, **more)


def tell_end(session: AsyncSession, row: Row) -> None:
    """The event of a build's end, in the transaction of it."""
    error = {"error": row.error_message} if row.error_code else {}
    tell(session, row, "build.finished", state=row.state, **error)


async def _find(
    session: AsyncSession, caller: Caller, build_id: str, *, to_change: bool = False
) -> Row:
    row = await session.get(Row, build_id, with_for_update=to_change or None)
    if row is None or row.team_id != caller.team_id:
        raise NotFound(f"there is no build {build_id[:80]!r}")
    return row


async def _find_made(session: AsyncSession, wanted: Row) -> Row | None:
    """What this request has made before. Raises Conflict when its key was another's."""
    made = await session.scalar(
        select(Row).where(
            Row.team_id == wanted.team_id, Row.idempotency_key == wanted.idempotency_key
        )
    )
    if made is not None and made.request_hash != wanted.request_hash:
        raise used_otherwise()
    return made


def _check_awaited(row: Row) -> None:
    if row.awaited_until is None or row.finished_at is not None:
        raise Conflict(f"build {row.build_id} waits for nothing", hint="reserve another one")


async def _check_name(session: AsyncSession, caller: Caller, name: str) -> None:
    """Raises Denied when the name is the platform's."""
    if caller.team_id == PLATFORM_TEAM_ID:
        return
    try:
        found = await find_template(session, PLATFORM_TEAM_ID, name)
    except NotFound:
        return
    raise Denied(f"template {found.name!r} belongs to the platform", hint="choose another name")
