"""The lease of a build: whose work it is, and by which conditions that is kept in every change."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sandmartin.control.tables import Build


@dataclass(frozen=True, kw_only=True)
class Lease:
    """A build that this replica works on."""

    build_id: str
    team_id: str
    token: str


def lease_of(lease: Lease) -> tuple[Any, ...]:
    """Conditions that hold for as long as the lease is ours."""
    return (
        Build.build_id == lease.build_id,
        Build.lease_token == lease.token,
        Build.finished_at.is_(None),
    )
