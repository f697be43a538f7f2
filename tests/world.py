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

#: With our number: several runs may share the machine.
INTERNET = f"smtest-internet-{os.getpid()}"
_PATH = namespace.DIRECTORY / INTERNET
_CLONE_NEWNET = 0x40000000

HOST_PUBLIC = "198.51.100.2"
HOST_PRIVATE = "192.168.77.1"
ROUTER = "198.51.100.1"
PUBLIC_SERVER = "203.0.113.7"
PRIVATE_SERVER = "10.99.0.1"
METADATA_SERVER = "169.254.169.254"
SERVERS = (PUBLIC_SERVER, PRIVATE_SERVER, METADATA_SERVER, "172.16.5.5", "100.64.0.9")
TCP_PORT = 8080
UDP_PORT = 8081
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
        _up(routes, "host0", f"{ROUTER}/24", *(f"{server}/32" for server in SERVERS))
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
        self.closing: list[Callable[[], None]] = []

    async def open(self) -> None:
        """Serve a banner by TCP, an echo by UDP, and names by both."""
        tcp = on_internet(socket.SOCK_STREAM, "0.0.0.0", TCP_PORT)
        self.closing.append((await asyncio.start_server(self._greet, sock=tcp)).close)
        await self.serve_datagrams(_Echo, on_internet(socket.SOCK_DGRAM, PUBLIC_SERVER, UDP_PORT))
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
        """Any name is the public server; `big.` has too many addresses for a datagram."""
        query = dns.message.from_wire(wire)
        question = query.question[0]
        self.queries.append(f"{question.name} {'tcp' if tcp else 'udp'}")
        response = dns.message.make_response(query, recursion_available=True)
        count = 150 if question.name.to_text().startswith("big.") else 1
        if count > 1 and not tcp:
            response.flags |= dns.flags.TC
            return bytes(response.to_wire())
        first = int(IPv4Address(PUBLIC_SERVER))
        addresses = [str(IPv4Address(first + i)) for i in range(count)]
        response.answer.append(dns.rrset.from_text_list(question.name, 60, "IN", "A", addresses))
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
