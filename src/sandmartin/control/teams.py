"""Teams: who belongs to them, who may do what, and how they end.

A team always has an owner. One gives at most the role one has, and acts only on those below (an
owner on all). Changes of one team's members are made one after the other. A deleted team's row
stays; what it had is destroyed afterwards, by whichever replica comes to it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from uuid import uuid4

from sqlalchemy import delete, func, select, update
from sqlalchemy.ext.asyncio import AsyncSession

from sandmartin.control import audit, events, invitations, tables
from sandmartin.control.caller import ActorKind, Caller, Role, system
from sandmartin.control.census import Size, sizes_of
from sandmartin.control.db import Database
from sandmartin.control.keys import drop_keys, person_behind
from sandmartin.control.limits import INVITATION, Limits, Use
from sandmartin.control.sandboxes import Sandboxes
from sandmartin.control.sessions import end_sessions
from sandmartin.control.states import ALIVE, TemplateState
from sandmartin.control.tables import PLATFORM_TEAM_ID, Invitation, Member, Team, User
from sandmartin.control.templates import Templates
from sandmartin.errors import (
    AlreadyExists,
    Conflict,
    Denied,
    Exhausted,
    Invalid,
    NotFound,
    SandmartinError,
)

_log = logging.getLogger(__name__)

_MAX_NAME = 100
#: Quotas are a team's, so that teams must not come for nothing.
_MAX_OWNED = 10


@dataclass(frozen=True, kw_only=True)
class Belonging:
    """A team, and the role that somebody has in it; None for one who is no member."""

    team: Team
    role: Role | None


@dataclass(frozen=True, kw_only=True)
class Limit:
    """What a team may hold; None is the platform's default."""

    max_sandboxes: int | None = None
    max_vcpus: int | None = None
    max_memory_mb: int | None = None


