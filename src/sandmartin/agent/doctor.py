"""Whether this machine can run sandboxes: one finding for each thing they need.

A check returns what it found when that will do, and raises when it will not: the sentence of the
error becomes the detail, its hint the remedy. A check that breaks is a finding too. Nothing on
the machine is changed; what has to be tried is tried in a namespace, a control group or a VM that
is gone when the check ends.
"""

from __future__ import annotations

import json
import os
import resource
import tempfile
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from ipaddress import IPv4Network
from pathlib import Path
from typing import Any

from sandmartin.agent import disk, packages, proc
from sandmartin.agent.assets import Assets
from sandmartin.agent.cell import Cell
from sandmartin.agent.limits import OVERHEAD_MB, Allowance, ControlGroups
from sandmartin.agent.network import rules
from sandmartin.agent.network.slot import LINK_PREFIX
from sandmartin.agent.vmm.accel import choose_accel, probe_boot
from sandmartin.agent.vmm.qemu import Installation, Qemu
from sandmartin.errors import (
    Conflict,
    Denied,
    Exhausted,
    SandmartinError,
    ToolFailed,
    Unavailable,
    Unimplemented,
)
from sandmartin.model import DEFAULT_MEMORY_MB, Accel, Settings, random_id

#: pidfd_open, by which VMs are signalled without hitting a stranger, came with 5.3.
_OLDEST_KERNEL = (5, 4)
#: Bits of capabilities(7) that the agent uses.
_CAPABILITIES = {
    "CAP_CHOWN": 0,
    "CAP_DAC_OVERRIDE": 1,
    "CAP_KILL": 5,
    "CAP_SETGID": 6,
    "CAP_SETUID": 7,
    "CAP_NET_ADMIN": 12,
    "CAP_SYS_ADMIN": 21,
}
_CONTROLLERS = {"cpu", "memory", "pids"}
#: A few for each sandbox, and some hundred sandboxes.
_DESCRIPTORS = 4096
_TUN = Path("/dev/net/tun")
_LEGACY_TABLES = Path("/proc/net/ip_tables_names")
_TOOL_DEADLINE_S = 15.0
_AS_ROOT = "run it as root: sudo sandmartin doctor"
_REINSTALL = "reinstall qemu-system-x86, and report it if that does not help"


@dataclass(frozen=True)
class Finding:
    """What one check found; `remedy` says what to do when it is not `ok`."""

    name: str
    ok: bool
    detail: str
    remedy: str = ""
    #: Whether sandboxes cannot run without it; otherwise the detail says what does not work.
    needed: bool = True


@dataclass(frozen=True)
class _Check:
    name: str
    act: Callable[[Settings], str | Awaitable[str]]
    #: What to do when the error itself does not say it.
    remedy: str
    needed: bool = True


async def examine(settings: Settings) -> list[Finding]:
    """Check everything. Never raises for what a check found or broke on."""
    return [await _examine(check, settings) for check in _CHECKS]


async def _examine(check: _Check, settings: Settings) -> Finding:
    try:
        found = check.act(settings)
        detail = found if isinstance(found, str) else await found
    except SandmartinError as error:
        remedy = error.hint or check.remedy
        return Finding(check.name, False, _line(error.message), remedy, check.needed)
    except Exception as error:  # noqa: BLE001
        # On a machine that is broken in its own way every other finding is needed all the more.
        broken = f"the check broke: {type(error).__name__}: {error}"
        return Finding(check.name, False, _line(broken), check.remedy, check.needed)
    return Finding(check.name, True, detail)


def _line(text: str) -> str:
    return " ".join(text.split())


# The machine.


def _kernel(_: Settings) -> str:
    system = os.uname()
    found = f"Linux {system.release} on {system.machine}"
    if system.machine != "x86_64":
        raise Unimplemented(f"{found}: sandboxes run on x86-64 alone", hint="use an x86-64 host")
    number = tuple(int(part) for part in system.release.split("-")[0].split(".")[:2])
    if number < _OLDEST_KERNEL:
        raise Unavailable(f"{found} is too old", hint="use Linux 5.4 or later")
    return found


