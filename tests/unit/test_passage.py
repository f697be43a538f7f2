"""The way to a guest's ports: how many at once, and what a hostile guest agent may answer."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import pytest

from sandmartin.agent.passage import Passage
from sandmartin.errors import Exhausted, GuestSilent, NotFound
from tests.control.inside import listening


@contextlib.asynccontextmanager
async def answering(answer: bytes) -> AsyncIterator[int]:
    """The port of a guest agent that answers each request in this way, and then echoes."""

    async def serve(_: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(answer)
        while answer and (data := await reader.read(1 << 16)):
            writer.write(data)

    async with listening(serve) as inside:
        yield inside.port


def _closed_port() -> int:
    # Below those that are given out by themselves, and nobody's.
    return 1


async def test_a_tunnel_begins_with_what_came_early() -> None:
    switched = b"HTTP/1.1 101 S\r\nUpgrade: tcp\r\nConnection: Upgrade\r\n\r\nearly"
    async with answering(switched) as port:
        passage = Passage("127.0.0.1", port)
        line = await passage.dial(_closed_port(), "token")
        assert await line.read() == b"early"
        await line.write(b"more")
        assert await line.read() == b"more"
        passage.abort()
        with pytest.raises(ConnectionError):
            await line.read()
        await line.wait_closed()


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (b"HTTP/1.1 502 X\r\nContent-Length: 0\r\n\r\n", NotFound),
        (b"HTTP/1.1 404 X\r\nContent-Length: 0\r\n\r\n", NotFound),
        (b"", GuestSilent),
        (b"SSH-2.0\r\n\r\n", GuestSilent),
        (b"HTTP/1.1 200 X\r\n" + b"X: y\r\n" * 100_000, GuestSilent),
    ],
)
async def test_a_guest_agent_that_does_not_connect(answer: bytes, error: type[Exception]) -> None:
    async with answering(answer) as port:
        passage = Passage("127.0.0.1", port)
        with pytest.raises(error):
            await passage.dial(_closed_port(), "token")
        await passage.closed()


async def test_what_is_ended_while_it_is_made_is_never_open() -> None:
    async with answering(b"x") as port:
        passage = Passage("127.0.0.1", port)
        dialling = asyncio.create_task(passage.dial_agent())
        await asyncio.sleep(0)
        passage.abort()
        await passage.closed()
        line = await dialling
        with pytest.raises(ConnectionError):
            await line.read()
        await line.wait_closed()


async def test_a_guest_has_only_so_many_connections() -> None:
    async with answering(b"x") as port:
        passage = Passage("127.0.0.1", 1, max_lines=2)
        one, _ = [await passage.dial(port, "token") for _ in range(2)]
        with pytest.raises(Exhausted):
            await passage.dial(port, "token")
        one.abort()
        await one.wait_closed()
        await passage.dial(port, "token")
        passage.abort()
        await passage.closed()
