"""A web server that remembers what it was sent, and answers as it is told."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Received:
    """One request, whole."""

    path: str
    headers: dict[str, str]
    body: bytes = field(repr=False)


@dataclass
class Receiver:
    """What came, and what is answered: a status, or None for nothing at all."""

    answer: Callable[[Received], int | None] = lambda _: 204
    location: str = ""
    port: int = 0
    received: list[Received] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/hook"

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.closing(writer), contextlib.suppress(OSError, EOFError):
            head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
            headers = dict(line.lower().split(": ", 1) for line in head[1:] if line)
            body = await reader.readexactly(int(headers.get("content-length", 0)))
            request = Received(head[0].split(" ")[1], headers, body)
            self.received.append(request)
            status = self.answer(request)
            if status is None:
                await reader.read()
                return
            lines = [f"HTTP/1.1 {status} So", "Connection: close", "Content-Length: 0"]
            lines += [f"Location: {self.location}"] if self.location else []
            writer.write("\r\n".join([*lines, "", ""]).encode())
            await writer.drain()


@contextlib.asynccontextmanager
async def running_receiver(tls: ssl.SSLContext | None = None) -> AsyncIterator[Receiver]:
    receiver = Receiver()
    tasks: set[asyncio.Task[None]] = set()

    def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(receiver.serve(reader, writer))
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    server = await asyncio.start_server(connected, "127.0.0.1", 0, ssl=tls)
    receiver.port = server.sockets[0].getsockname()[1]
    try:
        yield receiver
    finally:
        server.close()
        for task in tuple(tasks):
            task.cancel()
        if tasks:
            await asyncio.wait(tuple(tasks))
