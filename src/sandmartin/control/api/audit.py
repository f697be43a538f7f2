"""`/v1/audit-logs`: who did what."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query
from pydantic import BaseModel, Field

from sandmartin.control import audit, tables
from sandmartin.control.api.access import TheCaller, ThePlatform
from sandmartin.control.audit import Filter

router = APIRouter(tags=["audit"])


class RecordBody(BaseModel):
    """What somebody did."""

    id: int
    at: float
    team_id: str
    actor_type: str = Field(description="`user`, `key`, `host` or `system`.")
    actor_id: str
    actor_name: str
    action: str
    resource_type: str
    resource_id: str
    scope: str
    status: str
    request_id: str
    address: str
    metadata: dict[str, Any]

    @classmethod
    def of(cls, row: tables.AuditRecord) -> RecordBody:
        return cls(
            id=row.audit_id,
            at=row.at,
            team_id=row.team_id,
            actor_type=row.actor_kind,
            actor_id=row.actor_id,
            actor_name=row.actor_name,
            action=row.action,
            resource_type=row.resource_kind,
            resource_id=row.resource_id,
            scope=row.scope,
            status=row.status,
            request_id=row.request_id,
            address=row.address,
            metadata=row.data,
        )


class AuditPage(BaseModel):
    items: list[RecordBody]
    next: int | None = Field(description="`before` of the next page; null at the end.")

    @classmethod
    def of(cls, page: audit.Page) -> AuditPage:
        return cls(items=[RecordBody.of(row) for row in page.rows], next=page.next)


def _filter(
    before: Annotated[int | None, Query(ge=0, le=1 << 62, description="Older ones alone.")] = None,
    limit: Annotated[int, Query(ge=1, le=200)] = 50,
    resource_type: Annotated[str, Query(max_length=64)] = "",
    action: Annotated[str, Query(max_length=64)] = "",
) -> Filter:
    return Filter(before=before, limit=limit, resource_kind=resource_type, action=action)


Wanted = Annotated[Filter, Depends(_filter)]


@router.get("/audit-logs")
async def list_records(caller: TheCaller, platform: ThePlatform, wanted: Wanted) -> AuditPage:
    """What was done in the team, newest first; members and keys see what concerns all."""
    return AuditPage.of(await audit.list_records(platform.db, caller, wanted))


@router.get("/admin/audit-logs")
async def list_all_records(
    caller: TheCaller,
    platform: ThePlatform,
    wanted: Wanted,
    team_id: Annotated[str, Query(max_length=64)] = "",
) -> AuditPage:
    """What was done in all teams, for administrators of the platform."""
    return AuditPage.of(await audit.list_all_records(platform.db, caller, wanted, team_id or None))
