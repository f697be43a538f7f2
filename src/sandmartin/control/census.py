"""Who belongs to which team, and what teams have: figures for whoever administers the platform."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncSession

from sandmartin.control.states import ALIVE, HOLDING
from sandmartin.control.tables import Member, Sandbox, Team


@dataclass(frozen=True, kw_only=True)
class Size:
    """What a team is and has."""

    members: int = 0
    #: All that are not over.
    sandboxes: int = 0
    #: Those that count against its quotas.
    running: int = 0
    vcpus: int = 0
    memory_mb: int = 0


async def sizes_of(session: AsyncSession, team_ids: Collection[str]) -> Mapping[str, Size]:
    """Of each of these teams."""
    counts = select(Member.team_id, func.count()).where(Member.team_id.in_(team_ids))
    counted = await session.execute(counts.group_by(Member.team_id))
    members = {team_id: count for team_id, count in counted}
    holds = Sandbox.state.in_(HOLDING)
    query = (
        select(
            Sandbox.team_id,
            func.count(),
            func.count().filter(holds),
            func.coalesce(func.sum(Sandbox.vcpus).filter(holds), 0),
            func.coalesce(func.sum(Sandbox.memory_mb).filter(holds), 0),
        )
        .where(Sandbox.team_id.in_(team_ids), Sandbox.state.in_(ALIVE))
        .group_by(Sandbox.team_id)
    )
    held = {team_id: figures for team_id, *figures in await session.execute(query)}
    found = {}
    for team_id in team_ids:
        sandboxes, running, vcpus, memory_mb = held.get(team_id, (0, 0, 0, 0))
        found[team_id] = Size(
            members=members.get(team_id, 0),
            sandboxes=sandboxes,
            running=running,
            vcpus=int(vcpus),
            memory_mb=int(memory_mb),
        )
    return found


async def teams_of(
    session: AsyncSession, user_ids: Collection[str]
) -> Mapping[str, Sequence[Team]]:
    """The teams of each of these users, oldest membership first."""
    query = (
        select(Member.user_id, Team)
        .join(Team, Team.team_id == Member.team_id)
        .where(Member.user_id.in_(user_ids), Team.deleted_at.is_(None))
        .order_by(Member.created_at, Team.team_id)
    )
    found: dict[str, list[Team]] = defaultdict(list)
    for user_id, team in await session.execute(query):
        found[user_id].append(team)
    return found
