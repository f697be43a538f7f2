"""Traffic of sandboxes through the control plane's port and an agent, over real connections."""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import websockets

from sandmartin.control.platform import Platform
from tests.control.conftest import (
    DEADLINE_S,
    RunningHost,
    make_team,
    running_host,
    served_platform,
)
from tests.control.inside import Inside, Raw, connected, listening, request

OPEN, CLOSED = 8000, 8001


@dataclass
class Site:
    """A platform that is served, and a sandbox in which something listens."""

    platform: Platform
    host: RunningHost
    port: int
    api: httpx.AsyncClient
    inside: Inside
    sandbox_id: str = ""

    def name(self, port: int = OPEN) -> str:
        return f"{port}-{self.sandbox_id}.sandboxes.test"

    async def create(self, **body: object) -> str:
        wanted = {"memory_mb": 128, "disk_size_mb": 8, **body}
        made = await self.api.post("/v1/sandboxes", json=wanted)
        assert made.status_code == 201, made.text
        return str(made.json()["id"])

    async def ask(
        self, method: str, target: str, *headers: str, port: int = OPEN, body: bytes = b""
    ) -> tuple[int, dict[str, str], bytes]:
        """One request to the sandbox, and its answer."""
        data = request(method, target, self.name(port), *headers, body=body)
        async with connected(self.port, data) as raw:
            return await raw.answer()

    async def refused(
        self, method: str, target: str, *headers: str, port: int = OPEN
    ) -> tuple[int, str]:
        status, _, body = await self.ask(method, target, *headers, port=port)
        return status, str(json.loads(body)["message"])

    def line(self, data: bytes) -> contextlib.AbstractAsyncContextManager[Raw]:
        return connected(self.port, data)


@contextlib.asynccontextmanager
async def opened(migrated: Path, tmp_path: Path, **settings: object) -> AsyncIterator[Site]:
    path = tmp_path / "control.sqlite3"
    shutil.copy(migrated, path)
    async with contextlib.AsyncExitStack() as stack:
        inside = await stack.enter_async_context(listening())
        host = await stack.enter_async_context(running_host())
        host.fakes.guests.ports[OPEN] = inside.port
        platform, url = await stack.enter_async_context(
            served_platform(f"sqlite:///{path}", tmp_path, host, **settings)
        )
        _, key = await make_team(platform)
        api = await stack.enter_async_context(
            httpx.AsyncClient(
                base_url=url, headers={"x-api-key": key}, timeout=DEADLINE_S, trust_env=False
            )
        )
        site = Site(platform, host, int(url.rpartition(":")[2]), api, inside)
        site.sandbox_id = await site.create()
        yield site


@pytest.fixture
async def site(migrated_sqlite: Path, tmp_path: Path) -> AsyncIterator[Site]:
    async with opened(migrated_sqlite, tmp_path) as site:
        yield site


async def test_a_request_comes_to_the_port_and_its_answer_back(site: Site) -> None:
    status, headers, body = await site.ask("GET", "/a%2Fb/../c?x=%20&y", "X-Mine: 1", "X-Mine: 2")
    assert (status, body) == (200, b"hi")
    assert site.inside.head.startswith(b"GET /a%2Fb/../c?x=%20&y HTTP/1.1\r\n")
    assert site.inside.header("host") == [site.name()]
    assert site.inside.header("x-mine") == ["1", "2"]
    assert "date" in headers and "connection" not in headers


async def test_a_websocket(site: Site) -> None:
    async def echo(socket: websockets.ServerConnection) -> None:
        async for message in socket:
            await socket.send(message)

    async with websockets.serve(echo, "127.0.0.1", 0) as server:
        site.host.fakes.guests.ports[CLOSED] = server.sockets[0].getsockname()[1]
        async with websockets.connect(
            f"ws://{site.name(CLOSED)}/ws", host="127.0.0.1", port=site.port, proxy=None
        ) as socket:
            for size in (0, 5, 1 << 20):
                await socket.send(b"x" * size)
                assert await asyncio.wait_for(socket.recv(), DEADLINE_S) == b"x" * size


# Framing.


async def test_a_kept_connection_finds_its_sandbox_at_each_request(site: Site) -> None:
    other = await site.create()
    async with site.line(b"") as raw:
        for host, status in (
            (site.name(), 200),
            (f"{CLOSED}-{site.sandbox_id}.x", 502),
            (f"{OPEN}-{other}.sandboxes.test", 200),
            (f"127.0.0.1:{site.port}", 401),
        ):
            raw.writer.write(request("GET", "/v1/sandboxes", host))
            assert (await raw.answer())[0] == status


