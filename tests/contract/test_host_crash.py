"""The agent dies by SIGKILL at every step of its operations; the next one leaves nothing behind.

The agent that dies is a process of its own, forked once for each step from one that has imported
everything. The steps are those that a whole run comes by, and must be all that the code names.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from sandmartin.agent import host as host_module
from sandmartin.agent import microvm as microvm_module
from sandmartin.agent import proc
from sandmartin.agent import sandbox as sandbox_module
from sandmartin.agent.disk import Layers
from sandmartin.agent.guest import Command, Identity, Output
from sandmartin.agent.host import Host
from sandmartin.agent.journal import DataDir
from sandmartin.agent.sandbox import Sandbox
from sandmartin.agent.snapshots import Snapshot
from sandmartin.agent.vmm import VmSpec
from sandmartin.errors import NotFound, TimedOut, ToolFailed
from sandmartin.model import NetworkPolicy, SandboxSpec, State
from tests import fakes_agent
from tests.fakes_agent import (
    IMAGE,
    Fakes,
    find_leaks,
    find_vms,
    machine_directory,
    make_machine,
    make_spec,
    no_step,
)
from tests.fakes_vmm import SCRATCH, FakeVm
from tests.waiting import until

pytestmark = pytest.mark.qemu_img

ONE, OTHER, BORN = "sb1", "sb2", "sb3"
CHILDREN = ("sbchild1", "sbchild2")
TEMPLATE = "frozen"
#: What a test leaves in a sandbox's memory, before a checkpoint and after it.
THEN, NOW = b"as it was then", b"as it is today"
POLICY = NetworkPolicy(deny_out=("0.0.0.0/0",))
_DEADLINE_S = 60
_AT_ONCE = 6


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
    fakes = make_machine(
        directory,
        step=killer,
        warm=operation in {"warm", "taken", "claimed"},
        vm_pool_size=int(operation == "taken"),
        ready_sandboxes=f"{IMAGE}=1" if operation == "claimed" else "",
    )
    if operation == "recover":
        killer.arm()
    async with fakes.host() as host:
        await _prepare(operation, host, fakes)
        killer.arm()
        match operation:
            case "create" | "warm":
                await host.create(make_spec(ONE), {})
            case "taken":
                await host.create(make_spec(OTHER), {})
            case "claimed":
                await host.create(SandboxSpec(sandbox_id=ONE, template=IMAGE), {})
            case "destroy":
                await host.destroy(ONE)
            case "terminate":
                await host.terminate()
            case "pause":
                await host.pause(ONE)
            case "resume":
                await host.resume(ONE, None)
            case "checkpoint":
                await host.checkpoint(ONE, "")
            case "rollback":
                await host.rollback(ONE, host.get(ONE).checkpoints()[0].path.name)
            case "fork":
                await host.fork(ONE, CHILDREN, None)
            case "snapshot" | "template":
                await host.create_snapshot(ONE, TEMPLATE, live=operation == "snapshot")
            case "flatten":
                await host.flatten(ONE, TEMPLATE)
            case "network":
                await host.update_network(ONE, POLICY)


async def _prepare(operation: str, host: Host, fakes: Fakes) -> None:
    """What there is before the operation: a sandbox with something in its memory."""
    if operation in {"create", "warm", "recover"}:
        return
    if operation == "claimed":
        await until(lambda: len(host._ready) == 1, "a ready sandbox")
        # Another one would be made while this one is claimed.
        host._ready._sizes = {}
        return
    await host.create(make_spec(ONE), {})
    if operation in {"destroy", "terminate"}:
        await host.create(make_spec(OTHER), {})
    fakes.vmm.vms[ONE].write(SCRATCH, THEN)
    match operation:
        case "taken":
            await until(lambda: len(host._waiting) == 1, "a VM that waits")
        case "resume":
            await host.pause(ONE)
        case "rollback":
            await host.checkpoint(ONE, "")
            fakes.vmm.vms[ONE].write(SCRATCH, NOW)


def _start_agent(operation: str, step: str, directory: Path) -> int:
    """Fork an agent that runs `operation` up to `step`; its pid."""
    child = os.fork()
    if child == 0:
        try:
            asyncio.run(_operate(operation, directory, Killer(step)))
        finally:
            os._exit(0)
    return child


def main() -> None:
    """Play the agents of the cases in argv, some at a time; how each ended, as JSON."""
    ends: list[int] = []
    cases = json.loads(sys.argv[1])
    for at in range(0, len(cases), _AT_ONCE):
        agents = []
        for operation, step, directory in cases[at : at + _AT_ONCE]:
            if operation == "recover":
                os.waitpid(_start_agent("create", "create:vm", Path(directory)), 0)
            agents.append(_start_agent(operation, step, Path(directory)))
        ends += [os.waitpid(agent, 0)[1] for agent in agents]
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
    """There is all that the host's sandboxes and templates hold, and nothing else."""
    expected, layers, bases = set(), set(), set()
    for sandbox in host.sandboxes():
        entry = sandbox.entry
        layers |= {*entry.layers, *_layers_of(sandbox.checkpoints())}
        expected.add(f"data/sandboxes/{sandbox.sandbox_id}")
        assert not entry.next_top
        if sandbox.state is State.RUNNING:
            assert entry.vm is not None and entry.slot is not None and entry.ram is not None
            bases.add(entry.ram.base)
            expected |= {f"slots/{entry.slot}", f"groups/{entry.group}"}
            expected.add(f"process {entry.vm.process.pid}")
        else:
            assert sandbox.state is State.PAUSED, f"{sandbox.sandbox_id} is {sandbox.state}"
            assert (entry.vm, entry.slot) == (None, None)
        own = {path.stem for path in (directory / "data/sandboxes").glob("*/layer-*")}
        assert entry.top in own | {""}
    for template in host.templates():
        if isinstance(template, Snapshot):
            layers |= _layers_of([template])
            expected.add(f"data/templates/{template.path.name}")
        elif template.name != IMAGE:
            expected.add(f"data/images/{template.name}")
    expected |= {f"data/layers/{name}.qcow2" for name in layers}
    # Those that VMs boot from take no room.
    there = (path for path in (directory / "data/bases").iterdir() if path.stat().st_blocks)
    expected |= {f"data/bases/{path.name}" for path in there if path.stem in bases}
    # What stands for the whole machine is looked after by who makes the next one.
    assert {name for name in find_leaks(directory) if not name.startswith("assets/")} == expected


