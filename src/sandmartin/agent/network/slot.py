"""A slot: one prepared place for a VM, with a namespace, a link to the host and a tap of its own.

Inside every slot all is named and numbered alike, MAC addresses included, so that a snapshot fits
any of them; what differs is the link's addresses and the one address at which the host reaches
the guest. All of it follows from the slot's number, which no two agents of a machine share.
"""

from __future__ import annotations

import contextlib
import errno
import os
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path

from pyroute2 import IPRoute, NetlinkError, netns

from sandmartin.agent import namespace
from sandmartin.errors import ToolFailed

TAP = "tap0"
UPLINK = "uplink0"
GUEST_IP = IPv4Address("169.254.0.21")
GATEWAY_IP = IPv4Address("169.254.0.22")
PREFIX_LENGTH = 30
#: A restored guest has the gateway's MAC in its ARP cache: every tap must have the same.
GATEWAY_MAC = "02:fc:00:00:00:01"
GUEST_MAC = "02:fc:00:00:00:02"
#: Of every agent's links on the host, whichever its instance.
LINK_PREFIX = "sm"


def link_prefix(instance_id: str) -> str:
    """How the names of an agent's links on the host begin."""
    return f"{LINK_PREFIX}{instance_id}-"


@dataclass(frozen=True, kw_only=True)
class Slot:
    """One network place."""

    number: int
    instance_id: str
    #: The host reaches the guest here; also the source of what the guest sends out.
    host_ip: IPv4Address
    #: The two ends of the link between host and namespace.
    link_host_ip: IPv4Address
    link_slot_ip: IPv4Address
    #: User and group id of the VM.
    uid: int

    guest_ip = GUEST_IP
    gateway_ip = GATEWAY_IP
    prefix_length = PREFIX_LENGTH
    guest_mac = GUEST_MAC
    tap = TAP

    @classmethod
    def of(
        cls,
        number: int,
        instance_id: str,
        addresses: IPv4Network,
        links: IPv4Network,
        uid_base: int,
    ) -> Slot:
        return cls(
            number=number,
            instance_id=instance_id,
            host_ip=addresses[number],
            link_host_ip=links[2 * number],
            link_slot_ip=links[2 * number + 1],
            uid=uid_base + number,
        )

    @property
    def netns_path(self) -> Path:
        return namespace.path_of_slot(self.instance_id, self.number)

    @property
    def link(self) -> str:
        """The link's end on the host."""
        return f"{link_prefix(self.instance_id)}{self.number}"

    def exists(self) -> bool:
        return self.netns_path.exists()

    # All below blocks shortly and raises ToolFailed.

    def make(self) -> None:
        """Make namespace, link, tap, addresses and routes; all or nothing."""
        try:
            namespace.run_in_new(self._attach)
            self._connect_to_host()
        except BaseException as error:
            self.remove()
            if isinstance(error, OSError | NetlinkError):
                raise _failed(f"network slot {self.number} cannot be made", error) from error
            raise

    def _attach(self, thread_id: int) -> None:
        netns.attach(os.fspath(self.netns_path), thread_id)
        # Before any device is there, so that none ever has an address of version 6.
        _set("ipv6/conf/all/disable_ipv6", "1")
        _set("ipv6/conf/default/disable_ipv6", "1")
        _set("ipv4/conf/all/accept_redirects", "0")
        _set("ipv4/conf/default/accept_redirects", "0")
        _set("ipv4/conf/all/send_redirects", "0")
        _set("ipv4/conf/default/send_redirects", "0")
        _set("ipv4/ip_forward", "1")
        # Each refusal is told at once, not one in a second; the kernel's limit of all stays.
        _set("ipv4/icmp_ratelimit", "0")
        with IPRoute() as routes:
            routes.link("set", index=_index(routes, "lo"), state="up")
            # With the header in which a guest leaves checksums and segmentation to the host.
            routes.link("add", ifname=TAP, kind="tuntap", mode="tap", vnet_hdr=True)
            tap = _index(routes, TAP)
            routes.link("set", index=tap, address=GATEWAY_MAC, state="up")
            routes.addr("add", index=tap, address=str(GATEWAY_IP), prefixlen=PREFIX_LENGTH)
            # Who is there is known: neither side has to ask, nor can be told something else.
            guest = {"dst": str(GUEST_IP), "lladdr": GUEST_MAC}
            routes.neigh("add", ifindex=tap, state="permanent", **guest)

    def _connect_to_host(self) -> None:
        target = os.open(self.netns_path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            with IPRoute() as routes:
                peer = {"ifname": UPLINK, "net_ns_fd": target}
                routes.link("add", ifname=self.link, kind="veth", peer=peer)
                _set(f"ipv6/conf/{self.link}/disable_ipv6", "1")
                _set(f"ipv4/conf/{self.link}/accept_redirects", "0")
                _set(f"ipv4/conf/{self.link}/send_redirects", "0")
                _set(f"ipv4/conf/{self.link}/forwarding", "1")
                link = _index(routes, self.link)
                routes.addr("add", index=link, address=str(self.link_host_ip), prefixlen=31)
                routes.link("set", index=link, state="up")
        finally:
            os.close(target)
        namespace.run_inside(self.netns_path, self._raise_uplink)
        with IPRoute() as routes:
            routes.route(
                "add",
                dst=f"{self.host_ip}/32",
                gateway=str(self.link_slot_ip),
                oif=_index(routes, self.link),
                prefsrc=str(self.link_host_ip),
            )

    def _raise_uplink(self) -> None:
        with IPRoute() as routes:
            uplink = _index(routes, UPLINK)
            routes.addr("add", index=uplink, address=str(self.link_slot_ip), prefixlen=31)
            routes.link("set", index=uplink, state="up")
            routes.route("add", dst="default", gateway=str(self.link_host_ip))

    def remove(self) -> None:
        """Remove the link and the namespace. Idempotent; what still runs inside keeps it alive."""
        try:
            # The link goes at once; a namespace's own devices only some time after its last user.
            with IPRoute() as routes:
                for index in routes.link_lookup(ifname=self.link):
                    routes.link("del", index=index)
            with contextlib.suppress(FileNotFoundError):
                netns.remove(os.fspath(self.netns_path))
        except NetlinkError as error:
            if error.code != errno.ENODEV:
                raise _failed(f"network slot {self.number} cannot be removed", error) from error


def list_own(instance_id: str) -> set[int]:
    """Numbers of the slots that exist under an agent's instance id, whole or half made."""
    names = [name.name for name in namespace.DIRECTORY.glob(f"sandmartin-{instance_id}-*")]
    with IPRoute() as routes:
        names += [str(link.get("ifname")) for link in routes.get_links()]
    found = set()
    for name in names:
        head, _, number = name.rpartition("-")
        ours = head in {f"sandmartin-{instance_id}", link_prefix(instance_id)[:-1]}
        if ours and number.isdigit():
            found.add(int(number))
    return found


def _index(routes: IPRoute, name: str) -> int:
    found = routes.link_lookup(ifname=name)
    if not found:
        raise OSError(errno.ENODEV, f"there is no device {name}")
    return int(found[0])


def _set(name: str, value: str) -> None:
    """Set a network setting of the calling thread's namespace, where the kernel has it."""
    with contextlib.suppress(FileNotFoundError):
        Path("/proc/sys/net", name).write_text(value)


def _failed(what: str, error: Exception) -> ToolFailed:
    return ToolFailed(f"{what}: {error}", hint="run `sandmartin doctor`")