@pytest.mark.parametrize("chunked", [False, True])
async def test_a_large_body_passes_both_ways_at_once(site: Site, chunked: bool) -> None:
    size = 24 << 20

    async def echo(head: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        assert (b"chunked" in head.lower()) == chunked
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        seen = 0
        while seen < size:
            data = await reader.read(1 << 16)
            seen += len(data)
            writer.write(b"%x\r\n%s\r\n" % (len(data), data))
            await writer.drain()
        writer.write(b"0\r\n\r\n")

    async def echo_chunks(
        _: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        while left := int(await reader.readline(), 16):
            data = await reader.readexactly(left + 2)
            writer.write(b"%x\r\n%s" % (left, data))
            await writer.drain()
        writer.write(b"0\r\n\r\n")

    site.inside.serve = echo_chunks if chunked else echo
    piece = bytes(range(256)) * 256
    pieces = size // len(piece)

    async def body() -> AsyncIterator[bytes]:
        for _ in range(pieces):
            yield piece

    # A client that does both at once; most send everything first.
    length = "Transfer-Encoding: chunked" if chunked else f"Content-Length: {size}"
    async with site.line(request("POST", "/", site.name(), length)) as raw:

        async def send() -> None:
            for _ in range(pieces):
                raw.writer.write(b"%x\r\n%s\r\n" % (len(piece), piece) if chunked else piece)
                await raw.writer.drain()
            if chunked:
                raw.writer.write(b"0\r\n\r\n")

        sending = asyncio.create_task(send())
        await raw.reader.readuntil(b"\r\n\r\n")
        received = 0
        while left := int(await raw.reader.readline(), 16):
            received += len((await raw.reader.readexactly(left + 2))[:-2])
        await sending
        assert received == size


async def test_answers_without_a_body(site: Site) -> None:
    async def serve(head: bytes, _: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        status = head.split(b" ")[1].lstrip(b"/")
        length = b"Content-Length: 7\r\n" if head.startswith(b"HEAD") or status == b"304" else b""
        writer.write(b"HTTP/1.1 %s X\r\nETag: e\r\n%s\r\n" % (status, length))

    site.inside.serve = serve
    async with site.line(b"") as raw:
        for method, code in (("HEAD", 200), ("GET", 204), ("GET", 304), ("HEAD", 404)):
            raw.writer.write(request(method, f"/{code}", site.name()))
            head = await asyncio.wait_for(raw.reader.readuntil(b"\r\n\r\n"), DEADLINE_S)
            assert head.startswith(b"HTTP/1.1 %d" % code) and b"etag: e" in head
            assert (b"content-length: 7" in head) == (method == "HEAD" or code == 304)


async def test_a_client_that_waits_to_be_asked_for_its_body(site: Site) -> None:
    asked = asyncio.Event()

    async def serve(
        head: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        if b"/no" in head:
            writer.write(b"HTTP/1.1 413 No\r\nContent-Length: 0\r\n\r\n")
            return
        assert b"expect: 100-continue" in head.lower()
        asked.set()
        writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        body = await reader.readexactly(4)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\n" + body)

    site.inside.serve = serve
    expecting = ("Expect: 100-continue", "Content-Length: 4")
    async with site.line(request("POST", "/no", site.name(), *expecting)) as raw:
        assert (await raw.answer())[0] == 413
    async with site.line(request("POST", "/", site.name(), *expecting)) as raw:
        assert (await raw.answer())[0] == 100
        assert asked.is_set()
        raw.writer.write(b"body")
        assert (await raw.answer())[2] == b"body"


async def test_an_early_answer_to_a_long_upload(site: Site) -> None:
    async def serve(_: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readexactly(1000)
        writer.write(b"HTTP/1.1 413 No\r\nContent-Length: 2\r\n\r\nno")
        await writer.drain()
        writer.write_eof()
        await reader.read()

    site.inside.serve = serve
    data = request("POST", "/", site.name(), f"Content-Length: {8 << 20}")
    async with site.line(data) as raw:
        raw.writer.write(b"x" * (1 << 20))
        assert (await raw.answer())[::2] == (413, b"no")


async def test_events_come_one_by_one(site: Site) -> None:
    go_on = asyncio.Event()

    async def serve(_: bytes, __: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\ndata: 1\n\n")
        await go_on.wait()
        writer.write(b"data: 2\n\n")

    site.inside.serve = serve
    async with site.line(request("GET", "/", site.name(), close=True)) as raw:
        await asyncio.wait_for(raw.reader.readuntil(b"data: 1\n\n"), DEADLINE_S)
        go_on.set()
        assert b"data: 2\n\n" in await raw.rest()


async def test_a_slow_client_slows_the_server_in_the_sandbox(site: Site) -> None:
    sent = 0

    async def serve(
        head: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        nonlocal sent
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % (256 << 20))
        for _ in range(256):
            writer.write(b"x" * (1 << 20))
            await writer.drain()
            sent += 1

    site.inside.serve = serve
    async with site.line(request("GET", "/", site.name())) as raw:
        await raw.reader.readuntil(b"\r\n\r\n")
        # Until nothing moves any more.
        before = -1
        async with asyncio.timeout(DEADLINE_S):
            while sent != before:
                before = sent
                await asyncio.sleep(0.5)
        assert sent < 64
    await asyncio.wait_for(site.inside.ended.acquire(), DEADLINE_S)


@pytest.mark.parametrize(
    "headers",
    [
        ("Content-Length: 4", "Transfer-Encoding: chunked"),
        ("Content-Length: 4", "Content-Length: 5"),
        ("Content-Length: +4",),
        ("Transfer-Encoding: gzip, chunked",),
        ("Transfer-Encoding : chunked",),
        ("Transfer-Encoding: xchunked",),
        ("Host: 8001-sbother.x",),
        ("X: a\rb",),
    ],
)
async def test_lengths_that_two_could_read_in_two_ways(
    site: Site, headers: tuple[str, ...]
) -> None:
    smuggled = b"0\r\n\r\nGET /smuggled HTTP/1.1\r\nHost: x\r\n\r\n"
    data = request("POST", "/", site.name(), *headers) + smuggled
    async with site.line(data) as raw:
        status, _, _ = await raw.answer()
        assert status in {400, 501}
        await raw.rest()
    assert not site.inside.heads


async def test_a_folded_header_is_one_line_inside(site: Site) -> None:
    data = request("GET", "/", site.name(), "X-Mine: a\r\n Content-Length: 7\r\n\tX-Api-Key: k")
    async with site.line(data) as raw:
        assert (await raw.answer())[0] == 200
    assert site.inside.header("x-mine") == ["a Content-Length: 7 X-Api-Key: k"]
    assert not site.inside.header("content-length")


async def test_what_is_for_one_connection_alone_stays_there(site: Site) -> None:
    headers = ("Connection: keep-alive, X-Gone, Content-Length", "X-Gone: 1", "TE: trailers")
    sent = (
        *headers,
        "Keep-Alive: 9",
        "Proxy-Authorization: p",
        "Upgrade: h2c",
        "HTTP2-Settings: x",
    )
    status, _, _ = await site.ask("POST", "/", *sent, body=b"body")
    assert status == 200
    for gone in ("x-gone", "te", "keep-alive", "proxy-authorization", "upgrade", "connection"):
        assert not site.inside.header(gone), gone
    assert site.inside.header("content-length") == ["4"]


async def test_where_it_comes_from_is_what_we_say(site: Site) -> None:
    lies = (
        "X-Forwarded-For: 1.2.3.4",
        "X-Forwarded-Proto: https",
        "Forwarded: for=1",
        "X-Real-IP: 1",
    )
    await site.ask("GET", "/", *lies, "X-Forwarded-Prefix: /x")
    assert site.inside.header("x-forwarded-for") == ["127.0.0.1"]
    assert site.inside.header("x-forwarded-proto") == ["http"]
    assert site.inside.header("x-forwarded-host") == [site.name()]
    assert not any(site.inside.header(each) for each in ("forwarded", "x-real-ip"))
    assert not site.inside.header("x-forwarded-prefix")


# Secrets.


async def test_what_opens_the_platform_is_taken_out(site: Site) -> None:
    key = str(site.api.headers["x-api-key"])
    await site.ask(
        "GET",
        "/",
        f"X-API-KEY: {key}",
        f"Authorization: bearer {key}",
        "Cookie: a=1; sandmartin_session=s; __Host-sandmartin=s; b=2",
        "X-Access-Token: t",
        "E2b-Traffic-Access-Token: t",
        "X-Traffic-Token: t",
        "Sandmartin-Expects: 1",
        "E2b-Sandbox-Id: x",
    )
    head = site.inside.head.lower()
    for secret in (key.encode(), b"sandmartin", b"x-api-key", b"token", b"authorization", b"e2b-"):
        assert secret not in head, secret
    assert site.inside.header("cookie") == ["a=1; b=2"]
    await site.ask("GET", "/", "Authorization: Bearer of-the-application", "Cookie: c=3")
    assert site.inside.header("authorization") == ["Bearer of-the-application"]


async def test_no_guest_speaks_for_us(site: Site) -> None:
    async def serve(_: bytes, __: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(
            b"HTTP/1.1 200 OK\r\nSandmartin-Refusal: paused\r\nSet-Cookie: sandmartin_session=x\r\n"
            b"Set-Cookie: mine=1\r\nContent-Length: 2\r\n\r\nhi"
        )

    site.inside.serve = serve
    status, headers, body = await site.ask("GET", "/")
    assert (status, body) == (200, b"hi")
    assert headers["set-cookie"] == "mine=1" and "sandmartin-refusal" not in headers


async def test_private_ports_need_the_traffic_token(site: Site) -> None:
    site.sandbox_id = await site.create(public_traffic=False)
    site.host.fakes.guests.ports[49999] = site.inside.port
    access = (await site.api.get(f"/v1/sandboxes/{site.sandbox_id}/access")).json()
    for port in (OPEN, 49999):
        status, message = await site.refused("GET", "/", port=port)
        assert status == 403 and "private" in message
        wrong = f"E2b-Traffic-Access-Token: {access['access_token']}"
        assert (await site.refused("GET", "/", wrong, port=port))[0] == 403
        for name in ("E2b-Traffic-Access-Token", "X-Traffic-Token"):
            right = f"{name}: {access['traffic_token']}"
            assert (await site.ask("GET", "/", right, port=port))[0] == 200
    opened = f"X-Access-Token: {access['access_token']}"
    assert (await site.ask("GET", "/", opened, port=49999))[0] == 200
    # Theirs alone, and the guest's own for it.
    assert site.inside.header("x-access-token") != [access["access_token"]]
    assert (await site.refused("GET", "/", opened))[0] == 403


# What goes wrong.


async def test_nothing_there(site: Site) -> None:
    status, _, body = await site.ask("GET", "/", port=CLOSED)
    assert status == 502
    assert json.loads(body) == {
        "sandboxId": site.sandbox_id,
        "message": "The sandbox is running but port is not open",
        "code": 502,
        "port": CLOSED,
    }
    site.sandbox_id, living = "sb" + "0" * 20, site.sandbox_id
    status, _, body = await site.ask("GET", "/", "Accept: text/html,*/*;q=0.1")
    assert status == 502 and body.startswith(b"<!doctype html>") and b"was not found" in body
    site.sandbox_id = living
    assert (await site.api.delete(f"/v1/sandboxes/{living}")).status_code == 204
    assert await site.refused("GET", "/") == (502, "The sandbox was not found")


@pytest.mark.parametrize(
    "garbage",
    [
        b"",
        b"SSH-2.0-x\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
        b"HTTP/1.1 999 X\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 101 X\r\nUpgrade: tcp\r\nConnection: upgrade\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX: \x00\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 200000 + b"\r\n",
    ],
)
async def test_what_is_no_answer(site: Site, garbage: bytes) -> None:
    async def serve(_: bytes, __: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(garbage)

    site.inside.serve = serve
    status, message = await site.refused("GET", "/")
    assert status == 502 and "not found" not in message and "not open" not in message


async def _endless(_: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\n\r\nfirst")
    await writer.drain()
    await reader.read()


@pytest.mark.parametrize("how", ["destroy", "pause", "server"])
async def test_an_answer_that_breaks_off_is_not_completed(site: Site, how: str) -> None:
    cut = asyncio.Event()

    async def serve(
        head: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nfirst")
        await writer.drain()
        await cut.wait()
        writer.transport.abort()

    site.inside.serve = serve if how == "server" else _endless
    async with site.line(request("GET", "/", site.name())) as raw:
        await asyncio.wait_for(raw.reader.readuntil(b"first"), DEADLINE_S)
        path = f"/v1/sandboxes/{site.sandbox_id}"
        if how == "destroy":
            assert (await site.api.delete(path)).status_code == 204
        elif how == "pause":
            assert (await site.api.post(f"{path}/pause")).status_code == 200
        else:
            cut.set()
        with contextlib.suppress(ConnectionResetError):
            assert b"0\r\n" not in await raw.rest()


async def test_a_client_that_goes_away_ends_it_inside(site: Site) -> None:
    site.inside.serve = _endless
    async with site.line(request("GET", "/", site.name())) as raw:
        await asyncio.wait_for(raw.reader.readuntil(b"first"), DEADLINE_S)
    await asyncio.wait_for(site.inside.ended.acquire(), DEADLINE_S)


async def test_an_upgrade_that_is_refused_is_an_answer(site: Site) -> None:
    upgrade = ("Connection: Upgrade", "Upgrade: websocket")
    assert (await site.ask("GET", "/", *upgrade))[::2] == (200, b"hi")
    assert site.inside.header("upgrade") == ["websocket"]
    assert (await site.refused("GET", "/", *upgrade, port=CLOSED))[0] == 502


async def test_what_follows_an_upgrade_passes_byte_for_byte(site: Site) -> None:
    async def serve(_: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 101 X\r\nUpgrade: mine\r\nConnection: Upgrade\r\n\r\nearly\0")
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()
        writer.write(b"end")

    site.inside.serve = serve
    data = request("GET", "/", site.name(), "Connection: Upgrade", "Upgrade: mine")
    async with site.line(data + b"GET / HTTP/1.1\r\n\r\n\xff\0") as raw:
        assert (await raw.answer())[0] == 101
        expected = b"early\0GET / HTTP/1.1\r\n\r\n\xff\0"
        async with asyncio.timeout(DEADLINE_S):
            assert await raw.reader.readexactly(len(expected)) == expected
            raw.writer.write_eof()
            assert await raw.rest() == b"end"


# Sleep.


async def test_traffic_wakes_a_sandbox_that_may_be_woken(site: Site) -> None:
    site.sandbox_id = await site.create(auto_resume=True)
    path = f"/v1/sandboxes/{site.sandbox_id}"
    assert (await site.api.post(f"{path}/pause")).status_code == 200
    answers = await asyncio.gather(*(site.ask("POST", "/", body=b"body") for _ in range(10)))
    assert {status for status, _, _ in answers} == {200}
    kinds = [each["kind"] for each in (await site.api.get(f"{path}/timeline")).json()]
    assert kinds.count("sandbox.resuming") == 1


async def test_what_its_host_put_to_sleep_is_woken_before_its_row_says_so(site: Site) -> None:
    site.sandbox_id = await site.create(auto_resume=True)
    agent = await site.platform.hosts.agent(await _host_of(site))
    await agent.pause(site.sandbox_id)
    assert (await site.ask("GET", "/"))[0] == 200


async def _host_of(site: Site) -> str:
    found = (await site.api.get(f"/v1/sandboxes/{site.sandbox_id}")).json()
    return str(found["host_id"])


async def test_others_sleep_on(site: Site) -> None:
    path = f"/v1/sandboxes/{site.sandbox_id}"
    assert (await site.api.post(f"{path}/pause")).status_code == 200
    assert await site.refused("GET", "/") == (502, "The sandbox was not found")
    assert (await site.api.get(path)).json()["status"] == "paused"


async def test_a_stream_keeps_a_sandbox_awake_while_something_passes(site: Site) -> None:
    site.sandbox_id = await site.create(timeout_sec=1)
    stop = asyncio.Event()

    async def serve(_: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
        while not stop.is_set():
            writer.write(b"x")
            await asyncio.sleep(0.1)
        await reader.read()

    site.inside.serve = serve
    async with site.line(request("GET", "/", site.name())) as raw:
        for _ in range(20):
            # Each comes after what came before it, so two seconds and more pass.
            assert b"x" in await asyncio.wait_for(raw.reader.readuntil(b"x"), DEADLINE_S)
        agent = await site.platform.hosts.agent(await _host_of(site))
        states = {each.sandbox_id: each.state for each in await agent.list_sandboxes()}
        assert states[site.sandbox_id] == "running"
        stop.set()
        # Then it idles, is put to sleep, and the connection with it.
        with contextlib.suppress(ConnectionResetError):
            await raw.rest()


async def test_a_vm_that_ends_by_itself_cuts_its_connections(site: Site) -> None:
    site.inside.serve = _endless
    async with site.line(request("GET", "/", site.name())) as raw:
        await asyncio.wait_for(raw.reader.readuntil(b"first"), DEADLINE_S)
        for vm in site.host.fakes.machine.vmm.vms.values():  # type: ignore[attr-defined]
            await vm.kill()
        with contextlib.suppress(ConnectionResetError):
            await raw.rest()
