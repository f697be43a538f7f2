"""The guests' resolver: port 53 of every gateway, answered by the host's own resolvers.

A guest's packets never go to those resolvers as they are. Each query is parsed, sent anew under a
number and a port of our choice, and its answer checked against it, so a guest gets answers to its
questions and no other way to the resolvers' network. What one guest may ask is limited in rate,
in number at a time, and in size.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path

import dns.asyncbackend
import dns.asyncquery
import dns.entropy
import dns.exception
import dns.flags
import dns.message
import dns.opcode
import dns.rcode
import dns.resolver

from sandmartin.agent import namespace
from sandmartin.agent.network.slot import Slot
from sandmartin.errors import ToolFailed

_log = logging.getLogger(__name__)

PORT = 53
_UPSTREAM_S = 3.0
_CLIENT_S = 10.0
_MAX_DATAGRAM = 4096
_MAX_AT_ONCE = 64
_MAX_CONNECTIONS = 16
_RATE_PER_S = 100.0
_BURST = 200.0


Learn = Callable[[dns.message.Message], Awaitable[None]]


async def _nothing(_: dns.message.Message) -> None:
    """Learn nothing."""


class Upstream:
    """The host's resolvers, as its configuration names them now."""

    def __init__(self, configuration: Path, port: int = PORT) -> None:
        self._configuration = configuration
        self._port = port
        self._backend = dns.asyncbackend.get_backend("asyncio")
        self._changed_ns = -1
        self._servers: list[str] = []

    def servers(self) -> list[str]:
        """Addresses of the resolvers, in order of preference."""
        try:
            changed_ns = self._configuration.stat().st_mtime_ns
            if changed_ns != self._changed_ns:
                resolver = dns.resolver.Resolver(configure=False)
                resolver.read_resolv_conf(str(self._configuration))
                self._servers = [str(server) for server in resolver.nameservers]
                self._changed_ns = changed_ns
        except (OSError, dns.exception.DNSException) as error:
            _log.warning("the host's resolvers cannot be read: %s", error)
        return self._servers

    async def answer(self, wire: bytes, *, tcp: bool, learn: Learn = _nothing) -> bytes | None:
        """The answer to a query, or a failure as DNS has it; None for what is no query.

        `learn` is done with the answer before anybody has it.
        """
        try:
            query = dns.message.from_wire(wire, ignore_trailing=True)
        except (dns.exception.DNSException, ValueError):
            return None
        asks = query.opcode() == dns.opcode.QUERY and len(query.question) == 1
        if query.flags & dns.flags.QR or not asks:
            return None
        number, query.id = query.id, dns.entropy.random_16()
        response = await self._ask(query, tcp=tcp) or _failure(query)
        await learn(response)
        response.id = number
        try:
            return bytes(response.to_wire(max_size=65535 if tcp else _room(query)))
        except dns.exception.TooBig:
            return _truncated(query, number)

    async def _ask(self, query: dns.message.Message, *, tcp: bool) -> dns.message.Message | None:
        for server in self.servers():
            with suppress(OSError, dns.exception.DNSException, EOFError):
                if tcp:
                    return await dns.asyncquery.tcp(
                        query, server, _UPSTREAM_S, self._port, backend=self._backend
                    )
                return await dns.asyncquery.udp(
                    query,
                    server,
                    _UPSTREAM_S,
                    self._port,
                    ignore_unexpected=True,
                    ignore_errors=True,
                    backend=self._backend,
                )
        return None


def _room(query: dns.message.Message) -> int:
    """How large a datagram the asker takes (RFC 1035 4.2.1, RFC 6891 6.2.3)."""
    return max(512, query.payload) if query.edns >= 0 else 512


def _failure(query: dns.message.Message) -> dns.message.Message:
    response = dns.message.make_response(query, recursion_available=True)
    response.set_rcode(dns.rcode.SERVFAIL)
    return response


def _truncated(query: dns.message.Message, number: int) -> bytes:
    """An answer that tells the asker to come back by TCP."""
    response = dns.message.make_response(query, recursion_available=True)
    response.id = number
    response.flags |= dns.flags.TC
    return bytes(response.to_wire())


class _Rate:
    """A bucket of tokens that fills steadily."""

    def __init__(self) -> None:
        self._tokens = _BURST
        self._filled_at = time.monotonic()

    def take(self) -> bool:
        now = time.monotonic()
        self._tokens = min(_BURST, self._tokens + (now - self._filled_at) * _RATE_PER_S)
        self._filled_at = now
        if self._tokens < 1:
            return False
        self._tokens -= 1
        return True


class Gateway:
    """Port 53 of one slot's gateway."""

    def __init__(
        self, upstream: Upstream, udp: socket.socket, tcp: socket.socket, learn: Learn
    ) -> None:
        self._upstream = upstream
        self._learn = learn
        self._udp = udp
        self._tcp = tcp
        self._rate = _Rate()
        self._at_once = 0
        self._connections = 0

    @classmethod
    async def open(cls, upstream: Upstream, slot: Slot, learn: Learn) -> Gateway:
        """Listen in a slot; `learn` from each answer before the guest has it. Raises ToolFailed."""
        try:
            udp, tcp = await namespace.inside(slot.netns_path, lambda: _listen(slot))
        except OSError as error:
            raise ToolFailed(
                f"the resolver of network slot {slot.number} cannot listen: {error}"
            ) from error
        return cls(upstream, udp, tcp, learn)

    def close(self) -> None:
        self._udp.close()
        self._tcp.close()

    async def serve(self) -> None:
        """Answer until cancelled."""
        server = await asyncio.start_server(self._talk, sock=self._tcp)
        async with server, asyncio.TaskGroup() as group:
            loop = asyncio.get_running_loop()
            while True:
                try:
                    wire, client = await loop.sock_recvfrom(self._udp, _MAX_DATAGRAM)
                except OSError as error:
                    # An earlier answer could not be delivered: nobody waits for it any more.
                    _log.debug("resolver: %s", error)
                    continue
                if self._at_once < _MAX_AT_ONCE and self._rate.take():
                    self._at_once += 1
                    group.create_task(self._reply(wire, client), name="resolver reply")

    async def _reply(self, wire: bytes, client: tuple[str, int]) -> None:
        try:
            answer = await self._upstream.answer(wire, tcp=False, learn=self._learn)
            if answer is not None:
                with suppress(OSError):
                    self._udp.sendto(answer, client)
        finally:
            self._at_once -= 1

    async def _talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection; each message is preceded by its length (RFC 1035 4.2.2)."""
        self._connections += 1
        try:
            with suppress(OSError, EOFError, TimeoutError):
                while self._connections <= _MAX_CONNECTIONS:
                    async with asyncio.timeout(_CLIENT_S):
                        length = int.from_bytes(await reader.readexactly(2), "big")
                        wire = await reader.readexactly(length)
                    answer = await self._upstream.answer(wire, tcp=True, learn=self._learn)
                    if answer is None or not self._rate.take():
                        return
                    writer.write(len(answer).to_bytes(2, "big") + answer)
                    async with asyncio.timeout(_CLIENT_S):
                        await writer.drain()
        finally:
            self._connections -= 1
            writer.close()


def _listen(slot: Slot) -> tuple[socket.socket, socket.socket]:
    address = (str(slot.gateway_ip), PORT)
    udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    tcp = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        for each in (udp, tcp):
            each.setblocking(False)
            each.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            each.bind(address)
        tcp.listen(_MAX_CONNECTIONS)
    except OSError:
        udp.close()
        tcp.close()
        raise
    return udp, tcp
