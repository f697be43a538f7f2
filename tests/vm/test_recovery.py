"""What outlives a pause, the agent, and the host: on a real VM, through the agent's own door."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace

import pytest

from sandmartin.agent.journal import DataDir, Entry
from sandmartin.agent.server import serve
from sandmartin.client.sandbox import AsyncSandbox
from sandmartin.errors import Conflict
from sandmartin.model import Settings, new_sandbox_id
from sandmartin.transport import NewSandbox
from sandmartin.transport.agent import AgentSocket
from tests import world
from tests.vm.conftest import DEADLINE_S, Result, execute, run_agent

_PORT = 7777
_CLOCK_S = 0.1
#: Counts in memory all the time, and answers whoever connects with its pid and its count. A
#: connection with itself must hold too.
_SERVER = f"""
import os, socket, threading, time
count = 0
def tick():
    global count
    while True:
        count += 1
        time.sleep(0.01)
threading.Thread(target=tick, daemon=True).start()
server = socket.create_server(("0.0.0.0", {_PORT}))
there = socket.create_connection(("127.0.0.1", {_PORT}))
back, _ = server.accept()
open("/dev/shm/ready", "w")
while True:
    caller, _ = server.accept()
    there.sendall(b"x")
    assert back.recv(1) == b"x"
    caller.sendall(f"{{os.getpid()}} {{count}}".encode())
    caller.close()
"""
#: What must be another in each of two forks, one on a line.
_CHANCE = """
import os, pathlib, uuid
print(os.urandom(16).hex())
print(uuid.uuid4())
print(pathlib.Path("/etc/machine-id").read_text().strip())
print(os.uname().nodename)
for line in open("/proc/self/maps"):
    if "[heap]" in line or "[stack]" in line or "r-xp" in line and "/libc" in line:
        print(line.split("-")[0])
"""


@asynccontextmanager
async def _agent(settings: Settings) -> AsyncIterator[AgentSocket]:
    """An agent until SIGTERM ends it, as at its upgrade: its VMs run on."""
    ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    serving = asyncio.create_task(
        serve(settings, announce=lambda _: ready.set_result(None)), name="agent"
    )
    await asyncio.wait({serving, ready}, return_when=asyncio.FIRST_COMPLETED)
    if serving.done():
        serving.result()
    try:
        async with aclosing(AgentSocket(settings.socket)) as transport:
            yield transport
    finally:
        os.kill(os.getpid(), signal.SIGTERM)
        async with asyncio.timeout(DEADLINE_S):
            await serving


@pytest.fixture
async def place(settings: Settings, internet: world.Internet) -> AsyncIterator[Settings]:
    """Settings of the agents of a test, of which in the end nothing is left."""
    yield settings
    async with run_agent(settings):
        pass


async def _output(sandbox: AsyncSandbox, *words: str) -> str:
    result: Result = await execute(sandbox, *words)
    assert result.exit_code == 0, result
    return result.text.strip()


async def _state(transport: AgentSocket, sandbox_id: str) -> tuple[str, str]:
    (info,) = [i for i in await transport.list_sandboxes() if i.sandbox_id == sandbox_id]
    return info.state, info.reason


async def _ask(address: str) -> tuple[int, int]:
    """Pid and count of the server in the sandbox at `address`."""
    async with asyncio.timeout(DEADLINE_S):
        reader, writer = await asyncio.open_connection(address, _PORT)
        pid, count = (await reader.read()).split()
        writer.close()
        await writer.wait_closed()
    return int(pid), int(count)


async def _assert_clock_is_right(sandbox: AsyncSandbox) -> None:
    before = time.time()
    clock = float(await _output(sandbox, "date", "+%s.%N"))
    assert before - _CLOCK_S < clock < time.time() + _CLOCK_S


async def test_all_goes_on_where_it_was(place: Settings) -> None:
    start = f"python3 -c '{_SERVER}' >/dev/null 2>&1 &"
    async with _agent(place) as transport:
        name = new_sandbox_id()
        made = await transport.create(NewSandbox(sandbox_id=name))
        sandbox = AsyncSandbox(transport, name)
        await _output(sandbox, "sh", "-c", "echo disk >/root/file; echo memory >/dev/shm/file")
        await _output(sandbox, "sh", "-c", f"{start} until [ -e /dev/shm/ready ]; do :; done")
        pid, before = await _ask(made.address)
        await transport.pause(name)
        paused_at = time.monotonic()
    async with _agent(place) as transport:
        sandbox = AsyncSandbox(transport, name)
        assert (await _state(transport, name))[0] == "paused"
        with pytest.raises(Conflict, match="paused"):
            await execute(sandbox, "true")
        resuming_at = time.monotonic()
        # Else neither clock nor counter would tell anything.
        assert resuming_at - paused_at > 2 * _CLOCK_S
        woken = await transport.resume(name, None)
        await _assert_clock_is_right(sandbox)
        same, count = await _ask(woken.address)
        running_s = time.monotonic() - resuming_at + 1
        assert same == pid
        assert before <= count < before + running_s / 0.01
        assert await _output(sandbox, "cat", "/root/file", "/dev/shm/file") == "disk\nmemory"
        # It is not only there, it goes on.
        assert (await _ask(woken.address))[1] > count
    async with _agent(place) as transport:
        # And so it does while no agent is there.
        assert (await _state(transport, name))[0] == "running"
        assert (await _ask(woken.address))[1] > count
        await _assert_clock_is_right(AsyncSandbox(transport, name))
        await transport.destroy(name)


async def test_two_forks_of_one_parent_share_no_chance(place: Settings) -> None:
    async with _agent(place) as transport:
        name, *children = (new_sandbox_id() for _ in range(3))
        await transport.create(NewSandbox(sandbox_id=name))
        made = await transport.fork(name, tuple(children), 0)
        members = [AsyncSandbox(transport, each) for each in (*children, name)]
        told = [(await _output(each, "python3", "-c", _CHANCE)).splitlines() for each in members]
        for alike in zip(*told, strict=True):
            assert len(set(alike)) == len(members), alike
        assert len(told[0]) == 7
        assert len({each.address for each in made}) == len(children)
        for each in (*children, name):
            await transport.destroy(each)


async def test_files_outlive_the_host(place: Settings) -> None:
    async with _agent(place) as transport:
        name = new_sandbox_id()
        await transport.create(NewSandbox(sandbox_id=name))
        sandbox = AsyncSandbox(transport, name)
        await _output(sandbox, "sh", "-c", "echo disk >/root/file; echo memory >/dev/shm/file")
        await _output(sandbox, "sync")
    await _restart_host(place, name)
    async with _agent(place) as transport:
        sandbox = AsyncSandbox(transport, name)
        state, reason = await _state(transport, name)
        assert (state, "its memory is lost" in reason) == ("paused", True)
        await transport.resume(name, None)
        assert await _output(sandbox, "sh", "-c", "cat /root/file; ls /dev/shm") == "disk"
        await _assert_clock_is_right(sandbox)
        assert await _output(sandbox, "hostname") == name
        await transport.destroy(name)


async def _restart_host(settings: Settings, sandbox_id: str) -> None:
    """End a VM as the end of its host would, and have its entry be of the time before."""
    data = DataDir(settings.data_dir)
    entry: Entry | None = dict(data.read_all())[sandbox_id]
    assert entry is not None and entry.vm is not None
    entry.vm.process.kill()
    assert await entry.vm.process.gone(DEADLINE_S)
    data.write(replace(entry, boot_id="of the boot before"))
