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


@pytest.fixture
async def site(migrated_sqlite: Path, tmp_path: Path) -> AsyncIterator[Site]:
    path = tmp_path / "control.sqlite3"
    shutil.copy(migrated_sqlite, path)
    async with contextlib.AsyncExitStack() as stack:
        inside = await stack.enter_async_context(listening())
        host = await stack.enter_async_context(running_host())
        host.fakes.guests.ports[OPEN] = inside.port
        platform, url = await stack.enter_async_context(
            served_platform(f"sqlite:///{path}", tmp_path, host)
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
