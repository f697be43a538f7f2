"""People and keys by their ids, as the team is told of them in which they did something."""

from __future__ import annotations

from collections.abc import Iterable

from sqlalchemy import select

from sandmartin.control.db import Database
from sandmartin.control.tables import ApiKey, User


async def names_of(db: Database, actor_ids: Iterable[str]) -> dict[str, str]:
    """E-mail addresses of people and names of keys, by id; who is gone is not among them."""
    wanted = set(actor_ids)
    people = select(User.user_id, User.email).where(
        User.user_id.in_(wanted), User.deleted_at.is_(None)
    )
    keys = select(ApiKey.key_id, ApiKey.name).where(ApiKey.key_id.in_(wanted))
    async with db.read() as session:
        found = [*(await session.execute(people)).all(), *(await session.execute(keys)).all()]
    return {actor_id: name for actor_id, name in found}
