"""`/v1/sandboxes`: their life. What is done inside them is in `inside`."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query, Response
from pydantic import BaseModel, ConfigDict, Field

from sandmartin.control import tables
from sandmartin.control.api.access import MAX_KEY, TheCaller, TheKey, ThePlatform
from sandmartin.control.requests import Filter, NewChildren, NewRow
from sandmartin.control.states import LISTED
from sandmartin.errors import Invalid
from sandmartin.model import MAX_NETWORK_RULES, NetworkPolicy, State
from sandmartin.transport import Checkpoint

router = APIRouter(tags=["sandboxes"])

_MAX_PAGE = 1000
Strict = ConfigDict(extra="forbid")
Rule = Annotated[str, Field(max_length=255)]


class NetworkBody(BaseModel):
    """What a sandbox may reach. What no sandbox may reach stays out of reach whatever it says."""

    model_config = Strict

    allow_internet_access: bool = Field(True, description="False denies the whole Internet.")
    allow_out: list[Rule] = Field(
        default_factory=list,
        max_length=MAX_NETWORK_RULES,
        description="IPv4 addresses, CIDR blocks, host names, `*.domain`; they win.",
    )
    deny_out: list[Rule] = Field(
        default_factory=list,
        max_length=MAX_NETWORK_RULES,
        description="IPv4 addresses and CIDR blocks; `0.0.0.0/0` is all.",
    )

    def policy(self) -> NetworkPolicy:
        """Raises Invalid."""
        return NetworkPolicy(
            allow_internet_access=self.allow_internet_access,
            allow_out=tuple(self.allow_out),
            deny_out=tuple(self.deny_out),
        )


class NewSandbox(BaseModel):
    model_config = Strict

    template: str = Field("base", description="Name of a template.")
    vcpus: int | None = Field(None, ge=1, le=64)
    memory_mb: int | None = Field(None, ge=128, le=1 << 20)
    disk_size_mb: int | None = Field(None, ge=1, le=1 << 24)
    timeout_sec: int = Field(0, ge=0, le=1 << 30, description="Idle limit; 0 is never.")
    on_timeout: str = Field("pause", description="`pause` or `kill`.")
    auto_resume: bool = Field(False, description="Traffic wakes it from its sleep.")
    public_traffic: bool = Field(True, description="Its ports need no token.")
    network: NetworkBody | None = Field(
        None, description="Without one, what the source of a snapshot had, or the Internet."
    )
    metadata: dict[str, str] = Field(default_factory=dict)
    envs: dict[str, str] = Field(default_factory=dict)


class SandboxBody(BaseModel):
    """A sandbox."""

    id: str
    template: str
    status: str
    reason: str = Field(description="Why it is in error, missing or stopped.")
    vcpus: int
    memory_mb: int
    disk_size_mb: int
    timeout_sec: int
    on_timeout: str
    auto_resume: bool
    public_traffic: bool
    network: NetworkBody
    metadata: dict[str, str]
    host_ip: str
    host_id: str | None
    parent_id: str | None
    created_at: float
    started_at: float | None
    ends_at: float | None = Field(description="When it ends, however much it is used.")
    last_active_at: float | None
    last_updated: float

    @classmethod
    def of(cls, row: tables.Sandbox) -> SandboxBody:
        return cls(
            id=row.sandbox_id,
            template=row.template,
            status=row.state,
            reason=row.reason,
            vcpus=row.vcpus,
            memory_mb=row.memory_mb,
            disk_size_mb=row.disk_size_mb,
            timeout_sec=row.timeout_s,
            on_timeout=row.on_timeout,
            auto_resume=row.auto_resume,
            public_traffic=row.public_traffic,
            network=NetworkBody(**NetworkPolicy.from_dict(row.network).to_dict()),
            metadata=row.labels,
            host_ip=row.host_ip,
            host_id=row.host_id,
            parent_id=row.parent_id,
            created_at=row.created_at,
            started_at=row.started_at,
            ends_at=row.ends_at,
            last_active_at=row.last_active_at,
            last_updated=row.state_at,
        )


class SandboxPage(BaseModel):
    items: list[SandboxBody]
    next: str = Field(description="`cursor` of the next page; empty at the end.")


class TimeoutBody(BaseModel):
    model_config = Strict

    timeout_sec: int = Field(ge=0, le=1 << 30, description="Idle limit; 0 is never.")


class ResumeBody(BaseModel):
    model_config = Strict

    timeout_sec: int | None = Field(None, ge=0, le=1 << 30)


class ForkBody(BaseModel):
    model_config = Strict

    count: int = Field(1, ge=1, le=100)
    timeout_sec: int | None = Field(None, ge=0, le=1 << 30)


class CheckpointRequest(BaseModel):
    model_config = Strict

    comment: str = Field("", max_length=1000)


class CheckpointBody(BaseModel):
    id: str
    comment: str
    created_at: float
    size_bytes: int

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> CheckpointBody:
        return cls(
            id=checkpoint.checkpoint_id,
            comment=checkpoint.comment,
            created_at=checkpoint.created_at,
            size_bytes=checkpoint.size_bytes,
        )


class AccessBody(BaseModel):
    """What traffic to a sandbox's ports needs."""

    domain: str = Field(description="Ports are at PORT-ID.DOMAIN; empty where there is none.")
    access_token: str = Field(description="`X-Access-Token`, of the guest agent's port 49983.")
    traffic_token: str = Field(description="`E2b-Traffic-Access-Token`, of private ports.")


