"""The agent dies by SIGKILL at every step of every operation on real VMs; the next one makes good.

An agent that dies is a process of its own, forked for each step from one that has imported
everything. The steps are those that a whole run comes by, so a new one is covered by itself. What
each of them leaves is the same as on the fakes, and told there.
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from sandmartin.agent.guest import Command, Ended, Output
from sandmartin.agent.host import Host
from sandmartin.agent.journal import INSTANCE
from sandmartin.agent.machine import open_machine
from sandmartin.agent.sandbox import Sandbox
from sandmartin.errors import Conflict, NotFound
from sandmartin.model import SandboxSpec, Settings, State
from tests import leaks, world
from tests.contract.test_host_crash import (
    BORN,
    CHILDREN,
    NOW,
    ONE,
    TEMPLATE,
    THEN,
    Killer,
    left_after,
)

#: A point takes some seconds, and an operation has up to twenty of them.
pytestmark = [pytest.mark.full, pytest.mark.timeout(400)]

OPERATIONS = (
    "create",
    "destroy",
    "pause",
    "resume",
    "fork",
    "checkpoint",
    "rollback",
    "snapshot",
    "template",
    "flatten",
)
_CLOCK_S = 0.1


@asynccontextmanager
async def _host(settings: Settings, killer: Killer | None = None) -> AsyncIterator[Host]:
    """An agent's core; at the end its VMs run on."""
    async with open_machine(settings) as machine:
        host = Host(replace(machine, step=killer) if killer else machine)
        await host.open()
        try:
            yield host
        finally:
            await host.close()


async def _output(sandbox: Sandbox, script: str) -> str:
    """What a script says, which must succeed."""
    said, end = b"", None
    command = Command(cmd="sh", args=("-c", script), timeout_s=30)
    async with aclosing(sandbox.exec(command)) as events:
        async for event in events:
            if isinstance(event, Output):
                said += event.data
            elif isinstance(event, Ended):
                end = event.exit_code
    assert end == 0, f"{script}: {end} {said!r}"
    return said.decode()


async def _mark(sandbox: Sandbox, content: bytes) -> None:
    """Have `content` in its memory and on its disk."""
    await _output(sandbox, f"echo '{content.decode()}' | tee /dev/shm/mark > /root/mark")


# The agents that die.


async def _operate(operation: str, settings: Settings, killer: Killer) -> None:
    """Run `operation` on a sandbox that was made for it, with the killer armed when it begins."""
    async with _host(settings, killer) as host:
        spec = SandboxSpec(sandbox_id=ONE, template="base")
        if operation != "create":
            await _mark(await host.create(spec, {}), THEN)
        if operation == "resume":
            await host.pause(ONE)
        if operation == "rollback":
            await host.checkpoint(ONE, "")
            await _mark(host.get(ONE), NOW)
        killer.arm()
        match operation:
            case "create":
                await host.create(spec, {})
            case "destroy":
                await host.destroy(ONE)
            case "pause":
                await host.pause(ONE)
            case "resume":
                await host.resume(ONE, None)
            case "fork":
                await host.fork(ONE, CHILDREN, None)
            case "checkpoint":
                await host.checkpoint(ONE, "")
            case "rollback":
                await host.rollback(ONE, host.get(ONE).checkpoints()[0].path.name)
            case "snapshot" | "template":
                await host.create_snapshot(ONE, TEMPLATE, live=operation == "snapshot")
            case "flatten":
                await host.flatten(ONE, TEMPLATE)


def _run_agent(operation: str, step: str, settings: Settings) -> dict[str, object]:
    """An agent that runs `operation` up to `step`: how it ended, and the steps it came by."""
    with tempfile.TemporaryFile() as told:
        child = os.fork()
        if child == 0:
            killer = Killer(step)
            with _ending():
                asyncio.run(_operate(operation, settings, killer))
                os.pwrite(told.fileno(), json.dumps(list(dict.fromkeys(killer.seen))).encode(), 0)
        status = os.waitpid(child, 0)[1]
        return {"status": status, "steps": json.loads(told.read() or "[]")}


@contextmanager
def _ending() -> Iterator[None]:
    """The process ends with the context, come what may."""
    try:
        yield
    finally:
        if sys.exc_info()[1]:
            traceback.print_exc()
        os._exit(0)


def main() -> None:
    """Play the agents that are asked for on stdin, one a line, and tell how each ended."""
    settings = pickle.loads(base64.b64decode(sys.argv[1]))
    for line in sys.stdin:
        operation, step = json.loads(line)
        print(json.dumps(_run_agent(operation, step, settings)), flush=True)


