"""The way to where a user says: checked once, and never anywhere else.

A name is resolved once, every address it has is checked, and the connection goes to a checked
address: a name that changes its answer afterwards gains nothing. What leads to this machine, to
private networks or to metadata services is refused, unless the settings allow that network.

`proxy` gives the same to a child process whose library makes its own connections.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hmac
import logging
import secrets
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass
from ipaddress import (
    IPv4Address,
    IPv4Network,
    IPv6Address,
    IPv6Network,
    ip_address,
    ip_network,
)
from typing import Any
from urllib.parse import urlsplit

from sandmartin.errors import Denied, Invalid, Unavailable

_log = logging.getLogger(__name__)

_CONNECT_S = 10.0
_MAX_HEAD_BYTES = 32 * 1024
_CHUNK_BYTES = 64 * 1024
#: Addresses of IPv4 hosts in disguise, and of protocols: some releases of Python call them global.
_SPECIAL: tuple[IPv4Network | IPv6Network, ...] = (
    IPv4Network("192.0.0.0/24"),
    *map(IPv6Network, ("64:ff9b::/96", "64:ff9b:1::/48", "2002::/16", "2001::/23")),
)

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network
#: The addresses of a host. Raises OSError.
Resolve = Callable[[str, int], Awaitable[Sequence[str]]]
Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Coroutine[Any, Any, None]]


async def resolve_name(host: str, port: int) -> Sequence[str]:
    """The addresses that the host's resolver knows. Raises OSError."""
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    # In order, each once.
    return list(dict.fromkeys(str(each[4][0]) for each in found))


def parse_networks(text: str, setting: str) -> tuple[Network, ...]:
    """Networks separated by commas, of the setting of that name. Raises Invalid."""
    try:
        return tuple(ip_network(part.strip()) for part in text.split(",") if part.strip())
    except ValueError as error:
        raise Invalid(
            f"{setting} is {text!r}: {error}", hint="use 10.0.0.0/8,192.168.7.0/24"
        ) from error


def is_public(address: Address) -> bool:
    """Whether an address is somewhere in the Internet, and nowhere else."""
    if isinstance(address, IPv6Address) and address.ipv4_mapped is not None:
        return is_public(address.ipv4_mapped)
    if any(address in network for network in _SPECIAL):
        return False
    return (
        address.is_global
        and not address.is_multicast
        and not address.is_reserved
        and not address.is_unspecified
    )


