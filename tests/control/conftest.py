"""Fixtures of the control plane's tests: a database of each kind, hosts on fakes, a client.

A test that takes `database_url` runs on SQLite and on a real PostgreSQL. The hosts are real agents
over their real RPC, whose VMs are fakes (`tests.fakes_vmm`).
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import uuid4

import httpx
import pytest

from sandmartin.agent import assets
from sandmartin.agent.machine import GuestFactory
from sandmartin.agent.server import serve_machine
from sandmartin.control import tables
from sandmartin.control.app import create_app
from sandmartin.control.bootstrap import ensure_platform
from sandmartin.control.builds.settings import BuildSettings
from sandmartin.control.caller import Role, Whence
from sandmartin.control.hosts import HostFacts
from sandmartin.control.keys import add_key
from sandmartin.control.migrations import upgrade
from sandmartin.control.operations import Timing
from sandmartin.control.platform import Platform, open_platform
from sandmartin.control.reconciler import Pace
from sandmartin.control.server import listen, serving
from sandmartin.control.sessions import cookie_name
from sandmartin.control.settings import ControlSettings
from sandmartin.model import random_id
from tests import postgres
from tests.fakes_agent import Fakes, Guests, machine_directory, make_machine
from tests.waiting import until

if TYPE_CHECKING:
    from tests.control.living import Place

#: Nothing waits for longer than a moment.
TIMING = Timing(lease_s=2.0, pick_up_s=0.05, retry_s=0.05, grace_s=5.0)
BUILDING = BuildSettings(
    lease_s=2.0, pick_up_s=0.05, retry_s=0.05, look_s=0.05, layer_after_s=0.0, most_s=60.0
)
PACE = Pace(period_s=0.05, unreachable_s=0.5, unknown_s=0.3, grace_s=0.2)
DEADLINE_S = 20.0


async def eventually(condition: Callable[[], Awaitable[bool]], what: str) -> None:
    """Wait until `condition` holds; fails at the deadline."""
    try:
        async with asyncio.timeout(DEADLINE_S):
            while not await condition():
                await asyncio.sleep(0.02)
    except TimeoutError:
        raise AssertionError(f"never came: {what}") from None


class Gate:
    """A step of an agent that keeps whoever comes by, once it is closed.

    Only for steps in threads: those on the loop would keep everything.
    """

    def __init__(self, at: str = "vmm:stopped") -> None:
        self._at = at
        self._open = threading.Event()
        self._open.set()
        self.waiting = 0

    def __call__(self, step: str) -> None:
        if step == self._at and not self._open.is_set():
            self.waiting += 1
            assert self._open.wait(DEADLINE_S)
            self.waiting -= 1

    def close(self) -> None:
        self._open.clear()

    def open(self) -> None:
        self._open.set()

    async def reached(self) -> None:
        await until(lambda: self.waiting > 0, f"somebody at {self._at}")


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[postgres.Server]:
    with postgres.running_server() as server:
        upgrade(server.create("migrated"))
        yield server


@pytest.fixture(scope="session")
def migrated_sqlite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sqlite") / "migrated.sqlite3"
    upgrade(f"sqlite:///{path}")
    return path


@pytest.fixture
def quick_disk(tmp_path: Path) -> Iterator[Path]:
    """A directory in memory: a disk that is busy with other tests keeps a commit for seconds."""
    memory = Path("/dev/shm")
    if not memory.is_dir():
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(prefix="smtest-", dir=memory) as directory:
        yield Path(directory)


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, quick_disk: Path) -> Iterator[str]:
    """A fresh database, its tables there."""
    if request.param == "sqlite":
        path = quick_disk / "control.sqlite3"
        shutil.copy(request.getfixturevalue("migrated_sqlite"), path)
        yield f"sqlite:///{path}"
        return
    server: postgres.Server = request.getfixturevalue("postgres_server")
    name = f"test_{random_id(12)}"
    yield server.create(name, template="migrated")
    server.drop(name)


@dataclass
class RunningHost:
    """An agent that serves, and its fakes."""

    name: str
    directory: Path
    fakes: Fakes = field(repr=False)
    leave: asyncio.Event
    task: asyncio.Task[None]

    @property
    def address(self) -> str:
        return f"unix:{self.fakes.machine.settings.socket}"

    async def stop(self) -> None:
        """End the agent; its VMs run on."""
        self.leave.set()
        await asyncio.wait({self.task})
        self.fakes.data.close()


async def start_host(
    directory: Path,
    name: str = "one",
    *,
    inside: Callable[[Guests], GuestFactory] | None = None,
    **settings: object,
) -> RunningHost:
    """An agent on `directory`; a second one on the same finds what the first one left.

    `inside` makes its guests more than fakes.
    """
    fakes = make_machine(directory, **settings)  # type: ignore[arg-type]
    if inside is not None:
        fakes.machine = replace(fakes.machine, guest=inside(fakes.guests))
    leave, ready = asyncio.Event(), asyncio.Event()
    task = asyncio.create_task(
        serve_machine(fakes.machine, announce=lambda _: ready.set(), leave=leave)
    )
    waiting = asyncio.ensure_future(ready.wait())
    await asyncio.wait({task, waiting}, return_when=asyncio.FIRST_COMPLETED)
    waiting.cancel()
    if task.done():
        task.result()
    return RunningHost(name, directory, fakes, leave, task)


@contextlib.asynccontextmanager
async def running_host(
    name: str = "one",
    *,
    inside: Callable[[Guests], GuestFactory] | None = None,
    **settings: object,
) -> AsyncIterator[RunningHost]:
    with machine_directory() as directory:
        host = await start_host(directory, name, inside=inside, **settings)
        try:
            yield host
        finally:
            await host.stop()


@pytest.fixture
async def host() -> AsyncIterator[RunningHost]:
    async with running_host() as host:
        yield host


def facts_of(host: RunningHost) -> HostFacts:
    return HostFacts(
        name=host.name,
        address=host.address,
        cpus=4,
        memory_mb=16 * 1024,
        disk_free_mb=100 * 1024,
        cpu_overcommit=16.0,
        memory_overhead_mb=0,
        accel="tcg",
        version="0",
    )


@contextlib.asynccontextmanager
async def running_platform(
    database_url: str,
    directory: Path,
    *hosts: RunningHost,
    working: bool = True,
    building: BuildSettings = BUILDING,
    **settings: object,
) -> AsyncIterator[Platform]:
    """A replica with these hosts, that works by itself or only does what it is asked for."""
    made = ControlSettings(
        data_dir=directory / "control",
        database_url=database_url,
        **settings,  # type: ignore[arg-type]
    )
    async with open_platform(made, timing=TIMING, pace=PACE, building=building) as platform:
        await ensure_platform(platform.db)
        for host in hosts:
            await platform.hosts.ensure_local(facts_of(host))
        await platform.reconciler.tick()
        if not working:
            yield platform
            await platform.operations.close()
            return
        async with platform.working():
            yield platform


@pytest.fixture
async def platform(database_url: str, tmp_path: Path, host: RunningHost) -> AsyncIterator[Platform]:
    async with running_platform(database_url, tmp_path, host) as platform:
        yield platform


@dataclass(frozen=True)
class Team:
    """A team with a key, and a client that has it."""

    team_id: str
    key: str
    http: httpx.AsyncClient


async def make_team(platform: Platform, name: str = "swifts") -> tuple[str, str]:
    """A new team's id, and its key."""
    team_id = str(uuid4())
    async with platform.db.write() as session:
        session.add(tables.Team(team_id=team_id, name=name, created_at=time.time()))
        await session.flush()
        _, key = add_key(session, team_id, "test", "test")
    return team_id, key


