"""`/v1/hosts`: what administrators of the platform do with hosts, and what hosts say themselves."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Query, Request, Response
from fastapi.security import APIKeyHeader
from pydantic import BaseModel, ConfigDict, Field

from sandmartin.control import tables
from sandmartin.control.api.access import TheCaller, ThePlatform
from sandmartin.control.hosts import Credentials, Load, Token
from sandmartin.errors import Unauthenticated
from sandmartin.transport import HostInfo

router = APIRouter(tags=["hosts"])

_MAX_REQUEST = 8192
_TOKEN = APIKeyHeader(name="X-Host-Token", auto_error=False, description="A host's own token.")
Strict = ConfigDict(extra="forbid")


def _token(token: Annotated[str | None, Depends(_TOKEN)]) -> str:
    if not token:
        raise Unauthenticated("no host token is given", hint="send it as X-Host-Token")
    return token


HostToken = Annotated[str, Depends(_token)]


class NewHost(BaseModel):
    model_config = Strict

    name: str = Field(max_length=64)


class HostBody(BaseModel):
    """A host."""

    id: str
    name: str
    address: str
    status: str
    draining: bool
    created_at: float
    heartbeat_at: float | None = Field(description="When it was last heard of.")
    reached_at: float | None = Field(description="When it was last reached.")
    certificate_expires_at: float | None
    cpus: int
    memory_mb: int = Field(description="For all sandboxes together.")
    disk_free_mb: int
    cpu_overcommit: float
    memory_overhead_mb: int = Field(description="What each sandbox takes beside its memory.")
    accel: str
    vmm_version: str
    version: str
    running: int = Field(description="Sandboxes that hold some of it.")
    paused: int
    used_vcpus: int
    used_memory_mb: int

    @classmethod
    def of(cls, row: tables.Host, load: Load) -> HostBody:
        return cls(
            id=row.host_id,
            name=row.name,
            address=row.address,
            status=row.state,
            draining=row.draining,
            created_at=row.created_at,
            heartbeat_at=row.heartbeat_at,
            reached_at=row.reached_at,
            certificate_expires_at=row.certificate_expires_at,
            cpus=row.cpus,
            memory_mb=row.memory_mb,
            disk_free_mb=row.disk_free_mb,
            cpu_overcommit=row.cpu_overcommit,
            memory_overhead_mb=row.memory_overhead_mb,
            accel=row.accel,
            vmm_version=row.vmm_version,
            version=row.version,
            running=load.running,
            paused=load.paused,
            used_vcpus=load.vcpus,
            used_memory_mb=load.memory_mb,
        )


class TokenBody(BaseModel):
    """A token to register with, seen once."""

    token: str
    expires_at: float

    @classmethod
    def of(cls, token: Token) -> TokenBody:
        return cls(token=token.text, expires_at=token.expires_at)


class NewHostBody(TokenBody):
    host: HostBody


class OccupantsBody(BaseModel):
    """What would be lost with a host."""

    sandbox_ids: list[str]
    templates: list[str] = Field(description="Those that no other host has.")


class Facts(BaseModel):
    """What a host is, and what it has for sandboxes."""

    model_config = Strict

    cpus: int = Field(ge=1, le=1 << 16)
    memory_mb: int = Field(ge=0, le=1 << 30)
    memory_overhead_mb: int = Field(ge=0, le=1 << 20)
    disk_free_mb: int = Field(ge=0, le=1 << 30)
    cpu_overcommit: float = Field(gt=0, le=1e6, allow_inf_nan=False)
    accel: str = Field(max_length=16)
    vmm_version: str = Field(max_length=100)
    agent_version: str = Field(max_length=100)
    running: int = Field(0, ge=0, le=1 << 20)
    paused: int = Field(0, ge=0, le=1 << 20)

    def info(self) -> HostInfo:
        return HostInfo(**self.model_dump())


class Heartbeat(BaseModel):
    model_config = Strict

    address: str = Field(max_length=300, description="`https://NAME:PORT`.")
    facts: Facts


class Registration(Heartbeat):
    token: str = Field(max_length=200, description="What creating the host gave.")
    request: str = Field(max_length=_MAX_REQUEST, description="PKCS #10, as PEM.")


class Renewal(BaseModel):
    model_config = Strict

    request: str = Field(max_length=_MAX_REQUEST, description="PKCS #10, as PEM.")


class CredentialsBody(BaseModel):
    """What a host needs to be one."""

    host_id: str
    certificate: str
    expires_at: float
    issuer: str = Field(description="Who has a certificate of it may connect to the host.")
    token: str = Field(description="For heartbeats and renewals; empty where it stays.")

    @classmethod
    def of(cls, made: Credentials) -> CredentialsBody:
        return cls(
            host_id=made.host_id,
            certificate=made.certificate,
            expires_at=made.expires_at,
            issuer=made.issuer,
            token=made.token,
        )


# Hosts themselves.


@router.post("/register", status_code=201)
async def register(body: Registration, request: Request, platform: ThePlatform) -> CredentialsBody:
    """Become the host that a token was made for. The token works once."""
    address = request.client.host if request.client else ""
    made = await platform.hosts.register(
        body.token, body.request, body.address, body.facts.info(), address
    )
    return CredentialsBody.of(made)


@router.post("/{host_id}/heartbeat", status_code=204)
async def heartbeat(
    host_id: str, token: HostToken, body: Heartbeat, platform: ThePlatform
) -> Response:
    """The host is there, and this is what it has. 404: it was deleted."""
    await platform.hosts.heartbeat(host_id, token, body.address, body.facts.info())
    return Response(status_code=204)


@router.post("/{host_id}/renew")
async def renew(
    host_id: str, token: HostToken, body: Renewal, platform: ThePlatform
) -> CredentialsBody:
    """A new certificate, for a new key."""
    return CredentialsBody.of(await platform.hosts.renew(host_id, token, body.request))


# Administrators.


@router.post("", status_code=201)
async def create(body: NewHost, caller: TheCaller, platform: ThePlatform) -> NewHostBody:
    """A host that is to come, and the token with which it may register within an hour."""
    row, token = await platform.hosts.create(caller, body.name)
    return NewHostBody(token=token.text, expires_at=token.expires_at, host=HostBody.of(row, Load()))


@router.get("")
async def list_hosts(caller: TheCaller, platform: ThePlatform) -> list[HostBody]:
    """All hosts of the platform."""
    return [HostBody.of(row, load) for row, load in await platform.hosts.list(caller)]


@router.get("/{host_id}")
async def get(host_id: str, caller: TheCaller, platform: ThePlatform) -> HostBody:
    """One host."""
    return HostBody.of(*await platform.hosts.get(caller, host_id))


@router.get("/{host_id}/delete-preview")
async def delete_preview(host_id: str, caller: TheCaller, platform: ThePlatform) -> OccupantsBody:
    """What would be lost with a host."""
    sandboxes, templates = await platform.hosts.occupants(caller, host_id)
    return OccupantsBody(sandbox_ids=list(sandboxes), templates=list(templates))


@router.delete("/{host_id}", status_code=204)
async def delete(
    host_id: str,
    caller: TheCaller,
    platform: ThePlatform,
    force: Annotated[bool, Query(description="With all that is on it, reached or not.")] = False,
) -> Response:
    """End a host's agent and forget the host. 409 when something would be lost."""
    await platform.hosts.delete(caller, host_id, force=force)
    return Response(status_code=204)


@router.post("/{host_id}/token", status_code=201)
async def reissue(host_id: str, caller: TheCaller, platform: ThePlatform) -> TokenBody:
    """A new token to register with, in the place of any other."""
    return TokenBody.of(await platform.hosts.reissue(caller, host_id))


@router.post("/{host_id}/drain")
async def drain(host_id: str, caller: TheCaller, platform: ThePlatform) -> HostBody:
    """It takes nothing new; what is on it goes on."""
    await platform.hosts.drain(caller, host_id)
    return HostBody.of(*await platform.hosts.get(caller, host_id))


@router.post("/{host_id}/undrain")
async def undrain(host_id: str, caller: TheCaller, platform: ThePlatform) -> HostBody:
    """It takes new sandboxes again."""
    await platform.hosts.drain(caller, host_id, undo=True)
    return HostBody.of(*await platform.hosts.get(caller, host_id))


@router.post("/{host_id}/revoke")
async def revoke(host_id: str, caller: TheCaller, platform: ThePlatform) -> HostBody:
    """None of its certificates and tokens count any more; a new token lets it register again."""
    await platform.hosts.revoke(caller, host_id)
    return HostBody.of(*await platform.hosts.get(caller, host_id))
