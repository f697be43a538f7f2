"""Browser sessions: who is logged in, known by a cookie that is kept as a hash.

A session is found, with its user and the user's role, at each request, so that a logged-out one,
a disabled user or a former member stops at once. A new login is always a new session. What a
cookie may change needs the session's CSRF token too.
"""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass, field, replace

from sqlalchemy import delete, select, update
from sqlalchemy.ext.asyncio import AsyncSession

from sandmartin.control import audit
from sandmartin.control.caller import ActorKind, Caller, Role, Whence
from sandmartin.control.db import Database
from sandmartin.control.seal import digest
from sandmartin.control.tables import BrowserSession, Member, Team, User
from sandmartin.errors import Denied, NotFound, Unauthenticated

LIFE_S = 14 * 24 * 3600
_SECURE_COOKIE = "__Host-sandmartin"
_PLAIN_COOKIE = "sandmartin_session"
#: None of these is for what runs in a sandbox.
COOKIES = frozenset({_SECURE_COOKIE, _PLAIN_COOKIE})


def cookie_name(base_url: str) -> str:
    """The session's cookie; browsers bind the one on https to this very host."""
    return _SECURE_COOKIE if base_url.startswith("https:") else _PLAIN_COOKIE


@dataclass(frozen=True, kw_only=True)
class LoggedIn:
    """A session of somebody, who acts for one team."""

    caller: Caller
    session_hash: str = field(repr=False)
    csrf_token: str = field(repr=False)

    def check_csrf(self, token: str) -> None:
        """Raises Denied unless `token` is the session's."""
        if not secrets.compare_digest(token.encode(), self.csrf_token.encode()):
            raise Denied(
                "the CSRF token is missing or wrong",
                hint="send `csrf_token` of GET /v1/me as X-CSRF-Token",
            )


class Sessions:
    """The browser sessions of all users."""

    def __init__(self, db: Database) -> None:
        self._db = db

    async def start(
        self, user_id: str, team_id: str, whence: Whence, *, instead_of: str = ""
    ) -> str:
        """A new session's cookie; the session of the cookie `instead_of` ends.

        Raises Denied when the user was disabled meanwhile.
        """
        token, now = secrets.token_urlsafe(32), time.time()
        async with self._db.write() as session:
            user = await session.get(User, user_id)
            if user is None or not user.active:
                raise Denied("this account is disabled")
            await session.execute(
                delete(BrowserSession).where(
                    (BrowserSession.session_hash == digest(instead_of))
                    | (BrowserSession.expires_at < now)
                )
            )
            session.add(
                BrowserSession(
                    session_hash=digest(token),
                    user_id=user_id,
                    team_id=team_id,
                    csrf_token=secrets.token_urlsafe(32),
                    created_at=now,
                    expires_at=now + LIFE_S,
                )
            )
            caller = person(user, team_id, whence)
            audit.record(session, caller, "user.logged_in", "user", user_id, scope="admin")
        return token

    async def find(self, token: str, whence: Whence) -> LoggedIn:
        """Whose cookie this is. Raises Unauthenticated."""
        query = (
            select(BrowserSession, User, Member.role)
            .join(User, User.user_id == BrowserSession.user_id)
            .join(Team, Team.team_id == BrowserSession.team_id)
            .join(
                Member,
                (Member.user_id == BrowserSession.user_id)
                & (Member.team_id == BrowserSession.team_id),
            )
            .where(
                BrowserSession.session_hash == digest(token),
                BrowserSession.expires_at > time.time(),
                User.active,
                Team.deleted_at.is_(None),
            )
        )
        async with self._db.read() as session:
            found = (await session.execute(query)).one_or_none()
        if found is None:
            raise Unauthenticated("the session is over", hint="log in again")
        row, user, role = found
        return LoggedIn(
            caller=replace(
                person(user, row.team_id, whence, role=Role(role)), session_hash=row.session_hash
            ),
            session_hash=row.session_hash,
            csrf_token=row.csrf_token,
        )

    async def end(self, logged_in: LoggedIn) -> None:
        async with self._db.write() as session:
            await session.execute(
                delete(BrowserSession).where(BrowserSession.session_hash == logged_in.session_hash)
            )
            caller = logged_in.caller
            audit.record(session, caller, "user.logged_out", "user", caller.actor_id, scope="admin")

    async def switch(self, logged_in: LoggedIn, team_id: str) -> None:
        """Act for another team from now on. Raises NotFound unless its member."""
        caller = logged_in.caller
        async with self._db.write() as session:
            team = await session.get(Team, team_id)
            member = await session.get(Member, (team_id, caller.actor_id))
            if member is None or team is None or team.deleted_at is not None:
                raise NotFound(f"there is no team {team_id[:80]!r}")
            await session.execute(
                update(BrowserSession)
                .where(BrowserSession.session_hash == logged_in.session_hash)
                .values(team_id=team_id)
            )
            audit.record(
                session,
                caller,
                "user.switched_team",
                "user",
                caller.actor_id,
                scope="admin",
                team_id=team_id,
            )


def person(user: User, team_id: str, whence: Whence, *, role: Role | None = None) -> Caller:
    """A user as one who asks."""
    return Caller(
        kind=ActorKind.USER,
        actor_id=user.user_id,
        name=user.email,
        team_id=team_id,
        role=role,
        is_admin=user.is_admin,
        request_id=whence.request_id,
        address=whence.address,
    )


async def end_sessions(
    session: AsyncSession, user_id: str, *, team_id: str | None = None, keep: str = ""
) -> None:
    """End a user's sessions, or those for one team, but for the one with the hash `keep`."""
    statement = delete(BrowserSession).where(
        BrowserSession.user_id == user_id, BrowserSession.session_hash != keep
    )
    if team_id is not None:
        statement = statement.where(BrowserSession.team_id == team_id)
    await session.execute(statement)