@contextlib.asynccontextmanager
async def client_of(platform: Platform, **headers: str) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the application itself, without a network between."""
    transport = httpx.ASGITransport(create_app(platform), raise_app_exceptions=False)
    async with httpx.AsyncClient(
        transport=transport, base_url="http://control", headers=headers, timeout=DEADLINE_S
    ) as client:
        yield client


@pytest.fixture
async def team(platform: Platform) -> AsyncIterator[Team]:
    team_id, key = await make_team(platform)
    async with client_of(platform, **{"x-api-key": key}) as http:
        yield Team(team_id, key, http)


@pytest.fixture
async def other_team(platform: Platform) -> AsyncIterator[Team]:
    team_id, key = await make_team(platform, "swallows")
    async with client_of(platform, **{"x-api-key": key}) as http:
        yield Team(team_id, key, http)


@dataclass(frozen=True)
class Person:
    """Somebody who is logged in, acting for a team, and a client that has the cookie."""

    user_id: str
    email: str
    team_id: str
    http: httpx.AsyncClient


async def make_user(platform: Platform, email: str, *, is_admin: bool = False) -> str:
    """Somebody without a password, nor a team."""
    user_id = str(uuid4())
    async with platform.db.write() as session:
        session.add(
            tables.User(user_id=user_id, email=email, is_admin=is_admin, created_at=time.time())
        )
    return user_id


async def add_member(platform: Platform, team_id: str, user_id: str, role: Role) -> None:
    async with platform.db.write() as session:
        session.add(
            tables.Member(team_id=team_id, user_id=user_id, role=role, created_at=time.time())
        )


@contextlib.asynccontextmanager
async def logged_in(platform: Platform, user_id: str, team_id: str) -> AsyncIterator[Person]:
    """A session of a user, for a team, without the way through a password."""
    token = await platform.sessions.start(user_id, team_id, Whence())
    found = await platform.sessions.find(token, Whence())
    async with client_of(platform, **{"x-csrf-token": found.csrf_token}) as http:
        http.cookies.set(cookie_name(platform.settings.base_url), token)
        yield Person(user_id, found.caller.name, team_id, http)


@contextlib.asynccontextmanager
async def new_person(
    platform: Platform, team_id: str, role: Role, *, email: str = "", is_admin: bool = False
) -> AsyncIterator[Person]:
    """A new member of a team, logged in."""
    email = email or f"{random_id(8)}@example.org"
    user_id = await make_user(platform, email, is_admin=is_admin)
    await add_member(platform, team_id, user_id, role)
    async with logged_in(platform, user_id, team_id) as person:
        yield person


# Hosts whose sandboxes have a real inside.


@pytest.fixture(scope="session")
async def guest_binary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    into = tmp_path_factory.mktemp("guest")
    await assets._build_guest(into)
    return into / "sandmartin-guest"


@pytest.fixture(scope="module")
async def place(
    guest_binary: Path, migrated_sqlite: Path, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Place]:
    """A running sandbox with a real inside, served over real connections, for a whole module."""
    from tests.control.living import living_guest, living_place

    directory = tmp_path_factory.mktemp("place")
    shutil.copy(migrated_sqlite, directory / "control.sqlite3")
    url = f"sqlite:///{directory / 'control.sqlite3'}"
    async with living_guest(guest_binary) as agent, living_place(url, directory, agent) as place:
        yield place


@contextlib.asynccontextmanager
async def served_platform(
    database_url: str, directory: Path, *hosts: RunningHost, **settings: object
) -> AsyncIterator[tuple[Platform, str]]:
    """A replica that listens and works, and its address: for streams, which need a network."""
    made = ControlSettings(
        data_dir=directory / "control",
        database_url=database_url,
        **settings,  # type: ignore[arg-type]
    )
    async with open_platform(made, timing=TIMING, pace=PACE) as platform:
        await ensure_platform(platform.db)
        for host in hosts:
            await platform.hosts.ensure_local(facts_of(host))
        await platform.reconciler.tick()
        listener = listen("127.0.0.1", 0)
        with contextlib.closing(listener):
            async with serving(platform, listener):
                yield platform, f"http://127.0.0.1:{listener.getsockname()[1]}"
