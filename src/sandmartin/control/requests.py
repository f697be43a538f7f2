"""What a team may ask for of sandboxes, checked as far as that needs nothing but the words."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field

from sandmartin.control import tables
from sandmartin.control.caller import Caller
from sandmartin.control.rows import Row, ends_at
from sandmartin.control.scheduler import Need
from sandmartin.control.states import LISTED
from sandmartin.errors import Invalid
from sandmartin.model import (
    DEFAULT_DISK_SIZE_MB,
    DEFAULT_MEMORY_MB,
    DEFAULT_VCPUS,
    INTERNET,
    NetworkPolicy,
    SandboxSpec,
    State,
    new_sandbox_id,
)

MAX_CHILDREN = 100
_MAX_LABELS = 64
_MAX_LABEL_CHARS = 1024


@dataclass(frozen=True, kw_only=True)
class NewRow:
    """A sandbox that a team asks for. What is None is left to the defaults. Raises Invalid."""

    template: str = "base"
    vcpus: int | None = None
    memory_mb: int | None = None
    disk_size_mb: int | None = None
    timeout_s: int = 0
    #: For how long it runs, however much it is used; None for as long as it is.
    lifetime_s: int | None = None
    on_timeout: str = "pause"
    #: Whether traffic wakes it from its sleep, and whether that needs no token.
    auto_resume: bool = False
    public_traffic: bool = True
    #: None is what the template's source had, or the Internet.
    network: NetworkPolicy | None = None
    labels: Mapping[str, str] = field(default_factory=dict)
    envs: Mapping[str, str] = field(default_factory=dict, repr=False)
    #: Of a build: which it is, and the template's id, as what builds make has no name.
    build_id: str | None = None
    template_id: str = ""

    def __post_init__(self) -> None:
        if self.on_timeout not in {"pause", "kill"}:
            raise Invalid(f"on_timeout is {self.on_timeout!r}", hint="use `pause` or `kill`")
        if self.lifetime_s is not None and self.lifetime_s < 1:
            raise Invalid(f"the lifetime is {self.lifetime_s} s", hint="use at least 1 s")
        check_labels(self.labels)
        if any(not name or "=" in name for name in self.envs):
            raise Invalid("a name in envs is empty or contains '='")
        _check_texts(self.envs, "envs")

    def digest(self) -> str:
        """The same for the same request."""
        return _digest(self)


@dataclass(frozen=True, kw_only=True)
class NewChildren:
    """Forks that a team asks for. Raises Invalid."""

    sandbox_id: str
    count: int = 1
    #: None is that of the source.
    timeout_s: int | None = None
    lifetime_s: int | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.count <= MAX_CHILDREN:
            raise Invalid(f"count is {self.count}", hint=f"use 1 to {MAX_CHILDREN}")

    def digest(self) -> str:
        """The same for the same request."""
        return _digest(self)


def keys_of_children(key: str, count: int = MAX_CHILDREN) -> list[str]:
    """The idempotency key of each child that a request with this key makes."""
    return [f"{key}/{number}" for number in range(count)]


def _digest(request: NewRow | NewChildren) -> str:
    return hashlib.sha256(json.dumps(asdict(request), sort_keys=True).encode()).hexdigest()


def check_labels(labels: Mapping[str, str]) -> None:
    """Raises Invalid when there are too many, or they are too long."""
    if len(labels) > _MAX_LABELS:
        raise Invalid(f"metadata has {len(labels)} entries", hint=f"use at most {_MAX_LABELS}")
    if any(len(key) + len(value) > _MAX_LABEL_CHARS or not key for key, value in labels.items()):
        raise Invalid(
            "an entry of metadata is too long, or has no name",
            hint=f"use at most {_MAX_LABEL_CHARS} characters for name and value together",
        )
    _check_texts(labels, "metadata")


def _check_texts(texts: Mapping[str, str], what: str) -> None:
    """Raises Invalid for what no database or environment can hold."""
    for text in (*texts, *texts.values()):
        # Half a surrogate pair can be said in JSON, and is no character.
        if "\0" in text or any("\ud800" <= each <= "\udfff" for each in text):
            raise Invalid(f"{what} has a text with a NUL or half a surrogate pair")


@dataclass(frozen=True, kw_only=True)
class Filter:
    """Which sandboxes a list is to show."""

    states: Collection[State] = LISTED
    labels: Mapping[str, str] = field(default_factory=dict)
    #: Name of a template; empty for all.
    template: str = ""
    #: Only what ran first after.
    started_after: float | None = None
    oldest_first: bool = False
    limit: int = 100
    #: `next` of the page before.
    cursor: str = ""
    #: Only what requests with this key made.
    idempotency_key: str = ""
    #: For administrators of the platform.
    all_teams: bool = False


@dataclass(frozen=True, kw_only=True)
class Page:
    rows: Sequence[Row]
    next: str


def spec_of(new: NewRow, template: tables.Template) -> SandboxSpec:
    """What the agent will be asked for, defaults filled in. Raises Invalid."""
    snapshot = template.kind == "snapshot"
    return SandboxSpec(
        sandbox_id=new_sandbox_id(),
        template=template.agent_name,
        vcpus=template.vcpus if snapshot else new.vcpus or template.vcpus or DEFAULT_VCPUS,
        memory_mb=template.memory_mb
        if snapshot
        else new.memory_mb or template.memory_mb or DEFAULT_MEMORY_MB,
        disk_size_mb=max(new.disk_size_mb or DEFAULT_DISK_SIZE_MB, template.disk_size_mb),
        timeout_s=new.timeout_s,
    )


def row_of(
    new: NewRow, template: tables.Template, spec: SandboxSpec, caller: Caller, host_id: str
) -> Row:
    """The sandbox as it begins, on the host that was chosen for it."""
    now = time.time()
    policy = _policy(new, template)
    return Row(
        sandbox_id=spec.sandbox_id,
        team_id=caller.team_id,
        host_id=host_id,
        template=new.template,
        agent_template=template.agent_name,
        state=State.STARTING,
        state_at=now,
        vcpus=spec.vcpus,
        memory_mb=spec.memory_mb,
        disk_size_mb=spec.disk_size_mb,
        timeout_s=spec.timeout_s,
        lifetime_s=new.lifetime_s,
        ends_at=ends_at(new.lifetime_s),
        network=None if policy == INTERNET else policy.to_dict(),
        on_timeout=new.on_timeout,
        auto_resume=new.auto_resume,
        public_traffic=new.public_traffic,
        labels=dict(new.labels),
        defaults=dict(template.defaults),
        build_id=new.build_id,
        created_by=caller.actor_id,
        created_at=now,
    )


def _policy(new: NewRow, template: tables.Template) -> NetworkPolicy:
    """What the sandbox may reach: as asked, or as what the template was made from."""
    return new.network or NetworkPolicy.from_dict(template.network)


def first_envs(new: NewRow, template: tables.Template) -> dict[str, str]:
    """Variables of all commands: those of the template, and those that were asked for.

    A build gives each command its own.
    """
    if new.build_id is not None:
        return dict(new.envs)
    return {**template.defaults.get("envs", {}), **new.envs}


def need_of(spec: SandboxSpec, template: tables.Template, *, stored: bool) -> Need:
    return Need(
        template_id=template.template_id,
        template=template.name,
        vcpus=spec.vcpus,
        memory_mb=spec.memory_mb,
        stored=stored,
    )