class PhaseBody(BaseModel):
    """One part of what an operation's time went to."""

    name: str
    ms: float


class EventData(BaseModel):
    """What more is told of an event; what does not belong to it is left out.

    Kinds of events have fields of their own beside these.
    """

    model_config = ConfigDict(extra="allow")

    state: str = Field("", description="Of the sandbox, from then on.")
    phases: list[PhaseBody] = Field(
        default_factory=list, description="Of the operation that ended, in order."
    )
    reason: str = Field("", description="Why it came to that.")
    error: str = Field("", description="What the operation failed with.")
    host: str = Field("", description="Name of the host that was chosen.")
    seen: bool = Field(False, description="It was found so on its host, and not asked for.")


class EventBody(BaseModel):
    id: int
    kind: str
    sandbox_id: str | None
    at: float
    data: EventData


@router.post("", status_code=201)
async def create(
    body: NewSandbox,
    caller: TheCaller,
    platform: ThePlatform,
    idempotency_key: TheKey = "",
) -> SandboxBody:
    """Start a sandbox. The same Idempotency-Key and body give the same sandbox."""
    new = NewRow(
        template=body.template,
        vcpus=body.vcpus,
        memory_mb=body.memory_mb,
        disk_size_mb=body.disk_size_mb,
        timeout_s=body.timeout_sec,
        on_timeout=body.on_timeout,
        auto_resume=body.auto_resume,
        public_traffic=body.public_traffic,
        network=None if body.network is None else body.network.policy(),
        labels=body.metadata,
        envs=body.envs,
    )
    return SandboxBody.of(await platform.sandboxes.create(caller, new, idempotency_key))


@router.get("")
async def list_sandboxes(
    caller: TheCaller,
    platform: ThePlatform,
    state: Annotated[list[State] | None, Query()] = None,
    metadata: Annotated[list[str] | None, Query(description="`name=value`, all of them.")] = None,
    limit: Annotated[int, Query(ge=1, le=_MAX_PAGE)] = 100,
    cursor: Annotated[str, Query(max_length=200)] = "",
    idempotency_key: Annotated[
        str, Query(max_length=MAX_KEY, description="What requests with this key made.")
    ] = "",
) -> SandboxPage:
    """The team's sandboxes, newest first; stopped ones and errors only when asked for."""
    wanted = Filter(
        states=frozenset(state) if state else LISTED,
        idempotency_key=idempotency_key,
        labels=_labels(metadata or []),
        limit=limit,
        cursor=cursor,
    )
    page = await platform.sandboxes.list(caller, wanted)
    return SandboxPage(items=[SandboxBody.of(row) for row in page.rows], next=page.next)


def _labels(conditions: list[str]) -> dict[str, str]:
    labels = {}
    for each in conditions:
        name, equals, value = each.partition("=")
        if not name or not equals:
            raise Invalid(f"metadata is {each[:80]!r}", hint="use name=value")
        labels[name] = value
    return labels


@router.get("/{sandbox_id}")
async def get(sandbox_id: str, caller: TheCaller, platform: ThePlatform) -> SandboxBody:
    return SandboxBody.of(await platform.sandboxes.get(caller, sandbox_id))


@router.delete("/{sandbox_id}", status_code=204)
async def destroy(sandbox_id: str, caller: TheCaller, platform: ThePlatform) -> Response:
    """End a sandbox and remove all it held. Already gone is success."""
    await platform.sandboxes.destroy(caller, sandbox_id)
    return Response(status_code=204)


@router.post("/{sandbox_id}/pause")
async def pause(sandbox_id: str, caller: TheCaller, platform: ThePlatform) -> SandboxBody:
    """Write memory and disk to the host's storage, and free processor and RAM."""
    return SandboxBody.of(await platform.sandboxes.pause(caller, sandbox_id))