def _rights(_: Settings) -> str:
    if os.geteuid() != 0:
        raise Denied("not root, which the agent needs to be", hint=_AS_ROOT)
    lines = Path("/proc/self/status").read_text().splitlines()
    (effective,) = (int(line.split()[1], 16) for line in lines if line.startswith("CapEff:"))
    missing = [name for name, bit in _CAPABILITIES.items() if not effective >> bit & 1]
    if missing:
        raise Denied(
            f"root, but without {', '.join(missing)}",
            hint="give the container these capabilities (--cap-add), or run outside of it",
        )
    return "root, with all capabilities that the agent uses"


def _memory(settings: Settings) -> str:
    sizes = {}
    for line in Path("/proc/meminfo").read_text().splitlines():
        name, _, rest = line.partition(":")
        sizes[name] = int(rest.split()[0]) // 1024
    total, free = sizes["MemTotal"], sizes["MemAvailable"]
    found = f"{free} MB of {total} MB are free, {settings.memory_reserve_mb} MB are kept back"
    need = DEFAULT_MEMORY_MB + OVERHEAD_MB[Accel.TCG]
    if min(free, total - settings.memory_reserve_mb) < need:
        raise Exhausted(f"{found}, and a sandbox takes {need} MB", hint="free some memory")
    return found


def _disk(settings: Settings) -> str:
    there = _nearest(settings.data_dir)
    disk.check_free(there, settings.disk_floor_mb)
    return f"{disk.free_mb(there)} MB are free in {there}, the floor is {settings.disk_floor_mb} MB"


def _nearest(path: Path) -> Path:
    """`path`, or the nearest directory above it that exists."""
    path = path.absolute()
    return next(each for each in (path, *path.parents) if each.exists())


def _descriptors(_: Settings) -> str:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    found = "without limit" if hard == resource.RLIM_INFINITY else f"{hard} for a process"
    if hard != resource.RLIM_INFINITY and hard < _DESCRIPTORS:
        raise Exhausted(
            f"{found}, and {_DESCRIPTORS} are needed",
            hint=f"raise it: `ulimit -Hn {_DESCRIPTORS}`, or LimitNOFILE= in the agent's unit",
        )
    return found


def _control_groups(_: Settings) -> str:
    groups = ControlGroups(f"doctor-{random_id(6)}")
    try:
        groups.open()
        made = groups.create("probe", Allowance.of(1, DEFAULT_MEMORY_MB, Accel.TCG))
    finally:
        with suppress(OSError, SandmartinError):
            groups.remove("probe")
        groups.close()
    if groups.version == 1 and (
        missing := _CONTROLLERS - {group.parent.parent.name for group in made}
    ):
        raise ToolFailed(f"version 1, without the controllers {', '.join(sorted(missing))}")
    return f"version {groups.version}: a group with limits was made and removed"


# What setup brings.


async def _cells(settings: Settings) -> str:
    with tempfile.TemporaryDirectory(prefix="sandmartin-") as directory:
        # Its users must be able to pass.
        Path(directory).chmod(0o711)  # noqa: ASYNC240
        work = Path(directory, "work")
        cell = Cell(work=work, uid=settings.unpack_uid_base, file_bytes=1)
        cell.open()
        try:
            await cell.run(["true"], deadline_s=_TOOL_DEADLINE_S)
        except SandmartinError as error:
            why = f"no image of a registry or archive can be unpacked: {error.message}"
            raise Unavailable(why, hint=error.hint) from error
    return "images can be unpacked where they harm nobody"


def _packages(_: Settings) -> str:
    if missing := packages.find_missing():
        raise Unavailable(
            f"missing: {', '.join(missing)}",
            hint=f"{packages.install_line(missing)} (or: sudo sandmartin setup)",
        )
    return "all are installed"


async def _qemu(_: Settings) -> str:
    found = await Installation.find()
    return (
        f"QEMU {found.version.text} ({found.binary}), built with {', '.join(sorted(found.accels))}"
    )


def _assets(settings: Settings) -> str:
    assets = Assets.find(settings)
    return f"kernel, initramfs and {', '.join(assets.images)} are in {settings.assets_dir}"


