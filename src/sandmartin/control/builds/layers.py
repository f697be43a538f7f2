"""Layers: what builds have made and builds to come may begin from, each a team's hidden template.

A layer is found by its key, used last by somebody, and forgotten when a team has too many of them,
the one first that was not used for longest. What a sandbox or another template still needs is
kept by the hosts until that is over.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import delete, func, select
from sqlalchemy.ext.asyncio import AsyncSession

from sandmartin.control.db import Database
from sandmartin.control.states import HostState, TemplateState
from sandmartin.control.tables import Host, Team, Template, TemplatePlacement
from sandmartin.control.templates import retire


@dataclass(frozen=True, kw_only=True)
class LayerLimits:
    """What a team's layers may be in all."""

    count: int = 100
    size_bytes: int = 20 * 2**30


def layer_key(*words: str) -> str:
    """The key of what depends on all of these."""
    return hashlib.sha256("\0".join(words).encode()).hexdigest()


class Layers:
    """The layers of all teams."""

    def __init__(self, db: Database, limits: LayerLimits) -> None:
        self._db = db
        self._limits = limits

    async def find(
        self, team_id: str, keys: Sequence[str], *, newer_than: float = 0.0
    ) -> Template | None:
        """The layer of the last of `keys` that has one which can be used; it is used now."""
        placed = (
            select(TemplatePlacement.template_id)
            .join(Host, Host.host_id == TemplatePlacement.host_id)
            .where(Host.state == HostState.ONLINE, Host.draining.is_(False))
        )
        query = select(Template).where(
            Template.team_id == team_id,
            Template.layer_key.in_(keys),
            Template.state == TemplateState.HIDDEN,
            Template.template_id.in_(placed),
            Template.created_at > newer_than,
        )
        async with self._db.write() as session:
            found = (await session.scalars(query.order_by(Template.created_at))).all()
            if not found:
                return None
            best = max(found, key=lambda row: keys.index(row.layer_key or ""))
            best.used_at = time.time()
        return best

    async def undo(self, session: AsyncSession, build_id: str) -> None:
        """Forget what a build was about to make, and what only it needed."""
        own = (Template.build_id == build_id, Template.layer_key == "")
        await session.execute(
            delete(Template).where(
                Template.build_id == build_id, Template.state == TemplateState.MAKING
            )
        )
        query = select(Template).where(*own, Template.state == TemplateState.HIDDEN)
        for row in (await session.scalars(query)).all():
            await retire(session, row)

    async def evict(self) -> None:
        """Have no team have more than it may, and deleted teams nothing."""
        totals = (
            select(Template.team_id, func.count(), func.sum(Template.size_bytes))
            .where(Template.state == TemplateState.HIDDEN, Template.layer_key.is_not(None))
            .group_by(Template.team_id)
        )
        gone = select(Team.team_id).where(Team.deleted_at.is_not(None))
        async with self._db.read() as session:
            found = (await session.execute(totals)).all()
            deleted = set(await session.scalars(gone))
        for team_id, count, size_bytes in found:
            if team_id in deleted:
                await self._evict(team_id, LayerLimits(count=0, size_bytes=0))
            elif count > self._limits.count or (size_bytes or 0) > self._limits.size_bytes:
                await self._evict(team_id, self._limits)

    async def _evict(self, team_id: str, limits: LayerLimits) -> None:
        query = select(Template).where(
            Template.team_id == team_id,
            Template.state == TemplateState.HIDDEN,
            Template.layer_key.is_not(None),
        )
        async with self._db.write() as session:
            rows = (await session.scalars(query.order_by(Template.used_at.desc()))).all()
            size_bytes = 0
            for number, row in enumerate(rows, 1):
                size_bytes += row.size_bytes
                if number > limits.count or size_bytes > limits.size_bytes:
                    await retire(session, row)