class Teams:
    """All teams but the platform's own."""

    def __init__(
        self,
        db: Database,
        limits: Limits,
        sandboxes: Sandboxes,
        templates: Templates,
        *,
        sweep_s: float,
    ) -> None:
        self._db = db
        self._limits = limits
        self._sandboxes = sandboxes
        self._templates = templates
        self._sweep_s = sweep_s

    # Looking.

    async def list(self, caller: Caller) -> Sequence[Belonging]:
        """The caller's teams, oldest membership first; of a key its own."""
        if caller.kind is not ActorKind.USER:
            return [await self.get(caller, caller.team_id)]
        async with self._db.read() as session:
            return await memberships(session, caller.actor_id)

    async def get(self, caller: Caller, team_id: str) -> Belonging:
        """Raises NotFound for a team that the caller does not belong to."""
        async with self._db.read() as session:
            team, acting = await _enter(session, caller, team_id)
            return Belonging(team=team, role=acting.role)

    async def members(self, caller: Caller, team_id: str) -> Sequence[tuple[Member, User]]:
        """Raises NotFound, Denied."""
        async with self._db.read() as session:
            _, acting = await _enter(session, caller, team_id)
            acting.require_role(Role.MEMBER)
            query = (
                select(Member, User)
                .join(User, User.user_id == Member.user_id)
                .where(Member.team_id == team_id)
                .order_by(Member.created_at)
            )
            return [(member, user) for member, user in await session.execute(query)]

    # Changing.

    async def create(self, caller: Caller, name: str) -> Belonging:
        """A team that the caller owns. Raises Invalid, Exhausted."""
        async with self._db.write() as session:
            owned = select(func.count()).where(
                Member.user_id == caller.actor_id, Member.role == Role.OWNER
            )
            if (await session.scalar(owned) or 0) >= _MAX_OWNED:
                raise Exhausted(f"you own {_MAX_OWNED} teams", hint="delete one first")
            team = await found_team(session, caller.actor_id, name)
            audit.record(
                session, caller, "team.created", "team", team.team_id, team_id=team.team_id
            )
        return Belonging(team=team, role=Role.OWNER)

    async def rename(self, caller: Caller, team_id: str, name: str) -> Belonging:
        """Raises NotFound, Denied, Invalid."""
        async with self._db.write() as session:
            team, acting = await _enter(session, caller, team_id, change=True)
            acting.require_role(Role.ADMIN)
            team.name = check_team_name(name)
            audit.record(session, acting, "team.renamed", "team", team_id, name=team.name)
        return Belonging(team=team, role=acting.role)

    async def set_role(self, caller: Caller, team_id: str, user_id: str, role: Role) -> None:
        """Raises NotFound, Denied; Conflict when no owner would be left."""
        async with self._db.write() as session:
            _, acting = await _enter(session, caller, team_id, change=True)
            member = await _get_member(session, team_id, user_id)
            _check_power(acting, Role(member.role), role)
            if role is not Role.OWNER:
                await _check_owner_stays(session, member)
            member.role = role
            audit.record(
                session,
                acting,
                "member.role_changed",
                "member",
                user_id,
                scope="admin",
                role=role,
            )

    async def remove(self, caller: Caller, team_id: str, user_id: str) -> None:
        """Put somebody out of a team, or leave it.

        Raises NotFound, Denied; Conflict when no owner would be left.
        """
        async with self._db.write() as session:
            _, acting = await _enter(session, caller, team_id, change=True)
            member = await _get_member(session, team_id, user_id)
            leaves = acting.kind is ActorKind.USER and user_id == acting.actor_id
            if not leaves:
                _check_power(acting, Role(member.role))
            await _check_owner_stays(session, member)
            await part(session, member)
            action = "member.left" if leaves else "member.removed"
            audit.record(session, acting, action, "member", user_id, scope="admin")

    async def delete(self, caller: Caller, team_id: str) -> None:
        """End a team and destroy all that it has. Raises NotFound, Denied."""
        async with self._db.write() as session:
            team, acting = await _enter(session, caller, team_id, change=True)
            acting.require_role(Role.OWNER)
            await end_team(session, acting, team)
        await self.clear(team_id)

    # Invitations.

    async def invite(
        self, caller: Caller, team_id: str, role: Role, email: str = ""
    ) -> tuple[Invitation, str]:
        """An invitation, and its token. Raises NotFound, Denied, Invalid, Exhausted."""
        async with self._db.write() as session:
            _, acting = await _enter(session, caller, team_id, change=True)
            acting.require_role(Role.ADMIN)
            _check_power(acting, None, role)
            await invitations.check_room(session, team_id)
            made = invitations.add_invitation(
                session,
                await person_behind(session, acting),
                email=email,
                team_id=team_id,
                role=role,
            )
            audit.record(
                session,
                acting,
                "member.invited",
                "invitation",
                made[0].invitation_id,
                scope="admin",
                role=role,
                email=made[0].email,
            )
        return made

    async def invitations(self, caller: Caller, team_id: str) -> Sequence[Invitation]:
        """Those that can still be used. Raises NotFound, Denied."""
        async with self._db.read() as session:
            _, acting = await _enter(session, caller, team_id)
            acting.require_role(Role.ADMIN)
            return await invitations.list_open(session, team_id)

    async def withdraw(self, caller: Caller, team_id: str, invitation_id: str) -> None:
        """Raises NotFound, Denied."""
        async with self._db.write() as session:
            _, acting = await _enter(session, caller, team_id, change=True)
            acting.require_role(Role.ADMIN)
            if not await invitations.withdraw(session, team_id, invitation_id):
                raise NotFound(f"there is no invitation {invitation_id[:80]!r}")
            audit.record(
                session,
                acting,
                "invitation.withdrawn",
                "invitation",
                invitation_id,
                scope="admin",
            )

    async def accept(self, caller: Caller, token: str) -> Belonging:
        """Join the team of an invitation. Raises Invalid, AlreadyExists, TooMany."""
        use = Use(INVITATION, caller.actor_id), Use(INVITATION, caller.address)
        await self._limits.take(*use)
        async with self._db.write() as session:
            user = await session.get_one(User, caller.actor_id)
            invitation = await invitations.redeem(session, token, user.email)
            if invitation.team_id is None:
                raise Invalid("this invitation is to the platform, which you belong to already")
            team = await join_team(session, caller, invitation)
        await self._limits.give_back(*use)
        return Belonging(team=team, role=Role(invitation.role))

    # For administrators of the platform.

    async def list_all(
        self, caller: Caller, *, after: str, limit: int
    ) -> Sequence[tuple[Team, Size]]:
        """All teams that are not deleted, by id, with what they have. Raises Denied."""
        caller.require_admin()
        query = select(Team).where(
            Team.deleted_at.is_(None), Team.team_id > after, Team.team_id != PLATFORM_TEAM_ID
        )
        async with self._db.read() as session:
            teams = (await session.scalars(query.order_by(Team.team_id).limit(limit))).all()
            sizes = await sizes_of(session, [team.team_id for team in teams])
            return [(team, sizes[team.team_id]) for team in teams]

    async def set_limit(self, caller: Caller, team_id: str, limit: Limit) -> Team:
        """What a team may hold from now on. Raises NotFound, Denied."""
        caller.require_admin()
        async with self._db.write() as session:
            team = await lock_team(session, team_id)
            for name, value in vars(limit).items():
                setattr(team, name, value)
            audit.record(
                session, caller, "team.quotas_set", "team", team_id, team_id=team_id, **vars(limit)
            )
        return team

    async def delete_any(self, caller: Caller, team_id: str) -> None:
        """As `delete`, for whichever team but the platform's. Raises NotFound, Denied."""
        caller.require_admin()
        if team_id == PLATFORM_TEAM_ID:
            raise Denied("the platform's own team cannot be deleted")
        async with self._db.write() as session:
            team = await lock_team(session, team_id)
            await end_team(session, replace(caller, team_id=team_id), team)
        await self.clear(team_id)

    # What deleted teams had.

    async def clear(self, team_id: str) -> None:
        """Destroy what a deleted team still has; what cannot be now is taken up later."""
        row, template = tables.Sandbox, tables.Template
        async with self._db.read() as session:
            ids = await session.scalars(
                select(row.sandbox_id).where(row.team_id == team_id, row.state.in_(ALIVE))
            )
            names = await session.scalars(
                select(template.name).where(
                    template.team_id == team_id, template.state == TemplateState.READY
                )
            )
            sandbox_ids, template_names = ids.all(), names.all()
        caller = system(team_id)
        ends = [self._sandboxes.destroy(caller, each) for each in sandbox_ids]
        failures = await asyncio.gather(*ends, return_exceptions=True)
        for name in template_names:
            failures += await asyncio.gather(
                self._templates.delete(caller, name), return_exceptions=True
            )
        for failure in failures:
            if isinstance(failure, SandmartinError):
                _log.info("deleted team %s still has something: %s", team_id, failure)
            elif failure is not None:
                raise failure

    async def sweep(self) -> None:
        """Destroy what deleted teams still have, for ever."""
        while True:
            await asyncio.sleep(self._sweep_s)
            try:
                for team_id in await self._unfinished():
                    await self.clear(team_id)
            except SandmartinError as error:
                _log.warning("deleted teams are not looked at: %s", error)

    async def _unfinished(self) -> Sequence[str]:
        row, template = tables.Sandbox, tables.Template
        having = select(row.team_id).where(row.state.in_(ALIVE))
        templates = select(template.team_id).where(template.state == TemplateState.READY)
        query = select(Team.team_id).where(
            Team.deleted_at.is_not(None), Team.team_id.in_(having.union(templates))
        )
        async with self._db.read() as session:
            return (await session.scalars(query)).all()