async def _accelerator(settings: Settings) -> str:
    assets = Assets.find(settings)
    if os.geteuid() != 0:
        # A probe that fails for want of rights would be remembered as KVM's fault.
        raise Denied("a guest must be booted to know, and only root can", hint=_AS_ROOT)
    qemu = Qemu()
    choice = await choose_accel(
        settings.accel,
        assets.kernel,
        assets.initramfs,
        settings.assets_dir,
        fresh=True,
        qemu=qemu,
    )
    if choice.accel is Accel.KVM:
        return f"KVM: {choice.reason}"
    why = choice.reason if settings.accel is Accel.TCG else f"KVM: {choice.reason}"
    if failure := await probe_boot(
        qemu, assets.kernel, assets.initramfs, Accel.TCG, settings.boot_timeout_s
    ):
        raise ToolFailed(f"emulation does not work: {failure} ({why})", hint=_REINSTALL)
    found = _line(f"emulation: works, 15 to 20 times slower ({why})")
    return f"{found}; for KVM, {choice.hint}" if choice.hint else found


# The network.


async def _namespaces(_: Settings) -> str:
    await proc.run(["unshare", "--net", "true"], deadline_s=_TOOL_DEADLINE_S)
    return "a network namespace can be made"


def _tun(_: Settings) -> str:
    try:
        os.close(os.open(_TUN, os.O_RDWR | os.O_CLOEXEC))
    except PermissionError as error:
        raise Denied(f"{_TUN} cannot be opened", hint=_AS_ROOT) from error
    except OSError as error:
        raise Unavailable(f"{_TUN} cannot be opened: {error.strerror}") from error
    return f"{_TUN} opens"


async def _nftables(settings: Settings) -> str:
    await _nft("list", "tables")
    # The agent's own rules, in a namespace of their own: each kind of rule is a kernel module.
    await proc.run(
        ["unshare", "--net", "nft", "-f", "-"],
        stdin=rules.host_rules("doctor", settings.address_range, ()).encode(),
        deadline_s=_TOOL_DEADLINE_S,
    )
    return "the kernel takes the agent's rules"


async def _nft(*words: str) -> bytes:
    return (await proc.run(["nft", "-j", *words], deadline_s=_TOOL_DEADLINE_S)).stdout


def _objects(listing: bytes, kind: str) -> list[dict[str, Any]]:
    """The objects of one kind in what `nft -j` says (libnftables-json(5))."""
    return [each[kind] for each in json.loads(listing)["nftables"] if kind in each]


@dataclass(frozen=True)
class _Firewall:
    """A firewall, and how to let sandboxes through it."""

    name: str
    #: The directions it needs a rule for; it lets answers through by itself when this is one.
    keys: frozenset[str]
    remedy: str


_IN, _BOTH = frozenset({"iifname"}), frozenset({"iifname", "oifname"})
_FIREWALLD = _Firewall(
    "firewalld",
    _IN,
    f"firewall-cmd --permanent --zone=trusted --add-interface={LINK_PREFIX}+ "
    "&& firewall-cmd --reload",
)
_DOCKER = _Firewall(
    "Docker",
    _BOTH,
    f"iptables -I DOCKER-USER -i {LINK_PREFIX}+ -j ACCEPT && "
    f"iptables -I DOCKER-USER -o {LINK_PREFIX}+ -j ACCEPT",
)
_UFW = _Firewall("ufw", _IN, f"ufw route allow in on {LINK_PREFIX}+")


def _firewall_of(chain: Mapping[str, Any], names: Iterable[str]) -> _Firewall:
    """Whose base chain this is, by the `names` of all chains in its table."""
    if chain["table"] == "firewalld":
        return _FIREWALLD
    if "DOCKER-USER" in names:
        return _DOCKER
    if any(name.startswith("ufw-") for name in names):
        return _UFW
    insert = f"nft insert rule {chain['family']} {chain['table']} {chain['name']}"
    allow = " && ".join(f"{insert} {key} '\"{LINK_PREFIX}*\"' accept" for key in sorted(_BOTH))
    return _Firewall("a firewall", _BOTH, f"{allow} (and keep it in its configuration)")


def _drops_forwarded(chain: Mapping[str, Any]) -> bool:
    """Whether a base chain drops forwarded IPv4 packets that none of its rules lets through."""
    if chain.get("hook") != "forward" or chain["family"] not in {"ip", "inet"}:
        return False
    if chain["table"].startswith("sandmartin"):
        return False
    # firewalld's chain has the policy accept, and rejects by its last rule.
    return chain.get("policy") == "drop" or chain["table"] == "firewalld"


