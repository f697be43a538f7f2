"""What strangers, slow clients and hostile guests can make the platform hold, and for how long."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path

import httpx
import pytest

from sandmartin.agent.guest import Identity
from sandmartin.control.limits import WAKE
from sandmartin.relay.line import Line
from sandmartin.transport.agent import Agent
from tests.control.conftest import DEADLINE_S, eventually
from tests.control.inside import connected, request
from tests.control.members import Served, joined
from tests.control.members import served_platform as served_with_members
from tests.control.test_proxy import CLOSED, OPEN, Site, opened

GUEST = 49983


@pytest.fixture
async def site(migrated_sqlite: Path, tmp_path: Path) -> AsyncIterator[Site]:
    async with opened(migrated_sqlite, tmp_path) as site:
        yield site


async def asleep(site: Site) -> None:
    path = f"/v1/sandboxes/{site.sandbox_id}"
    assert (await site.api.post(f"{path}/pause")).status_code == 200


# Waking.


async def test_strangers_wake_a_sandbox_only_so_often(site: Site) -> None:
    site.sandbox_id = await site.create(auto_resume=True)
    for _ in range(WAKE.burst):
        await asleep(site)
        assert (await site.ask("GET", "/"))[0] == 200
    await asleep(site)
    for port, target in ((OPEN, "/"), (GUEST, "/health")):
        status, headers, body = await site.ask("GET", target, port=port)
        assert (status, json.loads(body)["message"]) == (429, "The sandbox is woken up too often")
        assert headers["should-retry"] == "true" and 0 < int(headers["retry-after"]) <= 60
    # It sleeps on, and whoever shows its token wakes it all the same.
    path = f"/v1/sandboxes/{site.sandbox_id}"
    assert (await site.api.get(path)).json()["status"] == "paused"
    access = (await site.api.get(f"{path}/access")).json()["access_token"]
    assert (await site.ask("GET", "/", f"X-Access-Token: {access}"))[0] == 200


async def test_what_wakes_too_slowly(migrated_sqlite: Path, tmp_path: Path) -> None:
    async with opened(migrated_sqlite, tmp_path, wake_s=1.0) as site:
        site.sandbox_id = await site.create(auto_resume=True)
        await asleep(site)
        go_on = asyncio.Event()

        async def held(_: Identity) -> None:
            await go_on.wait()

        site.host.fakes.guests.introducing = held
        expected = (504, "The sandbox did not wake up in time")
        assert await site.refused("GET", "/") == expected
        # Only the request has given up.
        go_on.set()
        path = f"/v1/sandboxes/{site.sandbox_id}"

        async def runs() -> bool:
            return bool((await site.api.get(path)).json()["status"] == "running")

        await eventually(runs, "the sandbox runs")
        assert (await site.ask("GET", "/"))[0] == 200


# Connections.


async def test_a_crowded_sandbox_says_so_and_recovers(site: Site) -> None:
    async def serve(_: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\n\r\nfirst")
        await writer.drain()
        await reader.read()

    site.inside.serve = serve
    site.host.fakes.guests.max_lines = 2
    async with contextlib.AsyncExitStack() as stack:
        for _ in range(2):
            raw = await stack.enter_async_context(site.line(request("GET", "/", site.name())))
            await asyncio.wait_for(raw.reader.readuntil(b"first"), DEADLINE_S)
        status, headers, body = await site.ask("GET", "/")
        message = "There are too many connections to the sandbox"
        assert (status, json.loads(body)["message"]) == (429, message)
        assert headers["should-retry"] == "true"
    for _ in range(2):
        await asyncio.wait_for(site.inside.ended.acquire(), DEADLINE_S)
    site.inside.serve = greeting
    await eventually(lambda: answers(site), "there is room again")


async def greeting(_: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi")


async def answers(site: Site) -> bool:
    return (await site.ask("GET", "/"))[0] == 200


@pytest.fixture
async def impatient(migrated_sqlite: Path, tmp_path: Path) -> AsyncIterator[Site]:
    """Where heads must be there at once."""
    async with opened(migrated_sqlite, tmp_path, head_s=0.3) as site:
        yield site


@pytest.mark.parametrize("start", [b"", b"G", b"GET / HTTP/1.1\r\nHost: x\r\n"])
async def test_who_says_nothing_is_not_waited_for(impatient: Site, start: bytes) -> None:
    site = impatient
    async with site.line(start) as raw:
        with contextlib.suppress(ConnectionResetError):
            assert await raw.rest() == b""
    # Between two requests as well, once the second has begun, byte by byte or not.
    async with site.line(request("GET", "/", site.name())) as raw:
        assert (await raw.answer())[0] == 200
        raw.writer.write(start or b"P")
        with contextlib.suppress(ConnectionResetError):
            assert await raw.rest() == b""


async def test_a_head_byte_by_byte_gets_no_longer(impatient: Site) -> None:
    site = impatient
    async with site.line(b"") as raw, asyncio.timeout(DEADLINE_S):
        with contextlib.suppress(ConnectionError):
            while not raw.reader.at_eof():
                raw.writer.write(b"G")
                await raw.writer.drain()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(raw.reader.read(1), 0.05)


async def test_a_silent_stream_is_cut_by_nobody(impatient: Site) -> None:
    """Not for what clients owe us."""
    site = impatient
    go_on = asyncio.Event()

    async def serve(_: bytes, __: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\ndata: 1\n\n")
        await go_on.wait()
        writer.write(b"data: 2\n\n")

    site.inside.serve = serve
    async with (
        site.line(request("GET", "/", site.name(), close=True)) as raw,
        site.line(b"") as other,
    ):
        await asyncio.wait_for(raw.reader.readuntil(b"data: 1\n\n"), DEADLINE_S)
        # It outlives one that owes us a head and began later.
        with contextlib.suppress(ConnectionResetError):
            await other.rest()
        go_on.set()
        assert b"data: 2\n\n" in await raw.rest()


# Answers that nobody takes.

_STALL_S = 0.5
_LARGE_BYTES = 64 << 20


@pytest.fixture
async def stalling(migrated_sqlite: Path, tmp_path: Path) -> AsyncIterator[Site]:
    async with opened(migrated_sqlite, tmp_path, stall_s=_STALL_S) as site:
        yield site


def _large(head: bytes) -> Callable[..., Awaitable[None]]:
    """Answers with so much that some of it has to wait."""

    async def serve(_: bytes, __: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(head)
        for _number in range(_LARGE_BYTES >> 20):
            writer.write(b"x" * (1 << 20))
            await writer.drain()

    return serve


_WHOLE = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % _LARGE_BYTES
_SWITCHED = b"HTTP/1.1 101 X\r\nUpgrade: mine\r\nConnection: Upgrade\r\n\r\n"


@pytest.mark.parametrize("head", [_WHOLE, _SWITCHED], ids=["answer", "upgrade"])
async def test_who_takes_nothing_of_an_answer_holds_no_connection(
    stalling: Site, head: bytes
) -> None:
    site = stalling
    site.inside.serve = _large(head)
    asks = ("Connection: Upgrade", "Upgrade: mine") if head is _SWITCHED else ()
    async with site.line(request("GET", "/", site.name(), *asks)) as raw:
        await asyncio.wait_for(raw.reader.readuntil(b"\r\n\r\n"), DEADLINE_S)
        # It reads no more. The server inside is rid of it, whatever becomes of the client.
        await asyncio.wait_for(site.inside.ended.acquire(), DEADLINE_S)
        with pytest.raises(ConnectionResetError):
            await raw.rest()


async def test_who_takes_little_at_a_time_gets_all(stalling: Site) -> None:
    site = stalling
    site.inside.serve = _large(_WHOLE)
    async with site.line(request("GET", "/", site.name(), close=True)) as raw:
        await asyncio.wait_for(raw.reader.readuntil(b"\r\n\r\n"), DEADLINE_S)
        taken, began = 0, time.monotonic()
        while time.monotonic() < began + 6 * _STALL_S:
            taken += len(await asyncio.wait_for(raw.reader.readexactly(1 << 17), DEADLINE_S))
            await asyncio.sleep(_STALL_S / 5)
        assert taken < _LARGE_BYTES / 2
        assert taken + len(await raw.rest()) == _LARGE_BYTES


async def test_a_stream_without_anything_to_send_may_be_silent(stalling: Site) -> None:
    site = stalling
    go_on = asyncio.Event()

    async def serve(_: bytes, __: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\ndata: 1\n\n")
        await go_on.wait()
        writer.write(b"data: 2\n\n")

    site.inside.serve = serve
    async with site.line(request("GET", "/", site.name(), close=True)) as silent:
        await asyncio.wait_for(silent.reader.readuntil(b"data: 1\n\n"), DEADLINE_S)
        # It outlives one that takes nothing, and began later.
        site.inside.serve = _large(_WHOLE)
        async with site.line(request("GET", "/", site.name())) as other:
            await asyncio.wait_for(other.reader.readuntil(b"\r\n\r\n"), DEADLINE_S)
            await asyncio.wait_for(site.inside.ended.acquire(), DEADLINE_S)
        go_on.set()
        assert b"data: 2\n\n" in await silent.rest()


async def test_a_broken_body_after_the_answer_has_begun(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    async def serve(_: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\n\r\nfirst")
        await writer.drain()
        await reader.read()

    site.inside.serve = serve
    data = request("POST", "/", site.name(), "Transfer-Encoding: chunked")
    with caplog.at_level(logging.ERROR):
        async with site.line(data) as raw:
            await asyncio.wait_for(raw.reader.readuntil(b"first"), DEADLINE_S)
            raw.writer.write(b"this is no chunk\r\n")
            with contextlib.suppress(ConnectionResetError):
                assert b"400" not in await raw.rest()
        await asyncio.wait_for(site.inside.ended.acquire(), DEADLINE_S)
    assert not caplog.records


# Guests.


@pytest.mark.parametrize(
    ("before", "endless"),
    [
        (b"", b"HTTP/1.1 102 Processing\r\n\r\n"),
        (b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
        (b"HTTP/1.1 200 OK\r\n", b"X-Y: z\r\n"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n", b"X-Trailer: z\r\n"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1;", b"x=y;"),
    ],
)
async def test_a_guest_that_never_comes_to_the_point(
    site: Site, before: bytes, endless: bytes
) -> None:
    async def serve(_: bytes, __: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(before)
        while True:
            writer.write(endless * 1000)
            await writer.drain()

    site.inside.serve = serve
    async with site.line(request("GET", "/", site.name())) as raw:
        with contextlib.suppress(ConnectionResetError):
            told = await raw.rest() if b"\r\n\r\n" in before else b"502"
            assert b"0\r\n\r\n" not in told
        if b"\r\n\r\n" not in before:
            assert (await raw.answer())[0] == 502
    await asyncio.wait_for(site.inside.ended.acquire(), DEADLINE_S)


# Pages of other sites.


async def test_what_a_browser_asks_before(site: Site) -> None:
    wants = (
        "Origin: https://elsewhere.test",
        "Access-Control-Request-Method: POST",
        "Access-Control-Request-Headers: x-access-token, authorization",
    )
    site.sandbox_id = await site.create(auto_resume=True)
    await asleep(site)
    status, headers, _ = await site.ask("OPTIONS", "/files", *wants, port=GUEST)
    assert status == 204 and headers["access-control-allow-origin"] == "*"
    assert headers["access-control-allow-headers"] == "x-access-token, authorization"
    assert "POST" in headers["access-control-allow-methods"]
    assert "access-control-allow-credentials" not in headers
    # Nobody is woken for it, and a page can read why it is refused.
    path = f"/v1/sandboxes/{site.sandbox_id}"
    assert (await site.api.get(path)).json()["status"] == "paused"
    status, headers, _ = await site.ask("GET", "/files?path=/x", wants[0], port=GUEST)
    assert (status, headers["access-control-allow-origin"]) == (401, "*")
    # Other ports answer for themselves, and the API opens to no page.
    status, headers, _ = await site.ask("OPTIONS", "/", *wants)
    assert (status, "access-control-allow-origin" in headers) == (200, False)
    assert site.inside.head.startswith(b"OPTIONS / ")
    for name in ("", site.sandbox_id):
        api = await site.api.options(
            "/v1/sandboxes",
            headers={"origin": "https://x.test", "access-control-request-method": "GET"}
            | ({"e2b-sandbox-id": name, "e2b-sandbox-port": "8001"} if name else {}),
        )
        assert "access-control-allow-origin" not in api.headers


# Another machine.


async def test_traffic_to_another_machine_goes_over_mutual_tls(
    migrated_sqlite: Path, tmp_path: Path
) -> None:
    url = f"sqlite:///{tmp_path / 'members.sqlite3'}"
    (tmp_path / "members.sqlite3").write_bytes(migrated_sqlite.read_bytes())
    async with served_with_members(url, tmp_path) as served, joined(served) as (host, member, _d):
        async with echoing() as inside:
            member.fakes.guests.ports[OPEN] = inside
            made = await served.ask(
                "POST", "/v1/sandboxes", 201, json={"memory_mb": 128, "disk_size_mb": 8}
            )
            await passes_over_tls(served, str(made["id"]))
            other = await served.ask(
                "POST", "/v1/sandboxes", 201, json={"memory_mb": 128, "disk_size_mb": 8}
            )
            agent = await served.platform.hosts.agent(host)
            port = int(served.url.rpartition(":")[2])
            await is_kept(agent, port, [str(made["id"]), str(other["id"])])
        # Who has no certificate of the platform's gets nowhere.
        address = member.address
        assert address.startswith("https://")
        async with httpx.AsyncClient(verify=False, trust_env=False) as stranger:
            with pytest.raises(httpx.TransportError):
                await stranger.get(f"{address}/sandbox/{made['id']}/{OPEN}/")


async def passes_over_tls(served: Served, sandbox_id: str) -> None:
    size = 4 << 20
    host = f"{OPEN}-{sandbox_id}.sandboxes.test"
    port = int(served.url.rpartition(":")[2])
    async with connected(port) as raw:
        for _ in range(2):
            raw.writer.write(request("POST", "/", host, body=b"x" * size))
            status, _, body = await raw.answer()
            assert (status, len(body)) == (200, size)
        raw.writer.write(request("GET", "/", host, "Connection: Upgrade", "Upgrade: mine"))
        assert (await raw.answer())[0] == 101
        raw.writer.write(b"y" * size)
        assert await asyncio.wait_for(raw.reader.readexactly(size), DEADLINE_S) == b"y" * size


async def is_kept(agent: Agent, control_port: int, sandbox_ids: Sequence[str]) -> None:
    """One request after the other goes by one connection, which no other sandbox gets."""

    async def ask(sandbox_id: str, port: int = OPEN) -> tuple[int, Line | None]:
        host = f"{port}-{sandbox_id}.sandboxes.test"
        async with connected(control_port, request("POST", "/", host, body=b"words")) as raw:
            status, _, body = await raw.answer()
        assert (status, body) == (200, b"words") or port != OPEN
        kept = agent._kept._resting.get(sandbox_id)
        return status, kept[-1][0] if kept else None

    one, other = sandbox_ids
    _, first = await ask(one)
    assert first is not None and first.rests
    assert [await ask(one) for _ in range(3)] == [(200, first)] * 3
    _, second = await ask(other)
    assert second is not None and second is not first
    # What did not go as it should leaves nothing behind.
    assert await ask(one, CLOSED) == (502, None)
    assert not first.rests
    _, third = await ask(one)
    assert third is not None and third is not first and third is not second
    await asyncio.gather(*(ask(one) for _ in range(30)))
    assert 1 <= len(agent._kept._resting[one]) <= 8 and agent._kept._resting[other][0][0] is second


@contextlib.asynccontextmanager
async def echoing() -> AsyncIterator[int]:
    """A server that sends back what it gets: a body, or what follows an upgrade."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
            if b"upgrade: mine" in head:
                writer.write(b"HTTP/1.1 101 X\r\nUpgrade: mine\r\nConnection: Upgrade\r\n\r\n")
                while data := await reader.read(1 << 16):
                    writer.write(data)
                    await writer.drain()
            else:
                size = int(head.partition(b"content-length: ")[2].split(b"\r\n")[0])
                body = await reader.readexactly(size)
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size + body)
                await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
