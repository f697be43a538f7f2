"""All tables. Times are seconds since the epoch; ids of users, teams and hosts are UUIDs as text.

Who may change a `state` column stands beside it. Secrets are kept as hashes where they need only
be recognised, and sealed where they must be read again (`seal`).
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    UniqueConstraint,
    text,
)
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import Mapped, mapped_column

from sandmartin.control.db import Base

#: The owner of what comes with Sandmartin.
PLATFORM_TEAM_ID = "00000000-0000-0000-0000-000000000000"

_Json = JSON().with_variant(JSONB(), "postgresql")
#: Numbered in order of insertion, on both databases.
_Serial = BigInteger().with_variant(Integer(), "sqlite")


# Accounts.


class User(Base):
    __tablename__ = "users"

    user_id: Mapped[str] = mapped_column(primary_key=True)
    #: In lower case.
    email: Mapped[str] = mapped_column(unique=True)
    name: Mapped[str] = mapped_column(default="")
    #: argon2; None for one who logs in elsewhere.
    password_hash: Mapped[str | None]
    #: Administrator of the platform.
    is_admin: Mapped[bool] = mapped_column(default=False)
    active: Mapped[bool] = mapped_column(default=True)
    created_at: Mapped[float]
    #: Its name and address are forgotten then.
    deleted_at: Mapped[float | None]


class OauthIdentity(Base):
    __tablename__ = "oauth_identities"

    provider: Mapped[str] = mapped_column(primary_key=True)
    subject: Mapped[str] = mapped_column(primary_key=True)
    user_id: Mapped[str] = mapped_column(ForeignKey("users.user_id", ondelete="CASCADE"))


class Team(Base):
    __tablename__ = "teams"

    team_id: Mapped[str] = mapped_column(primary_key=True)
    name: Mapped[str]
    created_at: Mapped[float]
    deleted_at: Mapped[float | None]
    # Quotas; None is the platform's default.
    max_sandboxes: Mapped[int | None]
    max_vcpus: Mapped[int | None]
    max_memory_mb: Mapped[int | None]


class Member(Base):
    __tablename__ = "members"

    team_id: Mapped[str] = mapped_column(
        ForeignKey("teams.team_id", ondelete="CASCADE"), primary_key=True
    )
    user_id: Mapped[str] = mapped_column(
        ForeignKey("users.user_id", ondelete="CASCADE"), primary_key=True
    )
    #: A `Role`.
    role: Mapped[str]
    created_at: Mapped[float]

    __table_args__ = (Index("members_by_user", "user_id"),)


class Invitation(Base):
    __tablename__ = "invitations"

    invitation_id: Mapped[str] = mapped_column(primary_key=True)
    token_hash: Mapped[str] = mapped_column(unique=True)
    #: Who alone may use it; empty for whoever has the token.
    email: Mapped[str] = mapped_column(default="")
    #: Joined when it is used; None for a team of one's own.
    team_id: Mapped[str | None] = mapped_column(ForeignKey("teams.team_id", ondelete="CASCADE"))
    role: Mapped[str] = mapped_column(default="member")
    created_by: Mapped[str]
    created_at: Mapped[float]
    expires_at: Mapped[float]
    used_at: Mapped[float | None]


class BrowserSession(Base):
    __tablename__ = "browser_sessions"

    #: SHA-256 of the cookie.
    session_hash: Mapped[str] = mapped_column(primary_key=True)
    user_id: Mapped[str] = mapped_column(ForeignKey("users.user_id", ondelete="CASCADE"))
    team_id: Mapped[str] = mapped_column(ForeignKey("teams.team_id", ondelete="CASCADE"))
    csrf_token: Mapped[str]
    created_at: Mapped[float]
    expires_at: Mapped[float]

    __table_args__ = (Index("browser_sessions_by_user", "user_id"),)


class ApiKey(Base):
    __tablename__ = "api_keys"

    key_id: Mapped[str] = mapped_column(primary_key=True)
    team_id: Mapped[str] = mapped_column(ForeignKey("teams.team_id", ondelete="CASCADE"))
    #: The user who answers for it, or `system`.
    created_by: Mapped[str]
    #: Administers the platform, and owns its team.
    is_admin: Mapped[bool] = mapped_column(default=False)
    name: Mapped[str]
    #: The beginning of the key, to tell keys apart.
    prefix: Mapped[str]
    #: SHA-256 of the key.
    key_hash: Mapped[str] = mapped_column(unique=True)
    created_at: Mapped[float]
    last_used_at: Mapped[float | None]

    __table_args__ = (Index("api_keys_by_team", "team_id"),)


class Attempt(Base):
    """How much was tried lately of what can be guessed, of one kind by one party."""

    __tablename__ = "attempts"

    #: SHA-256 of kind and party.
    attempt_key: Mapped[str] = mapped_column(primary_key=True)
    #: When all that was tried is forgotten.
    clear_at: Mapped[float]

    __table_args__ = (Index("attempts_by_time", "clear_at"),)


# Hosts.


class Host(Base):
    __tablename__ = "hosts"

    host_id: Mapped[str] = mapped_column(primary_key=True)
    name: Mapped[str]
    #: `unix:PATH`, or `https://NAME:PORT`; empty before it is registered.
    address: Mapped[str] = mapped_column(default="")
    #: A `HostState`; changed by `hosts` alone.
    state: Mapped[str]
    #: Takes nothing new.
    draining: Mapped[bool] = mapped_column(default=False)
    created_at: Mapped[float]
    #: When it was last heard of, and when it was last reached.
    heartbeat_at: Mapped[float | None]
    reached_at: Mapped[float | None]
    cpus: Mapped[int] = mapped_column(default=0)
    memory_mb: Mapped[int] = mapped_column(default=0)
    disk_free_mb: Mapped[int] = mapped_column(default=0)
    cpu_overcommit: Mapped[float] = mapped_column(default=1.0)
    #: What the monitor of each sandbox takes beside its memory.
    memory_overhead_mb: Mapped[int] = mapped_column(default=0)
    accel: Mapped[str] = mapped_column(default="")
    vmm_version: Mapped[str] = mapped_column(default="")
    version: Mapped[str] = mapped_column(default="")
    #: SHA-256 of the one-time token with which it may register, until then.
    registration_hash: Mapped[str | None]
    registration_expires_at: Mapped[float | None]
    #: SHA-256 of the token with which it sends heartbeats and renews its certificate.
    token_hash: Mapped[str | None] = mapped_column(unique=True)
    #: Serial numbers of the certificates that it may show, as hexadecimal text, newest first.
    certificate_serials: Mapped[list[str]] = mapped_column(_Json, default=list)
    certificate_expires_at: Mapped[float | None]

    __table_args__ = (
        # The name of a deleted one may be used again.
        Index(
            "hosts_by_name",
            "name",
            unique=True,
            sqlite_where=text("state != 'deleted'"),
            postgresql_where=text("state != 'deleted'"),
        ),
    )


# Templates.


class Template(Base):
    __tablename__ = "templates"

    template_id: Mapped[str] = mapped_column(primary_key=True)
    team_id: Mapped[str] = mapped_column(ForeignKey("teams.team_id"))
    name: Mapped[str]
    #: Its name on the hosts, which know no teams.
    agent_name: Mapped[str] = mapped_column(unique=True)
    #: `image` (a disk) or `snapshot` (disk and memory).
    kind: Mapped[str]
    #: A `TemplateState`; changed by `templates` alone.
    state: Mapped[str]
    #: Of a snapshot, which fixes them; 0 for an image.
    vcpus: Mapped[int] = mapped_column(default=0)
    memory_mb: Mapped[int] = mapped_column(default=0)
    disk_size_mb: Mapped[int] = mapped_column(default=0)
    #: Allocated blocks.
    size_bytes: Mapped[int] = mapped_column(BigInteger, default=0)
    #: The sandbox that it was made of, if any.
    sandbox_id: Mapped[str | None]
    #: What its source might reach; see `Sandbox.network`.
    network: Mapped[dict[str, Any] | None] = mapped_column(_Json)
    #: What its sandboxes begin with; see `defaults`.
    defaults: Mapped[dict[str, Any]] = mapped_column(_Json, default=dict)
    #: The build that made it.
    build_id: Mapped[str | None]
    #: Of what only builds see: by what they find it, and when one last did.
    layer_key: Mapped[str | None]
    used_at: Mapped[float] = mapped_column(default=0.0)
    created_at: Mapped[float]
    created_by: Mapped[str] = mapped_column(default="")

    __table_args__ = (
        UniqueConstraint("team_id", "name"),
        Index("templates_by_layer", "team_id", "layer_key"),
    )


class TemplateTag(Base):
    """A tag of a name, and the template that it is of. A name alone is its tag `default`."""

    __tablename__ = "template_tags"

    team_id: Mapped[str] = mapped_column(ForeignKey("teams.team_id"), primary_key=True)
    name: Mapped[str] = mapped_column(primary_key=True)
    tag: Mapped[str] = mapped_column(primary_key=True)
    template_id: Mapped[str] = mapped_column(
        ForeignKey("templates.template_id", ondelete="CASCADE")
    )
    created_at: Mapped[float]

    __table_args__ = (Index("template_tags_by_template", "template_id"),)


class TemplatePlacement(Base):
    """A host that has a template."""

    __tablename__ = "template_placements"

    template_id: Mapped[str] = mapped_column(
        ForeignKey("templates.template_id", ondelete="CASCADE"), primary_key=True
    )
    host_id: Mapped[str] = mapped_column(
        ForeignKey("hosts.host_id", ondelete="CASCADE"), primary_key=True
    )


class Artefact(Base):
    """A template in the artefact store, or on its way there; who pushes it holds its lease."""

    __tablename__ = "artefacts"

    template_id: Mapped[str] = mapped_column(
        ForeignKey("templates.template_id", ondelete="CASCADE"), primary_key=True
    )
    #: Its name in the store; None while it is not there, or not whole.
    artefact_id: Mapped[str | None]
    #: Before compression.
    size_bytes: Mapped[int] = mapped_column(BigInteger, default=0)
    #: What a snapshot was made on, and needs of a host; empty for an image.
    accel: Mapped[str] = mapped_column(default="")
    vmm_version: Mapped[str] = mapped_column(default="")
    created_at: Mapped[float]
    stored_at: Mapped[float | None]
    #: Nobody tries before; 0 tries at once.
    next_at: Mapped[float] = mapped_column(default=0.0)
    attempts: Mapped[int] = mapped_column(default=0)
    #: Why the last try failed.
    error: Mapped[str] = mapped_column(default="")
    lease_token: Mapped[str] = mapped_column(default="")
    lease_expires_at: Mapped[float] = mapped_column(default=0.0)

    __table_args__ = (
        Index(
            "artefacts_open",
            "next_at",
            sqlite_where=text("artefact_id IS NULL"),
            postgresql_where=text("artefact_id IS NULL"),
        ),
    )


# Sandboxes.


class Sandbox(Base):
    __tablename__ = "sandboxes"

    sandbox_id: Mapped[str] = mapped_column(primary_key=True)
    team_id: Mapped[str] = mapped_column(ForeignKey("teams.team_id"))
    host_id: Mapped[str | None] = mapped_column(ForeignKey("hosts.host_id"))
    #: As it was asked for, and its name on the host.
    template: Mapped[str]
    agent_template: Mapped[str]
    #: A `State`; changed by `rows.move` and `rows.observe` alone, and by `hosts` when its host is
    #: deleted.
    state: Mapped[str]
    state_at: Mapped[float]
    #: Why it is in error, missing or stopped.
    reason: Mapped[str] = mapped_column(default="")
    #: The operation that is under way; None when none is.
    operation_id: Mapped[str | None]
    vcpus: Mapped[int]
    memory_mb: Mapped[int]
    disk_size_mb: Mapped[int]
    timeout_s: Mapped[int] = mapped_column(default=0)
    #: For how long it runs after its start, or when it is woken, and when that is over; None for
    #: as long as it is used.
    lifetime_s: Mapped[int | None]
    ends_at: Mapped[float | None]
    #: What happens at the end of its idle time or of its lifetime: `pause` or `kill`.
    on_timeout: Mapped[str] = mapped_column(default="pause")
    #: Whether traffic wakes it from its sleep, and whether that needs no token.
    auto_resume: Mapped[bool] = mapped_column(default=False)
    public_traffic: Mapped[bool] = mapped_column(default=True)
    #: A `NetworkPolicy` as plain values; None is the Internet.
    network: Mapped[dict[str, Any] | None] = mapped_column(_Json)
    #: Labels that its owner gave it.
    labels: Mapped[dict[str, str]] = mapped_column("metadata", _Json, default=dict)
    #: What it has of its template; see `defaults`.
    defaults: Mapped[dict[str, Any]] = mapped_column(_Json, default=dict)
    #: The build that works in it, and to whose team it is not shown.
    build_id: Mapped[str | None]
    host_ip: Mapped[str] = mapped_column(default="")
    #: The guest protocol that it speaks, as E2B counts it; empty when it is not known.
    envd_version: Mapped[str] = mapped_column(default="")
    #: The sandbox it was forked from.
    parent_id: Mapped[str | None]
    created_by: Mapped[str] = mapped_column(default="")
    created_at: Mapped[float]
    #: When it ran first, and when it was gone.
    started_at: Mapped[float | None]
    ended_at: Mapped[float | None]
    last_active_at: Mapped[float | None]
    idempotency_key: Mapped[str | None]
    #: SHA-256 of the request that came with the key.
    request_hash: Mapped[str | None]

    __table_args__ = (
        UniqueConstraint("team_id", "idempotency_key"),
        Index("sandboxes_by_team", "team_id", "created_at", "sandbox_id"),
        # What the reconciler and the scheduler look at: all that is not over.
        Index(
            "sandboxes_alive",
            "host_id",
            "state",
            sqlite_where=text("state != 'stopped'"),
            postgresql_where=text("state != 'stopped'"),
        ),
        Index(
            "sandboxes_of_builds",
            "build_id",
            sqlite_where=text("build_id IS NOT NULL AND state != 'stopped'"),
            postgresql_where=text("build_id IS NOT NULL AND state != 'stopped'"),
        ),
        # What the deadlines look at.
        Index(
            "sandboxes_ending",
            "ends_at",
            sqlite_where=text("ends_at IS NOT NULL AND state != 'stopped'"),
            postgresql_where=text("ends_at IS NOT NULL AND state != 'stopped'"),
        ),
    )


class Operation(Base):
    """Long work on a sandbox. Whoever holds its lease does it, and nobody else."""

    __tablename__ = "operations"

    operation_id: Mapped[str] = mapped_column(primary_key=True)
    sandbox_id: Mapped[str] = mapped_column(ForeignKey("sandboxes.sandbox_id", ondelete="CASCADE"))
    #: A `Kind` of `operations`, and what it needs to know.
    kind: Mapped[str]
    arguments: Mapped[dict[str, Any]] = mapped_column(_Json, default=dict)
    #: To go back to when it fails before anything was done.
    state_before: Mapped[str]
    created_at: Mapped[float]
    #: Who works on it, with which token, until when unless renewed.
    lease_owner: Mapped[str]
    lease_token: Mapped[str]
    lease_expires_at: Mapped[float]
    attempts: Mapped[int] = mapped_column(default=1)
    finished_at: Mapped[float | None]
    #: Code of the error it ended with; empty for success.
    error_code: Mapped[str] = mapped_column(default="")
    error_message: Mapped[str] = mapped_column(default="")

    __table_args__ = (
        Index("operations_by_sandbox", "sandbox_id"),
        Index(
            "operations_open",
            "lease_expires_at",
            sqlite_where=text("finished_at IS NULL"),
            postgresql_where=text("finished_at IS NULL"),
        ),
    )


# Builds.


class Build(Base):
    """A template being built. Whoever holds its lease does it, and nobody else."""

    __tablename__ = "builds"

    build_id: Mapped[str] = mapped_column(primary_key=True)
    team_id: Mapped[str] = mapped_column(ForeignKey("teams.team_id"))
    name: Mapped[str]
    tags: Mapped[list[str]] = mapped_column(_Json, default=list)
    #: A `BuildState`; changed by `builds.service` and `builds.queue` alone.
    state: Mapped[str]
    #: What is to be done, sealed, as there may be secrets in it; None once that is over.
    sealed_request: Mapped[bytes | None] = mapped_column(LargeBinary)
    #: It was reserved, and its steps are awaited until then; None for what may be begun.
    awaited_until: Mapped[float | None]
    template_id: Mapped[str | None]
    #: Code of the error it ended with; empty for none. `error_step` counts from 1.
    error_code: Mapped[str] = mapped_column(default="")
    error_message: Mapped[str] = mapped_column(default="")
    error_hint: Mapped[str] = mapped_column(default="")
    error_step: Mapped[int | None]
    created_by: Mapped[str] = mapped_column(default="")
    created_at: Mapped[float]
    started_at: Mapped[float | None]
    finished_at: Mapped[float | None]
    steps_total: Mapped[int] = mapped_column(default=0)
    steps_done: Mapped[int] = mapped_column(default=0)
    steps_cached: Mapped[int] = mapped_column(default=0)
    #: Of its log.
    log_lines: Mapped[int] = mapped_column(default=0)
    log_bytes: Mapped[int] = mapped_column(default=0)
    #: Somebody wants it to end.
    cancelling: Mapped[bool] = mapped_column(default=False)
    idempotency_key: Mapped[str | None]
    #: Of the request that came with the key, see `builds.service`.
    request_hash: Mapped[str | None]
    #: Who works on it, with which token, until when unless renewed; empty while it waits.
    lease_owner: Mapped[str] = mapped_column(default="")
    lease_token: Mapped[str] = mapped_column(default="")
    lease_expires_at: Mapped[float] = mapped_column(default=0.0)
    attempts: Mapped[int] = mapped_column(default=0)

    __table_args__ = (
        UniqueConstraint("team_id", "idempotency_key"),
        Index("builds_by_team", "team_id", "created_at", "build_id"),
        Index(
            "builds_open",
            "created_at",
            sqlite_where=text("finished_at IS NULL"),
            postgresql_where=text("finished_at IS NULL"),
        ),
    )


class BuildLine(Base):
    """A line of a build's log; they count from 1."""

    __tablename__ = "build_log"

    build_id: Mapped[str] = mapped_column(
        ForeignKey("builds.build_id", ondelete="CASCADE"), primary_key=True
    )
    number: Mapped[int] = mapped_column(primary_key=True)
    at: Mapped[float]
    #: `debug`, `info`, `warn` or `error`.
    level: Mapped[str]
    message: Mapped[str]
    #: The step that it is of, from 1; 0 for none. `phase` is that of the step.
    step: Mapped[int] = mapped_column(default=0)
    phase: Mapped[str] = mapped_column(default="")
    #: Since the build was begun.
    elapsed_ms: Mapped[int] = mapped_column(default=0)


