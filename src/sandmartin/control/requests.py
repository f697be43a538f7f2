"""What a team may ask for of sandboxes, checked as far as that needs nothing but the words."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field

from sandmartin.control import tables
from sandmartin.control.rows import Row
from sandmartin.control.scheduler import Need
from sandmartin.control.states import LISTED
from sandmartin.errors import Invalid
from sandmartin.model import (
    DEFAULT_DISK_SIZE_MB,
    DEFAULT_MEMORY_MB,
    DEFAULT_VCPUS,
    SandboxSpec,
    State,
    new_sandbox_id,
)

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
    on_timeout: str = "pause"
    labels: Mapping[str, str] = field(default_factory=dict)
    envs: Mapping[str, str] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if self.on_timeout not in {"pause", "kill"}:
            raise Invalid(f"on_timeout is {self.on_timeout!r}", hint="use `pause` or `kill`")
        check_labels(self.labels)
        if any(not name or "=" in name for name in self.envs):
            raise Invalid("a name in envs is empty or contains '='")
        _check_texts(self.envs, "envs")

    def digest(self) -> str:
        """The same for the same request."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()


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
    limit: int = 100
    #: `next` of the page before.
    cursor: str = ""
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


def need_of(spec: SandboxSpec, template: tables.Template) -> Need:
    return Need(
        template_id=template.template_id,
        template=template.name,
        vcpus=spec.vcpus,
        memory_mb=spec.memory_mb,
    )
