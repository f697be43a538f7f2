"""The agent dies by SIGKILL at every step of its operations; the next one leaves nothing behind.

The agent that dies is a process of its own, forked once for each step from one that has imported
everything. The steps are those that a whole run comes by, and must be all that the code names.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import aclosing
from pathlib import Path

import pytest

from sandmartin.agent import host as host_module
from sandmartin.agent import sandbox as sandbox_module
from sandmartin.agent.guest import Command, Output
from sandmartin.agent.host import Host
from sandmartin.agent.journal import DataDir
from sandmartin.agent.sandbox import Sandbox
from sandmartin.model import State
from tests import fakes_agent
from tests.fakes_agent import find_leaks, find_vms, machine_directory, make_machine, make_spec

pytestmark = pytest.mark.qemu_img

ONE, OTHER = "sb1", "sb2"
_DEADLINE_S = 60


class Killer:
    """Kills its own process at a step, once armed; remembers the steps that it came by."""

    def __init__(self, at: str = "") -> None:
        self._at = at
        self._armed = False
        self.seen: list[str] = []

    def arm(self) -> None:
        self._armed = True

    def __call__(self, step: str) -> None:
        if self._armed:
            self.seen.append(step)
            if step == self._at:
                os.kill(os.getpid(), signal.SIGKILL)


async def _operate(operation: str, directory: Path, killer: Killer) -> None:
    """Run `operation` on a new host in `directory`, with the killer armed when it begins."""
    fakes = make_machine(directory, step=killer)
    if operation == "recover":
        killer.arm()
    async with fakes.host() as host:
        if operation in {"destroy", "terminate"}:
            await host.create(make_spec(ONE), {})
            await host.create(make_spec(OTHER), {})
        killer.arm()
        match operation:
            case "create":
                await host.create(make_spec(ONE), {})
            case "destroy":
                await host.destroy(ONE)
            case "terminate":
                await host.terminate()


def _die(operation: str, step: str, directory: Path) -> int:
    """Fork an agent that runs `operation` up to `step`; how it ended, as waitpid tells it."""
    child = os.fork()
    if child == 0:
        asyncio.run(_operate(operation, directory, Killer(step)))
        os._exit(0)
    return os.waitpid(child, 0)[1]


def main() -> None:
    """Play the agents of the cases in argv; how each ended, as JSON."""
    ends = []
    for operation, step, directory in json.loads(sys.argv[1]):
        if operation == "recover":
            _die("create", "create:vm", Path(directory))
        ends.append(_die(operation, step, Path(directory)))
    print(json.dumps(ends))


async def _steps(operation: str) -> list[str]:
    """The steps that a whole run of `operation` comes by, each once and in order."""
    killer = Killer()
    with machine_directory() as directory:
        if operation == "recover":
            _kill_agents([("create", "create:vm", directory)])
        await _operate(operation, directory, killer)
    return list(dict.fromkeys(killer.seen))


def _kill_agents(cases: list[tuple[str, str, Path]]) -> None:
    """Let an agent die for each case: operation, step, directory."""
    argv = json.dumps([(operation, step, os.fspath(path)) for operation, step, path in cases])
    done = subprocess.run(
        [sys.executable, "-m", "tests.contract.test_host_crash", argv],
        cwd=Path(__file__).parents[2],
        stdout=subprocess.PIPE,
        timeout=_DEADLINE_S,
        check=True,
    )
    for (operation, step, _), status in zip(cases, json.loads(done.stdout), strict=True):
        killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        assert killed, f"{operation} did not come to {step}: status {status}"


async def _survivors(directory: Path) -> dict[str, State]:
    """What the next agent has after it started; it leaves nothing that belongs to nobody."""
    async with make_machine(directory).host() as host:
        for sandbox in host.sandboxes():
            if sandbox.state is State.RUNNING:
                await _assert_usable(sandbox)
        states = {sandbox.sandbox_id: sandbox.state for sandbox in host.sandboxes()}
        _assert_exact(directory, host)
    return states


async def _assert_usable(sandbox: Sandbox) -> None:
    async with aclosing(sandbox.exec(Command(cmd="echo", args=("hi",)))) as events:
        assert Output(b"hi") in [event async for event in events]


def _assert_exact(directory: Path, host: Host) -> None:
    """There is all that the host's sandboxes hold, and nothing else."""
    expected = set()
    for sandbox in host.sandboxes():
        entry = sandbox.entry
        assert sandbox.state is State.RUNNING, f"{sandbox.sandbox_id} is {sandbox.state}"
        assert entry.vm is not None
        expected |= {
            f"process {entry.vm.process.pid}",
            f"slots/{entry.slot}",
            f"groups/{sandbox.sandbox_id}",
            f"data/sandboxes/{sandbox.sandbox_id}",
        }
    assert find_leaks(directory) == expected


