"""Connections that rest between two requests."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import pytest

from sandmartin.relay.kept import KeptLines
from sandmartin.relay.line import Line, Lines

_DEADLINE_S = 10.0


@dataclass
class Server:
    """What is at the other end."""

    port: int = 0
    accepted: list[asyncio.StreamWriter] = field(default_factory=list)
    lines: Lines = field(default_factory=Lines)

    async def dial(self) -> Line:
        return await self.lines.dial("127.0.0.1", self.port)


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    found = Server()

    async def serve(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        found.accepted.append(writer)

    listening = await asyncio.start_server(serve, "127.0.0.1", 0)
    found.port = listening.sockets[0].getsockname()[1]
    yield found
    found.lines.abort()
    await found.lines.closed()
    for writer in found.accepted:
        writer.transport.abort()
    listening.close()
    await listening.wait_closed()


async def _accepted(server: Server, count: int) -> None:
    async with asyncio.timeout(_DEADLINE_S):
        while len(server.accepted) < count:
            await asyncio.sleep(0.005)


async def test_a_line_is_had_again_by_whom_it_was_used_for_alone(server: Server) -> None:
    kept = KeptLines()
    older, newer = await server.dial(), await server.dial()
    kept.keep("sbone", older)
    kept.keep("sbone", newer)
    assert kept.take("sbtwo") is None
    assert [kept.take("sbone"), kept.take("sbone"), kept.take("sbone")] == [newer, older, None]
    assert older.rests and newer.rests and len(kept) == 0


@pytest.mark.parametrize("what", ["data", "end", "reset"])
async def test_one_on_which_something_happened_is_never_used_again(
    server: Server, what: str
) -> None:
    kept = KeptLines()
    line = await server.dial()
    await _accepted(server, 1)
    kept.keep("sbone", line)
    (writer,) = server.accepted
    if what == "data":
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil")
    elif what == "end":
        writer.close()
    else:
        writer.transport.abort()
    async with asyncio.timeout(_DEADLINE_S):
        while line.rests:
            await asyncio.sleep(0.005)
    assert kept.take("sbone") is None
    await asyncio.wait_for(line.wait_closed(), _DEADLINE_S)


async def test_there_are_only_so_many_and_only_for_so_long(server: Server) -> None:
    kept = KeptLines(idle_s=0.2, max_lines=3, max_each=2)
    lines = [await server.dial() for _ in range(5)]
    for name, line in zip(("sbone", "sbone", "sbone", "sbtwo", "sbtwo"), lines, strict=True):
        kept.keep(name, line)
    assert [line.rests for line in lines] == [True, True, False, True, False]
    assert len(kept) == 3
    async with asyncio.timeout(_DEADLINE_S):
        for line in lines:
            await line.wait_closed()
    assert len(kept) == 0 and kept.take("sbone") is None


async def test_all_end_at_once(server: Server) -> None:
    kept = KeptLines()
    lines = [await server.dial() for _ in range(2)]
    for name, line in zip(("sbone", "sbtwo"), lines, strict=True):
        kept.keep(name, line)
    kept.abort()
    assert len(kept) == 0
    async with asyncio.timeout(_DEADLINE_S):
        for line in lines:
            await line.wait_closed()