def _let_through(table: bytes) -> set[str]:
    """The directions of our links (iifname, oifname) that a rule of the table lets through."""
    found = set()
    for rule in _objects(table, "rule"):
        expressions = rule.get("expr", ())
        if any(verdict in each for each in expressions for verdict in ("drop", "reject")):
            continue
        for match in (each["match"] for each in expressions if "match" in each):
            left, right = match["left"], match["right"]
            ours = isinstance(right, str) and right.startswith(LINK_PREFIX)
            if ours and match["op"] == "==" and "meta" in left:
                found.add(left["meta"]["key"])
    return found


async def _forwarding(_: Settings) -> str:
    chains = _objects(await _nft("list", "chains"), "chain")
    for chain in filter(_drops_forwarded, chains):
        table = {"family": chain["family"], "table": chain["table"]}
        names = {each["name"] for each in chains if table.items() <= each.items()}
        firewall = _firewall_of(chain, names)
        listed = await _nft("list", "table", chain["family"], chain["table"])
        if not firewall.keys <= _let_through(listed):
            raise Unavailable(
                f"{firewall.name} drops forwarded packets (chain {chain['name']} of table "
                f"{chain['family']} {chain['table']}), so sandboxes cannot reach the Internet",
                hint=firewall.remedy,
            )
    return f"no nftables chain drops what sandboxes send{_legacy()}"


def _legacy() -> str:
    # iptables-legacy keeps rules of its own beside nftables', and nft does not show them.
    with suppress(OSError):
        if "filter" in _LEGACY_TABLES.read_text().split():
            return "; iptables-legacy has rules too, which are not looked at: `iptables-legacy -S`"
    return ""


async def _routes(settings: Settings) -> str:
    command = ["ip", "-j", "-4", "route", "show", "table", "all"]
    said = (await proc.run(command, deadline_s=_TOOL_DEADLINE_S)).stdout
    ranges = {"address_range": settings.address_range, "link_range": settings.link_range}
    for route in _foreign_routes(json.loads(said or b"[]")):
        for setting, ours in ranges.items():
            if ours.overlaps(IPv4Network(route["dst"])):
                way = route.get("dev") or route.get("type", "several hops")
                raise Conflict(
                    f"the route to {route['dst']} ({way}) overlaps {ours}, the {setting}",
                    hint=f"set SANDMARTIN_{setting.upper()} to a private range that is not in use",
                )
    return f"nothing else uses {ranges['address_range']} or {ranges['link_range']}"


def _foreign_routes(routes: Iterable[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    """Routes to a network of somebody else's: not ours, and no default."""
    for route in routes:
        # VPNs make a default of two halves.
        default = route["dst"] == "default" or IPv4Network(route["dst"]).prefixlen <= 1
        if not default and not route.get("dev", "").startswith(LINK_PREFIX):
            yield route


_CHECKS = (
    _Check("kernel", _kernel, "use a recent Linux on x86-64"),
    _Check("rights", _rights, _AS_ROOT),
    _Check("memory", _memory, "free some memory"),
    _Check("disk", _disk, "free disk space, or set SANDMARTIN_DATA_DIR to a larger disk"),
    _Check("descriptors", _descriptors, "raise the limit of open files"),
    _Check(
        "control groups",
        _control_groups,
        "run as root, with cpu, memory and pids controllers at /sys/fs/cgroup",
    ),
    _Check("packages", _packages, "run `sudo sandmartin setup`"),
    _Check("qemu", _qemu, "run `sudo sandmartin setup`"),
    _Check("assets", _assets, "run `sudo sandmartin setup`"),
    _Check("accelerator", _accelerator, "run `sudo sandmartin setup`"),
    _Check("namespaces", _namespaces, "run as root, in a container with CAP_SYS_ADMIN"),
    _Check(
        "cells",
        _cells,
        "allow user namespaces: `sysctl user.max_user_namespaces=65536`",
        needed=False,
    ),
    _Check("tun", _tun, "`modprobe tun`; for a container: --device /dev/net/tun"),
    _Check(
        "nftables",
        _nftables,
        "run as root, on a kernel with nf_tables, nat, fib and reject (`modprobe nf_tables`)",
    ),
    _Check("forwarding", _forwarding, "run as root, with nftables installed"),
    _Check("routes", _routes, "install iproute2"),
)
