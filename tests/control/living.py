"""Hosts whose fake VMs have a real inside: the guest agent, as a process of this machine.

All sandboxes of such a host share that one guest, so a test has one sandbox, or does not mind.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import websockets

from sandmartin.agent.guest import Command, FileInfo, Guest, ProcessEvent, Running, Terminal
from sandmartin.agent.machine import GuestFactory
from sandmartin.control.bootstrap import ensure_platform
from sandmartin.control.platform import Platform, open_platform
from sandmartin.control.reconciler import Pace
from sandmartin.control.server import listen, serving
from sandmartin.control.settings import ControlSettings
from sandmartin.relay.line import Line
from tests.contract.guests import RunningAgent, identity, running
from tests.control.conftest import (
    DEADLINE_S,
    TIMING,
    RunningHost,
    facts_of,
    make_team,
    running_host,
)
from tests.fakes_agent import FakeGuest, Guests


class LivingGuest(FakeGuest):
    """Introduced like a fake; what is done inside is done by a real guest agent."""

    def __init__(self, guests: Guests, address: str, token: str, inside: Guest) -> None:
        super().__init__(guests, address, token)
        self._inside = inside

    @property
    def token(self) -> str:
        return self._inside.token

    async def dial(self, port: int) -> Line:
        self._check()
        return await self._inside.dial(port)

    def hang_up(self) -> None:
        self._inside.hang_up()

    async def start(self, command: Command) -> AsyncGenerator[ProcessEvent, None]:
        self._check()
        async with contextlib.aclosing(self._inside.start(command)) as events:
            async for event in events:
                yield event

    async def attach(self, pid: int) -> AsyncGenerator[ProcessEvent, None]:
        async with contextlib.aclosing(self._inside.attach(pid)) as events:
            async for event in events:
                yield event

    async def send_input(self, pid: int, data: bytes) -> None:
        await self._inside.send_input(pid, data)

    async def close_input(self, pid: int) -> None:
        await self._inside.close_input(pid)

    async def signal(self, pid: int, number: int) -> None:
        await self._inside.signal(pid, number)

    async def resize(self, pid: int, size: Terminal) -> None:
        await self._inside.resize(pid, size)

    async def processes(self) -> list[Running]:
        return await self._inside.processes()

    async def stat(self, path: str, user: str) -> FileInfo:
        return await self._inside.stat(path, user)

    async def list_files(self, path: str, user: str, depth: int) -> list[FileInfo]:
        return await self._inside.list_files(path, user, depth)

    async def make_directory(self, path: str, user: str) -> None:
        await self._inside.make_directory(path, user)

    async def move_file(self, source: str, destination: str, user: str) -> None:
        await self._inside.move_file(source, destination, user)

    async def remove_file(self, path: str, user: str) -> None:
        await self._inside.remove_file(path, user)

    async def upload(self, path: str, user: str, chunks: AsyncIterable[bytes]) -> None:
        self._check()
        await self._inside.upload(path, user, chunks)

    async def download(self, path: str, user: str) -> AsyncGenerator[bytes, None]:
        self._check()
        async with contextlib.aclosing(self._inside.download(path, user)) as chunks:
            async for chunk in chunks:
                yield chunk

    async def write_tree(self, directory: str, owner: str, chunks: AsyncIterable[bytes]) -> int:
        self._check()
        return await self._inside.write_tree(directory, owner, chunks)

    async def read_tree(self, path: str) -> AsyncGenerator[bytes, None]:
        self._check()
        async with contextlib.aclosing(self._inside.read_tree(path)) as chunks:
            async for chunk in chunks:
                yield chunk


@contextlib.asynccontextmanager
async def living_guest(binary: Path) -> AsyncIterator[RunningAgent]:
    """A guest agent that knows who it is."""
    with running(binary) as agent:
        client = agent.client()
        await client.introduce(identity(), 10)
        await client.close()
        yield agent


@contextlib.asynccontextmanager
async def living_host(agent: RunningAgent) -> AsyncIterator[RunningHost]:
    """A host all of whose sandboxes have `agent` inside."""
    client = agent.client()

    def inside(guests: Guests) -> GuestFactory:
        return lambda address, token: LivingGuest(guests, address, token, client)

    try:
        async with running_host(inside=inside) as host:
            yield host
    finally:
        await client.close()


@dataclass(frozen=True)
class Place:
    """A platform that is served over real connections, and a running sandbox of a team."""

    platform: Platform
    host: RunningHost
    url: str
    key: str
    sandbox_id: str
    http: httpx.AsyncClient

    @property
    def path(self) -> str:
        return f"/v1/sandboxes/{self.sandbox_id}"

    def socket(self, path: str, **options: Any) -> websockets.connect:
        """A WebSocket to a path below the sandbox's."""
        headers = options.pop("headers", {"x-api-key": self.key})
        url = f"ws{self.url.removeprefix('http')}{self.path}{path}"
        return websockets.connect(
            url, additional_headers=headers, compression=None, proxy=None, **options
        )


@contextlib.asynccontextmanager
async def living_place(
    database_url: str, directory: Path, agent: RunningAgent
) -> AsyncIterator[Place]:
    """A place to work inside a sandbox."""
    settings = ControlSettings(data_dir=directory / "control", database_url=database_url)
    async with contextlib.AsyncExitStack() as stack:
        host = await stack.enter_async_context(living_host(agent))
        platform = await stack.enter_async_context(
            open_platform(settings, timing=TIMING, pace=Pace(period_s=1.0))
        )
        await ensure_platform(platform.db)
        await platform.hosts.ensure_local(facts_of(host))
        await platform.reconciler.tick()
        _, key = await make_team(platform)
        listener = stack.enter_context(contextlib.closing(listen("127.0.0.1", 0)))
        await stack.enter_async_context(serving(platform, listener))
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        http = await stack.enter_async_context(
            httpx.AsyncClient(
                base_url=url, headers={"x-api-key": key}, timeout=DEADLINE_S, trust_env=False
            )
        )
        made = await http.post("/v1/sandboxes", json={"memory_mb": 128, "disk_size_mb": 8})
        assert made.status_code == 201, made.text
        yield Place(platform, host, url, key, made.json()["id"], http)
