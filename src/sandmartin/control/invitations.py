"""Invitations: tokens, shown once, with which somebody may sign up or join a team.

Each is used at most once, by one guarded UPDATE, and dies with the rights of whoever made it.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from uuid import uuid4

from sqlalchemy import ColumnElement, delete, func, select, update
from sqlalchemy.ext.asyncio import AsyncSession

from sandmartin.control.caller import Role
from sandmartin.control.seal import digest
from sandmartin.control.tables import Invitation
from sandmartin.errors import Exhausted, Invalid

LIFE_S = 7 * 24 * 3600
_MAX_OPEN = 100
_MAX_EMAIL = 254


def add_invitation(
    session: AsyncSession,
    created_by: str,
    *,
    email: str = "",
    team_id: str | None = None,
    role: Role = Role.MEMBER,
) -> tuple[Invitation, str]:
    """A new invitation in a transaction, and its token, which is never seen again."""
    token = secrets.token_urlsafe(32)
    now = time.time()
    row = Invitation(
        invitation_id=str(uuid4()),
        token_hash=digest(token),
        email=check_email(email) if email else "",
        team_id=team_id,
        role=role,
        created_by=created_by,
        created_at=now,
        expires_at=now + LIFE_S,
    )
    session.add(row)
    return row, token


async def redeem(session: AsyncSession, token: str, email: str) -> Invitation:
    """Use an invitation up, for whoever has this address. Raises Invalid, the same for all."""
    row, now = Invitation, time.time()
    done = await session.execute(
        update(row)
        .where(
            row.token_hash == digest(token),
            row.used_at.is_(None),
            row.expires_at > now,
            row.email.in_(["", email]),
        )
        .values(used_at=now)
        .returning(row.invitation_id)
    )
    found = done.scalar_one_or_none()
    if found is None:
        raise Invalid(
            "the invitation is not valid",
            hint="it is for another address, was used already, or is too old: ask for a new one",
        )
    return await session.get_one(Invitation, found)


async def list_open(session: AsyncSession, team_id: str | None) -> Sequence[Invitation]:
    """Those of a team, or of the platform, that can still be used; newest first."""
    row = Invitation
    query = select(row).where(_of(team_id), row.used_at.is_(None), row.expires_at > time.time())
    return (await session.scalars(query.order_by(row.created_at.desc()))).all()


async def check_room(session: AsyncSession, team_id: str | None) -> None:
    """Remove what is too old. Raises Exhausted when too many wait to be used."""
    row = Invitation
    await session.execute(delete(row).where(row.used_at.is_(None), row.expires_at < time.time()))
    count = select(func.count()).where(_of(team_id), row.used_at.is_(None))
    if (await session.scalar(count) or 0) >= _MAX_OPEN:
        raise Exhausted(
            f"{_MAX_OPEN} invitations wait to be used", hint="withdraw some of them first"
        )


async def withdraw(session: AsyncSession, team_id: str | None, invitation_id: str) -> bool:
    """Whether there was such an invitation."""
    row = Invitation
    done = await session.execute(
        delete(row).where(row.invitation_id == invitation_id, _of(team_id), row.used_at.is_(None))
    )
    return bool(done.rowcount)  # type: ignore[attr-defined]


async def drop_invitations(
    session: AsyncSession, user_id: str, *, team_id: str | None = None
) -> None:
    """Withdraw what a user has invited to, or to one team."""
    statement = delete(Invitation).where(
        Invitation.created_by == user_id, Invitation.used_at.is_(None)
    )
    if team_id is not None:
        statement = statement.where(Invitation.team_id == team_id)
    await session.execute(statement)


def _of(team_id: str | None) -> ColumnElement[bool]:
    return Invitation.team_id.is_(None) if team_id is None else Invitation.team_id == team_id


def check_email(email: str) -> str:
    """The address in the form in which it is kept. Raises Invalid."""
    kept = email.strip().lower()
    name, at, domain = kept.rpartition("@")
    if not (at and name and domain) or len(kept) > _MAX_EMAIL:
        raise Invalid("this is no e-mail address")
    if not kept.isprintable() or any(char.isspace() for char in kept):
        raise Invalid("this is no e-mail address")
    return kept
