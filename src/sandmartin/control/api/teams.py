"""`/v1/teams` and `/v1/invitations`: teams, their members, and who is invited to them."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Response
from pydantic import BaseModel, ConfigDict, Field

from sandmartin.control import tables
from sandmartin.control.api.access import TheCaller, ThePerson, ThePlatform
from sandmartin.control.caller import Role
from sandmartin.control.platform import Platform
from sandmartin.control.teams import Belonging

router = APIRouter(tags=["teams"])

Strict = ConfigDict(extra="forbid")
Email = Annotated[str, Field(max_length=254)]
Token = Annotated[str, Field(max_length=200)]


class TeamName(BaseModel):
    model_config = Strict

    name: Annotated[str, Field(min_length=1, max_length=100)]


class TeamBody(BaseModel):
    """A team. What is null in its quotas is the platform's default."""

    id: str
    name: str
    role: Role | None = Field(description="The caller's; null for a key.")
    created_at: float
    max_sandboxes: int | None
    max_vcpus: int | None
    max_memory_mb: int | None

    @classmethod
    def of(cls, belonging: Belonging) -> TeamBody:
        row = belonging.team
        return cls(
            id=row.team_id,
            name=row.name,
            role=belonging.role,
            created_at=row.created_at,
            max_sandboxes=row.max_sandboxes,
            max_vcpus=row.max_vcpus,
            max_memory_mb=row.max_memory_mb,
        )


class MemberBody(BaseModel):
    user_id: str
    email: str
    name: str
    role: Role
    active: bool
    joined_at: float


class RoleBody(BaseModel):
    model_config = Strict

    role: Role


class NewInvitation(BaseModel):
    model_config = Strict

    role: Role = Role.MEMBER
    email: Email = Field("", description="Who alone may use it; empty for whoever has it.")


class InvitationBody(BaseModel):
    id: str
    email: str
    role: Role
    team_id: str | None
    created_by: str
    created_at: float
    expires_at: float

    @classmethod
    def of(cls, row: tables.Invitation) -> InvitationBody:
        return cls(
            id=row.invitation_id,
            email=row.email,
            role=Role(row.role),
            team_id=row.team_id,
            created_by=row.created_by,
            created_at=row.created_at,
            expires_at=row.expires_at,
        )


class CreatedInvitation(InvitationBody):
    token: str = Field(description="Shown this once; to be handed over, for none is mailed.")
    url: str

    @classmethod
    def made(cls, row: tables.Invitation, token: str, platform: Platform) -> CreatedInvitation:
        url = platform.accounts.invitation_url(token)
        return cls(**InvitationBody.of(row).model_dump(), token=token, url=url)


class TokenBody(BaseModel):
    model_config = Strict

    token: Token


@router.get("/teams")
async def list_teams(caller: TheCaller, platform: ThePlatform) -> list[TeamBody]:
    return [TeamBody.of(each) for each in await platform.teams.list(caller)]


@router.post("/teams", status_code=201)
async def create(body: TeamName, caller: ThePerson, platform: ThePlatform) -> TeamBody:
    """A team that the caller owns."""
    return TeamBody.of(await platform.teams.create(caller, body.name))


@router.get("/teams/{team_id}")
async def get(team_id: str, caller: TheCaller, platform: ThePlatform) -> TeamBody:
    return TeamBody.of(await platform.teams.get(caller, team_id))


@router.patch("/teams/{team_id}")
async def rename(
    team_id: str, body: TeamName, caller: TheCaller, platform: ThePlatform
) -> TeamBody:
    return TeamBody.of(await platform.teams.rename(caller, team_id, body.name))


@router.delete("/teams/{team_id}", status_code=204)
async def delete(team_id: str, caller: TheCaller, platform: ThePlatform) -> Response:
    """End a team, with its keys, sandboxes and templates. For its owners."""
    await platform.teams.delete(caller, team_id)
    return Response(status_code=204)


@router.get("/teams/{team_id}/members")
async def list_members(team_id: str, caller: TheCaller, platform: ThePlatform) -> list[MemberBody]:
    return [
        MemberBody(
            user_id=user.user_id,
            email=user.email,
            name=user.name,
            role=Role(member.role),
            active=user.active,
            joined_at=member.created_at,
        )
        for member, user in await platform.teams.members(caller, team_id)
    ]


@router.patch("/teams/{team_id}/members/{user_id}", status_code=204)
async def set_role(
    team_id: str, user_id: str, body: RoleBody, caller: TheCaller, platform: ThePlatform
) -> Response:
    await platform.teams.set_role(caller, team_id, user_id, body.role)
    return Response(status_code=204)


@router.delete("/teams/{team_id}/members/{user_id}", status_code=204)
async def remove(team_id: str, user_id: str, caller: TheCaller, platform: ThePlatform) -> Response:
    """Put somebody out of the team, with the keys they made for it."""
    await platform.teams.remove(caller, team_id, user_id)
    return Response(status_code=204)


@router.post("/teams/{team_id}/leave", status_code=204)
async def leave(team_id: str, caller: ThePerson, platform: ThePlatform) -> Response:
    await platform.teams.remove(caller, team_id, caller.actor_id)
    return Response(status_code=204)


@router.post("/teams/{team_id}/invitations", status_code=201)
async def invite(
    team_id: str, body: NewInvitation, caller: TheCaller, platform: ThePlatform
) -> CreatedInvitation:
    """A token with which somebody may join, within 7 days."""
    row, token = await platform.teams.invite(caller, team_id, body.role, body.email)
    return CreatedInvitation.made(row, token, platform)


@router.get("/teams/{team_id}/invitations")
async def list_invitations(
    team_id: str, caller: TheCaller, platform: ThePlatform
) -> list[InvitationBody]:
    """Those that can still be used."""
    found = await platform.teams.invitations(caller, team_id)
    return [InvitationBody.of(row) for row in found]


@router.delete("/teams/{team_id}/invitations/{invitation_id}", status_code=204)
async def withdraw(
    team_id: str, invitation_id: str, caller: TheCaller, platform: ThePlatform
) -> Response:
    await platform.teams.withdraw(caller, team_id, invitation_id)
    return Response(status_code=204)


@router.post("/invitations/accept")
async def accept(body: TokenBody, caller: ThePerson, platform: ThePlatform) -> TeamBody:
    """Join a team that one was invited to."""
    return TeamBody.of(await platform.teams.accept(caller, body.token))