@pytest.fixture
def directories() -> Iterator[Callable[[], Path]]:
    """As many machines' directories as a test asks for."""
    with machine_directory() as top:
        numbers = iter(range(1000))

        def make() -> Path:
            path = top / str(next(numbers))
            path.mkdir(mode=0o711)
            path.chmod(0o711)
            return path

        yield make


def _named_in(*modules: object) -> set[str]:
    """The steps that the source of modules names."""
    files = [Path(str(module.__file__)) for module in modules]  # type: ignore[attr-defined]
    pattern = re.compile(r"step\(\"([a-z:]+)\"\)")
    return {name for file in files for name in pattern.findall(file.read_text())}


async def test_every_step_is_reached() -> None:
    reached = {step for operation in ("create", "terminate") for step in await _steps(operation)}
    assert reached == _named_in(host_module, sandbox_module, fakes_agent)


@pytest.mark.parametrize("operation", ["create", "destroy", "terminate", "recover"])
async def test_killed_at_every_step(operation: str, directories: Callable[[], Path]) -> None:
    cases = [(operation, step, directories()) for step in await _steps(operation)]
    assert len(cases) > 5
    _kill_agents(cases)
    for _, step, directory in cases:
        survivors = await _survivors(directory)
        assert survivors.keys() <= _may_live(operation, step), f"after {step}"
        assert survivors.keys() >= _must_live(operation, step), f"after {step}"
        assert await _survivors(directory) == survivors, f"second start after {step}"
        async with make_machine(directory).host() as host:
            await host.terminate()
        assert not find_leaks(directory), f"after {step}"


def _must_live(operation: str, step: str) -> set[str]:
    if operation == "create":
        return {ONE} if step == "create:running" else set()
    return {OTHER} if operation == "destroy" else set()


def _may_live(operation: str, step: str) -> set[str]:
    # Of two that are destroyed at once, one may not have begun.
    begun = operation == "terminate" and step == "destroy:recorded"
    return _must_live(operation, step) | ({ONE, OTHER} if begun else set())


async def test_released_slot_is_in_no_entry(directories: Callable[[], Path]) -> None:
    # From then on another sandbox may have the slot. An entry that still names it would have the
    # next agent take it from there.
    directory = directories()
    _kill_agents([("destroy", "destroy:slot", directory)])
    entries = dict(DataDir(directory / "data").read_all())
    entry = entries[ONE]
    assert entry is not None
    assert (entry.state, entry.slot) == (State.STOPPING, None)


async def test_vm_of_a_damaged_entry_is_ended(directories: Callable[[], Path]) -> None:
    directory = directories()
    async with make_machine(directory).host() as host:
        await host.create(make_spec(ONE), {})
        await host.create(make_spec(OTHER), {})
    DataDir(directory / "data").sandbox(ONE).entry.write_text('{"format": 1, "spec"')
    assert len(find_vms(directory)) == 2
    assert await _survivors(directory) == {OTHER: State.RUNNING}


if __name__ == "__main__":
    main()
