"""Servers that stand for what listens in a sandbox, and clients that say just what they want."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field

DEADLINE_S = 20.0
Serve = Callable[[bytes, asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


async def greet(_: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answer anything, and close."""
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nhi")


@dataclass
class Inside:
    """A server that keeps the head of each request, as it came, and answers as `serve` does."""

    port: int = 0
    serve: Serve = greet
    heads: list[bytes] = field(default_factory=list)
    #: Connections that broke off or ended.
    ended: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(0))
    _open: dict[asyncio.StreamWriter, asyncio.Task[None]] = field(default_factory=dict)

    @property
    def head(self) -> bytes:
        return self.heads[-1]

    def header(self, name: str) -> list[str]:
        """Values of a header of the newest request."""
        lines = self.head.decode("latin-1").split("\r\n")[1:]
        pairs = (line.partition(":") for line in lines)
        return [value.strip() for each, _, value in pairs if each.lower() == name]

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._open[writer] = task
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            self.heads.append(head)
            await self.serve(head, reader, writer)
            await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            self.ended.release()
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()
            del self._open[writer]

    async def close(self) -> None:
        """End what is still open."""
        for writer in self._open:
            writer.transport.abort()
        if tasks := set(self._open.values()):
            await asyncio.wait(tasks, timeout=DEADLINE_S)


@contextlib.asynccontextmanager
async def listening(serve: Serve = greet) -> AsyncIterator[Inside]:
    inside = Inside(serve=serve)
    server = await asyncio.start_server(inside._connected, "127.0.0.1", 0)
    inside.port = server.sockets[0].getsockname()[1]
    try:
        yield inside
    finally:
        server.close()
        await inside.close()
        await server.wait_closed()


@dataclass
class Raw:
    """A connection of a client that writes what it wants."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    async def answer(self) -> tuple[int, dict[str, str], bytes]:
        """Status, headers, and the body of an answer that says how long it is."""
        async with asyncio.timeout(DEADLINE_S):
            head = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1")
            lines = head.split("\r\n")
            pairs = (line.partition(":") for line in lines[1:] if line)
            headers = {name.lower(): value.strip() for name, _, value in pairs}
            body = await self.reader.readexactly(int(headers.get("content-length", "0")))
            return int(lines[0].split()[1]), headers, body

    async def rest(self) -> bytes:
        async with asyncio.timeout(DEADLINE_S):
            return await self.reader.read()


@contextlib.asynccontextmanager
async def connected(port: int, data: bytes = b"") -> AsyncIterator[Raw]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(data)
        await writer.drain()
        yield Raw(reader, writer)
    finally:
        writer.transport.abort()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


def request(
    method: str, target: str, host: str, *headers: str, body: bytes = b"", close: bool = False
) -> bytes:
    """A request, its headers as they are given."""
    lines = [f"{method} {target} HTTP/1.1", f"Host: {host}", *headers]
    if body:
        lines.append(f"Content-Length: {len(body)}")
    if close:
        lines.append("Connection: close")
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body
