"""Fixtures of the tests on real VMs, in the order of an agent's life.

The tests run on a host of their own (`tests.world`), one for all. An agent serves a module; after
each test nothing may be there that was not there before it, and after the module nothing at all.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from sandmartin.agent import namespace
from sandmartin.agent.journal import INSTANCE, DataDir, Entry
from sandmartin.agent.server import serve
from sandmartin.client.sandbox import AsyncSandbox, temporary_sandbox
from sandmartin.model import Settings, new_sandbox_id
from sandmartin.transport import Command, Ended, NewSandbox, Stderr, Stdout
from sandmartin.transport.agent import AgentSocket
from tests import leaks, world

#: Beside the uids that an agent of this machine gives out.
UID_BASE = 3_000_000
DEADLINE_S = 60.0


@pytest.fixture(scope="session")
async def internet(private_host: None) -> AsyncIterator[world.Internet]:
    """The servers beyond the host."""
    internet = world.Internet()
    await internet.open()
    yield internet
    await internet.close()


@pytest.fixture(scope="module")
def settings() -> Iterator[Settings]:
    """Settings of an agent with directories of its own, reachable by the VMs' users."""
    path = Path(tempfile.mkdtemp(prefix="smtest-", dir="/var/tmp"))
    path.chmod(0o711)
    resolv_conf = path / "resolv.conf"
    resolv_conf.write_text(f"nameserver {world.ROUTER}\n")
    yield Settings(
        data_dir=path / "data",
        run_dir=path / "run",
        uid_base=UID_BASE,
        resolv_conf=resolv_conf,
        slot_pool_size=2,
        # What comes and goes in the background would look like a leak.
        vm_pool_size=0,
        guest_silence_s=6,
    )
    shutil.rmtree(path)


@dataclass(frozen=True)
class Result:
    """What a command gave."""

    exit_code: int
    stdout: bytes
    stderr: bytes
    error: str = ""

    @property
    def text(self) -> str:
        return self.stdout.decode()


@dataclass
class RunningAgent:
    """An agent that serves, and a client of it."""

    settings: Settings
    transport: AgentSocket
    instance_id: str

    def leaks(self) -> set[str]:
        return leaks.find(self.instance_id, self.settings.data_dir, self.settings.run_dir)

    @asynccontextmanager
    async def sandbox(self, **shape: object) -> AsyncIterator[AsyncSandbox]:
        """A sandbox for as long as the context lasts."""
        new = NewSandbox(sandbox_id=new_sandbox_id(), **shape)  # type: ignore[arg-type]
        async with temporary_sandbox(self.transport, new) as sandbox:
            yield sandbox

    def host_ip(self, sandbox_id: str) -> str:
        """Address at which the host reaches a sandbox."""
        return str(self.settings.address_range[self._slot(sandbox_id)])

    def netns(self, sandbox_id: str) -> Path:
        """The network namespace of a sandbox."""
        instance = json.loads((self.settings.data_dir / INSTANCE).read_text())
        return namespace.path_of_slot(instance["id"], self._slot(sandbox_id))

    def token(self, sandbox_id: str) -> str:
        """What a sandbox's guest agent asks for."""
        return self._entry(sandbox_id).token

    def _slot(self, sandbox_id: str) -> int:
        slot = self._entry(sandbox_id).slot
        assert slot is not None
        return slot

    def _entry(self, sandbox_id: str) -> Entry:
        """What stands of a sandbox in the journal."""
        data = DataDir(self.settings.data_dir)
        (entry,) = (e for i, e in data.read_all() if i == sandbox_id and e is not None)
        return entry


@asynccontextmanager
async def run_agent(settings: Settings) -> AsyncIterator[RunningAgent]:
    """An agent on its socket; at the end it is terminated and must have left nothing."""
    ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    serving = asyncio.create_task(
        serve(settings, announce=lambda _: ready.set_result(None)), name="agent"
    )
    await asyncio.wait({serving, ready}, return_when=asyncio.FIRST_COMPLETED)
    if serving.done():
        serving.result()
    instance_id = json.loads((settings.data_dir / INSTANCE).read_bytes())["id"]
    async with AsyncExitStack() as stack:
        transport = await stack.enter_async_context(aclosing(AgentSocket(settings.socket)))
        try:
            yield RunningAgent(settings, transport, instance_id)
        finally:
            await transport.terminate()
            async with asyncio.timeout(DEADLINE_S):
                await serving
    left = await asyncio.to_thread(leaks.find_all, instance_id, settings.data_dir, settings.run_dir)
    assert not left, f"the agent left behind: {sorted(left)}"


@pytest.fixture(scope="module")
async def agent(settings: Settings, internet: world.Internet) -> AsyncIterator[RunningAgent]:
    """The module's agent."""
    async with run_agent(settings) as agent:
        yield agent


@pytest.fixture(scope="module")
async def sandbox(agent: RunningAgent) -> AsyncIterator[AsyncSandbox]:
    """The module's sandbox, booted once."""
    async with agent.sandbox() as sandbox:
        yield sandbox


@pytest.fixture(autouse=True)
def no_leak(request: pytest.FixtureRequest) -> Iterator[None]:
    """After a test nothing may be there that was not there before it."""
    if "agent" not in request.fixturenames:
        yield
        return
    for name in {"sandbox", "second", "counting"} & set(request.fixturenames):
        # A module's own, made before the first look.
        request.getfixturevalue(name)
    agent: RunningAgent = request.getfixturevalue("agent")
    before = agent.leaks()
    yield
    left = agent.leaks() - before
    assert not left, f"the test left behind: {sorted(left)}"


async def execute(sandbox: AsyncSandbox, *words: str, **options: object) -> Result:
    """Run a command to its end."""
    command = Command(cmd=words[0], args=words[1:], **{"timeout_s": 60, **options})  # type: ignore[arg-type]
    stdout, stderr = bytearray(), bytearray()
    async with sandbox.exec(command) as execution:
        async for event in execution:
            match event:
                case Stdout(data):
                    stdout += data
                case Stderr(data):
                    stderr += data
                case Ended():
                    return Result(event.exit_code, bytes(stdout), bytes(stderr), event.error)
    raise AssertionError("the execution did not end")
