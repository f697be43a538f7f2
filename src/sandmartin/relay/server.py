"""The server's side: uvicorn's HTTP/1.1, with connections that an application can take over.

An application finds its connection in the scope. It can cut it off in the middle of an answer,
which no other way tells a client of HTTP/1.1 that there is no more to come; and it can answer 101
and have what follows, which is not HTTP any more.
"""

from __future__ import annotations

import asyncio
import socket
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from sandmartin.relay.headers import Headers
from sandmartin.relay.line import Line
from sandmartin.relay.progress import STALL_S, Progress, reset

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

_EXTENSION = "sandmartin.connection"
#: How long a server that stops waits for an answer that is being passed on.
_STOP_S = 3.0
#: How long a client may take to say what it wants, from its first byte on or its connecting.
HEAD_S = 30.0
#: Clients that are gone without a word are noticed after about two minutes.
_KEEPALIVE = {"TCP_KEEPIDLE": 60, "TCP_KEEPINTVL": 15, "TCP_KEEPCNT": 4}


class Connection(H11Protocol, ABC):
    """One connection of a client."""

    head_s = HEAD_S
    stall_s = STALL_S

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._served = self.app
        self.app = self._serve
        self._relays = False
        self._head_timer: asyncio.TimerHandle | None = None

    async def _serve(self, scope: Any, receive: Any, send: Any) -> None:
        scope.setdefault("extensions", {})[_EXTENSION] = self
        await self._served(scope, receive, send)

    @abstractmethod
    def wants_relay(self, scope: Scope) -> bool:
        """Whether an upgrade is the application's to answer, and no WebSocket of our own."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        connected = transport.get_extra_info("socket")
        if connected is not None and connected.family != socket.AF_UNIX:
            connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for name, value in _KEEPALIVE.items():
                connected.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        self._progress = Progress(transport, self.stall_s)
        self._wait_for_head()

    def data_received(self, data: bytes) -> None:
        try:
            super().data_received(data)
        except h11.LocalProtocolError:
            # What came is no more of the request, and the answer to say so in has begun.
            self.transport.abort()
        self._wait_for_head()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        # Of the next request a part may have come already.
        if self.conn.trailing_data[0]:
            self._wait_for_head()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._progress.begin()

    def resume_writing(self) -> None:
        self._progress.end()
        super().resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        self._progress.end()
        super().connection_lost(exc)

    def _wait_for_head(self) -> None:
        """Nobody holds a connection for nothing; between requests a longer time counts."""
        if self.conn.their_state is not h11.IDLE or self.transport.is_closing():
            self._stop_waiting()
        elif self._head_timer is None:
            self._head_timer = self.loop.call_later(self.head_s, self._end_waiting)

    def _end_waiting(self) -> None:
        self._head_timer = None
        if self.conn.their_state is h11.IDLE:
            self.transport.abort()

    def _stop_waiting(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _should_upgrade(self) -> bool:
        if self._get_upgrade() is None or self.wants_relay(dict(self.scope)):
            return False
        return super()._should_upgrade()

    def shutdown(self) -> None:
        super().shutdown()
        if self._relays:
            self.loop.call_later(_STOP_S, self.transport.abort)

    # What applications use.

    @property
    def peer(self) -> str:
        """Address of the client; empty on a unix socket."""
        return self.client[0] if self.client else ""

    def relays(self) -> None:
        """The answer is somebody else's, and need not come to an end."""
        self._relays = True

    async def cut(self, receive: Receive) -> None:
        """End the connection in the middle of an answer, so that it is not taken for whole."""
        reset(self.transport)
        while (await receive())["type"] != "http.disconnect":
            pass

    def take(self, headers: Headers) -> Line:
        """Switch protocols, and have the connection from then on."""
        answer = h11.InformationalResponse(
            status_code=101, headers=headers, reason=b"Switching Protocols"
        )
        self.transport.write(self.conn.send(answer) or b"")
        early, _ = self.conn.trailing_data
        self.flow.resume_reading()
        line = _Taken(self.connections, self._progress)
        line.connection_made(self.transport)
        line.unread(early)
        self.connections.discard(self)
        self.connections.add(line)  # type: ignore[arg-type]
        # There is no cycle of request and answer to complete any more.
        self.cycle.disconnected = True
        self.cycle.message_event.set()
        self.transport.set_protocol(line)
        return line


class _Taken(Line):
    """A connection that was taken over, which the server still knows."""

    def __init__(self, connections: set[Any], progress: Progress) -> None:
        super().__init__()
        self._connections = connections
        self._progress = progress

    def pause_writing(self) -> None:
        super().pause_writing()
        self._progress.begin()

    def resume_writing(self) -> None:
        self._progress.end()
        super().resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        self._connections.discard(self)
        self._progress.end()
        super().connection_lost(exc)

    def shutdown(self) -> None:
        """The server stops."""
        self.abort()


def connection_of(scope: Scope) -> Connection | None:
    """The connection by which a request came; None where there is no network between."""
    found = scope.get("extensions", {}).get(_EXTENSION)
    return found if isinstance(found, Connection) else None


def protocol_for(
    relayed: Callable[[Scope], bool], wait_s: float = HEAD_S, slack_s: float = STALL_S
) -> type[Connection]:
    """The class of connections on which the application itself answers upgrades of `relayed`.

    `wait_s` is how long a client may take to say what it wants, `slack_s` how long it may take
    nothing of an answer that waits for it.
    """

    class Relaying(Connection):
        head_s = wait_s
        stall_s = slack_s

        def wants_relay(self, scope: Scope) -> bool:
            return relayed(scope)

    return Relaying
