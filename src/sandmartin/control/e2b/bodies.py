"""What goes over E2B's wire: names in camel case, times as dates, sizes in MiB."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from sandmartin.control import tables
from sandmartin.control.e2b.envd import ENVD_VERSION
from sandmartin.control.platform import Platform
from sandmartin.control.states import TRANSITIONAL
from sandmartin.model import NetworkPolicy, State

#: Who runs the sandbox, for clients that were made when that was to be told.
CLIENT_ID = "sandmartin"
#: The end of a sandbox whose time is not limited: every answer has one.
_NEVER = datetime(2999, 1, 1, tzinfo=UTC)
_UPPER = {"id": "ID", "mb": "MB"}

#: In their words a sandbox runs, or is paused, or is not there.
PAUSED = frozenset({State.PAUSED, State.PAUSING})
OVER = frozenset({State.STOPPING, State.STOPPED, State.ERROR})
RUNNING = frozenset(State) - PAUSED - OVER
#: What is not there yet is not listed.
LISTED_RUNNING = RUNNING - {State.PENDING, State.STARTING}
assert TRANSITIONAL <= PAUSED | OVER | RUNNING


def wire_name(name: str) -> str:
    first, *others = name.split("_")
    return first + "".join(_UPPER.get(each, each.capitalize()) for each in others)


class Body(BaseModel):
    """What newer clients say beyond what we know is left alone."""

    model_config = ConfigDict(alias_generator=wire_name, populate_by_name=True, extra="ignore")


def moment_of(at: float) -> datetime:
    return datetime.fromtimestamp(at, UTC)


# What comes.


class AutoResume(Body):
    enabled: bool = False


class Egress(Body):
    """What a sandbox may reach."""

    allow_out: list[str] | None = None
    deny_out: list[str] | None = None
    dns_servers: list[str] | None = None
    egress_proxy: Any = None
    rules: dict[str, Any] | None = None


class NetworkUpdate(Egress):
    allow_internet_access: bool | None = Field(default=None, alias="allow_internet_access")


class Network(Egress):
    allow_public_traffic: bool | None = None
    mask_request_host: str | None = None
    https_ports: list[int] | None = None


class NewSandbox(Body):
    template_id: str = Field(min_length=1, max_length=300)
    timeout: int = Field(default=300, description="Seconds from now after which it ends.")
    metadata: dict[str, str] | None = None
    env_vars: dict[str, str] | None = None
    auto_pause: bool | None = Field(default=None, description="Pause at the end, rather than kill.")
    auto_pause_memory: bool | None = None
    auto_resume: AutoResume | None = None
    allow_internet_access: bool | None = Field(default=None, alias="allow_internet_access")
    network: Network | None = None
    mcp: dict[str, Any] | None = None
    iam: dict[str, Any] | None = None
    volume_mounts: list[dict[str, Any]] | None = None


class OldNewSandbox(NewSandbox):
    timeout: int = 15


class Connect(Body):
    timeout: int = Field(default=300, ge=0)
    memory: bool | None = None


class Resume(Body):
    timeout: int = Field(default=15, ge=0)


class Timeout(Body):
    timeout: int = Field(ge=0, description="Seconds from now; 0 ends it at once.")


class Refresh(Body):
    duration: int = Field(default=60, ge=0, le=3600)


class Pause(Body):
    memory: bool | None = None
    require_healthy_guest: bool | None = None


class Fork(Body):
    timeout: int | None = Field(default=None, ge=1)
    count: int = Field(default=1, ge=1, le=100)


class NewSnapshot(Body):
    name: str | None = Field(default=None, max_length=200)
    memory: bool | None = None


class TemplateUpdate(Body):
    public: bool | None = None


class NewTemplate(Body):
    name: str | None = Field(default=None, max_length=300, description="`name[:tag]`.")
    alias: str | None = Field(default=None, max_length=300, description="What was `name` before.")
    tags: list[str] | None = Field(default=None, max_length=32)
    cpu_count: int | None = Field(default=None, ge=1, le=64)
    memory_mb: int | None = Field(default=None, ge=128, le=1 << 20)
    min_free_disk_mb: int | None = Field(default=None, ge=0, le=1 << 20, alias="minFreeDiskMb")


class BuildStep(Body):
    type: str = Field(max_length=32)
    args: list[str] | None = None
    files_hash: str | None = Field(default=None, max_length=128)
    force: bool | None = None


class Registry(Body):
    type: str = Field(max_length=32)
    username: str | None = Field(default=None, max_length=255)
    password: str | None = Field(default=None, max_length=1 << 14)


class BuildSteps(Body):
    from_image: str | None = Field(default=None, max_length=512)
    from_template: str | None = Field(default=None, max_length=300)
    from_image_registry: Registry | None = None
    steps: list[BuildStep] = Field(default_factory=list)
    start_cmd: str | None = None
    ready_cmd: str | None = None
    force: bool | None = None


class TagAssignment(Body):
    target: str = Field(max_length=300, description="`name[:tag]`.")
    tags: list[str] = Field(min_length=1, max_length=32)


class TagRemoval(Body):
    name: str = Field(max_length=300)
    tags: list[str] = Field(min_length=1, max_length=32)


# What goes.


class Sandbox(Body):
    """A sandbox, and what is needed to talk to it."""

    template_id: str
    sandbox_id: str
    client_id: str = CLIENT_ID
    envd_version: str
    alias: str
    envd_access_token: str
    traffic_access_token: str | None
    domain: str | None

    @classmethod
    def of(cls, row: tables.Sandbox, platform: Platform) -> Sandbox:
        tokens = platform.tokens
        return cls(
            template_id=row.template,
            sandbox_id=row.sandbox_id,
            envd_version=row.envd_version or ENVD_VERSION,
            alias=row.template,
            envd_access_token=tokens.access(row.sandbox_id),
            traffic_access_token=None if row.public_traffic else tokens.traffic(row.sandbox_id),
            domain=platform.settings.domain or None,
        )


class ListedSandbox(Body):
    template_id: str
    sandbox_id: str
    client_id: str = CLIENT_ID
    envd_version: str
    alias: str
    started_at: datetime
    end_at: datetime
    cpu_count: int
    memory_mb: int
    disk_size_mb: int
    state: Literal["running", "paused"]
    metadata: dict[str, str]
    volume_mounts: list[dict[str, str]]

    @classmethod
    def of(cls, row: tables.Sandbox) -> ListedSandbox:
        return cls(**_facts(row))


class Lifecycle(Body):
    auto_resume: bool
    on_timeout: Literal["kill", "pause"]


class SandboxDetail(ListedSandbox):
    envd_access_token: str
    domain: str | None
    lifecycle: Lifecycle
    pause_mode: Literal["full"] | None = Field(description="What a paused one has kept.")
    allow_internet_access: bool | None
    network: Network

    @classmethod
    def of_row(cls, row: tables.Sandbox, platform: Platform) -> SandboxDetail:
        policy = NetworkPolicy.from_dict(row.network)
        on_timeout: Literal["kill", "pause"] = "kill" if row.on_timeout == "kill" else "pause"
        return cls(
            **_facts(row),
            envd_access_token=platform.tokens.access(row.sandbox_id),
            domain=platform.settings.domain or None,
            lifecycle=Lifecycle(auto_resume=row.auto_resume, on_timeout=on_timeout),
            pause_mode="full" if row.state == State.PAUSED else None,
            allow_internet_access=None if row.network is None else policy.allow_internet_access,
            network=Network(
                allow_public_traffic=row.public_traffic,
                allow_out=list(policy.allow_out) or None,
                deny_out=list(policy.deny_out) or None,
            ),
        )


def _facts(row: tables.Sandbox) -> dict[str, Any]:
    return {
        "template_id": row.template,
        "sandbox_id": row.sandbox_id,
        "envd_version": row.envd_version or ENVD_VERSION,
        "alias": row.template,
        "started_at": moment_of(row.started_at or row.created_at),
        "end_at": _NEVER if row.ends_at is None else moment_of(row.ends_at),
        "cpu_count": row.vcpus,
        "memory_mb": row.memory_mb,
        "disk_size_mb": row.disk_size_mb,
        "state": "paused" if row.state in PAUSED else "running",
        "metadata": row.labels,
        "volume_mounts": [],
    }


class ForkError(Body):
    code: int
    message: str


class ForkResult(Body):
    """A child, or why it could not be made."""

    sandbox: Sandbox | None = None
    error: ForkError | None = None


class Metric(Body):
    timestamp: datetime
    timestamp_unix: int
    cpu_count: int
    cpu_used_pct: float = Field(description="100 is all of its processors.")
    mem_used: int
    mem_total: int
    mem_cache: int
    disk_used: int
    disk_total: int


class LogLine(Body):
    timestamp: datetime
    line: str


class LogEntry(Body):
    timestamp: datetime
    level: Literal["info", "error"]
    message: str
    fields: dict[str, str]


class Logs(Body):
    logs: list[LogLine]
    log_entries: list[LogEntry]


class Snapshot(Body):
    snapshot_id: str
    names: list[str]


class Template(Body):
    template_id: str
    build_id: str
    cpu_count: int
    memory_mb: int
    disk_size_mb: int
    public: bool
    aliases: list[str]
    names: list[str]
    created_at: datetime
    updated_at: datetime
    created_by: None = None
    last_spawned_at: None = None
    spawn_count: int = 0
    build_count: int = 1
    envd_version: str = ENVD_VERSION
    build_status: Literal["ready"] = "ready"


class RequestedTemplate(Body):
    template_id: str
    build_id: str
    names: list[str]
    tags: list[str]
    aliases: list[str]
    public: bool = False


class FileUpload(Body):
    present: bool
    url: str = Field(description="For a PUT, which needs no key.")


class BuildLogEntry(Body):
    timestamp: datetime
    message: str
    level: str
    step: str | None = None


class BuildReason(Body):
    message: str
    step: str | None = None


class BuildStatus(Body):
    template_id: str
    build_id: str
    status: Literal["waiting", "building", "ready", "error"]
    logs: list[str] = Field(default=[], description="Always empty, as theirs.")
    log_entries: list[BuildLogEntry]
    reason: BuildReason | None = None


class BuildLogs(Body):
    logs: list[BuildLogEntry]


class AssignedTags(Body):
    build_id: str
    tags: list[str]


class TemplateTag(Body):
    tag: str
    build_id: str
    created_at: datetime


class Alias(Body):
    template_id: str
    public: bool


class Names(Body):
    names: list[str]


class Team(Body):
    team_id: str
    name: str
    api_key: str = Field(default="", description="Never shown again after it was made.")
    is_default: bool
