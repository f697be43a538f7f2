"""The host's life cycle, admission and recovery, on VMs that are sleeping processes."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from pathlib import Path

import pytest

from sandmartin.agent.admission import memory_total_mb
from sandmartin.agent.guest import Command, Ended, Identity, Output, ProcessEvent, Started
from sandmartin.agent.host import Host
from sandmartin.agent.journal import DataDir, Entry
from sandmartin.agent.limits import OVERHEAD_MB
from sandmartin.agent.sandbox import Sandbox
from sandmartin.agent.vmm import VmStatus
from sandmartin.errors import (
    AlreadyExists,
    Conflict,
    DiskFull,
    Exhausted,
    GuestSilent,
    Invalid,
    NotFound,
    SandmartinError,
    TimedOut,
    ToolFailed,
    Unavailable,
)
from sandmartin.model import Accel, State
from tests.fakes_agent import (
    IMAGE_MB,
    Fakes,
    find_leaks,
    find_vms,
    make_machine,
    make_spec,
)
from tests.waiting import until

pytestmark = pytest.mark.qemu_img


async def run(sandbox: Sandbox, *words: str) -> bytes:
    """The output of `echo words`."""
    async with aclosing(sandbox.exec(Command(cmd="echo", args=words))) as events:
        return b"".join([event.data async for event in events if isinstance(event, Output)])


def entry_of(directory: Path, sandbox_id: str) -> Entry:
    """A sandbox's entry as a next agent would read it."""
    entry = dict(DataDir(directory / "data").read_all())[sandbox_id]
    assert entry is not None
    return entry


class Gate:
    """Holds guests in their introduction until it opens."""

    def __init__(self, fakes: Fakes) -> None:
        self.reached = asyncio.Event()
        self.opened = asyncio.Event()
        fakes.guests.introducing = self._introduce

    async def _introduce(self, _: Identity) -> None:
        self.reached.set()
        await self.opened.wait()


# Create and destroy.


async def test_create_use_destroy(fakes: Fakes, host: Host, directory: Path) -> None:
    sandbox = await host.create(make_spec(disk_size_mb=IMAGE_MB + 8), {"A": "1"})
    assert (sandbox.state, host.sandboxes(), host.get("sb1")) == (State.RUNNING, [sandbox], sandbox)
    assert await run(sandbox, "a", "b") == b"a b"
    identity = fakes.guests.identities[sandbox.host_ip]
    assert (identity.sandbox_id, identity.envs) == ("sb1", {"A": "1"})
    assert identity.root_bytes == (IMAGE_MB + 8) << 20
    entry = entry_of(directory, "sb1")
    assert (entry.token, entry.envd_version) == (identity.token, fakes.guests.envd_version)
    spec = fakes.vmm.specs["sb1"]
    assert (spec.vcpus, spec.memory_mb, spec.uid) == (1, 128, os.geteuid())
    assert identity.token not in repr((sandbox.entry, identity, spec))
    await host.destroy("sb1")
    assert (sandbox.state, host.sandboxes()) == (State.STOPPED, [])
    assert not find_leaks(directory)
    await host.destroy("sb1")
    with pytest.raises(NotFound, match="there is no sandbox 'sb1'"):
        host.get("sb1")
    with pytest.raises(Conflict, match="is stopped"):
        await run(sandbox)


async def test_same_id_twice(fakes: Fakes, host: Host) -> None:
    gate = Gate(fakes)
    first = asyncio.create_task(host.create(make_spec(), {}))
    await gate.reached.wait()
    with pytest.raises(AlreadyExists):
        await host.create(make_spec(), {})
    gate.opened.set()
    sandbox = await first
    with pytest.raises(AlreadyExists):
        await host.create(make_spec(), {})
    assert await run(sandbox, "lives") == b"lives"


async def test_twenty_at_once(host: Host, directory: Path) -> None:
    ids = [f"sb{number}" for number in range(20)]
    made = await asyncio.gather(*(host.create(make_spec(each), {}) for each in ids))
    assert {sandbox.state for sandbox in made} == {State.RUNNING}
    assert len({sandbox.host_ip for sandbox in made}) == len(find_vms(directory)) == 20
    said = await asyncio.gather(*(run(sandbox, sandbox.sandbox_id) for sandbox in made))
    assert said == [each.encode() for each in ids]
    await asyncio.gather(*(host.destroy(each) for each in ids + ids))
    assert not find_leaks(directory)


