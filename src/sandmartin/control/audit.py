"""The audit log: who did what to which thing. Records are only ever added.

A record joins the transaction of the change it tells of.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from sandmartin.control.caller import Caller, Role
from sandmartin.control.db import Database
from sandmartin.control.tables import AuditRecord


def record(
    session: AsyncSession,
    caller: Caller,
    action: str,
    resource_kind: str,
    resource_id: str,
    *,
    scope: str = "team",
    status: str = "success",
    team_id: str | None = None,
    **data: Any,
) -> None:
    """Note what `caller` did; `data` holds no secrets."""
    session.add(
        AuditRecord(
            at=time.time(),
            team_id=team_id or caller.team_id,
            actor_kind=caller.kind,
            actor_id=caller.actor_id,
            actor_name=caller.name,
            action=action,
            resource_kind=resource_kind,
            resource_id=resource_id,
            scope=scope,
            status=status,
            request_id=caller.request_id,
            address=caller.address,
            data=data,
        )
    )


@dataclass(frozen=True, kw_only=True)
class Filter:
    """Which records a list is to show; what is empty is not looked at."""

    #: Only older ones than this: `next` of the page before.
    before: int | None = None
    limit: int = 50
    resource_kind: str = ""
    action: str = ""


@dataclass(frozen=True, kw_only=True)
class Page:
    rows: Sequence[AuditRecord]
    #: None at the end.
    next: int | None


async def list_records(db: Database, caller: Caller, wanted: Filter) -> Page:
    """Records of the caller's team, newest first; what a member may not see is left out."""
    scoped = [AuditRecord.team_id == caller.team_id]
    if not caller.is_admin and (caller.role is None or caller.role.rank < Role.ADMIN.rank):
        scoped.append(AuditRecord.scope == "team")
    return await _list(db, wanted, *scoped)


async def list_all_records(
    db: Database, caller: Caller, wanted: Filter, team_id: str | None = None
) -> Page:
    """Records of all teams, or of any one. Raises Denied."""
    caller.require_admin()
    return await _list(db, wanted, *([AuditRecord.team_id == team_id] if team_id else []))


async def _list(db: Database, wanted: Filter, *conditions: Any) -> Page:
    row = AuditRecord
    query = select(row).where(*conditions)
    if wanted.before is not None:
        query = query.where(row.audit_id < wanted.before)
    if wanted.resource_kind:
        query = query.where(row.resource_kind == wanted.resource_kind)
    if wanted.action:
        query = query.where(row.action == wanted.action)
    async with db.read() as session:
        query = query.order_by(row.audit_id.desc()).limit(wanted.limit + 1)
        rows = (await session.scalars(query)).all()
    shown = rows[: wanted.limit]
    return Page(rows=shown, next=shown[-1].audit_id if len(rows) > wanted.limit else None)
