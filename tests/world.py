"""A small world of our own for network tests: this process's host, and an Internet beside it.

The process moves into a network namespace of its own that plays the host, so that whatever the
agent does there ends with it. A second namespace plays the Internet, with a way to the host; both
public and private addresses answer there, so that a refusal is the rules' doing and nothing else's.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from ipaddress import IPv4Address
from pathlib import Path

import dns.flags
import dns.message
import dns.rrset
from pyroute2 import IPRoute, netns

from sandmartin.agent import namespace
from sandmartin.agent.network.slot import GATEWAY_IP, GUEST_IP, GUEST_MAC, PREFIX_LENGTH, Slot
from sandmartin.agent.vmm.tap import open_tap

#: With our number: several runs may share the machine.
INTERNET = f"smtest-internet-{os.getpid()}"
_PATH = namespace.DIRECTORY / INTERNET
_CLONE_NEWNET = 0x40000000

HOST_PUBLIC = "198.51.100.2"
HOST_PRIVATE = "192.168.77.1"
ROUTER = "198.51.100.1"
PUBLIC_SERVER = "203.0.113.7"
OTHER_SERVER = "203.0.113.200"
PRIVATE_SERVER = "10.99.0.1"
METADATA_SERVER = "169.254.169.254"
SERVERS = (PUBLIC_SERVER, PRIVATE_SERVER, METADATA_SERVER, "172.16.5.5", "100.64.0.9")
TCP_PORT = 8080
UDP_PORT = 8081
ECHO_PORT = 8082
BANNER = b"hello from outside\n"


@contextmanager
def private_host() -> Iterator[None]:
    """This process in a network of its own that has the Internet on its link `wan0`.

    Threads started meanwhile are there too; none may be left at the end.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        assert libc.unshare(_CLONE_NEWNET) == 0, os.strerror(ctypes.get_errno())
        try:
            namespace.run_in_new(lambda tid: netns.attach(INTERNET, tid))
            _connect()
            yield
        finally:
            netns.remove(INTERNET)
    finally:
        assert libc.setns(home, _CLONE_NEWNET) == 0, os.strerror(ctypes.get_errno())
        os.close(home)


@contextmanager
def forwarding_nothing() -> Iterator[None]:
    """The host forwards nothing by itself, whatever agents of other tests left or still need."""
    forwarding = Path("/proc/sys/net/ipv4/conf/wan0/forwarding")
    before = forwarding.read_text()
    forwarding.write_text("0")
    try:
        yield
    finally:
        forwarding.write_text(before)


def _connect() -> None:
    target = os.open(_PATH, os.O_RDONLY | os.O_CLOEXEC)
    with IPRoute() as routes:
        _up(routes, "lo")
        routes.link(
            "add", ifname="wan0", kind="veth", peer={"ifname": "host0", "net_ns_fd": target}
        )
        _up(routes, "wan0", f"{HOST_PUBLIC}/24")
        routes.link("add", ifname="lan0", kind="bridge")
        _up(routes, "lan0", f"{HOST_PRIVATE}/24")
        namespace.run_inside(_PATH, _furnish_internet)
        routes.route("add", dst="default", gateway=ROUTER)
    os.close(target)


def _furnish_internet() -> None:
    with IPRoute() as routes:
        _up(routes, "lo")
        _up(
            routes,
            "host0",
            f"{ROUTER}/24",
            *(f"{server}/32" for server in (*SERVERS, OTHER_SERVER)),
        )
        # It would answer if the host let it: sandboxes' own ranges are reached by way of the host.
        routes.route("add", dst="10.11.0.0/16", gateway=HOST_PUBLIC)
        routes.route("add", dst="192.168.77.0/24", gateway=HOST_PUBLIC)


def _up(routes: IPRoute, name: str, *addresses: str) -> None:
    (index,) = routes.link_lookup(ifname=name)
    for address in addresses:
        ip, length = address.split("/")
        routes.addr("add", index=index, address=ip, prefixlen=int(length))
    routes.link("set", index=index, state="up")


def on_internet(kind: int, address: str, port: int) -> socket.socket:
    """A socket of the Internet, bound there."""

    def make() -> socket.socket:
        made = socket.socket(socket.AF_INET, kind)
        made.setblocking(False)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind((address, port))
        return made

    return namespace.run_inside(_PATH, make)


