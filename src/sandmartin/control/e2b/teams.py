"""`/teams`: whom a key belongs to."""

from __future__ import annotations

from fastapi import APIRouter

from sandmartin.control.api.access import TheCaller, ThePlatform
from sandmartin.control.e2b import bodies

router = APIRouter()


@router.get("/teams")
async def list_teams(caller: TheCaller, platform: ThePlatform) -> list[bodies.Team]:
    """The caller's teams; of a key its own."""
    return [
        bodies.Team(
            team_id=each.team.team_id,
            name=each.team.name,
            is_default=each.team.team_id == caller.team_id,
        )
        for each in await platform.teams.list(caller)
    ]
