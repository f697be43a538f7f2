"""A connection that is read piece by piece and written no faster than it drains.

Two of them can be spliced: what comes at one leaves at the other, without a task for either.
"""

from __future__ import annotations

import asyncio
import os
import ssl
from collections import deque
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any

#: What may wait to be read before the other side is slowed down.
_HIGH_WATER_BYTES = 64 * 1024


def _nothing() -> None:
    """Nobody wants to know."""


class Line(asyncio.Protocol):
    """One connection."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._chunks: deque[bytes] = deque()
        self._waiting_bytes = 0
        self._reading_paused = False
        self._ended = False
        self._error: Exception | None = None
        self._lost = asyncio.Event()
        self._writable = asyncio.Event()
        self._writable.set()
        #: Set whenever there is something to read, or never will be again.
        self._readable = asyncio.Event()
        self._peer: Line | None = None
        self._flows: Callable[[], None] = _nothing

    # Reading and writing.

    async def read(self) -> bytes:
        """What came; empty at the end. Raises ConnectionError when it broke off."""
        while not self._chunks:
            if self._error is not None:
                raise ConnectionResetError("the connection broke off") from self._error
            if self._ended or self._lost.is_set():
                return b""
            self._readable.clear()
            await self._readable.wait()
        return self._take()

    def _take(self) -> bytes:
        data = b"".join(self._chunks)
        self._chunks.clear()
        self._waiting_bytes = 0
        self._resume_reading()
        return data

    async def write(self, data: bytes) -> None:
        """Write, and wait while the other side takes no more. Raises ConnectionError."""
        if self._transport is None or self._transport.is_closing():
            raise ConnectionResetError("the connection is closed")
        self._transport.write(data)
        await self._writable.wait()

    def unread(self, data: bytes) -> None:
        """Have what was read, and is somebody else's, read again."""
        if data:
            self._chunks.appendleft(data)
            self._waiting_bytes += len(data)
            self._readable.set()

    def close(self) -> None:
        """End it once all is written."""
        if self._transport is not None:
            self._transport.close()

    def abort(self) -> None:
        """End it at once; whoever reads learns that it broke off."""
        if self._lost.is_set():
            return
        self._error = self._error or ConnectionAbortedError("it was ended here")
        if self._transport is not None:
            self._transport.abort()

    @property
    def made(self) -> bool:
        """Whether it ever was a connection."""
        return self._transport is not None

    @property
    def rests(self) -> bool:
        """Whether it is open, with nothing to be read or still to be sent."""
        transport = self._transport
        return (
            transport is not None
            and not (self._chunks or self._ended or self._error or self._lost.is_set())
            and not transport.is_closing()
            and not transport.get_write_buffer_size()
        )

    async def wait_closed(self) -> None:
        """Wait until the connection is gone."""
        await self._lost.wait()

    # Splicing.

    def join(self, peer: Line, flows: Callable[[], None]) -> None:
        """From now on pass on to `peer` whatever comes."""
        self._peer, self._flows = peer, flows
        if self._chunks:
            peer._pass_on(self._take())
        if self._lost.is_set():
            self._peer_ends()
        elif self._ended:
            peer._end_writing()
        if peer._writable.is_set():
            self._resume_reading()

    def _pass_on(self, data: bytes) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(data)

    def _end_writing(self) -> None:
        transport = self._transport
        if transport is None or transport.is_closing():
            return
        # Over TLS there is no half of a connection.
        if self._ended or not transport.can_write_eof():
            transport.close()
        else:
            transport.write_eof()

    def _peer_ends(self) -> None:
        assert self._peer is not None
        if self._error is not None:
            self._peer.abort()
        else:
            self._peer.close()

    def _pause_reading(self) -> None:
        if self._transport is not None and not self._reading_paused and not self._lost.is_set():
            self._reading_paused = True
            self._transport.pause_reading()

    def _resume_reading(self) -> None:
        if self._transport is not None and self._reading_paused:
            self._reading_paused = False
            self._transport.resume_reading()

    # What the transport calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        if self._error is not None:
            # It was ended while it was being made.
            transport.abort()

    def data_received(self, data: bytes) -> None:
        self._flows()
        if self._peer is not None:
            self._peer._pass_on(data)
            return
        self._chunks.append(data)
        self._waiting_bytes += len(data)
        self._readable.set()
        if self._waiting_bytes > _HIGH_WATER_BYTES:
            self._pause_reading()

    def eof_received(self) -> bool:
        self._ended = True
        self._readable.set()
        assert self._transport is not None
        if self._peer is not None:
            self._peer._end_writing()
            if self._peer._ended:
                self._transport.close()
        return self._transport.can_write_eof()

    def connection_lost(self, exc: Exception | None) -> None:
        self._error = self._error or exc
        self._lost.set()
        self._readable.set()
        self._writable.set()
        if self._peer is not None:
            self._peer_ends()

    def pause_writing(self) -> None:
        self._writable.clear()
        if self._peer is not None:
            self._peer._pause_reading()

    def resume_writing(self) -> None:
        self._writable.set()
        if self._peer is not None:
            self._peer._resume_reading()


async def splice(one: Line, other: Line, flows: Callable[[], None] = _nothing) -> None:
    """Pass on what comes at either to the other, until both are closed.

    `flows` is called whenever something comes.
    """
    one.join(other, flows)
    other.join(one, flows)
    try:
        await one.wait_closed()
        await other.wait_closed()
    finally:
        one.abort()
        other.abort()


class Lines:
    """Connections that are open, so that all of them can be ended at once."""

    def __init__(self) -> None:
        self._open: set[Line] = set()

    def __len__(self) -> int:
        return len(self._open)

    async def dial(
        self, host: str, port: int, tls: ssl.SSLContext | None = None, name: str | None = None
    ) -> Line:
        """A new connection; with `tls` to who has a certificate for `name`. Raises OSError."""
        loop = asyncio.get_running_loop()
        connecting = partial(loop.create_connection, host=host, port=port)
        return await self._opened(partial(connecting, ssl=tls, server_hostname=name))

    async def dial_unix(self, path: Path) -> Line:
        """A new connection to a unix socket. Raises OSError."""
        loop = asyncio.get_running_loop()
        return await self._opened(partial(loop.create_unix_connection, path=os.fspath(path)))

    async def _opened(self, connecting: Callable[..., Awaitable[Any]]) -> Line:
        line = _Counted(self._open)
        # From the first moment on: many may be dialled at once.
        self._open.add(line)
        try:
            await connecting(lambda: line)
        except BaseException:
            line.connection_lost(None)
            raise
        return line

    async def closed(self) -> None:
        """Wait until none is open any more; those that are being made are not waited for."""
        for line in list(self._open):
            if line.made:
                await line.wait_closed()

    def abort(self) -> None:
        """End all of them."""
        for line in list(self._open):
            line.abort()


class _Counted(Line):
    def __init__(self, counted: set[Line]) -> None:
        super().__init__()
        self._counted = counted

    def connection_lost(self, exc: Exception | None) -> None:
        self._counted.discard(self)
        super().connection_lost(exc)