async def test_caller_that_hangs_up_ends_only_its_waiting(
    fakes: Fakes, host: Host, directory: Path
) -> None:
    gate = Gate(fakes)
    creating = asyncio.create_task(host.create(make_spec(), {}))
    await gate.reached.wait()
    creating.cancel()
    with pytest.raises(asyncio.CancelledError):
        await creating
    gate.opened.set()
    sandbox = host.get("sb1")
    await until(lambda: sandbox.state is State.RUNNING, "the end of the create")
    destroying = asyncio.create_task(host.destroy("sb1"))
    await until(lambda: sandbox.state is State.STOPPING, "the begin of the destroy")
    destroying.cancel()
    await until(lambda: not host.sandboxes(), "the end of the destroy")
    assert not find_leaks(directory)


async def test_destroy_waits_for_the_create(fakes: Fakes, host: Host, directory: Path) -> None:
    gate = Gate(fakes)
    creating = asyncio.create_task(host.create(make_spec(), {}))
    await gate.reached.wait()
    destroying = asyncio.create_task(host.destroy("sb1"))
    with pytest.raises(Conflict, match="is starting"):
        await run(host.get("sb1"))
    gate.opened.set()
    await asyncio.gather(creating, destroying)
    assert (host.sandboxes(), find_leaks(directory)) == ([], set())
    await host.create(make_spec(), {})


# Creates that fail.


def _monitor_fails(fakes: Fakes) -> None:
    fakes.vmm.failure = ToolFailed("the monitor refused")


def _monitor_is_missing(fakes: Fakes) -> None:
    fakes.vmm.failure_before = ToolFailed("the monitor refused")


def _guest_is_silent(fakes: Fakes) -> None:
    async def never(_: Identity) -> None:
        raise TimedOut("the guest did not answer", hint="wait longer")

    fakes.guests.introducing = never
    fakes.vmm.console = b"Kernel panic\n"


def _guest_crashes(fakes: Fakes) -> None:
    async def end(identity: Identity) -> None:
        fakes.vmm.vms[identity.sandbox_id].record.process.kill()
        await asyncio.Event().wait()

    fakes.guests.introducing = end


def _guest_has_a_bug(fakes: Fakes) -> None:
    async def crash(_: Identity) -> None:
        raise RuntimeError("a bug of ours")

    fakes.guests.introducing = crash


def _no_slots(fakes: Fakes) -> None:
    fakes.network.limit = 0


@pytest.mark.parametrize(
    ("arrange", "kind", "message"),
    [
        (_no_slots, Exhausted, "all 0 network slots"),
        (_monitor_is_missing, ToolFailed, "the monitor refused"),
        (_monitor_fails, ToolFailed, "the monitor refused"),
        (_guest_is_silent, TimedOut, "did not answer; its console ends with: 'Kernel panic'"),
        (_guest_crashes, ToolFailed, "the VM ended while it started"),
        (_guest_has_a_bug, RuntimeError, "a bug of ours"),
    ],
)
async def test_failed_create_leaves_nothing(
    fakes: Fakes,
    host: Host,
    directory: Path,
    arrange: Callable[[Fakes], None],
    kind: type[Exception],
    message: str,
) -> None:
    arrange(fakes)
    with pytest.raises(kind, match=message):
        await host.create(make_spec(), {})
    assert (host.sandboxes(), find_leaks(directory)) == ([], set())


async def test_disk_smaller_than_the_image(host: Host, directory: Path) -> None:
    with pytest.raises(Invalid, match=f"template 'base' is {IMAGE_MB} MB"):
        await host.create(make_spec(disk_size_mb=IMAGE_MB - 1), {})
    assert (host.sandboxes(), find_leaks(directory)) == ([], set())