class Lease(Base):
    """A role that one replica of the control plane has at a time."""

    __tablename__ = "leases"

    name: Mapped[str] = mapped_column(primary_key=True)
    owner: Mapped[str]
    expires_at: Mapped[float]


# What happened.


class Event(Base):
    """Something that happened to a sandbox, a template or a host, in order."""

    __tablename__ = "events"

    event_id: Mapped[int] = mapped_column(_Serial, primary_key=True, autoincrement=True)
    team_id: Mapped[str]
    #: Such as `sandbox.paused`.
    kind: Mapped[str]
    sandbox_id: Mapped[str | None]
    at: Mapped[float]
    data: Mapped[dict[str, Any]] = mapped_column(_Json, default=dict)

    __table_args__ = (
        Index("events_by_team", "team_id", "event_id"),
        Index("events_by_sandbox", "sandbox_id", "event_id"),
        Index("events_by_team_and_time", "team_id", "at"),
        {"sqlite_autoincrement": True},
    )


class AuditRecord(Base):
    """What somebody did. Only ever added to."""

    __tablename__ = "audit"

    audit_id: Mapped[int] = mapped_column(_Serial, primary_key=True, autoincrement=True)
    at: Mapped[float]
    team_id: Mapped[str]
    #: `user`, `key`, `host` or `system`, and which.
    actor_kind: Mapped[str]
    actor_id: Mapped[str]
    actor_name: Mapped[str] = mapped_column(default="")
    #: In the past tense, such as `sandbox.created`.
    action: Mapped[str]
    resource_kind: Mapped[str]
    resource_id: Mapped[str]
    #: `team`: all members see it; `admin`: owners and administrators do.
    scope: Mapped[str] = mapped_column(default="team")
    #: `success`, `info`, `warning` or `error`.
    status: Mapped[str] = mapped_column(default="success")
    request_id: Mapped[str] = mapped_column(default="")
    address: Mapped[str] = mapped_column(default="")
    data: Mapped[dict[str, Any]] = mapped_column(_Json, default=dict)

    __table_args__ = (
        Index("audit_by_team", "team_id", "audit_id"),
        {"sqlite_autoincrement": True},
    )


