"""The list with 500 sandboxes: it scrolls, and follows what becomes of them, without hitches.

The control plane and its HTTP are real, and so are some sandboxes on a host that pretends to run
VMs; the others sleep on a host that is away, since 500 VMs do not fit here.
"""

from __future__ import annotations

import asyncio
import contextlib
import statistics
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from anyio.from_thread import BlockingPortal, start_blocking_portal
from playwright.sync_api import Browser, Page, expect

from sandmartin.control import tables
from sandmartin.control.platform import Platform
from sandmartin.control.states import HostState
from sandmartin.model import State, new_sandbox_id
from tests.control.conftest import running_host, served_platform
from tests.dashboard.conftest import PASSWORD, WIDE, complaints_of, watched

ASLEEP, AWAKE = 480, 20
#: What a machine that is busy with its tests may take for one piece of work, in milliseconds.
#: People notice some 100 on theirs.
LONGEST_MS = 250
_OBSERVE = """
globalThis.long = [];
new PerformanceObserver((list) => {
  for (const each of list.getEntries()) globalThis.long.push(each.duration);
}).observe({ type: "longtask" });
"""
#: Scrolls to the end, a step with each frame; how long the frames took, in milliseconds.
_SCROLL = """
async () => {
  const frames = [];
  let before = performance.now();
  for (let top = 0; top < document.documentElement.scrollHeight; top += 120) {
    scrollTo(0, top);
    await new Promise(requestAnimationFrame);
    const now = performance.now();
    frames.push(now - before);
    before = now;
  }
  return frames;
}
"""


@dataclass(frozen=True)
class Crowd:
    """A control plane, and somebody with very many sandboxes."""

    portal: BlockingPortal
    http: httpx.AsyncClient
    awake: list[str]

    def pause_all(self) -> None:
        self.portal.call(self._pause_all)

    async def _pause_all(self) -> None:
        paused = [self.http.post(f"/v1/sandboxes/{each}/pause") for each in self.awake]
        assert {each.status_code for each in await asyncio.gather(*paused)} == {200}


@contextlib.asynccontextmanager
async def crowd(portal: BlockingPortal, directory: Path) -> AsyncIterator[Crowd]:
    url = f"sqlite:///{directory / 'control.sqlite3'}"
    limits = {"max_sandboxes": 1000, "max_vcpus": 1000, "max_memory_mb": 1 << 20}
    async with (
        running_host() as host,
        served_platform(url, directory, host, sign_up="open", **limits) as (platform, address),
        httpx.AsyncClient(base_url=address, timeout=60) as http,
    ):
        account = {"email": "ada@example.org", "password": PASSWORD}
        me = (await http.post("/v1/auth/signup", json=account)).raise_for_status().json()
        http.headers["x-csrf-token"] = me["csrf_token"]
        await _add_sleepers(platform, me["team_id"])
        body = {"memory_mb": 128, "metadata": {"who": "is awake"}}
        created = [http.post("/v1/sandboxes", json=body) for _ in range(AWAKE)]
        awake = [each.raise_for_status().json()["id"] for each in await asyncio.gather(*created)]
        yield Crowd(portal, http, awake)


async def _add_sleepers(platform: Platform, team_id: str) -> None:
    now = time.time()
    away = tables.Host(host_id="away", name="away", state=HostState.UNREACHABLE, created_at=now)

    def sleeper(number: int) -> tables.Sandbox:
        shape: dict[str, Any] = {"vcpus": 1, "memory_mb": 512, "disk_size_mb": 5120}
        return tables.Sandbox(
            sandbox_id=new_sandbox_id(),
            team_id=team_id,
            host_id=away.host_id,
            template="base",
            agent_template="base",
            state=State.PAUSED,
            state_at=now,
            labels={"number": str(number), "of": "those who sleep"},
            created_at=now - number,
            **shape,
        )

    async with platform.db.write() as session:
        session.add(away)
        await session.flush()
        session.add_all(map(sleeper, range(ASLEEP)))


@pytest.fixture
def many(browser: Browser, tmp_path: Path) -> Iterator[tuple[Page, Crowd]]:
    with (
        start_blocking_portal() as portal,
        portal.wrap_async_context_manager(crowd(portal, tmp_path)) as crowded,
        browser.new_context(viewport=WIDE) as context,
    ):
        url = str(crowded.http.base_url).rstrip("/")
        account = {"email": "ada@example.org", "password": PASSWORD}
        assert context.request.post(f"{url}/v1/auth/login", data=account).ok
        page = watched(context.new_page())
        page.add_init_script(_OBSERVE)
        page.goto(f"{url}/dashboard/sandboxes")
        yield page, crowded
        assert not complaints_of(page)


def test_five_hundred_scroll_and_follow(many: tuple[Page, Crowd]) -> None:
    page, crowded = many
    expect(page.get_by_text(f"{ASLEEP + AWAKE} sandboxes")).to_be_visible(timeout=30_000)
    expect(page.get_by_role("row")).to_have_count(ASLEEP + AWAKE + 1, timeout=30_000)
    loading = long_tasks(page)
    frames = page.evaluate(_SCROLL)
    scrolling = long_tasks(page)
    crowded.pause_all()
    expect(page.get_by_role("row").filter(has_text="running")).to_have_count(0, timeout=30_000)
    following = long_tasks(page)
    page.get_by_label("Filter by id").fill("is awake")
    expect(page.get_by_text(f"{AWAKE} of {ASLEEP + AWAKE}")).to_be_visible()
    print(
        f"{len(frames)} frames, the middle one {statistics.median(frames):.0f} ms,"
        f" the longest {max(frames):.0f} ms; tasks above 50 ms while loading {loading},"
        f" scrolling {scrolling}, following {following}, filtering {long_tasks(page)}"
    )
    assert max([*loading, *scrolling, *following], default=0) < LONGEST_MS
    assert statistics.median(frames) < 34


def long_tasks(page: Page) -> list[int]:
    """Those since it was asked last, in milliseconds."""
    return [round(each) for each in page.evaluate("globalThis.long.splice(0)")]
