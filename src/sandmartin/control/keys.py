"""API keys: shown once, kept as a hash, found by it at each request so that a revoked one ends.

`e2b_` and 40 hexadecimal digits, so that E2B's clients accept them.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from uuid import uuid4

from sqlalchemy import delete, select, update
from sqlalchemy.ext.asyncio import AsyncSession

from sandmartin.control import audit, tables
from sandmartin.control.caller import ActorKind, Caller
from sandmartin.control.db import Database
from sandmartin.control.seal import digest
from sandmartin.errors import Invalid, NotFound, Unauthenticated

_PREFIX = "e2b_"
_SHOWN_CHARS = 10
#: The last use is written at most so often.
_USE_S = 60.0
_MAX_NAME = 100


class Keys:
    """The API keys of all teams."""

    def __init__(self, db: Database) -> None:
        self._db = db

    async def caller(self, key: str, *, request_id: str = "", address: str = "") -> Caller:
        """Who has this key. Raises Unauthenticated."""
        row = tables.ApiKey
        query = (
            select(row)
            .join(tables.Team, tables.Team.team_id == row.team_id)
            .where(row.key_hash == digest(key), tables.Team.deleted_at.is_(None))
        )
        async with self._db.read() as session:
            found = await session.scalar(query)
        if found is None:
            raise Unauthenticated("the API key is not known", hint="was it revoked?")
        if time.time() - (found.last_used_at or 0) > _USE_S:
            await self._note_use(found.key_id)
        return Caller(
            kind=ActorKind.KEY,
            actor_id=found.key_id,
            name=found.name,
            team_id=found.team_id,
            # The first key, of whoever started the platform.
            is_admin=found.created_by == "system",
            request_id=request_id,
            address=address,
        )

    async def _note_use(self, key_id: str) -> None:
        async with self._db.write() as session:
            await session.execute(
                update(tables.ApiKey)
                .where(tables.ApiKey.key_id == key_id)
                .values(last_used_at=time.time())
            )

    async def list(self, caller: Caller) -> Sequence[tables.ApiKey]:
        row = tables.ApiKey
        query = select(row).where(row.team_id == caller.team_id).order_by(row.created_at)
        async with self._db.read() as session:
            return (await session.scalars(query)).all()

    async def create(self, caller: Caller, name: str) -> tuple[tables.ApiKey, str]:
        """A new key of the caller's team, and its text, which is never seen again."""
        if not 0 < len(name) <= _MAX_NAME:
            raise Invalid("the key's name is empty or too long", hint="use 1 to 100 characters")
        async with self._db.write() as session:
            made = add_key(session, caller.team_id, caller.actor_id, name)
            audit.record(session, caller, "key.created", "key", made[0].key_id, name=name)
        return made

    async def revoke(self, caller: Caller, key_id: str) -> None:
        """Raises NotFound."""
        row = tables.ApiKey
        async with self._db.write() as session:
            done = await session.execute(
                delete(row).where(row.key_id == key_id, row.team_id == caller.team_id)
            )
            if not done.rowcount:  # type: ignore[attr-defined]
                raise NotFound(f"there is no key {key_id[:80]!r}")
            audit.record(session, caller, "key.revoked", "key", key_id)


def add_key(
    session: AsyncSession, team_id: str, created_by: str, name: str
) -> tuple[tables.ApiKey, str]:
    """A new key in a transaction, and its text."""
    key = _PREFIX + secrets.token_hex(20)
    row = tables.ApiKey(
        key_id=str(uuid4()),
        team_id=team_id,
        created_by=created_by,
        name=name,
        prefix=key[:_SHOWN_CHARS],
        key_hash=digest(key),
        created_at=time.time(),
    )
    session.add(row)
    return row, key
