"""What control plane and agent agree on about a request: target, headers, lengths."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandmartin.errors import Invalid
from sandmartin.relay.headers import end_to_end, framing_of, upgrade_of
from sandmartin.relay.line import Line, splice
from sandmartin.relay.target import is_control_route, path_of

CONTROL = ("init", "freeze", "unfreeze", "collapse", "fsfreeze", "fsthaw", "upgrade", "tunnel")


@pytest.mark.parametrize("word", CONTROL)
@pytest.mark.parametrize(
    "form",
    [
        "/{0}",
        "//{0}",
        "/./{0}",
        "/{0}/",
        "/{0}//x",
        "/a/../{0}",
        "/../../{0}",
        "/%2e/{0}",
        "/%2e%2e/{0}",
        "/%2f{0}",
        "/{0};x=1",
        "/{0}%00",
        "/%20{0}",
        "/\\{0}",
        "/%255c{0}",
    ],
)
def test_control_routes_in_any_writing(word: str, form: str) -> None:
    assert is_control_route(form.format(word).encode())
    assert is_control_route(form.format(word.upper()).encode())
    escaped = "".join(f"%{ord(each):02x}" for each in word)
    assert is_control_route(form.format(escaped).encode())
    assert is_control_route(form.format(quote(escaped)).encode())


@pytest.mark.parametrize(
    "path",
    ["/", "/files", "/health", "/initial", "/a/init", "/process.Process/Start", "/files?p=/init"],
)
def test_other_routes(path: str) -> None:
    assert not is_control_route(path.encode())


@given(st.binary(max_size=60))
def test_any_path_is_judged(path: bytes) -> None:
    assert is_control_route(b"/" + path) in {True, False}


@given(st.sampled_from(CONTROL), st.data())
def test_no_mixture_of_escapes_hides_one(word: str, data: st.DataObject) -> None:
    def written(text: str) -> str:
        if data.draw(st.booleans()):
            return text
        made = f"%{ord(text):02x}"
        return made.upper() if data.draw(st.booleans()) else made

    prefix = "".join(data.draw(st.lists(st.sampled_from(["/", "/.", "/x/.."]), max_size=3)))
    assert is_control_route((prefix + "/" + "".join(map(written, word))).encode())


def test_targets() -> None:
    assert path_of(b"/a", b"x") == b"/a"
    assert path_of(b"http://X.test:80/a", b"x.test:80") == b"/a"
    assert path_of(b"HTTPS://x", b"x") == b"/"
    for target in (b"*", b"x:443", b"http://y/a", b"http://x@y/a", b"ftp://x/a", b""):
        with pytest.raises(Invalid):
            path_of(target, b"x")


@pytest.mark.parametrize(
    ("headers", "framing"),
    [
        ([], []),
        ([(b"content-length", b"0")], [(b"content-length", b"0")]),
        ([(b"transfer-encoding", b"Chunked")], [(b"transfer-encoding", b"chunked")]),
    ],
)
def test_lengths(headers: list[tuple[bytes, bytes]], framing: list[tuple[bytes, bytes]]) -> None:
    assert framing_of(headers) == framing


@pytest.mark.parametrize(
    "headers",
    [
        [(b"content-length", b"1"), (b"content-length", b"1")],
        [(b"content-length", b"1"), (b"transfer-encoding", b"chunked")],
        [(b"content-length", b"-1")],
        [(b"content-length", b"1, 1")],
        [(b"content-length", "\u0663".encode())],
        [(b"transfer-encoding", b"gzip, chunked")],
        [(b"transfer-encoding", b"chunked"), (b"transfer-encoding", b"chunked")],
    ],
)
def test_lengths_that_are_refused(headers: list[tuple[bytes, bytes]]) -> None:
    with pytest.raises(Invalid):
        framing_of(headers)


def test_what_is_for_one_connection() -> None:
    headers = [(b"connection", b"close, X-A"), (b"x-a", b"1"), (b"te", b"x"), (b"host", b"h")]
    assert end_to_end([*headers, (b"x-b", b"2")]) == [(b"host", b"h"), (b"x-b", b"2")]
    # Nobody makes us forget for whom it is.
    assert end_to_end([(b"connection", b"host"), (b"host", b"h")]) == [(b"host", b"h")]


def test_upgrades() -> None:
    def asked(upgrade: bytes, connection: bytes = b"keep-alive, Upgrade") -> bytes:
        return upgrade_of([(b"connection", connection), (b"upgrade", upgrade)])

    assert asked(b"WebSocket") == b"websocket"
    for other in (b"h2c", b"HTTP/2.0", b"TLS/1.0", b"websocket, h2c", b""):
        assert asked(other) == b""
    assert asked(b"websocket", b"close") == b""


# Lines.


@asynccontextmanager
async def pair() -> AsyncIterator[tuple[Line, Line]]:
    """Two ends of one connection."""
    loop = asyncio.get_running_loop()
    ends = socket.socketpair()
    (_, one), (_, other) = [await loop.create_connection(Line, sock=end) for end in ends]
    try:
        yield one, other
    finally:
        one.abort()
        other.abort()
        await one.wait_closed()
        await other.wait_closed()


async def test_a_line_that_ends_and_one_that_breaks_off() -> None:
    async with pair() as (one, other):
        await one.write(b"a")
        one.close()
        assert await other.read() == b"a"
        assert await other.read() == b""
    async with pair() as (one, _):
        one.abort()
        with pytest.raises(ConnectionError):
            await one.read()
        with pytest.raises(ConnectionError):
            await one.write(b"a")


async def test_a_writer_waits_for_its_reader() -> None:
    async with pair() as (one, other):
        writing = asyncio.create_task(_write_much(one))
        done, _ = await asyncio.wait({writing}, timeout=0.2)
        assert not done
        read = 0
        while read < 64 << 20:
            read += len(await other.read())
        await writing


async def _write_much(line: Line) -> None:
    for _ in range(64):
        await line.write(b"x" * (1 << 20))


async def test_a_splice_keeps_order_halves_and_pace() -> None:
    async with pair() as (client, front), pair() as (back, server):
        front.unread(b"early ")
        passed: list[None] = []
        splicing = asyncio.create_task(splice(front, back, lambda: passed.append(None)))
        writing = asyncio.create_task(_write_much(client))
        done, _ = await asyncio.wait({writing}, timeout=0.2)
        assert not done
        data = b""
        while len(data) < (64 << 20) + 6:
            data += await server.read()
        await writing
        assert data.startswith(b"early x") and data.endswith(b"xx") and passed
        await server.write(b"back")
        server.close()
        assert await client.read() == b"back"
        assert await client.read() == b""
        client.close()
        await asyncio.wait_for(splicing, 10)