def _layers_of(snapshots: list[Snapshot]) -> set[str]:
    return {name for snapshot in snapshots for name in snapshot.manifest.layers}


async def _live_on(directory: Path) -> dict[str, bytes]:
    """Wake all that sleeps, and start one from a new template; what is in the memory of each.

    At the end nothing is left.
    """
    fakes = make_machine(directory)
    async with fakes.host() as host:
        for sandbox in host.sandboxes():
            await host.resume(sandbox.sandbox_id, None)
            # All that can be done with one can be done again.
            await host.checkpoint(sandbox.sandbox_id, "")
            await host.pause(sandbox.sandbox_id)
            await host.resume(sandbox.sandbox_id, None)
        with contextlib.suppress(NotFound):
            await host.create(replace(make_spec(BORN), template=TEMPLATE), {})
        for sandbox in host.sandboxes():
            await _assert_usable(sandbox)
        found = {i: vm.read(SCRATCH, len(THEN)) for i, vm in fakes.vmm.vms.items()}
        for sandbox in host.sandboxes():
            await host.destroy(sandbox.sandbox_id)
        with contextlib.suppress(NotFound):
            await host.delete_snapshot(TEMPLATE)
        await host.terminate()
    assert not find_leaks(directory)
    return found


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


_OLD = ("create", "taken", "claimed", "destroy", "terminate", "recover")
_SNAPSHOTS = ("pause", "resume", "checkpoint", "rollback", "fork", "snapshot", "template")
_FLATTEN = pytest.param("flatten", marks=pytest.mark.root)