async def test_create_whose_undoing_fails_tells_its_own_error(
    fakes: Fakes, host: Host, directory: Path
) -> None:
    async def stuck(identity: Identity) -> None:
        fakes.vmm.vms[identity.sandbox_id].stuck = TimedOut("the process does not end")
        raise ToolFailed("the guest refused")

    fakes.guests.introducing = stuck
    with pytest.raises(ToolFailed, match="the guest refused"):
        await host.create(make_spec(), {})
    sandbox = host.get("sb1")
    assert sandbox.state is State.ERROR
    assert sandbox.reason == "it could not be removed: the process does not end"
    with pytest.raises(TimedOut):
        await host.destroy("sb1")
    assert sandbox.state is State.ERROR
    fakes.vmm.vms["sb1"].stuck = None
    await host.destroy("sb1")
    assert not find_leaks(directory)


# What happens to a running one.


async def test_vm_that_ends_by_itself(fakes: Fakes, host: Host, directory: Path) -> None:
    sandbox = await host.create(make_spec(), {})
    fakes.vmm.vms["sb1"].record.process.kill()
    await until(lambda: sandbox.state is State.ERROR, "the end to be noticed")
    assert entry_of(directory, "sb1").reason == "its VM ended by itself"
    with pytest.raises(Conflict, match="is error: its VM ended by itself") as caught:
        await run(sandbox)
    assert "destroy" in caught.value.hint
    await host.destroy("sb1")
    assert not find_leaks(directory)


async def test_command_in_a_vm_that_ends(fakes: Fakes, host: Host) -> None:
    async def end(_: Command) -> AsyncGenerator[ProcessEvent, None]:
        yield Started(1)
        process = fakes.vmm.vms["sb1"].record.process
        process.kill()
        # Whoever notices first, the reason must be the same.
        while process.alive():
            pass
        raise GuestSilent("the connection broke")

    fakes.guests.running = end
    sandbox = await host.create(make_spec(), {})
    with pytest.raises(Conflict, match="its VM ended by itself"):
        await run(sandbox)
    assert sandbox.reason == "its VM ended by itself"


async def test_silent_guest(fakes: Fakes, host: Host, directory: Path) -> None:
    sandbox = await host.create(make_spec(), {})
    fakes.guests.silent.add(sandbox.host_ip)
    with pytest.raises(GuestSilent, match="of sandbox sb1 does not answer") as caught:
        await run(sandbox)
    assert "destroy" in caught.value.hint
    assert fakes.guests.checks == fakes.machine.patience.health_tries
    assert (sandbox.state, sandbox.reason) == (State.ERROR, "its guest agent does not answer")
    with pytest.raises(Conflict, match="its guest agent does not answer"):
        await run(sandbox)
    await host.destroy("sb1")
    assert not find_leaks(directory)


async def test_guest_that_was_silent_once(fakes: Fakes, host: Host) -> None:
    async def hiccup(_: Command) -> AsyncGenerator[ProcessEvent, None]:
        yield Started(1)
        raise GuestSilent("the connection broke")

    fakes.guests.running = hiccup
    sandbox = await host.create(make_spec(), {})
    with pytest.raises(GuestSilent, match="the connection broke"):
        await run(sandbox)
    assert (sandbox.state, fakes.guests.checks) == (State.RUNNING, 1)


async def test_full_host_disk(fakes: Fakes, host: Host) -> None:
    sandbox = await host.create(make_spec(), {})
    vm = fakes.vmm.vms["sb1"]
    vm.condition, vm.has_space = VmStatus.DISK_FULL, False
    fakes.guests.silent.add(sandbox.host_ip)
    with pytest.raises(DiskFull, match="stands still because the host's disk is full") as caught:
        await run(sandbox)
    assert "free disk space" in caught.value.hint
    assert (sandbox.state, fakes.guests.checks) == (State.RUNNING, 0)
    assert "disk is full" in sandbox.reason
    vm.has_space = True
    fakes.guests.silent.clear()
    await until(lambda: not sandbox.reason, "the VM to go on")
    assert vm.condition is VmStatus.RUNNING
    assert await run(sandbox, "again") == b"again"


