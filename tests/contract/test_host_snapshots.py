"""Sleeping, forking, rolling back and templates, on VMs that are processes with a RAM of their own.

Memory is real: what a test writes to a guest's RAM comes back only if its page was found dirtied,
copied, and injected before the device state was loaded.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path

import pytest

from sandmartin.agent import proc
from sandmartin.agent.guest import Command, Identity, Output
from sandmartin.agent.host import Host
from sandmartin.agent.journal import DataDir
from sandmartin.agent.sandbox import Sandbox
from sandmartin.errors import (
    AlreadyExists,
    Conflict,
    DiskFull,
    Exhausted,
    Invalid,
    NotFound,
    SandmartinError,
    TimedOut,
    ToolFailed,
)
from sandmartin.model import State
from tests.fakes_agent import (
    IMAGE_MB,
    Fakes,
    find_leaks,
    find_vms,
    make_machine,
    make_spec,
)
from tests.fakes_vmm import PLATFORM, SCRATCH
from tests.waiting import until

pytestmark = pytest.mark.qemu_img

MARK, OTHER = b"remember this", b"forget this\0\0"


@pytest.fixture
async def sandbox(fakes: Fakes, host: Host) -> Sandbox:
    """A sandbox that remembers something."""
    made = await host.create(make_spec(timeout_s=900), {"A": "1"})
    fakes.vmm.vms["sb1"].write(SCRATCH, MARK)
    return made


def remembered(fakes: Fakes, sandbox_id: str = "sb1") -> bytes:
    return fakes.vmm.vms[sandbox_id].read(SCRATCH, len(MARK))


async def assert_usable(sandbox: Sandbox) -> None:
    async with aclosing(sandbox.exec(Command(cmd="echo", args=("hi",)))) as events:
        assert Output(b"hi") in [event async for event in events]


def children(made: list[Sandbox | SandmartinError]) -> list[Sandbox]:
    found = [each for each in made if isinstance(each, Sandbox)]
    assert len(found) == len(made), made
    return found


# Pause and resume.


async def test_paused_holds_nothing_but_files(
    fakes: Fakes, host: Host, sandbox: Sandbox, directory: Path
) -> None:
    token = sandbox.entry.token
    for _ in range(2):
        await host.pause("sb1")
        assert (sandbox.state, sandbox.host_ip) == (State.PAUSED, "")
        assert find_leaks(directory) == {"data/sandboxes/sb1"}
    with pytest.raises(Conflict, match="sb1 is paused"):
        await assert_usable(sandbox)
    for _ in range(2):
        await host.resume("sb1", 60)
        assert (sandbox.state, remembered(fakes)) == (State.RUNNING, MARK)
        await assert_usable(sandbox)
    assert (sandbox.entry.token, sandbox.entry.spec.timeout_s) == (token, 60)
    known = fakes.guests.memory(sandbox.host_ip)
    assert (known["envs"], known["id"]) == ({"A": "1"}, "sb1")
    # It is where it was: its connections are good still.
    assert not fakes.guests.identities[sandbox.host_ip].moved
    assert not (DataDir(directory / "data").sandbox("sb1").paused).exists()
    await host.pause("sb1")
    await host.destroy("sb1")
    assert not find_leaks(directory)


async def test_zeroed_page_comes_back_as_zero(fakes: Fakes, host: Host, sandbox: Sandbox) -> None:
    await host.create_snapshot("sb1", "marked", live=True)
    child = await host.create(replace(make_spec("sb2"), template="marked"), {})
    fakes.vmm.vms["sb2"].write(SCRATCH, bytes(len(MARK)))
    await host.pause("sb2")
    await host.resume("sb2", None)
    assert (remembered(fakes, "sb2"), child.state) == (bytes(len(MARK)), State.RUNNING)


async def test_next_agent_wakes_what_slept(directory: Path) -> None:
    first = make_machine(directory)
    async with first.host() as host:
        await host.create(make_spec(), {})
        first.vmm.vms["sb1"].write(SCRATCH, MARK)
        await host.pause("sb1")
    second = make_machine(directory)
    async with second.host() as host:
        assert host.get("sb1").state is State.PAUSED
        await host.resume("sb1", None)
        assert remembered(second) == MARK
        await assert_usable(host.get("sb1"))
        await host.terminate()
    assert not find_leaks(directory)


def _freeze_fails(fakes: Fakes) -> None:
    fakes.vmm.vms["sb1"].freeze_failure = ToolFailed("the monitor refused")


def _journal_is_full(fakes: Fakes) -> None:
    fakes.data.full = True


def _sleeping_place_is_taken(fakes: Fakes) -> None:
    path = fakes.data.sandbox("sb1").paused
    path.mkdir()
    (path / "x").touch()


@pytest.mark.parametrize(
    ("arrange", "kind"),
    [
        (_freeze_fails, ToolFailed),
        (_journal_is_full, DiskFull),
        (_sleeping_place_is_taken, Conflict),
    ],
)
async def test_pause_that_fails_leaves_it_running(
    fakes: Fakes,
    host: Host,
    sandbox: Sandbox,
    arrange: Callable[[Fakes], None],
    kind: type[SandmartinError],
) -> None:
    arrange(fakes)
    with pytest.raises(kind):
        await host.pause("sb1")
    fakes.data.full, fakes.vmm.vms["sb1"].freeze_failure = False, None
    assert sandbox.state is State.RUNNING
    await assert_usable(sandbox)
    await host.pause("sb1")
    await host.resume("sb1", None)
    assert remembered(fakes) == MARK


def _start_fails(fakes: Fakes) -> None:
    fakes.vmm.failure = ToolFailed("the monitor refused")


def _load_fails(fakes: Fakes) -> None:
    fakes.vmm.load_failure = ToolFailed("the monitor refused")


def _no_slots(fakes: Fakes) -> None:
    fakes.network.limit = 0


@pytest.mark.parametrize(
    ("arrange", "kind"),
    [
        (_start_fails, ToolFailed),
        (_load_fails, ToolFailed),
        (_no_slots, Exhausted),
        (_journal_is_full, DiskFull),
    ],
)
async def test_resume_that_fails_lets_it_sleep(
    fakes: Fakes,
    host: Host,
    sandbox: Sandbox,
    directory: Path,
    arrange: Callable[[Fakes], None],
    kind: type[SandmartinError],
) -> None:
    await host.pause("sb1")
    arrange(fakes)
    with pytest.raises(kind):
        await host.resume("sb1", None)
    fakes.data.full, fakes.network.limit = False, 64
    fakes.vmm.failure = fakes.vmm.load_failure = None
    assert sandbox.state is State.PAUSED
    assert find_leaks(directory) == {"data/sandboxes/sb1"}
    await host.resume("sb1", None)
    assert remembered(fakes) == MARK


async def test_guest_that_does_not_wake_is_an_error(
    fakes: Fakes, host: Host, sandbox: Sandbox, directory: Path
) -> None:
    async def refuse(_: Identity) -> None:
        raise ToolFailed("the guest refused")

    await host.pause("sb1")
    fakes.guests.introducing = refuse
    with pytest.raises(ToolFailed, match="the guest refused"):
        await host.resume("sb1", None)
    assert (sandbox.state, sandbox.reason) == (
        State.ERROR,
        "it did not come back: the guest refused",
    )
    await host.destroy("sb1")
    assert not find_leaks(directory)


async def test_memory_that_fits_no_more_is_not_loaded(directory: Path) -> None:
    first = make_machine(directory)
    async with first.host() as host:
        for each in ("sb1", "sb2"):
            await host.create(make_spec(each), {"A": each})
            await host.pause(each)
    state = first.data.sandbox("sb2").paused / "state"
    state.write_bytes(state.read_bytes().replace(b"128", b"129"))
    changed = make_machine(directory, platform=replace(PLATFORM, vmm_version="fake 2"))
    async with changed.host() as host:
        sandbox = await host.resume("sb1", None)
        assert (changed.vmm.booted, changed.vmm.restored) == (1, 0)
        await assert_usable(sandbox)
        assert changed.guests.memory(sandbox.host_ip)["envs"] == {"A": "sb1"}
    # Now what was changed on disk since.
    same = make_machine(directory)
    async with same.host() as host:
        await assert_usable(await host.resume("sb2", None))
        assert same.vmm.booted == 1
        await host.terminate()
    assert not find_leaks(directory)


async def test_sleeping_ones_are_counted_no_more(directory: Path) -> None:
    async with make_machine(directory, cpu_overcommit=1 / (os.cpu_count() or 1)).host() as host:
        await host.create(make_spec("sb1"), {})
        await host.pause("sb1")
        await host.create(make_spec("sb2"), {})
        with pytest.raises(Exhausted, match="0 are left"):
            await host.resume("sb1", None)
        await host.pause("sb2")
        await host.resume("sb1", None)


async def test_idle_ones_are_put_to_sleep_and_told_of_once(fakes: Fakes, host: Host) -> None:
    idle = await host.create(make_spec("sb1", timeout_s=1), {})
    busy = await host.create(make_spec("sb2"), {})
    await until(lambda: idle.state is State.PAUSED, "the reaper")
    assert busy.state is State.RUNNING
    assert (host.drain_auto_paused(), host.drain_auto_paused()) == (["sb1"], [])
    await host.resume("sb1", 0)
    await host.pause("sb1")
    # By its user this time.
    assert host.drain_auto_paused() == []


async def test_vm_that_does_not_end_when_it_falls_asleep(
    fakes: Fakes, host: Host, sandbox: Sandbox, directory: Path
) -> None:
    vm = fakes.vmm.vms["sb1"]
    vm.stuck = TimedOut("the process does not end")
    with pytest.raises(TimedOut):
        await host.pause("sb1")
    with pytest.raises(TimedOut):
        await host.resume("sb1", None)
    vm.stuck = None
    await host.resume("sb1", None)
    assert (remembered(fakes), len(find_vms(directory))) == (MARK, 1)
    await host.destroy("sb1")
    assert not find_leaks(directory)


# Fork.


async def test_children_go_on_from_where_their_parent_is(
    fakes: Fakes, host: Host, sandbox: Sandbox, directory: Path
) -> None:
    made = children(await host.fork("sb1", ["sb2", "sb3"], 7))
    tokens = {each.entry.token for each in (sandbox, *made)}
    assert len(tokens) == 3
    for child in made:
        assert (remembered(fakes, child.sandbox_id), child.entry.spec.timeout_s) == (MARK, 7)
        known = fakes.guests.memory(child.host_ip)
        assert (known["envs"], known["id"]) == ({"A": "1"}, child.sandbox_id)
        assert fakes.guests.identities[child.host_ip].moved
        await assert_usable(child)
    # Memory and disk of each are its own from now on.
    fakes.vmm.vms["sb2"].write(SCRATCH, OTHER)
    assert (remembered(fakes), remembered(fakes, "sb3")) == (MARK, MARK)
    tops = {each.entry.top for each in (sandbox, *made)}
    assert len(tops) == 3
    assert await fakes.vmm.vms["sb1"].top_layer() == sandbox.entry.top
    assert {each.entry.layers for each in (sandbox, *made)} == {sandbox.entry.layers}
    # The parent's end is not the children's.
    await host.destroy("sb1")
    for child in made:
        await host.pause(child.sandbox_id)
        await host.resume(child.sandbox_id, None)
        await assert_usable(child)
    assert [remembered(fakes, each) for each in ("sb2", "sb3")] == [OTHER, MARK]
    await host.destroy("sb2")
    await host.destroy("sb3")
    assert not find_leaks(directory)


async def test_child_that_cannot_be_made_is_its_error(
    fakes: Fakes, host: Host, sandbox: Sandbox, directory: Path
) -> None:
    refused, made = await host.fork("sb1", ["sb1", "sb2"], None)
    assert isinstance(refused, AlreadyExists) and isinstance(made, Sandbox)
    fakes.vmm.load_failure = ToolFailed("the monitor refused")
    (failed,) = await host.fork("sb1", ["sb3"], None)
    assert isinstance(failed, ToolFailed)
    fakes.vmm.vms["sb1"].freeze_failure = ToolFailed("it does not stop")
    with pytest.raises(ToolFailed, match="it does not stop"):
        await host.fork("sb1", ["sb3"], None)
    await assert_usable(sandbox)
    await host.destroy("sb1")
    await host.destroy("sb2")
    assert not find_leaks(directory)


# Checkpoints.


async def test_rollback_returns_and_can_be_repeated(
    fakes: Fakes, host: Host, sandbox: Sandbox, directory: Path
) -> None:
    checkpoint = (await host.checkpoint("sb1", "before")).path.name
    later = (await host.checkpoint("sb1", "after")).path.name
    assert [each.manifest.comment for each in sandbox.checkpoints()] == ["before", "after"]
    layers = sandbox.entry.layers
    for asleep in (False, True):
        fakes.vmm.vms["sb1"].write(SCRATCH, OTHER)
        if asleep:
            await host.pause("sb1")
        await host.rollback("sb1", checkpoint)
        assert (sandbox.state, remembered(fakes)) == (State.RUNNING, MARK)
        assert sandbox.entry.layers == layers[:1]
        assert fakes.guests.identities[sandbox.host_ip].moved
        await assert_usable(sandbox)
    with pytest.raises(NotFound, match="no checkpoint 'cpnone'"):
        await host.rollback("sb1", "cpnone")
    await host.delete_checkpoint("sb1", later)
    assert [each.path.name for each in sandbox.checkpoints()] == [checkpoint]
    held = {path.stem for path in (directory / "data/layers").iterdir()}
    assert held == set(layers[:1])
    await host.destroy("sb1")
    assert not find_leaks(directory)


async def test_rollback_that_fails_can_be_tried_again(
    fakes: Fakes, host: Host, sandbox: Sandbox
) -> None:
    checkpoint = (await host.checkpoint("sb1", "")).path.name
    fakes.vmm.vms["sb1"].write(SCRATCH, OTHER)
    fakes.vmm.failure = ToolFailed("the monitor refused")
    with pytest.raises(ToolFailed):
        await host.rollback("sb1", checkpoint)
    assert sandbox.state is State.PAUSED
    with pytest.raises(Conflict, match="sleeps in checkpoint"):
        await host.delete_checkpoint("sb1", checkpoint)
    fakes.vmm.failure = None
    await host.resume("sb1", None)
    assert remembered(fakes) == MARK
    # Whoever wakes it, it was set back.
    assert fakes.guests.identities[sandbox.host_ip].moved
    await host.delete_checkpoint("sb1", checkpoint)


async def test_full_disk_at_a_rollback_changes_nothing(
    fakes: Fakes, host: Host, sandbox: Sandbox
) -> None:
    checkpoint = (await host.checkpoint("sb1", "")).path.name
    fakes.vmm.vms["sb1"].write(SCRATCH, OTHER)
    fakes.data.full = True
    with pytest.raises(DiskFull):
        await host.rollback("sb1", checkpoint)
    fakes.data.full = False
    assert (sandbox.state, remembered(fakes)) == (State.RUNNING, OTHER)
    await assert_usable(sandbox)


# Templates.


@pytest.mark.parametrize("live", [True, False])
async def test_template_from_a_sandbox(
    fakes: Fakes, host: Host, sandbox: Sandbox, directory: Path, live: bool
) -> None:
    await host.create_snapshot("sb1", "frozen", live=live)
    assert sandbox.state is (State.RUNNING if live else State.PAUSED)
    for taken in ("frozen", "base"):
        with pytest.raises(AlreadyExists):
            await host.create_snapshot("sb1", taken, live=live)
    with pytest.raises(Invalid):
        await host.create_snapshot("sb1", "../frozen", live=live)
    await host.destroy("sb1")
    spec = replace(make_spec("sb2", disk_size_mb=IMAGE_MB + 4, vcpus=2), template="frozen")
    born = await host.create(spec, {"B": "2"})
    assert (remembered(fakes, "sb2"), fakes.vmm.vms["sb2"].disk_bytes) == (
        MARK,
        (IMAGE_MB + 4) << 20,
    )
    # The shape is the snapshot's, and the environment the new one's.
    assert (born.entry.spec.vcpus, born.entry.spec.memory_mb) == (1, 128)
    assert fakes.guests.memory(born.host_ip)["envs"] == {"B": "2"}
    await assert_usable(born)
    with pytest.raises(Conflict, match="is needed by sb2"):
        await host.delete_snapshot("frozen")
    await host.destroy("sb2")
    # One that only comes from the same image is in nobody's way.
    await host.create(make_spec("sb3"), {})
    await host.delete_snapshot("frozen")
    with pytest.raises(NotFound, match="no template 'frozen'"):
        await host.create(spec, {})
    await host.destroy("sb3")
    assert not find_leaks(directory)


async def test_template_that_fails_leaves_none(
    fakes: Fakes, host: Host, sandbox: Sandbox, directory: Path
) -> None:
    fakes.vmm.vms["sb1"].freeze_failure = ToolFailed("it does not stop")
    for live in (True, False):
        with pytest.raises(ToolFailed):
            await host.create_snapshot("sb1", "frozen", live=live)
        assert sandbox.state is State.RUNNING
        await assert_usable(sandbox)
    fakes.vmm.vms["sb1"].freeze_failure = None
    await host.create_snapshot("sb1", "frozen", live=True)
    with pytest.raises(Conflict, match="is needed by sb1"):
        await host.delete_snapshot("frozen")
    await host.destroy("sb1")
    await host.delete_snapshot("frozen")
    assert not find_leaks(directory)


@pytest.mark.root
async def test_image_of_a_sandboxs_disk(
    fakes: Fakes, host: Host, sandbox: Sandbox, directory: Path
) -> None:
    await host.checkpoint("sb1", "")
    top = fakes.data.sandbox("sb1").layer(sandbox.entry.top)
    # In place of what a guest would write.
    await proc.run(["qemu-io", "-f", "qcow2", "-c", "write -P 7 64k 64k", top])
    await host.pause("sb1")
    assert await host.flatten("sb1", "flat") > 0
    assert host.sandboxes() == []
    image = directory / "data/images/flat/rootfs.ext4"
    with image.open("rb") as file:
        content = file.read(129 << 10)
    assert content[: 1 << 16].rstrip(b"\0") == b"an image"
    assert content[1 << 16 :] == b"\7" * (64 << 10) + bytes(1 << 10)
    born = await host.create(replace(make_spec("sb2"), template="flat"), {})
    assert remembered(fakes, "sb2") == bytes(len(MARK))
    with pytest.raises(Conflict, match="is needed by sb2"):
        await host.delete_snapshot("flat")
    await host.destroy(born.sandbox_id)
    await host.delete_snapshot("flat")
    assert not find_leaks(directory)


@pytest.mark.root
async def test_image_that_fails_is_forgotten_though_the_journal_is_full(directory: Path) -> None:
    """Else a later image of that name would end the sandbox, which had nothing to do with it."""
    fakes = make_machine(directory, step=lambda name: fill(name))

    def fill(step: str) -> None:
        if step == "pause:left":
            fakes.data.full = True
            (layer,) = (directory / "data/layers").iterdir()
            layer.write_bytes(b"")

    async with fakes.host() as host:
        sandbox = await host.create(make_spec(), {})
        with pytest.raises(Invalid, match="is cut off"):
            await host.flatten("sb1", "flat")
        assert sandbox.state is State.PAUSED
        fakes.data.full = False

        def flattens_to() -> Path | None:
            entry = dict(fakes.data.read_all())["sb1"]
            assert entry is not None
            return entry.flattens_to

        await until(lambda: flattens_to() is None, "the journal without the image")
        await host.terminate()


# Warm snapshots.


async def test_many_creates_boot_once_and_the_next_agent_never(directory: Path) -> None:
    first = make_machine(directory, warm=True)
    async with first.host() as host:
        ids = [f"sb{number}" for number in range(8)]
        made = await asyncio.gather(*(host.create(make_spec(each), {}) for each in ids))
        assert (first.vmm.booted, first.vmm.restored) == (1, 8)
        assert len({each.entry.token for each in made}) == 8
        for each in made:
            await assert_usable(each)
        await host.terminate()
    second = make_machine(directory, warm=True)
    async with second.host() as host:
        await assert_usable(await host.create(make_spec(), {}))
        assert (second.vmm.booted, second.vmm.restored) == (0, 1)
        await host.pause("sb1")
    assert find_vms(directory) == []
    other = make_machine(directory, warm=True, platform=replace(PLATFORM, vmm_version="fake 2"))
    async with other.host() as host:
        # Another one is made; what sleeps on the old one's memory keeps it on disk.
        await host.create(make_spec("sb2"), {})
        assert (other.vmm.booted, other.vmm.restored) == (1, 1)
        await host.destroy("sb2")
    third = make_machine(directory, warm=True)
    async with third.host() as host:
        await assert_usable(await host.resume("sb1", None))
        assert (third.vmm.booted, third.vmm.restored) == (0, 1)
        await host.terminate()


async def test_damaged_warm_snapshot_is_made_anew(directory: Path) -> None:
    async with make_machine(directory, warm=True).host() as host:
        await host.create(make_spec(), {})
        await host.terminate()
    (manifest,) = (directory / "assets/warm").glob("*/manifest.json")
    manifest.write_bytes(manifest.read_bytes().replace(b"base", b"bare", 1))
    fakes = make_machine(directory, warm=True)
    async with fakes.host() as host:
        await assert_usable(await host.create(make_spec(), {}))
        assert (fakes.vmm.booted, fakes.vmm.restored) == (1, 1)
        await host.terminate()


# All at once.


async def test_operations_at_once_are_one_after_the_other(
    host: Host, sandbox: Sandbox, directory: Path
) -> None:
    results = await asyncio.gather(
        host.pause("sb1"),
        host.fork("sb1", ["sb2"], None),
        host.checkpoint("sb1", ""),
        host.create_snapshot("sb1", "frozen", live=True),
        host.destroy("sb1"),
        return_exceptions=True,
    )
    failures = [each for each in results if isinstance(each, BaseException)]
    assert all(isinstance(each, Conflict | NotFound) for each in failures), failures
    assert sandbox.state is State.STOPPED
    await host.destroy("sb2")
    with contextlib.suppress(NotFound):
        await host.delete_snapshot("frozen")
    await host.terminate()
    assert not find_leaks(directory)