def _named_in(*modules: object) -> set[str]:
    """The steps that the source of modules names, with the operation where it is a variable."""
    files = [Path(str(module.__file__)) for module in modules]  # type: ignore[attr-defined]
    pattern = re.compile(r"step\(f?\"([^\"]+)\"\)")
    return {name for file in files for name in pattern.findall(file.read_text())}


@pytest.mark.root
async def test_every_step_is_reached() -> None:
    reached = set()
    for operation in ("create", "taken", "claimed", "terminate", "flatten", "network", *_SNAPSHOTS):
        reached |= set(await _steps(operation))
    for name in _named_in(host_module, sandbox_module, microvm_module, fakes_agent):
        # One without its operation comes with that of who asked for the VM.
        pattern = re.escape(name) if ":" in name else f"[a-z]+:{re.escape(name)}"
        pattern = re.sub(r"\\{[a-z]+\\}", "[a-z]+", pattern)
        assert any(re.fullmatch(pattern, step) for step in reached), name


@pytest.mark.parametrize("operation", _OLD)
async def test_killed_at_every_step(operation: str, directories: Callable[[], Path]) -> None:
    cases = [(operation, step, directories()) for step in await _steps(operation)]
    assert len(cases) > 3
    _kill_agents(cases)
    for _, step, directory in cases:
        survivors = await _survivors(directory)
        assert survivors.keys() <= _may_live(operation, step), f"after {step}"
        assert survivors.keys() >= _must_live(operation, step), f"after {step}"
        assert await _survivors(directory) == survivors, f"second start after {step}"
        async with make_machine(directory).host() as host:
            await host.terminate()
        # Warm snapshots are the whole machine's, and stay.
        leaks = {name for name in find_leaks(directory) if not name.startswith("assets/warm/")}
        assert not leaks, f"after {step}"


def _must_live(operation: str, step: str) -> set[str]:
    if operation in {"create", "claimed"}:
        return {ONE} if step == "create:running" else set()
    if operation == "taken":
        return {ONE, OTHER} if step == "create:running" else {ONE}
    return {OTHER} if operation == "destroy" else set()


def _may_live(operation: str, step: str) -> set[str]:
    # Of two that are destroyed at once, one may not have begun.
    begun = operation == "terminate" and step == "destroy:recorded"
    return _must_live(operation, step) | ({ONE, OTHER} if begun else set())


#: What a killed operation leaves the sandbox as, from which step on; and so its memory.
_LEFT: dict[str, dict[str, tuple[State | None, bytes]]] = {
    "pause": {"": (State.RUNNING, THEN), "write:whole": (State.PAUSED, THEN)},
    "resume": {"": (State.PAUSED, THEN), "resume:committed": (State.RUNNING, THEN)},
    "template": {"": (State.RUNNING, THEN), "pause:written": (State.PAUSED, THEN)},
    "rollback": {
        "": (State.RUNNING, NOW),
        "rollback:recorded": (State.PAUSED, THEN),
        "rollback:committed": (State.RUNNING, THEN),
    },
    "create": {"": (None, b""), "create:running": (State.RUNNING, b"")},
    "destroy": {"": (None, b"")},
    "flatten": {
        "": (State.RUNNING, THEN),
        "write:whole": (State.PAUSED, THEN),
        "flatten:written": (None, THEN),
    },
}
_STAYS = {"": (State.RUNNING, THEN)}


def left_after(operation: str, steps: Sequence[str]) -> Iterator[tuple[str, State | None, bytes]]:
    """Each step, and what the sandbox is, and has in its memory, when the agent dies there."""
    changes = _LEFT.get(operation, _STAYS)
    state, content = changes[""]
    for step in steps:
        state, content = changes.get(step, (state, content))
        yield step, state, content