# In the transactions of whoever changes something.


async def memberships(session: AsyncSession, user_id: str) -> list[Belonging]:
    """A user's teams, oldest membership first."""
    query = (
        select(Team, Member.role)
        .join(Member, Member.team_id == Team.team_id)
        .where(Member.user_id == user_id, Team.deleted_at.is_(None))
        .order_by(Member.created_at, Team.team_id)
    )
    return [Belonging(team=team, role=Role(role)) for team, role in await session.execute(query)]


async def found_team(session: AsyncSession, user_id: str, name: str) -> Team:
    """A new team of one owner. Raises Invalid."""
    now = time.time()
    team = Team(team_id=str(uuid4()), name=check_team_name(name), created_at=now)
    session.add(team)
    await session.flush()
    member = Member(team_id=team.team_id, user_id=user_id, role=Role.OWNER, created_at=now)
    session.add(member)
    return team


async def join_team(session: AsyncSession, caller: Caller, invitation: Invitation) -> Team:
    """Whoever used an invitation is a member now. Raises NotFound, AlreadyExists."""
    team_id, user_id = invitation.team_id, caller.actor_id
    assert team_id is not None
    team = await lock_team(session, team_id)
    if await session.get(Member, (team_id, user_id)) is not None:
        raise AlreadyExists("you are a member of this team already")
    session.add(
        Member(team_id=team_id, user_id=user_id, role=invitation.role, created_at=time.time())
    )
    events.record(session, team_id, "member.joined", user_id=user_id, role=invitation.role)
    audit.record(
        session,
        caller,
        "member.joined",
        "member",
        user_id,
        scope="admin",
        team_id=team_id,
        role=invitation.role,
        invited_by=invitation.created_by,
    )
    return team


