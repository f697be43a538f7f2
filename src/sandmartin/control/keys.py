"""API keys: shown once, kept as a hash, found by it at each request so that a revoked one ends.

`e2b_` and 40 hexadecimal digits, so that E2B's clients accept them. Behind each key stands the
user who made it, or who made the key that made it: it is refused while that user is disabled, and
administers the platform only while that user does.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from uuid import uuid4

from sqlalchemy import delete, func, select, update
from sqlalchemy.ext.asyncio import AsyncSession

from sandmartin.control import audit, tables
from sandmartin.control.caller import ActorKind, Caller, Role
from sandmartin.control.db import Database
from sandmartin.control.seal import digest
from sandmartin.errors import Denied, Exhausted, Invalid, NotFound, Unauthenticated

_PREFIX = "e2b_"
_SHOWN_CHARS = 10
#: The last use is written at most so often.
_USE_S = 60.0
_MAX_NAME = 100
_MAX_KEYS = 200


class Keys:
    """The API keys of all teams."""

    def __init__(self, db: Database) -> None:
        self._db = db

    async def caller(self, key: str, *, request_id: str = "", address: str = "") -> Caller:
        """Who has this key. Raises Unauthenticated."""
        row, user = tables.ApiKey, tables.User
        query = (
            select(row, user)
            .join(tables.Team, tables.Team.team_id == row.team_id)
            .outerjoin(user, user.user_id == row.created_by)
            .where(row.key_hash == digest(key), tables.Team.deleted_at.is_(None))
        )
        async with self._db.read() as session:
            pair = (await session.execute(query)).one_or_none()
        if pair is None or (pair[1] is not None and not pair[1].active):
            raise Unauthenticated("the API key is not known", hint="was it revoked?")
        found, maker = pair
        is_admin = found.is_admin and (maker is None or maker.is_admin)
        if time.time() - (found.last_used_at or 0) > _USE_S:
            await self._note_use(found.key_id)
        return Caller(
            kind=ActorKind.KEY,
            actor_id=found.key_id,
            name=found.name,
            team_id=found.team_id,
            role=Role.OWNER if is_admin else None,
            is_admin=is_admin,
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
        """The keys of the caller's team. Raises Denied for one who is no member."""
        caller.require_role(Role.MEMBER)
        row = tables.ApiKey
        query = select(row).where(row.team_id == caller.team_id).order_by(row.created_at)
        async with self._db.read() as session:
            return (await session.scalars(query)).all()

    async def create(
        self, caller: Caller, name: str, *, is_admin: bool = False
    ) -> tuple[tables.ApiKey, str]:
        """A new key of the caller's team, and its text, which is never seen again.

        One with `is_admin` administers the platform. Raises Invalid, Denied, Exhausted.
        """
        caller.require_role(Role.MEMBER)
        if is_admin:
            caller.require_admin()
        if not 0 < len(name) <= _MAX_NAME or not name.isprintable():
            raise Invalid("the key's name is empty or too long", hint="use 1 to 100 characters")
        async with self._db.write() as session:
            count = select(func.count()).where(tables.ApiKey.team_id == caller.team_id)
            if (await session.scalar(count) or 0) >= _MAX_KEYS:
                raise Exhausted(f"the team has {_MAX_KEYS} keys", hint="revoke some first")
            maker = await person_behind(session, caller)
            made = add_key(session, caller.team_id, maker, name, is_admin=is_admin)
            key_id = made[0].key_id
            audit.record(
                session, caller, "key.created", "key", key_id, name=name, is_admin=is_admin
            )
        return made

    async def revoke(self, caller: Caller, key_id: str) -> None:
        """End a key: itself, one's own, or any of the team for its administrators.

        Raises NotFound, Denied.
        """
        if caller.actor_id != key_id:
            caller.require_role(Role.MEMBER)
        async with self._db.write() as session:
            row = await session.get(tables.ApiKey, key_id)
            if row is None or row.team_id != caller.team_id:
                raise NotFound(f"there is no key {key_id[:80]!r}")
            if caller.actor_id not in {key_id, row.created_by}:
                caller.require_role(Role.ADMIN)
            if row.is_admin and not caller.is_admin:
                raise Denied("this key administers the platform")
            await session.execute(delete(tables.ApiKey).where(tables.ApiKey.key_id == key_id))
            audit.record(session, caller, "key.revoked", "key", key_id, name=row.name)


async def person_behind(session: AsyncSession, caller: Caller) -> str:
    """The user who answers for what a caller makes; `system` where there is none."""
    if caller.kind is not ActorKind.KEY:
        return caller.actor_id
    row = await session.get(tables.ApiKey, caller.actor_id)
    if row is None:
        raise Unauthenticated("the API key is not known", hint="was it revoked?")
    return row.created_by


async def drop_keys(session: AsyncSession, user_id: str, *, team_id: str | None = None) -> None:
    """End the keys behind which a user stands, or those of one team."""
    statement = delete(tables.ApiKey).where(tables.ApiKey.created_by == user_id)
    if team_id is not None:
        statement = statement.where(tables.ApiKey.team_id == team_id)
    await session.execute(statement)


def add_key(
    session: AsyncSession, team_id: str, created_by: str, name: str, *, is_admin: bool = False
) -> tuple[tables.ApiKey, str]:
    """A new key in a transaction, and its text."""
    key = _PREFIX + secrets.token_hex(20)
    row = tables.ApiKey(
        key_id=str(uuid4()),
        team_id=team_id,
        created_by=created_by,
        is_admin=is_admin,
        name=name,
        prefix=key[:_SHOWN_CHARS],
        key_hash=digest(key),
        created_at=time.time(),
    )
    session.add(row)
    return row, key