@pytest.mark.parametrize("operation", [*_SNAPSHOTS, _FLATTEN])
async def test_killed_between_sleep_and_waking(
    operation: str, directories: Callable[[], Path]
) -> None:
    cases = [(operation, step, directories()) for step in await _steps(operation)]
    assert len(cases) > 5
    _kill_agents(cases)
    left = left_after(operation, [step for _, step, _ in cases])
    for (_, _, directory), (step, state, content) in zip(cases, left, strict=True):
        survivors = await _survivors(directory)
        assert survivors.get(ONE) is state, f"after {step}"
        assert {survivors[each] for each in survivors if each != ONE} <= {State.RUNNING}
        assert survivors.keys() <= {ONE, *CHILDREN}
        assert await _survivors(directory) == survivors, f"second start after {step}"
        living = await _live_on(directory)
        # What ended with its disk made an image has not ended for nothing.
        assert state is not None or BORN in living, f"after {step}"
        for sandbox_id, found in living.items():
            # An image has a disk alone.
            lost = sandbox_id == BORN and operation == "flatten"
            assert found == (bytes(len(THEN)) if lost else content), f"{sandbox_id} after {step}"


async def test_what_a_policy_says_is_what_the_next_agent_holds_to(
    directories: Callable[[], Path],
) -> None:
    cases = [("network", step, directories()) for step in await _steps("network")]
    assert [step for _, step, _ in cases] == ["network:recorded", "network:changed"]
    _kill_agents(cases)
    for _, step, directory in cases:
        assert await _survivors(directory) == {ONE: State.RUNNING}, f"after {step}"
        fakes = make_machine(directory)
        async with fakes.host() as host:
            slot = host.get(ONE).entry.slot
            assert slot is not None
            assert fakes.network.policy(fakes.network._slot(slot)) == POLICY, f"after {step}"


@pytest.mark.parametrize(
    ("operation", "step"),
    [
        ("resume", "resume:committed"),
        ("rollback", "rollback:committed"),
        ("rollback", "rollback:recorded"),
        # It stands still, and its clock with it.
        ("pause", "pause:frozen"),
        ("checkpoint", "vmm:stopped"),
    ],
)
async def test_guest_that_was_not_told_is_told_by_the_next_agent(
    operation: str, step: str, directories: Callable[[], Path]
) -> None:
    directory = directories()
    _kill_agents([(operation, step, directory)])
    fakes = make_machine(directory)
    async with fakes.host() as host:
        sandbox = await host.resume(ONE, None)
        told = fakes.guests.identities[sandbox.host_ip]
        assert (told.sandbox_id, told.moved) == (ONE, operation == "rollback")
        await _assert_usable(sandbox)
    fakes = make_machine(directory)
    async with fakes.host() as host:
        await _assert_usable(host.get(ONE))
        assert fakes.guests.identities == {}, "it was told a second time"
        # Nothing of its past is told to a guest that is where it believes to be.
        await host.pause(ONE)
        sandbox = await host.resume(ONE, None)
        assert not fakes.guests.identities[sandbox.host_ip].moved


async def test_guest_that_cannot_be_told_is_an_error(directories: Callable[[], Path]) -> None:
    async def refuse(_: Identity) -> None:
        raise ToolFailed("the guest refused")

    directory = directories()
    _kill_agents([("resume", "resume:committed", directory)])
    fakes = make_machine(directory)
    fakes.guests.introducing = refuse
    async with fakes.host() as host:
        sandbox = host.get(ONE)
        reason = "it did not come back: the guest refused"
        assert (sandbox.state, sandbox.reason) == (State.ERROR, reason)
        await host.terminate()
    assert not find_leaks(directory)


async def test_vm_that_does_not_end_does_not_keep_the_agent_from_starting(
    directories: Callable[[], Path],
) -> None:
    directory = directories()
    _kill_agents([("pause", "pause:paused", directory)])
    fakes = make_machine(directory)
    entry = dict(fakes.data.read_all())[ONE]
    assert entry is not None and entry.vm is not None
    vm = fakes.vmm.vms[ONE] = FakeVm(entry.vm, no_step, fakes.vmm.vms)
    vm.stuck = TimedOut("the process does not end")
    async with fakes.host() as host:
        sandbox = host.get(ONE)
        assert sandbox.state is State.PAUSED
        with pytest.raises(TimedOut):
            await host.resume(ONE, None)
        vm.stuck = None
        await host.resume(ONE, None)
        assert fakes.vmm.vms[ONE].read(SCRATCH, len(THEN)) == THEN
        await _assert_usable(sandbox)
        await host.terminate()
    assert not find_leaks(directory)