@router.post("/{sandbox_id}/resume")
async def resume(
    sandbox_id: str, caller: TheCaller, platform: ThePlatform, body: ResumeBody | None = None
) -> SandboxBody:
    timeout_s = body.timeout_sec if body else None
    return SandboxBody.of(await platform.sandboxes.resume(caller, sandbox_id, timeout_s))


@router.post("/{sandbox_id}/timeout")
async def set_timeout(
    sandbox_id: str, body: TimeoutBody, caller: TheCaller, platform: ThePlatform
) -> SandboxBody:
    """Another idle limit; of one that is paused, for when it is resumed.

    The idle clock begins anew.
    """
    row = await platform.sandboxes.set_timeout(caller, sandbox_id, body.timeout_sec)
    return SandboxBody.of(row)


@router.get("/{sandbox_id}/network")
async def get_network(sandbox_id: str, caller: TheCaller, platform: ThePlatform) -> NetworkBody:
    """What the sandbox may reach."""
    policy = await platform.sandboxes.network(caller, sandbox_id)
    return NetworkBody(**policy.to_dict())


@router.put("/{sandbox_id}/network")
async def set_network(
    sandbox_id: str, body: NetworkBody, caller: TheCaller, platform: ThePlatform
) -> NetworkBody:
    """Replace all that the sandbox may reach, on open connections too."""
    policy = body.policy()
    await platform.sandboxes.set_network(caller, sandbox_id, policy)
    return NetworkBody(**policy.to_dict())


@router.post("/{sandbox_id}/fork", status_code=201)
async def fork(
    sandbox_id: str,
    body: ForkBody,
    caller: TheCaller,
    platform: ThePlatform,
    idempotency_key: TheKey = "",
) -> SandboxPage:
    """Sandboxes that go on from where this one is, which goes on too.

    The same Idempotency-Key and body give the same sandboxes.
    """
    asked = NewChildren(sandbox_id=sandbox_id, count=body.count, timeout_s=body.timeout_sec)
    rows = await platform.sandboxes.fork(caller, asked, idempotency_key)
    return SandboxPage(items=[SandboxBody.of(row) for row in rows], next="")


@router.get("/{sandbox_id}/checkpoints")
async def list_checkpoints(
    sandbox_id: str, caller: TheCaller, platform: ThePlatform
) -> list[CheckpointBody]:
    found = await platform.sandboxes.checkpoints(caller, sandbox_id)
    return [CheckpointBody.of(each) for each in found]


@router.post("/{sandbox_id}/checkpoints", status_code=201)
async def create_checkpoint(
    sandbox_id: str, body: CheckpointRequest, caller: TheCaller, platform: ThePlatform
) -> CheckpointBody:
    """Keep where the sandbox is; it goes on."""
    made = await platform.sandboxes.checkpoint(caller, sandbox_id, body.comment)
    return CheckpointBody.of(made)


@router.delete("/{sandbox_id}/checkpoints/{checkpoint_id}", status_code=204)
async def delete_checkpoint(
    sandbox_id: str, checkpoint_id: str, caller: TheCaller, platform: ThePlatform
) -> Response:
    await platform.sandboxes.delete_checkpoint(caller, sandbox_id, checkpoint_id)
    return Response(status_code=204)


@router.post("/{sandbox_id}/checkpoints/{checkpoint_id}/rollback")
async def rollback(
    sandbox_id: str, checkpoint_id: str, caller: TheCaller, platform: ThePlatform
) -> SandboxBody:
    """Return to a checkpoint, in memory and on disk; what came after it is gone."""
    row = await platform.sandboxes.rollback(caller, sandbox_id, checkpoint_id)
    return SandboxBody.of(row)


@router.get("/{sandbox_id}/access")
async def access(
    sandbox_id: str, caller: TheCaller, platform: ThePlatform, response: Response
) -> AccessBody:
    """Where the sandbox's ports are, and the tokens that open them."""
    await platform.sandboxes.get(caller, sandbox_id)
    response.headers["cache-control"] = "no-store"
    return AccessBody(
        domain=platform.settings.domain,
        access_token=platform.tokens.access(sandbox_id),
        traffic_token=platform.tokens.traffic(sandbox_id),
    )


@router.get("/{sandbox_id}/timeline", response_model_exclude_unset=True)
async def timeline(
    sandbox_id: str,
    caller: TheCaller,
    platform: ThePlatform,
    after: Annotated[int, Query(ge=0, lt=1 << 63)] = 0,
) -> list[EventBody]:
    """What happened to the sandbox, oldest first, after an event."""
    await platform.sandboxes.get(caller, sandbox_id)
    found = await platform.events.since(after, sandbox_id=sandbox_id)
    return [
        EventBody(
            id=each.event_id,
            kind=each.kind,
            sandbox_id=sandbox_id,
            at=each.at,
            data=EventData(**each.data),
        )
        for each in found
    ]