async def test_nothing_goes_on_below_the_disk_floor(directory: Path) -> None:
    # Half of the floor must be free before a VM is let go on; no disk has this much.
    fakes = make_machine(directory)
    async with fakes.host() as host:
        sandbox = await host.create(make_spec(), {})
        fakes.vmm.vms["sb1"].condition = VmStatus.DISK_FULL
        await until(lambda: not sandbox.reason, "the VM to go on")
    full = make_machine(directory, disk_floor_mb=2**50)
    async with full.host() as host:
        sandbox = host.get("sb1")
        vm = full.vmm.vms["sb1"]
        vm.condition = VmStatus.DISK_FULL
        await until(lambda: bool(sandbox.reason), "the full disk to be noticed")
        # Commands are refused at once, not after a guest's silence.
        with pytest.raises(DiskFull):
            await run(sandbox)
        assert vm.condition is VmStatus.DISK_FULL
        await host.destroy("sb1")
    assert not find_leaks(directory)


async def test_full_disk_under_the_journal(fakes: Fakes, host: Host, directory: Path) -> None:
    async def fill(_: Identity) -> None:
        fakes.data.full = True

    ended, sandbox = [await host.create(make_spec(each), {}) for each in ("sb1", "sb2")]
    fakes.guests.introducing = fill
    with pytest.raises(DiskFull):
        await host.create(make_spec("sb3"), {})
    with pytest.raises(DiskFull):
        await host.create(make_spec("sb4"), {})
    # What happens meanwhile is true none the less, and room can be made.
    fakes.vmm.vms["sb1"].record.process.kill()
    await until(lambda: ended.state is State.ERROR, "the end to be noticed")
    assert await run(sandbox, "goes", "on") == b"goes on"
    await host.destroy("sb1")
    assert [each.sandbox_id for each in host.sandboxes()] == ["sb2"]
    fakes.data.full = False
    active_at = sandbox.entry.last_active_at
    await until(lambda: entry_of(directory, "sb2").last_active_at == active_at, "the save")
    await host.destroy("sb2")
    assert not find_leaks(directory)


async def test_files_input_and_signals(fakes: Fakes, host: Host) -> None:
    async def chunks() -> AsyncGenerator[bytes, None]:
        for byte in range(3):
            yield bytes([byte]) * 50_000

    sandbox = await host.create(make_spec(), {})
    await sandbox.write_file("/a", "root", chunks())
    content = b"".join([chunk async for chunk in sandbox.read_file("/a", "root")])
    assert content == b"\0" * 50_000 + b"\1" * 50_000 + b"\2" * 50_000
    with pytest.raises(NotFound):
        await anext(sandbox.read_file("/b", "root"))
    await sandbox.send_input(7, chunks())
    assert fakes.guests.inputs[7] == content + b"<end>"
    await sandbox.signal(7, 15)
    assert fakes.guests.signals == [(7, 15)]


async def test_each_event_and_chunk_is_activity(fakes: Fakes, host: Host) -> None:
    async def two(_: Command) -> AsyncGenerator[ProcessEvent, None]:
        yield Started(1)
        yield Ended(exit_code=0)

    async def upload() -> AsyncGenerator[bytes, None]:
        for _ in range(2):
            times.append(sandbox.entry.last_active_at)
            yield b"x"

    fakes.guests.running = two
    sandbox = await host.create(make_spec(), {})
    times = [sandbox.entry.last_active_at]
    async with aclosing(sandbox.exec(Command(cmd="x"))) as events:
        async for _ in events:
            times.append(sandbox.entry.last_active_at)
    await sandbox.write_file("/a", "root", upload())
    async for _ in sandbox.read_file("/a", "root"):
        times.append(sandbox.entry.last_active_at)

    async def tree() -> AsyncGenerator[bytes, None]:
        for _ in range(2):
            times.append(sandbox.entry.last_active_at)
            yield bytes(512)

    await sandbox.write_tree("/there", "", tree())
    async for _ in sandbox.read_tree("/a"):
        times.append(sandbox.entry.last_active_at)
    assert times == sorted(set(times)), "each must be later than the one before"


# The end of an agent, and the next one.


