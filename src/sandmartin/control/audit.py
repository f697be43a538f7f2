"""The audit log: who did what to which thing. Records are only ever added.

A record joins the transaction of the change it tells of.
"""

from __future__ import annotations

import time
from typing import Any

from sqlalchemy.ext.asyncio import AsyncSession

from sandmartin.control.caller import Caller
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
