"""Ids, states and settings: the words that every part of Sandmartin shares.

Everything here is frozen and knows no wire format. Units end a name; `memory_mb` and
`disk_size_mb` count MiB, as the host contract has it.
"""

from __future__ import annotations

import os
import re
import secrets
import string
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from enum import StrEnum
from ipaddress import IPv4Network
from pathlib import Path
from typing import Any, TypeVar

from sandmartin.errors import Conflict, Invalid

_ID_ALPHABET = string.ascii_lowercase + string.digits
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
_SHAPE = re.compile(r"([0-9]{1,3})x([0-9]{1,8})")
_LABEL = re.compile(r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?")
_T = TypeVar("_T")

DEFAULT_VCPUS = 1
DEFAULT_MEMORY_MB = 512
DEFAULT_DISK_SIZE_MB = 5120
MIN_MEMORY_MB = 128
MAX_VCPUS = 64
DEFAULT_EXEC_TIMEOUT_S = 30
#: Of a template that is named without one.
DEFAULT_TAG = "default"
#: In each of the lists of a network policy.
MAX_NETWORK_RULES = 256


def random_id(length: int) -> str:
    """`length` random characters of `[a-z0-9]`."""
    return "".join(secrets.choice(_ID_ALPHABET) for _ in range(length))


def new_sandbox_id() -> str:
    """`sb` and 20 characters of `[a-z0-9]`: no dash, because host names split at the dash."""
    return "sb" + random_id(20)


def check_name(name: str, what: str) -> str:
    """Return `name` if it may become part of a path. Raises Invalid."""
    if not _NAME.fullmatch(name):
        raise Invalid(
            f"{what} {name[:80]!r} is not valid",
            hint="use 1 to 64 of a-z, 0-9, dot, dash, underscore; begin with a letter or digit",
        )
    return name


def split_tag(name: str) -> tuple[str, str]:
    """The template's name and the tag in `NAME` or `NAME:TAG`; no tag is the tag `default`.

    Raises Invalid.
    """
    plain, colon, tag = name.partition(":")
    check_name(plain, "template name")
    return plain, check_tag(tag) if colon else DEFAULT_TAG


def check_tag(tag: str) -> str:
    """Return `tag` if a template may have it. Raises Invalid."""
    if not _TAG.fullmatch(tag):
        raise Invalid(
            f"tag {tag[:80]!r} is not valid",
            hint="use 1 to 128 of letters, digits, dot, dash, underscore; begin with neither "
            "dot nor dash",
        )
    return tag


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What a VM has of processors and memory."""

    vcpus: int = DEFAULT_VCPUS
    memory_mb: int = DEFAULT_MEMORY_MB

    def __str__(self) -> str:
        return f"{self.vcpus}x{self.memory_mb}"

    @classmethod
    def parse(cls, text: str) -> Shape:
        """The shape that is written as vCPUs, `x`, MiB of memory. Raises ValueError."""
        if (match := _SHAPE.fullmatch(text)) is None:
            raise ValueError(f"{text[:80]!r} is no shape; one is written 2x1024: vCPUs x MiB")
        shape = cls(vcpus=int(match[1]), memory_mb=int(match[2]))
        if not 1 <= shape.vcpus <= MAX_VCPUS or shape.memory_mb < MIN_MEMORY_MB:
            raise ValueError(
                f"shape {shape} is impossible; use 1 to {MAX_VCPUS} vCPUs and at least"
                f" {MIN_MEMORY_MB} MiB"
            )
        return shape


@dataclass(frozen=True, kw_only=True)
class WarmAhead:
    """A template whose warm snapshot is made before anyone asks for it."""

    template: str
    #: None is what the template recommends.
    shape: Shape | None = None

    @classmethod
    def parse(cls, text: str) -> WarmAhead:
        """What is written `template` or `template=2x1024`. Raises ValueError."""
        template, equals, shape = text.partition("=")
        if not _NAME.fullmatch(template):
            raise ValueError(f"{text[:80]!r} names no template; write base or base=2x1024")
        return cls(template=template, shape=Shape.parse(shape) if equals else None)


class State(StrEnum):
    """State of a sandbox. The values are the wire strings."""

    PENDING = "pending"
    STARTING = "starting"
    RUNNING = "running"
    PAUSING = "pausing"
    PAUSED = "paused"
    RESUMING = "resuming"
    SNAPSHOTTING = "snapshotting"
    STOPPING = "stopping"
    STOPPED = "stopped"
    ERROR = "error"
    MISSING = "missing"


TRANSITIONS: Mapping[State, frozenset[State]] = {
    State.PENDING: frozenset({State.STARTING, State.STOPPING, State.ERROR}),
    State.STARTING: frozenset({State.RUNNING, State.STOPPING, State.ERROR, State.MISSING}),
    State.RUNNING: frozenset(
        {State.PAUSING, State.SNAPSHOTTING, State.STOPPING, State.ERROR, State.MISSING}
    ),
    State.PAUSING: frozenset({State.PAUSED, State.RUNNING, State.STOPPING, State.ERROR}),
    State.PAUSED: frozenset({State.RESUMING, State.SNAPSHOTTING, State.STOPPING, State.MISSING}),
    State.RESUMING: frozenset({State.RUNNING, State.PAUSED, State.STOPPING, State.ERROR}),
    State.SNAPSHOTTING: frozenset(
        {State.RUNNING, State.PAUSED, State.STOPPING, State.ERROR, State.STOPPED}
    ),
    State.STOPPING: frozenset({State.STOPPED, State.ERROR}),
    State.STOPPED: frozenset(),
    State.ERROR: frozenset({State.STOPPING}),
    State.MISSING: frozenset({State.RUNNING, State.PAUSED, State.STOPPED, State.STOPPING}),
}


def check_transition(current: State, to: State, what: str) -> State:
    """Return `to` if it may follow `current`. Raises Conflict."""
    if to not in TRANSITIONS[current]:
        raise Conflict(f"{what} is {current} and cannot become {to}")
    return to


@dataclass(frozen=True, kw_only=True)
class NetworkPolicy:
    """What a sandbox may reach; what no sandbox may reach stays out of reach whatever it says.

    What is allowed wins over what is denied, and what neither names is as the Internet is. Raises
    Invalid.
    """

    #: False denies the whole Internet.
    allow_internet_access: bool = True
    #: IPv4 networks, host names, and `*.domain` for all names below one.
    allow_out: tuple[str, ...] = ()
    #: IPv4 networks.
    deny_out: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("allow_out", "deny_out"):
            rules: tuple[str, ...] = getattr(self, name)
            if len(rules) > MAX_NETWORK_RULES:
                raise Invalid(
                    f"{name} has {len(rules)} entries", hint=f"use at most {MAX_NETWORK_RULES}"
                )
            plain = dict.fromkeys(_plain_rule(each, name) for each in rules)
            object.__setattr__(self, name, tuple(plain))

    @property
    def allowed_networks(self) -> tuple[IPv4Network, ...]:
        return tuple(IPv4Network(each) for each in self.allow_out if _is_network(each))

    @property
    def allowed_names(self) -> tuple[str, ...]:
        """Host names and `*.domain`."""
        return tuple(each for each in self.allow_out if not _is_network(each))

    @property
    def denied_networks(self) -> tuple[IPv4Network, ...]:
        denied = self.deny_out if self.allow_internet_access else ("0.0.0.0/0",)
        return tuple(IPv4Network(each) for each in denied)

    def to_dict(self) -> dict[str, Any]:
        """The same as plain values, as they are stored."""
        return {
            "allow_internet_access": self.allow_internet_access,
            "allow_out": list(self.allow_out),
            "deny_out": list(self.deny_out),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any] | None) -> NetworkPolicy:
        """What `to_dict` gave; None is the Internet. Raises Invalid, KeyError."""
        if values is None:
            return INTERNET
        return cls(
            allow_internet_access=bool(values["allow_internet_access"]),
            allow_out=tuple(values["allow_out"]),
            deny_out=tuple(values["deny_out"]),
        )


#: The policy of whoever asks for none.
INTERNET = NetworkPolicy()


def _is_network(rule: str) -> bool:
    # A name ends in a label that is no number.
    return rule.rpartition(".")[2].replace("/", "").isdigit()


def _plain_rule(rule: str, where: str) -> str:
    """A rule in the one form in which it is kept and compared. Raises Invalid."""
    text = rule.strip().lower().removesuffix(".")
    try:
        return str(IPv4Network(text, strict=False)).removesuffix("/32")
    except ValueError:
        pass
    labels = text.removeprefix("*.").split(".")
    is_name = len(text) <= 253 and not _is_network(text) and all(map(_LABEL.fullmatch, labels))
    if where == "allow_out" and is_name:
        return text
    known = "an IPv4 address or network"
    if where == "allow_out":
        known += ", a host name, or *.domain"
    hint = "0.0.0.0/0 is all" if where == "deny_out" else "write names in their ASCII form"
    raise Invalid(f"{where} has {rule[:80]!r}, which is not {known}", hint=hint)


@dataclass(frozen=True, kw_only=True)
class SandboxSpec:
    """What a sandbox was asked to be."""

    sandbox_id: str
    template: str
    vcpus: int = DEFAULT_VCPUS
    memory_mb: int = DEFAULT_MEMORY_MB
    disk_size_mb: int = DEFAULT_DISK_SIZE_MB
    timeout_s: int = 0
    #: None is what its template has.
    network: NetworkPolicy | None = None
    #: Whom its guest takes for a request that names nobody, and where that one's relative paths
    #: begin; empty leaves the guest's own, or what a snapshot has.
    default_user: str = ""
    default_workdir: str = ""

    def __post_init__(self) -> None:
        check_name(self.sandbox_id, "sandbox id")
        check_name(self.template, "template name")
        if not 1 <= self.vcpus <= MAX_VCPUS:
            raise Invalid(f"vcpus is {self.vcpus}", hint=f"use 1 to {MAX_VCPUS}")
        if self.memory_mb < MIN_MEMORY_MB:
            raise Invalid(f"memory_mb is {self.memory_mb}", hint=f"use at least {MIN_MEMORY_MB}")
        if self.disk_size_mb < 1:
            raise Invalid(f"disk_size_mb is {self.disk_size_mb}", hint="use a size above 0")
        if self.timeout_s < 0:
            raise Invalid(f"timeout_sec is {self.timeout_s}", hint="use 0 for no idle limit")


class Accel(StrEnum):
    """Who executes the guest's instructions."""

    AUTO = "auto"
    KVM = "kvm"
    TCG = "tcg"


def _setting(text: str, kind: Any) -> Any:
    if kind == "bool":
        return text.strip().lower() in {"1", "true", "yes", "on"}
    converters: dict[str, Callable[[str], Any]] = {
        "int": int,
        "float": float,
        "Path": Path,
        "IPv4Network": IPv4Network,
        "Accel": Accel,
        "tuple[Shape, ...]": lambda text: _list(text, Shape.parse),
        "tuple[WarmAhead, ...]": lambda text: _list(text, WarmAhead.parse),
    }
    return converters.get(kind, str)(text)


def _list(text: str, parse: Callable[[str], _T]) -> tuple[_T, ...]:
    return tuple(parse(part.strip()) for part in text.split(",")) if text.strip() else ()


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of one host agent, from flags, `SANDMARTIN_*` and a TOML file, in that order."""

    #: Everything that must survive a restart: images, sandboxes, journal.
    data_dir: Path = Path("/var/lib/sandmartin")
    #: Kernel, initramfs, guest agent and built-in images, keyed by content and shared by agents.
    assets_dir: Path = Path("/var/cache/sandmartin")
    #: Machine-wide claims of slots and the agents' sockets.
    run_dir: Path = Path("/run/sandmartin")
    accel: Accel = Accel.AUTO
    #: Host-reachable addresses of the sandboxes, one each.
    address_range: IPv4Network = field(default_factory=lambda: IPv4Network("10.11.0.0/16"))
    #: veth pairs between the host and the slots, a /31 each.
    link_range: IPv4Network = field(default_factory=lambda: IPv4Network("10.12.0.0/15"))
    #: User ids of the VMs: this plus the slot's number.
    uid_base: int = 2_000_000
    #: Names the host's resolvers, which answer the guests' queries.
    resolv_conf: Path = Path("/etc/resolv.conf")
    #: User id that owns sealed disk layers; no VM's, and one for all agents of a machine.
    layers_uid: int = 1_999_999
    #: First of the 65536 user ids as which images of strangers are unpacked; nobody else's.
    unpack_uid_base: int = 1_900_000
    #: Networks on which registries may be beside the Internet: `10.0.0.0/8,192.168.7.0/24`.
    registries_private: str = ""
    #: Registries that are spoken to without TLS: `HOST:PORT,HOST`.
    registries_plain: str = ""
    #: Disk for layers of images that were fetched, to be used again.
    layer_cache_mb: int = 4096
    #: Network places made ahead.
    slot_pool_size: int = 16
    #: VMs started ahead, which wait for a state to restore.
    vm_pool_size: int = 4
    #: Sandboxes that are ready to be claimed, by template: `base=4,other=1`.
    ready_sandboxes: str = ""
    #: Free disk below which nothing new starts.
    disk_floor_mb: int = 1024
    #: Memory of the host that sandboxes never get.
    memory_reserve_mb: int = 512
    #: Virtual CPUs granted for each CPU of the host.
    cpu_overcommit: float = 32.0
    #: Host memory for RAM bases that nobody uses just now, where the VMM needs copies of them.
    base_budget_mb: int = 2048
    #: Create by restoring a warm snapshot; otherwise every create boots.
    warm: bool = True
    #: Shapes that get warm snapshots, others boot; empty for every shape that is asked for.
    warm_shapes: tuple[Shape, ...] = ()
    #: Warm snapshots that are made as soon as the agent has nothing else to do.
    warm_ahead: tuple[WarmAhead, ...] = ()
    #: Disk for the warm snapshots of all agents of a machine.
    warm_budget_mb: int = 10240
    boot_timeout_s: float = 60.0
    #: How long a guest agent may be silent before its sandbox is in error.
    guest_silence_s: float = 35.0
    #: Name of the group that may use the agent's socket; root alone when it does not exist.
    group: str = "sandmartin"

    def __post_init__(self) -> None:
        _ = self.ready

    @property
    def ready(self) -> Mapping[str, int]:
        """`ready_sandboxes`, parsed. Raises Invalid."""
        counts = {}
        for item in filter(None, self.ready_sandboxes.replace(" ", "").split(",")):
            name, _, count = item.partition("=")
            if not count.isdigit():
                raise Invalid(f"ready_sandboxes has {item!r}", hint="use TEMPLATE=COUNT")
            counts[check_name(name, "template name")] = int(count)
        return counts

    @property
    def socket(self) -> Path:
        """The agent's unix socket."""
        return self.data_dir / "agent.sock"

    @classmethod
    def load(
        cls,
        flags: Mapping[str, Any] | None = None,
        environ: Mapping[str, str] | None = None,
        file: Path | None = None,
    ) -> Settings:
        """As `load_settings` has it. Raises Invalid."""
        return load_settings(cls, flags, environ, file)


_S = TypeVar("_S")


def load_settings(
    cls: type[_S],
    flags: Mapping[str, Any] | None = None,
    environ: Mapping[str, str] | None = None,
    file: Path | None = None,
) -> _S:
    """Settings from `flags` (None entries are ignored), `environ` and a TOML `file`.

    Raises Invalid for a name the file does not know or a value that does not parse.
    """
    environ = os.environ if environ is None else environ
    known = {each.name: str(each.type) for each in fields(cls)}  # type: ignore[arg-type]
    raw: dict[str, Any] = {}
    if file is not None:
        raw |= _read_settings_file(file, known)
    for name in known:
        if (text := environ.get(f"SANDMARTIN_{name.upper()}")) is not None:
            raw[name] = text
    raw |= {name: value for name, value in (flags or {}).items() if value is not None}
    values = {}
    for name, value in raw.items():
        try:
            values[name] = _setting(str(value), known[name])
        except ValueError as error:
            raise Invalid(f"setting {name} is {value!r}: {error}") from error
    return cls(**values)


def _read_settings_file(file: Path, known: Mapping[str, str]) -> dict[str, Any]:
    try:
        content = tomllib.loads(file.read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise Invalid(f"settings file {file} cannot be read: {error}") from error
    if unknown := sorted(set(content) - set(known)):
        raise Invalid(f"settings file {file} has unknown names: {', '.join(unknown)}")
    return content
