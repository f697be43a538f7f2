"""Requests that come again: the same idempotency key is answered with what it made already."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

from sqlalchemy import and_, or_, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession

from sandmartin.control import tables
from sandmartin.control.caller import Caller
from sandmartin.control.db import Database
from sandmartin.control.operations import Held, Kind, Operations
from sandmartin.control.rows import Row
from sandmartin.errors import Conflict


class Repeats:
    """What the idempotency keys of all teams have made."""

    def __init__(self, db: Database, operations: Operations) -> None:
        self._db = db
        self._operations = operations

    async def begin(
        self,
        caller: Caller,
        keys: Sequence[str],
        request_hash: str,
        begin: Callable[[AsyncSession], Awaitable[Held]],
    ) -> Held | list[Row]:
        """Begin what a request asks for, or find what the same request has made before.

        Raises as `_made` does, and what `begin` raises.
        """
        if keys and (made := await self._made(caller, keys, request_hash)):
            return made
        try:
            async with self._db.write() as session:
                return await begin(session)
        except IntegrityError:
            # Somebody was faster with the same key.
            if keys and (made := await self._made(caller, keys, request_hash)):
                return made
            raise

    async def _made(self, caller: Caller, keys: Sequence[str], request_hash: str) -> list[Row]:
        """The sandboxes of these keys, in their order, once they are there; none for new keys.

        Raises Conflict when a key was used for another request, and what making them raised.
        """
        operation = tables.Operation
        made_by = or_(
            and_(operation.sandbox_id == Row.sandbox_id, operation.kind == Kind.CREATE),
            and_(operation.operation_id == Row.operation_id, operation.kind == Kind.FORK),
        )
        ours = (Row.team_id == caller.team_id, Row.idempotency_key.in_(keys))
        query = select(Row.request_hash, operation.operation_id).outerjoin(operation, made_by)
        async with self._db.read() as session:
            found = (await session.execute(query.where(*ours))).all()
        if any(found_hash != request_hash for found_hash, _ in found):
            raise used_otherwise()
        for operation_id in {each for _, each in found if each is not None}:
            await self._operations.wait(operation_id)
        if not found:
            return []
        async with self._db.read() as session:
            rows = (await session.scalars(select(Row).where(*ours))).all()
        return sorted(rows, key=lambda row: keys.index(row.idempotency_key or ""))


def used_otherwise() -> Conflict:
    """A key that has come with another request before."""
    return Conflict(
        "this idempotency key was used for another request",
        hint="use a new key for each request",
    )
