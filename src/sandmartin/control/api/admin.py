"""`/v1/admin`: what administrators of the platform may do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from fastapi import APIRouter, Query, Response
from pydantic import BaseModel, ConfigDict, Field

from sandmartin.control import tables
from sandmartin.control.api.access import TheAdmin, ThePlatform
from sandmartin.control.api.sandboxes import SandboxBody
from sandmartin.control.api.teams import (
    CreatedInvitation,
    Email,
    InvitationBody,
    TeamBody,
)
from sandmartin.control.api.templates import TemplateBody, bodies_of
from sandmartin.control.census import Size
from sandmartin.control.requests import Filter
from sandmartin.control.states import LISTED
from sandmartin.control.tables import PLATFORM_TEAM_ID
from sandmartin.control.teams import Belonging, Limit
from sandmartin.model import State

router = APIRouter(prefix="/admin", tags=["administration"])

Strict = ConfigDict(extra="forbid")
Page = Annotated[int, Query(ge=1, le=1000)]
Cursor = Annotated[str, Query(max_length=200)]
Amount = Annotated[int | None, Field(ge=0, le=1 << 30, description="null: the default.")]


class UserBody(BaseModel):
    id: str
    email: str
    name: str
    admin: bool
    active: bool
    created_at: float

    @classmethod
    def of(cls, row: tables.User) -> UserBody:
        return cls(
            id=row.user_id,
            email=row.email,
            name=row.name,
            admin=row.is_admin,
            active=row.active,
            created_at=row.created_at,
        )


class NamedTeam(BaseModel):
    id: str
    name: str


class ListedUser(UserBody):
    teams: list[NamedTeam]


class UserPage(BaseModel):
    items: list[ListedUser]
    next: str = Field(description="`cursor` of the next page; empty at the end.")


class ListedTeam(TeamBody):
    members: int
    sandboxes: int = Field(description="All that are not over.")
    running: int = Field(description="Sandboxes that count against its quotas.")
    used_vcpus: int
    used_memory_mb: int


class DefaultQuotas(BaseModel):
    """What a team may hold for which nothing else is said."""

    max_sandboxes: int
    max_vcpus: int
    max_memory_mb: int


class TeamPage(BaseModel):
    items: list[ListedTeam]
    next: str
    defaults: DefaultQuotas


class OwnedSandbox(SandboxBody):
    team_id: str


class OwnedPage(BaseModel):
    items: list[OwnedSandbox]
    next: str


class ActiveBody(BaseModel):
    model_config = Strict

    active: bool


class AdminBody(BaseModel):
    model_config = Strict

    admin: bool


class QuotaBody(BaseModel):
    model_config = Strict

    max_sandboxes: Amount
    max_vcpus: Amount
    max_memory_mb: Amount


class NewPlatformInvitation(BaseModel):
    model_config = Strict

    email: Email = Field("", description="Who alone may use it; empty for whoever has it.")


# Users.


@router.get("/users")
async def list_users(
    caller: TheAdmin, platform: ThePlatform, limit: Page = 100, cursor: Cursor = ""
) -> UserPage:
    rows = await platform.accounts.list(caller, after=cursor, limit=limit)
    following = rows[-1][0].user_id if len(rows) == limit else ""
    return UserPage(items=[_listed_user(user, teams) for user, teams in rows], next=following)


@router.put("/users/{user_id}/active")
async def set_active(
    user_id: str, body: ActiveBody, caller: TheAdmin, platform: ThePlatform
) -> UserBody:
    """Disable somebody, with their sessions and keys, or allow them again."""
    return UserBody.of(await platform.accounts.set_active(caller, user_id, body.active))


@router.put("/users/{user_id}/admin")
async def set_admin(
    user_id: str, body: AdminBody, caller: TheAdmin, platform: ThePlatform
) -> UserBody:
    return UserBody.of(await platform.accounts.set_admin(caller, user_id, body.admin))


@router.post("/invitations", status_code=201)
async def invite(
    body: NewPlatformInvitation, caller: TheAdmin, platform: ThePlatform
) -> CreatedInvitation:
    """A token with which somebody may sign up, within 7 days."""
    row, token = await platform.accounts.invite(caller, body.email)
    return CreatedInvitation.made(row, token, platform)


@router.get("/invitations")
async def list_invitations(caller: TheAdmin, platform: ThePlatform) -> list[InvitationBody]:
    """Those to the platform that can still be used."""
    return [InvitationBody.of(row) for row in await platform.accounts.invitations(caller)]


@router.delete("/invitations/{invitation_id}", status_code=204)
async def withdraw(invitation_id: str, caller: TheAdmin, platform: ThePlatform) -> Response:
    await platform.accounts.withdraw(caller, invitation_id)
    return Response(status_code=204)


# Teams.


@router.get("/teams")
async def list_teams(
    caller: TheAdmin, platform: ThePlatform, limit: Page = 100, cursor: Cursor = ""
) -> TeamPage:
    rows = await platform.teams.list_all(caller, after=cursor, limit=limit)
    following = rows[-1][0].team_id if len(rows) == limit else ""
    settings = platform.settings
    return TeamPage(
        items=[_listed_team(team, size) for team, size in rows],
        next=following,
        defaults=DefaultQuotas(
            max_sandboxes=settings.max_sandboxes,
            max_vcpus=settings.max_vcpus,
            max_memory_mb=settings.max_memory_mb,
        ),
    )


@router.put("/teams/{team_id}/quotas")
async def set_quotas(
    team_id: str, body: QuotaBody, caller: TheAdmin, platform: ThePlatform
) -> TeamBody:
    """What the team may hold from now on. What it holds already stays."""
    team = await platform.teams.set_limit(caller, team_id, Limit(**body.model_dump()))
    return TeamBody.of(Belonging(team=team, role=None))


@router.delete("/teams/{team_id}", status_code=204)
async def delete_team(team_id: str, caller: TheAdmin, platform: ThePlatform) -> Response:
    """End a team, with its keys, sandboxes and templates."""
    await platform.teams.delete_any(caller, team_id)
    return Response(status_code=204)


# Sandboxes and templates.


@router.get("/sandboxes")
async def list_sandboxes(
    caller: TheAdmin,
    platform: ThePlatform,
    state: Annotated[list[State] | None, Query()] = None,
    limit: Page = 100,
    cursor: Cursor = "",
) -> OwnedPage:
    """Those of all teams, newest first."""
    states = frozenset(state) if state else LISTED
    wanted = Filter(states=states, limit=limit, cursor=cursor, all_teams=True)
    page = await platform.sandboxes.list(caller, wanted)
    return OwnedPage(items=[_owned(row) for row in page.rows], next=page.next)


@router.get("/sandboxes/{sandbox_id}")
async def get_sandbox(sandbox_id: str, caller: TheAdmin, platform: ThePlatform) -> OwnedSandbox:
    acting = await platform.sandboxes.on_behalf(caller, sandbox_id)
    return _owned(await platform.sandboxes.get(acting, sandbox_id))


@router.delete("/sandboxes/{sandbox_id}", status_code=204)
async def destroy_sandbox(sandbox_id: str, caller: TheAdmin, platform: ThePlatform) -> Response:
    acting = await platform.sandboxes.on_behalf(caller, sandbox_id)
    await platform.sandboxes.destroy(acting, sandbox_id)
    return Response(status_code=204)


@router.get("/templates")
async def list_templates(caller: TheAdmin, platform: ThePlatform) -> list[TemplateBody]:
    """The platform's own."""
    acting = caller.for_team(PLATFORM_TEAM_ID)
    return await bodies_of(platform, acting, await platform.templates.list(acting))


@router.delete("/templates/{name}", status_code=204)
async def delete_template(name: str, caller: TheAdmin, platform: ThePlatform) -> Response:
    """Delete one of the platform's."""
    await platform.templates.delete(caller.for_team(PLATFORM_TEAM_ID), name)
    return Response(status_code=204)


def _listed_user(user: tables.User, teams: Sequence[tables.Team]) -> ListedUser:
    names = [NamedTeam(id=team.team_id, name=team.name) for team in teams]
    return ListedUser(**UserBody.of(user).model_dump(), teams=names)


def _listed_team(team: tables.Team, size: Size) -> ListedTeam:
    return ListedTeam(
        **TeamBody.of(Belonging(team=team, role=None)).model_dump(),
        members=size.members,
        sandboxes=size.sandboxes,
        running=size.running,
        used_vcpus=size.vcpus,
        used_memory_mb=size.memory_mb,
    )


def _owned(row: tables.Sandbox) -> OwnedSandbox:
    return OwnedSandbox(**SandboxBody.of(row).model_dump(), team_id=row.team_id)
