"""Quotas: how much of the platform one team may hold at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncSession

from sandmartin.control import tables
from sandmartin.control.states import HOLDING
from sandmartin.errors import Exhausted
from sandmartin.model import SandboxSpec


@dataclass(frozen=True, kw_only=True)
class Quotas:
    """What a team may hold where nothing else is said for it."""

    max_sandboxes: int = 100
    max_vcpus: int = 200
    max_memory_mb: int = 200 * 1024

    def of(self, team: tables.Team | None) -> Quotas:
        """What a team may hold: its own quotas, and these where it has none."""
        if team is None:
            return self
        own = {name: getattr(team, name) for name in vars(self)}
        return replace(self, **{name: value for name, value in own.items() if value is not None})

    async def check(self, session: AsyncSession, team_id: str, more: Sequence[SandboxSpec]) -> None:
        """Raises Exhausted when the team may not hold `more` beside what it holds."""
        # Where transactions write side by side, those of one team count one after the other.
        lock = {"read": False, "key_share": True}
        team = await session.get(tables.Team, team_id, with_for_update=lock)
        row = tables.Sandbox
        query = select(func.count(), func.sum(row.vcpus), func.sum(row.memory_mb)).where(
            row.team_id == team_id, row.state.in_(HOLDING)
        )
        count, vcpus, memory_mb = (await session.execute(query)).one()
        own = self.of(team)
        limits = (own.max_sandboxes, own.max_vcpus, own.max_memory_mb)
        wants = (
            count + len(more),
            (vcpus or 0) + sum(each.vcpus for each in more),
            (memory_mb or 0) + sum(each.memory_mb for each in more),
        )
        words = ("sandboxes", "vCPUs", "MB of memory")
        for what, wanted, limit in zip(words, wants, limits, strict=True):
            if wanted > limit:
                raise Exhausted(
                    f"the team would have {wanted} {what}, and may have {limit}",
                    hint="pause or destroy sandboxes, or ask for a higher quota",
                )