class Channel(Base):
    """Where a team wants to hear of events."""

    __tablename__ = "channels"

    channel_id: Mapped[str] = mapped_column(primary_key=True)
    team_id: Mapped[str] = mapped_column(ForeignKey("teams.team_id", ondelete="CASCADE"))
    name: Mapped[str]
    #: `webhook`, or a service that `apprise` knows.
    kind: Mapped[str]
    #: Address and secrets, sealed.
    sealed_config: Mapped[bytes] = mapped_column(LargeBinary)
    #: Kinds of events; `*` is all.
    events: Mapped[list[str]] = mapped_column(_Json, default=list)
    active: Mapped[bool] = mapped_column(default=True)
    created_at: Mapped[float]
    #: Events up to this one were looked at.
    seen_event_id: Mapped[int] = mapped_column(BigInteger, default=0)


class Delivery(Base):
    """An event on its way to a channel."""

    __tablename__ = "deliveries"

    delivery_id: Mapped[str] = mapped_column(primary_key=True)
    channel_id: Mapped[str] = mapped_column(ForeignKey("channels.channel_id", ondelete="CASCADE"))
    event_id: Mapped[int] = mapped_column(BigInteger)
    #: Deliveries of one sandbox go one after the other.
    sandbox_id: Mapped[str | None]
    attempts: Mapped[int] = mapped_column(default=0)
    next_at: Mapped[float]
    #: When it arrived or was given up.
    finished_at: Mapped[float | None]
    error: Mapped[str] = mapped_column(default="")
    lease_token: Mapped[str] = mapped_column(default="")
    lease_expires_at: Mapped[float] = mapped_column(default=0.0)

    __table_args__ = (
        UniqueConstraint("channel_id", "event_id"),
        Index(
            "deliveries_open",
            "next_at",
            sqlite_where=text("finished_at IS NULL"),
            postgresql_where=text("finished_at IS NULL"),
        ),
    )