class Internet:
    """Servers that answer everywhere on the Internet, and what they have seen."""

    def __init__(self) -> None:
        self.datagrams: list[tuple[bytes, str]] = []
        self.connections: list[str] = []
        self.queries: list[str] = []
        #: Addresses of names that are not the public server's, and how long all of them count.
        self.names: dict[str, str] = {}
        self.ttl_s = 60
        self.closing: list[Callable[[], None]] = []

    async def open(self) -> None:
        """Serve a banner by TCP, an echo by TCP and UDP, and names by both."""
        for serve, port in ((self._greet, TCP_PORT), (self._echo, ECHO_PORT)):
            tcp = on_internet(socket.SOCK_STREAM, "0.0.0.0", port)
            self.closing.append((await asyncio.start_server(serve, sock=tcp)).close)
        for server in (PUBLIC_SERVER, OTHER_SERVER):
            await self.serve_datagrams(_Echo, on_internet(socket.SOCK_DGRAM, server, UDP_PORT))
        await self.serve_names(
            on_internet(socket.SOCK_DGRAM, ROUTER, 53), on_internet(socket.SOCK_STREAM, ROUTER, 53)
        )

    async def serve_names(self, udp: socket.socket, tcp: socket.socket) -> None:
        """Answer as `resolve` does on both sockets."""
        await self.serve_datagrams(_Names, udp)
        self.closing.append((await asyncio.start_server(self._name_by_tcp, sock=tcp)).close)

    async def serve_datagrams(self, handler: type[_Echo], udp: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        transport, _ = await loop.create_datagram_endpoint(lambda: handler(self), sock=udp)
        self.closing.append(transport.close)

    async def close(self) -> None:
        for close in self.closing:
            close()
        await asyncio.sleep(0)

    async def _greet(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections.append(writer.get_extra_info("peername")[0])
        with suppress(OSError):
            writer.write(BANNER)
            await writer.drain()
        writer.close()

    async def _echo(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # It may be one that nobody hears of any more.
        self.closing.append(writer.transport.abort)
        with suppress(OSError):
            while data := await reader.read(4096):
                writer.write(data)
                await writer.drain()
        writer.close()

    async def _name_by_tcp(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        with suppress(EOFError, OSError):
            length = int.from_bytes(await reader.readexactly(2), "big")
            answer = self.resolve(await reader.readexactly(length), tcp=True)
            writer.write(len(answer).to_bytes(2, "big") + answer)
            await writer.drain()
        writer.close()

    def resolve(self, wire: bytes, *, tcp: bool) -> bytes:
        """Any name is the public server unless `names` has it.

        `big.` has too many addresses for a datagram.
        """
        query = dns.message.from_wire(wire)
        question = query.question[0]
        self.queries.append(f"{question.name} {'tcp' if tcp else 'udp'}")
        response = dns.message.make_response(query, recursion_available=True)
        count = 150 if question.name.to_text().startswith("big.") else 1
        if count > 1 and not tcp:
            response.flags |= dns.flags.TC
            return bytes(response.to_wire())
        first = int(IPv4Address(self.names.get(str(question.name).lower(), PUBLIC_SERVER)))
        addresses = [str(IPv4Address(first + i)) for i in range(count)]
        found = dns.rrset.from_text_list(question.name, self.ttl_s, "IN", "A", addresses)
        response.answer.append(found)
        return bytes(response.to_wire())


class _Echo(asyncio.DatagramProtocol):
    def __init__(self, internet: Internet) -> None:
        self._internet = internet

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        self._internet.datagrams.append((data, addr[0]))
        self._transport.sendto(data, addr)  # type: ignore[attr-defined]


class _Names(_Echo):
    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        self._transport.sendto(self._internet.resolve(data, tcp=False), addr)  # type: ignore[attr-defined]


def setting(name: str) -> str:
    """A network setting of this process's host."""
    return Path("/proc/sys/net", name).read_text().strip()


class Guest:
    """What a VM is to its slot: another network stack, at the other end of the slot's tap."""

    def __init__(self, slot: Slot) -> None:
        self._slot = slot
        self._name = f"smtest-guest-{os.getpid()}-{slot.number}"
        self._path = namespace.DIRECTORY / self._name
        self._ends: tuple[int, int] = (-1, -1)

    def open(self) -> None:
        """Be there, its frames carried by the running loop."""
        namespace.run_in_new(self._furnish)
        self._ends = open_tap(self._slot.netns_path, self._slot.tap), open_tap(self._path, "eth0")
        for here, there in (self._ends, self._ends[::-1]):
            asyncio.get_running_loop().add_reader(here, _carry, here, there)

    def close(self) -> None:
        for end in self._ends:
            asyncio.get_running_loop().remove_reader(end)
            os.close(end)
        netns.remove(self._name)

    def _furnish(self, thread_id: int) -> None:
        netns.attach(self._name, thread_id)
        with IPRoute() as routes:
            _up(routes, "lo")
            routes.link("add", ifname="eth0", kind="tuntap", mode="tap", vnet_hdr=True)
            (index,) = routes.link_lookup(ifname="eth0")
            routes.link("set", index=index, address=GUEST_MAC)
            _up(routes, "eth0", f"{GUEST_IP}/{PREFIX_LENGTH}")
            routes.route("add", dst="default", gateway=str(GATEWAY_IP))

    def socket(self, kind: int) -> socket.socket:
        """A socket of the guest."""

        def make() -> socket.socket:
            made = socket.socket(socket.AF_INET, kind)
            made.setblocking(False)
            return made

        return namespace.run_inside(self._path, make)


def _carry(here: int, there: int) -> None:
    # What does not fit is lost, as on any wire.
    with suppress(OSError):
        os.write(there, os.read(here, 1 << 17))