async def test_next_agent_adopts(directory: Path) -> None:
    first = make_machine(directory)
    async with first.host() as host:
        sandbox = await host.create(make_spec(timeout_s=60), {})
        await host.create(make_spec("sb2"), {})
        sandbox.touch()
        before = sandbox.entry
        with pytest.raises(Conflict, match="another agent is running"):
            make_machine(directory)
    assert first.vmm.vms["sb1"].closed
    process = first.vmm.vms["sb2"].record.process
    assert process.kill()
    assert await process.gone(20)
    second = make_machine(directory)
    async with second.host() as host:
        sandbox, lost = host.get("sb1"), host.get("sb2")
        assert sandbox.entry == before
        assert await run(sandbox, "same", "token") == b"same token"
        assert (lost.state, lost.reason) == (
            State.ERROR,
            "its VM ended while no agent was running",
        )
        second.vmm.vms["sb1"].record.process.kill()
        await until(lambda: sandbox.state is State.ERROR, "an adopted VM's end")
        await host.destroy("sb1")
        await host.destroy("sb2")
    assert not find_leaks(directory)


async def test_adopted_without_its_slot(directory: Path) -> None:
    first = make_machine(directory)
    async with first.host() as host:
        await host.create(make_spec(), {})
    for file in (directory / "slots").iterdir():
        file.unlink()
    async with make_machine(directory).host() as host:
        sandbox = host.get("sb1")
        with pytest.raises(Conflict, match="its place in the network is gone"):
            await run(sandbox)
        await host.destroy("sb1")
    assert not find_leaks(directory)


async def test_what_cannot_be_removed_does_not_keep_the_next_agent_from_starting(
    directory: Path,
) -> None:
    fakes = make_machine(directory)
    async with fakes.host() as host:
        await host.create(make_spec("sb1"), {})
        await host.create(make_spec("sb2"), {})
        fakes.vmm.vms["sb1"].stuck = TimedOut("the process does not end")
        with pytest.raises(TimedOut):
            await host.destroy("sb1")
        stopping = host.get("sb1").entry
    # As a crash in the middle of that destroy would have left it.
    text = DataDir(directory / "data").sandbox("sb1").entry
    text.write_bytes(text.read_bytes().replace(b'"error"', b'"stopping"'))
    second = make_machine(directory)
    assert stopping.vm is not None
    vm = await second.vmm.adopt(stopping.vm)
    assert vm is second.vmm.vms["sb1"]
    second.vmm.vms["sb1"].stuck = TimedOut("the process does not end")
    async with second.host() as host:
        assert {s.sandbox_id: s.state for s in host.sandboxes()} == {
            "sb1": State.ERROR,
            "sb2": State.RUNNING,
        }
        second.vmm.vms["sb1"].stuck = None
        await host.terminate()
    assert not find_leaks(directory)


async def test_last_activity_outlives_a_killed_agent(fakes: Fakes, directory: Path) -> None:
    async with fakes.host() as host:
        sandbox = await host.create(make_spec(), {})
        sandbox.touch()
        active_at = sandbox.entry.last_active_at
        # Without a word from us: this is all that a killed agent leaves.
        await until(lambda: entry_of(directory, "sb1").last_active_at == active_at, "the save")
        inode = DataDir(directory / "data").sandbox("sb1").entry.stat().st_ino
        for _ in range(20):
            sandbox.save_activity()
        assert DataDir(directory / "data").sandbox("sb1").entry.stat().st_ino == inode


async def test_close_leaves_vms_and_terminate_ends_all(directory: Path) -> None:
    async with make_machine(directory).host() as host:
        await host.create(make_spec("sb1"), {})
        await host.create(make_spec("sb2"), {})
    assert len(find_vms(directory)) == 2
    async with make_machine(directory).host() as host:
        await asyncio.gather(host.terminate(), host.terminate())
        assert host.terminated.is_set()
        assert not find_leaks(directory)
        assert not (directory / "groups").exists()
        await host.terminate()
        with pytest.raises(Unavailable, match="this agent is ending"):
            await host.create(make_spec(), {})