@dataclass
class Players:
    """The process that plays the agents that die."""

    settings: Settings
    process: subprocess.Popen[str]

    def play(self, operation: str, step: str = "") -> dict[str, object]:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps([operation, step]) + "\n")
        self.process.stdin.flush()
        answer: dict[str, object] = json.loads(self.process.stdout.readline())
        return answer


@pytest.fixture(scope="module")
async def players(settings: Settings, internet: world.Internet) -> AsyncIterator[Players]:
    """Agents on one data directory, of which in the end nothing is left."""
    argv = base64.b64encode(pickle.dumps(settings)).decode()
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.vm.test_crash", argv],
        cwd=Path(__file__).parents[2],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield Players(settings, process)
    finally:
        process.communicate(timeout=30)
    async with _host(settings) as host:
        await host.terminate()
    left = await asyncio.to_thread(
        leaks.find_all, _instance(settings), settings.data_dir, settings.run_dir
    )
    assert not left, f"the agents left behind: {sorted(left)}"


def _instance(settings: Settings) -> str:
    return str(json.loads((settings.data_dir / INSTANCE).read_bytes())["id"])


# What they leave.


async def _assert_lives(sandbox: Sandbox, memory: bytes, disk: bytes) -> None:
    """It has what it is to have, knows who it is, and what time it is."""
    script = "cat /dev/shm/mark /root/mark 2>/dev/null; hostname; date +%s.%N"
    before = time.time()
    *marks, name, clock = (await _output(sandbox, script)).splitlines()
    expected = [each.decode() for each in (memory, disk) if each]
    assert (marks, name) == (expected, sandbox.sandbox_id)
    assert before - _CLOCK_S < float(clock) < time.time() + _CLOCK_S


async def _recover(operation: str, state: State | None, content: bytes, settings: Settings) -> None:
    """The next start: all that is there works, and nothing else is there."""
    # An image's own warm snapshot would outlive this test; its boot does not.
    async with _host(replace(settings, warm=False)) as host:
        states = {each.sandbox_id: each.state for each in host.sandboxes()}
        assert states.get(ONE) is state
        assert states.keys() <= {ONE, *CHILDREN}
        for sandbox in host.sandboxes():
            if sandbox.sandbox_id != ONE:
                assert sandbox.state is State.RUNNING
            await host.resume(sandbox.sandbox_id, None)
            await _assert_lives(sandbox, content, content)
        await _assert_template(operation, host, content, required=state is None)
        for sandbox in host.sandboxes():
            await host.destroy(sandbox.sandbox_id)
        with suppress(NotFound):
            await host.delete_snapshot(TEMPLATE)
    assert not leaks.find(_instance(settings), settings.data_dir, settings.run_dir)
    assert not _files_left(settings.data_dir)


async def _assert_template(operation: str, host: Host, content: bytes, *, required: bool) -> None:
    """A template is whole, or it is not there."""
    spec = SandboxSpec(sandbox_id=BORN, template=TEMPLATE)
    try:
        born = await host.create(spec, {})
    except NotFound:
        assert not (required and operation == "flatten"), "the sandbox has ended for nothing"
        return
    await _assert_lives(born, b"" if operation == "flatten" else content, content)
    with pytest.raises(Conflict, match=BORN):
        await host.delete_snapshot(TEMPLATE)


async def _clear(settings: Settings) -> None:
    """After a failure: let the next operation begin with nothing."""
    async with _host(settings) as host:
        for sandbox in host.sandboxes():
            await host.destroy(sandbox.sandbox_id)
        with suppress(NotFound):
            await host.delete_snapshot(TEMPLATE)


def _files_left(data_dir: Path) -> set[str]:
    """Files of sandboxes and templates; what VMs boot from is nothing but a hole."""
    places = ("sandboxes", "layers", "bases", "templates", "forks", "images")
    found = {path for place in places for path in (data_dir / place).iterdir()}
    return {str(path) for path in found if path.is_dir() or path.stat().st_blocks}


@pytest.mark.parametrize("operation", OPERATIONS)
async def test_killed_at_every_step(
    operation: str, players: Players, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = players.settings
    whole = await asyncio.to_thread(players.play, operation)
    steps = whole["steps"]
    assert isinstance(steps, list) and len(steps) >= 5, whole
    *_, (_, state, content) = left_after(operation, steps)
    await _recover(operation, state, content, settings)
    for step, state, content in left_after(operation, steps):
        ended = await asyncio.to_thread(players.play, operation, step)
        assert ended["status"] == signal.SIGKILL, f"{operation} did not come to {step}"
        try:
            await _recover(operation, state, content, settings)
        except BaseException as error:
            error.add_note(f"after {operation} was killed at {step}")
            await _clear(settings)
            raise
    with capsys.disabled():
        print(f"\n{operation}: {len(steps)} crash points")


if __name__ == "__main__":
    main()