class Guard:
    """The way out, for whatever goes where a user says; `setting` is what allows more."""

    def __init__(
        self, allow: Sequence[Network], setting: str, resolve: Resolve = resolve_name
    ) -> None:
        self._allow = tuple(allow)
        self._setting = setting
        self._resolve = resolve

    async def addresses(self, host: str, port: int) -> Sequence[str]:
        """Where a host is, if all of that may be reached. Raises Denied, Unavailable."""
        try:
            found = await self._resolve(host, port)
        except (OSError, UnicodeError) as error:
            raise Unavailable("the host's name cannot be resolved") from error
        if not found:
            raise Unavailable("the host's name has no address")
        for each in found:
            # Without the zone of a link-local one.
            self._check(ip_address(each.partition("%")[0]))
        return found

    def _check(self, address: Address) -> None:
        if not is_public(address) and not any(address in network for network in self._allow):
            raise Denied(
                "the address is on a network that may not be reached",
                hint=f"an operator can allow it by the setting {self._setting}",
            )

    # For libraries in a child process.

    @contextlib.asynccontextmanager
    async def proxy(self, listener: socket.socket | None = None) -> AsyncIterator[str]:
        """An HTTP proxy on loopback that leads where we may go; its URL, with its password.

        A `listener`, bound and not listening yet, may be in another network namespace.
        """
        password = secrets.token_hex(16)
        listener = listener or _on_loopback()
        async with _serving(listener, lambda one, other: self._relay(one, other, password)):
            yield f"http://proxy:{password}@127.0.0.1:{listener.getsockname()[1]}"

    @contextlib.asynccontextmanager
    async def forward(self, listener: socket.socket, host: str, port: int) -> AsyncIterator[None]:
        """Lead whoever connects to a bound `listener` to one place, if we may go there."""

        async def lead(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            try:
                async with asyncio.timeout(_CONNECT_S):
                    to_reader, to_writer = await self._connect(host, port)
                with contextlib.closing(to_writer):
                    await _join((reader, writer), (to_reader, to_writer))
            except (Denied, Unavailable, OSError, TimeoutError) as error:
                _log.debug("a connection was not made: %s", error)
            finally:
                with contextlib.suppress(OSError):
                    writer.close()

        async with _serving(listener, lead):
            yield

    async def _relay(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, password: str
    ) -> None:
        """Lead one connection of a child to where it wants to go, or refuse it."""
        try:
            async with asyncio.timeout(_CONNECT_S):
                wanted = _read_head(await reader.readuntil(b"\r\n\r\n"), password)
                if wanted is None:
                    writer.write(b"HTTP/1.1 407 Who Are You\r\nContent-Length: 0\r\n\r\n")
                    return
                to_reader, to_writer = await self._connect(wanted.host, wanted.port)
            with contextlib.closing(to_writer):
                if wanted.head:
                    to_writer.write(wanted.head)
                else:
                    writer.write(b"HTTP/1.1 200 Connected\r\n\r\n")
                await _join((reader, writer), (to_reader, to_writer))
        except (Denied, Unavailable, OSError, TimeoutError, ValueError, EOFError) as error:
            _log.debug("a connection was not made: %s", error)
            if not writer.is_closing():
                writer.write(b"HTTP/1.1 502 Refused\r\nContent-Length: 0\r\n\r\n")
        finally:
            with contextlib.suppress(OSError):
                writer.close()

    async def _connect(
        self, host: str, port: int
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        found = await self.addresses(host, port)
        for last, address in enumerate(found, 1 - len(found)):
            try:
                return await asyncio.open_connection(address, port)
            except OSError:
                if not last:
                    raise
        raise AssertionError("there is at least one address")


def _on_loopback() -> socket.socket:
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.bind(("127.0.0.1", 0))
    return listener


@contextlib.asynccontextmanager
async def _serving(listener: socket.socket, serve: Serve) -> AsyncIterator[None]:
    """Whoever connects is served by a task of its own; none outlives the context."""
    tasks: set[asyncio.Task[None]] = set()

    def on_connect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(serve(reader, writer))
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    server = await asyncio.start_server(on_connect, sock=listener, limit=_MAX_HEAD_BYTES)
    try:
        yield
    finally:
        server.close()
        for task in tuple(tasks):
            task.cancel()
        if tasks:
            await asyncio.wait(tuple(tasks))


@dataclass(frozen=True, kw_only=True)
class _Wanted:
    host: str
    port: int
    #: What the other side is to get first; empty for a plain tunnel.
    head: bytes


def _read_head(head: bytes, password: str) -> _Wanted | None:
    """Where a request to the proxy is to go; None for a wrong password. Raises ValueError."""
    first, *rest = head.decode("latin-1").removesuffix("\r\n\r\n").split("\r\n")
    method, target, version = first.split(" ")
    expected = "Basic " + base64.b64encode(f"proxy:{password}".encode()).decode()
    headers = [line for line in rest if not line.lower().startswith(("proxy-", "connection:"))]
    given = [line for line in rest if line.lower().startswith("proxy-authorization:")]
    if not any(hmac.compare_digest(line.partition(":")[2].strip(), expected) for line in given):
        return None
    if method == "CONNECT":
        host, _, port = target.rpartition(":")
        return _Wanted(host=host.strip("[]"), port=int(port), head=b"")
    url = urlsplit(target)
    if url.scheme != "http" or not url.hostname:
        raise ValueError("only http goes without a tunnel")
    path = url._replace(scheme="", netloc="", fragment="").geturl() or "/"
    lines = [f"{method} {path} {version}", *headers, "Connection: close"]
    return _Wanted(
        host=url.hostname,
        port=url.port or 80,
        head="\r\n".join([*lines, "", ""]).encode("latin-1"),
    )


async def _join(
    one: tuple[asyncio.StreamReader, asyncio.StreamWriter],
    other: tuple[asyncio.StreamReader, asyncio.StreamWriter],
) -> None:
    """Carry bytes both ways until either side has no more."""

    async def carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while chunk := await reader.read(_CHUNK_BYTES):
                writer.write(chunk)
                await writer.drain()

    ways = {
        asyncio.create_task(carry(one[0], other[1])),
        asyncio.create_task(carry(other[0], one[1])),
    }
    try:
        await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for way in ways:
            way.cancel()
        await asyncio.wait(ways)