async def test_terminate_waits_for_a_create(fakes: Fakes, host: Host, directory: Path) -> None:
    gate = Gate(fakes)
    creating = asyncio.create_task(host.create(make_spec(), {}))
    await gate.reached.wait()
    # Its caller hangs up, and that must not end it half way.
    ending = asyncio.create_task(host.terminate())
    await asyncio.sleep(0)
    with pytest.raises(Unavailable):
        await host.create(make_spec("sb2"), {})
    ending.cancel()
    gate.opened.set()
    await creating
    await asyncio.wait_for(host.terminated.wait(), 20)
    assert not find_leaks(directory)


async def test_terminate_that_fails_can_be_tried_again(
    fakes: Fakes, host: Host, directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for each in ("sb1", "sb2"):
        await host.create(make_spec(each), {})
    fakes.vmm.vms["sb1"].stuck = TimedOut("the process does not end")
    with caplog.at_level(logging.ERROR), pytest.raises(TimedOut):
        await host.terminate()
    assert ["sb1" in record.getMessage() for record in caplog.records] == [True]
    assert [sandbox.sandbox_id for sandbox in host.sandboxes()] == ["sb1"]
    assert not host.terminated.is_set()
    fakes.vmm.vms["sb1"].stuck = None
    assert (await host.create(make_spec("sb3"), {})).state is State.RUNNING
    await host.terminate()
    assert not find_leaks(directory)


# Admission.


async def refusal(creating: Awaitable[Sandbox]) -> SandmartinError:
    with pytest.raises(Exhausted) as caught:
        await creating
    assert caught.value.hint
    return caught.value


async def test_unknown_template(host: Host, directory: Path) -> None:
    spec = make_spec()
    unknown = type(spec)(sandbox_id="sb1", template="nothing")
    with pytest.raises(NotFound, match="no template 'nothing'") as caught:
        await host.create(unknown, {})
    assert "base" in caught.value.hint
    assert not find_leaks(directory)


async def test_vcpus_are_counted(directory: Path) -> None:
    cpus = os.cpu_count() or 1
    async with make_machine(directory, cpu_overcommit=2.0).host() as host:
        error = await refusal(host.create(make_spec(vcpus=cpus + 1), {}))
        assert f"this host has {cpus}" in error.message
        for each in ("sb1", "sb2"):
            await host.create(make_spec(each, vcpus=cpus), {})
        error = await refusal(host.create(make_spec("sb3"), {}))
        assert "1 vCPUs are asked for and 0 are left" in error.message
        await host.destroy("sb1")
        await host.create(make_spec("sb3"), {})


async def test_memory_is_counted_with_its_overhead(directory: Path) -> None:
    each = 128 + OVERHEAD_MB[Accel.TCG]
    fakes = make_machine(directory, memory_reserve_mb=memory_total_mb() - 2 * each - 1)
    async with fakes.host() as host:
        error = await refusal(host.create(make_spec(memory_mb=2**30), {}))
        assert f"and {2 * each + 1} MB are left" in error.message
        # At once: what is not made yet is counted as well.
        results = await asyncio.gather(
            *(host.create(make_spec(f"sb{number}"), {}) for number in range(4)),
            return_exceptions=True,
        )
        refused = [result for result in results if isinstance(result, Exhausted)]
        assert [str(error) for error in refused] == [refused[0].message] * 2
        assert "and 1 MB are left" in refused[0].message
        await host.destroy("sb0")
        await host.create(make_spec("sb9"), {})


async def test_failed_create_is_counted_no_more(directory: Path) -> None:
    fakes = make_machine(directory, cpu_overcommit=1 / (os.cpu_count() or 1))
    async with fakes.host() as host:
        fakes.vmm.failure = ToolFailed("the monitor refused")
        for _ in range(3):
            with pytest.raises(ToolFailed):
                await host.create(make_spec(), {})
        fakes.vmm.failure = None
        await host.create(make_spec(), {})


async def test_disk_floor(directory: Path) -> None:
    async with make_machine(directory, disk_floor_mb=2**50).host() as host:
        error = await refusal(host.create(make_spec(), {}))
        assert f"below the floor of {2**50} MB" in error.message
    assert not find_leaks(directory)