async def part(session: AsyncSession, member: Member) -> None:
    """A member is none any more, nor is what depended on it."""
    team_id, user_id = member.team_id, member.user_id
    await session.delete(member)
    await end_sessions(session, user_id, team_id=team_id)
    await drop_keys(session, user_id, team_id=team_id)
    await invitations.drop_invitations(session, user_id, team_id=team_id)
    events.record(session, team_id, "member.left", user_id=user_id)


async def end_team(session: AsyncSession, caller: Caller, team: Team) -> None:
    """Nobody can do anything as this team any more."""
    team_id = team.team_id
    team.deleted_at = time.time()
    for row in (tables.Member, tables.ApiKey, tables.BrowserSession, tables.Invitation):
        await session.execute(delete(row).where(row.team_id == team_id))
    await session.execute(
        update(tables.Channel).where(tables.Channel.team_id == team_id).values(active=False)
    )
    audit.record(session, caller, "team.deleted", "team", team_id, name=team.name)


async def lock_team(session: AsyncSession, team_id: str) -> Team:
    """A team whose members nobody else changes meanwhile. Raises NotFound."""
    query = select(Team).where(Team.team_id == team_id, Team.deleted_at.is_(None))
    team = await session.scalar(query.with_for_update())
    if team is None:
        raise NotFound(f"there is no team {team_id[:80]!r}")
    return team


async def _enter(
    session: AsyncSession, caller: Caller, team_id: str, *, change: bool = False
) -> tuple[Team, Caller]:
    """A team, and the caller as who they are in it. Raises NotFound."""
    missing = NotFound(f"there is no team {team_id[:80]!r}")
    if change:
        # Before the role is read: whoever changes it has the lock.
        team: Team | None = await lock_team(session, team_id)
    else:
        team = await session.get(Team, team_id)
    if team is None or team.deleted_at is not None:
        raise missing
    role = caller.role
    if caller.kind is ActorKind.USER:
        member = await session.get(Member, (team_id, caller.actor_id))
        if member is None:
            raise missing
        role = Role(member.role)
    elif caller.team_id != team_id:
        raise missing
    return team, replace(caller, team_id=team_id, role=role)


async def _get_member(session: AsyncSession, team_id: str, user_id: str) -> Member:
    member = await session.get(Member, (team_id, user_id))
    if member is None:
        raise NotFound(f"the team has no member {user_id[:80]!r}")
    return member


def _check_power(acting: Caller, over: Role | None, gives: Role | None = None) -> None:
    """Raises Denied unless the caller may act on a member, and give a role."""
    acting.require_role(Role.ADMIN)
    assert acting.role is not None
    if acting.role is Role.OWNER:
        return
    if over is not None and over.rank >= acting.role.rank:
        raise Denied(f"a team's {acting.role} cannot change its {over}s")
    if gives is not None and gives.rank > acting.role.rank:
        raise Denied(f"a team's {acting.role} cannot make somebody its {gives}")


async def _check_owner_stays(session: AsyncSession, member: Member) -> None:
    """Raises Conflict when the team would have no owner without this one."""
    if member.role != Role.OWNER:
        return
    others = select(func.count()).where(
        Member.team_id == member.team_id,
        Member.role == Role.OWNER,
        Member.user_id != member.user_id,
    )
    if not await session.scalar(others):
        raise Conflict("the team would have no owner", hint="make another member its owner first")


def check_team_name(name: str) -> str:
    """Raises Invalid."""
    name = name.strip()
    if not 0 < len(name) <= _MAX_NAME or not name.isprintable():
        raise Invalid("the team's name is empty, too long or not printable")
    return name