# What was used.


class MetricBlock(Base):
    """Points of a sandbox in one tier, packed, as they were flushed by its host."""

    __tablename__ = "metric_blocks"

    block_id: Mapped[int] = mapped_column(_Serial, primary_key=True, autoincrement=True)
    sandbox_id: Mapped[str] = mapped_column(ForeignKey("sandboxes.sandbox_id", ondelete="CASCADE"))
    #: `10m`, `2h` or `24h`.
    tier: Mapped[str]
    begins_at: Mapped[float]
    ends_at: Mapped[float]
    points: Mapped[bytes] = mapped_column(LargeBinary)

    __table_args__ = (Index("metric_blocks_by_sandbox", "sandbox_id", "tier", "begins_at"),)


class TeamSample(Base):
    """What a team's sandboxes held at one moment."""

    __tablename__ = "team_samples"

    team_id: Mapped[str] = mapped_column(primary_key=True)
    at: Mapped[float] = mapped_column(primary_key=True)
    running: Mapped[int]
    vcpus: Mapped[int]
    memory_mb: Mapped[int]


class UsageDay(Base):
    """What a team's sandboxes used on one day (UTC)."""

    __tablename__ = "usage_days"

    team_id: Mapped[str] = mapped_column(primary_key=True)
    #: YYYY-MM-DD.
    day: Mapped[str] = mapped_column(primary_key=True)
    cpu_minutes: Mapped[float] = mapped_column(default=0.0)
    memory_mb_minutes: Mapped[float] = mapped_column(default=0.0)


class Secret(Base):
    """What the platform itself must remember, sealed: the keys of its certificate authority."""

    __tablename__ = "secrets"

    name: Mapped[str] = mapped_column(primary_key=True)
    sealed: Mapped[bytes] = mapped_column(LargeBinary)
    created_at: Mapped[float]