@dataclass(frozen=True)
class Cut:
    """A power cut while a layer was switched: at a step, and what of it had reached the disk."""

    step: str
    written: bool = False
    sealed: bool = False
    #: Which of the two layers are there afterwards, and which of them is written to.
    kept: tuple[str, ...] = ("older",)
    top: str = "older"


@pytest.mark.parametrize(
    "cut",
    [
        Cut("snapshot:recorded"),
        Cut("vmm:switched"),
        Cut("vmm:switched", written=True, kept=("older", "newer"), top="newer"),
        Cut("snapshot:frozen", written=True, kept=("older", "newer"), top="newer"),
        Cut("snapshot:frozen", written=True, sealed=True, kept=("older", "newer"), top="newer"),
        Cut("snapshot:frozen", sealed=True, top=""),
    ],
    ids=lambda cut: f"{cut.step}-{'written' * cut.written}-{'sealed' * cut.sealed}",
)
async def test_power_cut_while_layers_are_switched(
    cut: Cut, directories: Callable[[], Path]
) -> None:
    directory = directories()
    _kill_agents([("checkpoint", cut.step, directory)])
    layers = {"": ""} | await _cut_power(directory, cut)
    fakes = make_machine(directory)
    async with fakes.host() as host:
        sandbox = host.get(ONE)
        assert (sandbox.state, "restarted" in sandbox.reason) == (State.PAUSED, True)
        entry = sandbox.entry
        kept = tuple(layers[each] for each in cut.kept)
        assert (*entry.layers, *filter(None, [entry.top])) == kept
        assert (entry.top, entry.next_top) == (layers[cut.top], "")
        await host.resume(ONE, None)
        await _assert_usable(sandbox)
        assert _in_disk_order(fakes.vmm.specs[ONE])[: len(kept)] == kept
        _assert_exact(directory, host)
        await host.terminate()
    assert not find_leaks(directory)


async def _cut_power(directory: Path, cut: Cut) -> dict[str, str]:
    """End the VM with its host's memory; the names of its older and its newer layer."""
    for vm in find_vms(directory):
        vm.kill()
        await vm.gone(_DEADLINE_S)
    data = DataDir(directory / "data")
    entry = dict(data.read_all())[ONE]
    assert entry is not None and entry.next_top
    paths = data.sandbox(ONE)
    data.write(replace(entry, boot_id="of another boot"))
    if cut.written:
        newer = paths.layer(entry.next_top)
        await proc.run(["qemu-io", "-f", "qcow2", "-c", "write -P 7 0 64k", newer])
    if cut.sealed:
        Layers(data.layers, os.geteuid()).seal(paths.layer(entry.top))
    return {"older": entry.top, "newer": entry.next_top}


def _in_disk_order(spec: VmSpec) -> tuple[str, ...]:
    assert spec.disk is not None
    return tuple(path.stem for path in (*spec.disk.sealed, spec.disk.top))


async def test_killed_while_a_warm_snapshot_is_made(directories: Callable[[], Path]) -> None:
    cases = [("warm", step, directories()) for step in await _steps("warm")]
    _kill_agents(cases)
    for _, step, directory in cases:
        survivors = await _survivors(directory)
        assert survivors.keys() <= ({ONE} if step == "create:running" else set())
        fakes = make_machine(directory, warm=True)
        async with fakes.host() as host:
            await host.create(make_spec(OTHER), {})
            assert fakes.vmm.restored == 1, f"after {step}"
            await host.terminate()
        # One warm snapshot for the machine, what it needs, and no half of another.
        left = {name.rpartition("/")[0] for name in find_leaks(directory)}
        assert left == {"assets/warm", "data/bases", "data/layers"}
        assert len(find_leaks(directory)) == 3, f"after {step}"


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
