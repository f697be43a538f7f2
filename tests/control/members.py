"""Hosts that join as hosts do: agents on fakes that register over HTTP and serve over TLS."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from sandmartin.agent.membership import NO_WISH, Wish
from sandmartin.agent.server import serve_machine
from sandmartin.control.bootstrap import ensure_first_key, ensure_platform
from sandmartin.control.platform import Platform, open_platform
from sandmartin.control.server import listen, serving
from sandmartin.control.settings import ControlSettings
from tests.control.conftest import DEADLINE_S, PACE, TIMING
from tests.fakes_agent import Fakes, machine_directory, make_machine

HEARTBEAT_S = 0.1


@dataclass(frozen=True)
class Served:
    """A control plane that listens, and a client that administers it."""

    platform: Platform
    url: str
    http: httpx.AsyncClient

    async def ask(self, method: str, path: str, status: int = 200, **options: Any) -> Any:
        answer = await self.http.request(method, path, **options)
        assert answer.status_code == status, answer.text
        return answer.json() if answer.content else None

    async def add(self, name: str) -> tuple[str, str]:
        """A host that is to come: its id and token."""
        made = await self.ask("POST", "/v1/hosts", 201, json={"name": name})
        return made["host"]["id"], made["token"]

    async def host(self, host_id: str) -> dict[str, Any]:
        found: dict[str, Any] = await self.ask("GET", f"/v1/hosts/{host_id}")
        return found


@contextlib.asynccontextmanager
async def served_platform(database_url: str, directory: Path) -> AsyncIterator[Served]:
    settings = ControlSettings(data_dir=directory / "control", database_url=database_url)
    with contextlib.closing(listen("127.0.0.1", 0)) as listener:
        async with open_platform(settings, timing=TIMING, pace=PACE) as platform:
            await ensure_platform(platform.db)
            key = await ensure_first_key(platform.db, platform.keys, directory / "api.key")
            async with serving(platform, listener):
                url = f"http://127.0.0.1:{listener.getsockname()[1]}"
                async with httpx.AsyncClient(
                    base_url=url, headers={"x-api-key": key}, timeout=DEADLINE_S
                ) as http:
                    yield Served(platform, url, http)


@dataclass
class Member:
    """An agent that serves as a host of a platform."""

    fakes: Fakes = field(repr=False)
    leave: asyncio.Event
    task: asyncio.Task[None]
    address: str = ""


@contextlib.asynccontextmanager
async def member(directory: Path, wish: Wish = NO_WISH) -> AsyncIterator[Member]:
    """An agent on `directory`; its VMs run on when it ends."""
    fakes = make_machine(directory)
    leave, told = asyncio.Event(), asyncio.Queue[dict[str, Any]]()
    task = asyncio.create_task(
        serve_machine(
            fakes.machine,
            announce=told.put_nowait,
            leave=leave,
            wish=wish,
            heartbeat_s=HEARTBEAT_S,
        )
    )
    try:
        waiting = asyncio.ensure_future(told.get())
        await asyncio.wait({task, waiting}, return_when=asyncio.FIRST_COMPLETED)
        if not waiting.done():
            waiting.cancel()
            task.result()
        yield Member(fakes, leave, task, waiting.result().get("address", ""))
    finally:
        leave.set()
        await asyncio.wait({task})
        fakes.data.close()


def wish(served: Served, token: str) -> Wish:
    return Wish(control=served.url, token=token, listen="127.0.0.1:0")


@contextlib.asynccontextmanager
async def joined(served: Served, name: str = "alpha") -> AsyncIterator[tuple[str, Member, Path]]:
    """A new host that has joined: its id, its agent, and its directory."""
    host_id, token = await served.add(name)
    with machine_directory() as directory:
        async with member(directory, wish(served, token)) as made:
            await until(lambda: has_templates(served, host_id))
            yield host_id, made, directory


async def has_templates(served: Served, host_id: str) -> bool:
    """Whether the reconciler has seen it."""
    await served.platform.reconciler.tick()
    return bool((await served.host(host_id))["status"] == "online")


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not await condition():
            await asyncio.sleep(0.02)
