"""Accounts: the people who log in, how they come, and how they go.

The first account ever made administers the platform; an active administrator always remains. An
address belongs to one account, and is forgotten with it. What is said to somebody who is not
logged in tells nothing of who has an account, except to one who may sign up.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from uuid import uuid4

from sqlalchemy import delete, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession

from sandmartin.control import audit, invitations
from sandmartin.control.caller import Caller, Role, Whence
from sandmartin.control.census import teams_of
from sandmartin.control.db import Database
from sandmartin.control.invitations import check_email
from sandmartin.control.keys import drop_keys, person_behind
from sandmartin.control.limits import (
    LOGIN_BY_ACCOUNT,
    LOGIN_BY_ADDRESS,
    SIGN_UP,
    Limits,
    Use,
)
from sandmartin.control.passwords import Passwords
from sandmartin.control.sessions import end_sessions, person
from sandmartin.control.settings import ControlSettings
from sandmartin.control.tables import (
    PLATFORM_TEAM_ID,
    Invitation,
    Member,
    OauthIdentity,
    Team,
    User,
)
from sandmartin.control.teams import (
    Belonging,
    Teams,
    end_team,
    found_team,
    join_team,
    lock_team,
    memberships,
    part,
)
from sandmartin.errors import (
    AlreadyExists,
    Conflict,
    Denied,
    Invalid,
    NotFound,
    Unauthenticated,
)

_log = logging.getLogger(__name__)

_MAX_NAME = 100


class SignUp(StrEnum):
    """Who may make an account."""

    OPEN = "open"
    INVITED = "invited"
    CLOSED = "closed"

    @classmethod
    def of(cls, text: str) -> SignUp:
        """Raises Invalid."""
        try:
            return cls(text)
        except ValueError:
            raise Invalid(f"sign_up is {text!r}", hint="use open, invited or closed") from None


@dataclass(frozen=True, kw_only=True)
class NewUser:
    """Somebody who wants an account."""

    email: str
    name: str = ""
    invitation: str = field(default="", repr=False)


@dataclass(frozen=True, kw_only=True)
class Entered:
    """Somebody who may have a session, and the team that it is to be for."""

    user_id: str
    team_id: str


@dataclass(frozen=True, kw_only=True)
class Profile:
    user: User
    teams: Sequence[Belonging]
    #: Where else the user may log in.
    providers: Sequence[str]


class Accounts:
    """The accounts of a platform."""

    def __init__(
        self, db: Database, settings: ControlSettings, limits: Limits, teams: Teams
    ) -> None:
        self.policy = SignUp.of(settings.sign_up)
        self._base_url = settings.base_url
        self._db = db
        self._limits = limits
        self._teams = teams
        self._passwords = Passwords()

    # Coming.

    def invitation_url(self, token: str) -> str:
        """Where to go with an invitation; its token stays in the browser, out of all logs."""
        return f"{self._base_url}/dashboard/signup#invitation={token}"

    async def sign_up(self, new: NewUser, password: str, whence: Whence) -> Entered:
        """A new account. Raises Invalid, Denied, AlreadyExists, TooMany."""
        await self._limits.take(Use(SIGN_UP, whence.address))
        self._check_policy(new)
        hashed = await self._passwords.hash(password)
        try:
            async with self._db.write() as session:
                return await self.add(session, new, hashed, whence)
        except IntegrityError as error:
            raise _taken() from error

    async def add(
        self, session: AsyncSession, new: NewUser, password_hash: str | None, whence: Whence
    ) -> Entered:
        """A new account in a transaction, if its owner may have one."""
        email, name = check_email(new.email), check_name_of_user(new.name)
        # One after the other, so that there is one first.
        platform = select(Team.team_id).where(Team.team_id == PLATFORM_TEAM_ID)
        await session.execute(platform.with_for_update())
        invitation = await self._admit(session, new, email)
        if await session.scalar(select(User.user_id).where(User.email == email)) is not None:
            raise _taken()
        is_first = await session.scalar(select(User.user_id).limit(1)) is None
        user = User(
            user_id=str(uuid4()),
            email=email,
            name=name,
            password_hash=password_hash,
            is_admin=is_first,
            active=True,
            created_at=time.time(),
        )
        session.add(user)
        await session.flush()
        if invitation is not None and invitation.team_id is not None:
            caller = person(user, invitation.team_id, whence)
            team = await join_team(session, caller, invitation)
        else:
            team = await found_team(session, user.user_id, _own_team_name(user))
        caller = person(user, team.team_id, whence)
        audit.record(
            session, caller, "user.signed_up", "user", user.user_id, scope="admin", first=is_first
        )
        return Entered(user_id=user.user_id, team_id=team.team_id)

    async def _admit(self, session: AsyncSession, new: NewUser, email: str) -> Invitation | None:
        self._check_policy(new)
        if new.invitation:
            return await invitations.redeem(session, new.invitation, email)
        return None

    def _check_policy(self, new: NewUser) -> None:
        hint = "ask an administrator of the platform"
        if self.policy is SignUp.CLOSED:
            raise Denied("nobody can sign up here", hint=hint)
        if self.policy is SignUp.INVITED and not new.invitation:
            raise Denied("an account needs an invitation", hint=hint)

    async def log_in(self, email: str, password: str, whence: Whence) -> Entered:
        """Raises Unauthenticated, Denied for a disabled account, TooMany."""
        email = email.strip().lower()
        uses = Use(LOGIN_BY_ADDRESS, whence.address), Use(LOGIN_BY_ACCOUNT, email)
        await self._limits.take(*uses)
        async with self._db.read() as session:
            user = await session.scalar(select(User).where(User.email == email))
        hashed = user.password_hash if user is not None else None
        if not await self._passwords.matches(hashed, password) or user is None:
            _log.info("a login failed, from %s", whence.address)
            raise Unauthenticated("the e-mail address or the password is wrong")
        await self._limits.give_back(*uses)
        return await self.enter(user.user_id, whence)

    async def enter(self, user_id: str, whence: Whence) -> Entered:
        """Somebody has shown who they are. Raises Denied for a disabled account."""
        async with self._db.write() as session:
            user = await session.get(User, user_id)
            if user is None or not user.active:
                raise Denied("this account is disabled", hint="ask an administrator")
            found = await memberships(session, user_id)
            if found:
                return Entered(user_id=user_id, team_id=found[0].team.team_id)
            team = await found_team(session, user_id, _own_team_name(user))
            caller = person(user, team.team_id, whence)
            audit.record(session, caller, "team.created", "team", team.team_id)
            return Entered(user_id=user_id, team_id=team.team_id)

    # One's own.

    async def profile(self, caller: Caller) -> Profile:
        async with self._db.read() as session:
            providers = await session.scalars(
                select(OauthIdentity.provider).where(OauthIdentity.user_id == caller.actor_id)
            )
            return Profile(
                user=await session.get_one(User, caller.actor_id),
                teams=await memberships(session, caller.actor_id),
                providers=providers.all(),
            )

    async def rename(self, caller: Caller, name: str) -> None:
        """Raises Invalid."""
        async with self._db.write() as session:
            user = await session.get_one(User, caller.actor_id)
            user.name = check_name_of_user(name)
            audit.record(session, caller, "user.renamed", "user", user.user_id, scope="admin")

    async def change_password(
        self, caller: Caller, current: str, new: str, *, session_hash: str
    ) -> None:
        """A new password; all other sessions end. Without one so far none need be given.

        Raises Denied for a wrong password, Invalid, TooMany.
        """
        use = Use(LOGIN_BY_ACCOUNT, caller.name)
        await self._limits.take(use)
        async with self._db.read() as session:
            known = (await session.get_one(User, caller.actor_id)).password_hash
        if known is not None and not await self._passwords.matches(known, current):
            raise Denied("the current password is wrong")
        await self._limits.give_back(use)
        hashed = await self._passwords.hash(new)
        async with self._db.write() as session:
            done = await session.execute(
                update(User)
                .where(
                    User.user_id == caller.actor_id, User.password_hash.is_not_distinct_from(known)
                )
                .values(password_hash=hashed)
            )
            if not done.rowcount:  # type: ignore[attr-defined]
                raise Conflict("the password was changed meanwhile")
            await end_sessions(session, caller.actor_id, keep=session_hash)
            audit.record(
                session, caller, "user.password_changed", "user", caller.actor_id, scope="admin"
            )

    async def unlink(self, caller: Caller, provider: str) -> None:
        """Log in there no more. Raises NotFound; Conflict when no other way would be left."""
        async with self._db.write() as session:
            user = await _lock_user(session, caller.actor_id)
            rows = await session.scalars(
                select(OauthIdentity).where(OauthIdentity.user_id == user.user_id)
            )
            linked = {row.provider: row for row in rows}
            if provider not in linked:
                raise NotFound(f"your account is not linked to {provider[:40]!r}")
            if user.password_hash is None and len(linked) == 1:
                raise Conflict("you could not log in any more", hint="set a password first")
            await session.delete(linked[provider])
            audit.record(
                session,
                caller,
                "user.unlinked",
                "user",
                user.user_id,
                scope="admin",
                provider=provider,
            )

    async def delete(self, caller: Caller, confirm: str) -> None:
        """Forget the caller, whose address `confirm` is; teams of nobody else end too.

        Raises Invalid; Conflict for the last administrator, and for the last owner of others.
        """
        async with self._db.write() as session:
            user = await _lock_user(session, caller.actor_id)
            if confirm.strip().lower() != user.email:
                raise Invalid("this is not your e-mail address", hint="`confirm` must be it")
            await _check_admin_stays(session, user)
            ended = await self._leave_all(session, caller)
            await session.execute(
                delete(OauthIdentity).where(OauthIdentity.user_id == user.user_id)
            )
            await end_sessions(session, user.user_id)
            await drop_keys(session, user.user_id)
            await invitations.drop_invitations(session, user.user_id)
            user.email, user.name = f"deleted:{user.user_id}", ""
            user.password_hash, user.active, user.is_admin = None, False, False
            user.deleted_at = time.time()
            audit.record(session, caller, "user.deleted", "user", user.user_id, scope="admin")
        for team_id in ended:
            await self._teams.clear(team_id)

    async def _leave_all(self, session: AsyncSession, caller: Caller) -> list[str]:
        """Leave all teams; those that ended with it. Raises Conflict."""
        ended = []
        for each in await memberships(session, caller.actor_id):
            team = await lock_team(session, each.team.team_id)
            query = select(Member).where(Member.team_id == team.team_id)
            members = (await session.scalars(query)).all()
            others = [one for one in members if one.user_id != caller.actor_id]
            if not others:
                await end_team(session, caller, team)
                ended.append(team.team_id)
                continue
            if not any(one.role == Role.OWNER for one in others):
                raise Conflict(
                    f"you are the only owner of team {team.name!r}, which has other members",
                    hint="make one of them its owner, or delete the team",
                )
            mine = next(one for one in members if one.user_id == caller.actor_id)
            await part(session, mine)
        return ended

    # For administrators of the platform.

    async def list(
        self, caller: Caller, *, after: str, limit: int
    ) -> Sequence[tuple[User, Sequence[Team]]]:
        """All accounts but deleted ones, by id, with their teams. Raises Denied."""
        caller.require_admin()
        query = select(User).where(User.deleted_at.is_(None), User.user_id > after)
        async with self._db.read() as session:
            users = (await session.scalars(query.order_by(User.user_id).limit(limit))).all()
            teams = await teams_of(session, [user.user_id for user in users])
            return [(user, teams.get(user.user_id, [])) for user in users]

    async def set_active(self, caller: Caller, user_id: str, active: bool) -> User:
        """Disable somebody, and all keys and sessions of theirs, or allow them again.

        Raises Denied, NotFound; Conflict for the last administrator.
        """
        caller.require_admin()
        async with self._db.write() as session:
            user = await _lock_user(session, user_id)
            if not active:
                await _check_admin_stays(session, user)
                await end_sessions(session, user_id)
                await invitations.drop_invitations(session, user_id)
            user.active = active
            action = "user.enabled" if active else "user.disabled"
            audit.record(
                session, caller, action, "user", user_id, scope="admin", team_id=PLATFORM_TEAM_ID
            )
        return user

    async def set_admin(self, caller: Caller, user_id: str, is_admin: bool) -> User:
        """Raises Denied, NotFound; Conflict for the last administrator."""
        caller.require_admin()
        async with self._db.write() as session:
            user = await _lock_user(session, user_id)
            if not is_admin:
                await _check_admin_stays(session, user)
            user.is_admin = is_admin
            action = "user.made_admin" if is_admin else "user.admin_revoked"
            audit.record(
                session, caller, action, "user", user_id, scope="admin", team_id=PLATFORM_TEAM_ID
            )
        return user

    async def invite(self, caller: Caller, email: str = "") -> tuple[Invitation, str]:
        """An invitation to the platform, and its token. Raises Denied, Invalid, Exhausted."""
        caller.require_admin()
        async with self._db.write() as session:
            await invitations.check_room(session, None)
            maker = await person_behind(session, caller)
            made = invitations.add_invitation(session, maker, email=email)
            audit.record(
                session,
                caller,
                "user.invited",
                "invitation",
                made[0].invitation_id,
                scope="admin",
                team_id=PLATFORM_TEAM_ID,
                email=made[0].email,
            )
        return made

    async def invitations(self, caller: Caller) -> Sequence[Invitation]:
        """Those to the platform that can still be used. Raises Denied."""
        caller.require_admin()
        async with self._db.read() as session:
            return await invitations.list_open(session, None)

    async def withdraw(self, caller: Caller, invitation_id: str) -> None:
        """Raises Denied, NotFound."""
        caller.require_admin()
        async with self._db.write() as session:
            if not await invitations.withdraw(session, None, invitation_id):
                raise NotFound(f"there is no invitation {invitation_id[:80]!r}")
            audit.record(
                session,
                caller,
                "invitation.withdrawn",
                "invitation",
                invitation_id,
                scope="admin",
                team_id=PLATFORM_TEAM_ID,
            )


async def _lock_user(session: AsyncSession, user_id: str) -> User:
    """A user whom nobody else changes meanwhile. Raises NotFound."""
    query = select(User).where(User.user_id == user_id, User.deleted_at.is_(None))
    user = await session.scalar(query.with_for_update())
    if user is None:
        raise NotFound(f"there is no user {user_id[:80]!r}")
    return user


async def _check_admin_stays(session: AsyncSession, user: User) -> None:
    """Raises Conflict when nobody would administer the platform without this one."""
    if not (user.is_admin and user.active):
        return
    query = select(User.user_id).where(User.is_admin, User.active).order_by(User.user_id)
    administrators = (await session.scalars(query.with_for_update())).all()
    if len(administrators) <= 1:
        raise Conflict(
            "the platform would have no administrator", hint="make another user one first"
        )


def check_name_of_user(name: str) -> str:
    """Raises Invalid."""
    name = name.strip()
    if len(name) > _MAX_NAME or not name.isprintable():
        raise Invalid("the name is too long or not printable", hint="use up to 100 characters")
    return name


def _own_team_name(user: User) -> str:
    who = user.name or user.email.partition("@")[0]
    return f"{who[:80]}'s team"


def _taken() -> AlreadyExists:
    return AlreadyExists("there is an account with this e-mail address", hint="log in instead")
