"""One VM with all that it takes of the host: network slot, control group, RAM, disk, process.

It is started cold or from a snapshot, frozen, and ended; who owns it learns what to keep of it
before it is used. Ending gives everything back, is idempotent, and needs no more than the records.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
from collections.abc import Callable, Coroutine, Iterable
from contextlib import AsyncExitStack, ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from sandmartin.agent.guest import Guest, Identity
from sandmartin.agent.journal import RamRecord
from sandmartin.agent.limits import Allowance
from sandmartin.agent.machine import Machine
from sandmartin.agent.memory import (
    Base,
    Buffer,
    Diff,
    Lease,
    Ram,
    Runs,
    dump_base,
    inject,
    open_diff,
)
from sandmartin.agent.network import Slot
from sandmartin.agent.snapshots import Snapshot
from sandmartin.agent.startup import start_up
from sandmartin.agent.traits import Traits
from sandmartin.agent.vmm import Disk, Vm, VmRecord, VmSpec
from sandmartin.errors import SandmartinError, TimedOut, ToolFailed
from sandmartin.model import INTERNET, NetworkPolicy
from sandmartin.model import Shape as Shape

_T = TypeVar("_T")
_log = logging.getLogger(__name__)

_CONSOLE_TAIL = 600
#: A running VM goes on dirtying between the first look and the freeze.
_BUFFER_SLACK = 16 << 20


@dataclass(frozen=True, kw_only=True)
class Records:
    """What its owner keeps of a VM; each is called before the thing is used."""

    #: The network slot, and the name of the control group.
    place: Callable[[Slot, str], None] = lambda _slot, _group: None
    #: Asked, once it has a place, what it may reach from there.
    policy: Callable[[], NetworkPolicy] = lambda: INTERNET
    vm: Callable[[VmRecord, RamRecord], None] = lambda _vm, _ram: None
    step: Callable[[str], None] = lambda _: None


@dataclass(frozen=True)
class Frozen:
    """A VM at one moment: its device state, and the pages that differ from its base."""

    state: bytes
    base: Base
    runs: Runs
    #: The pages, one after the other; None while the VM stands still and they can be read from it.
    pages: memoryview | None


#: Device state and diff of a snapshot, being read; the diff is good while the stack is open.
_Opening = asyncio.Future[tuple[bytes, ExitStack, Diff | None]]
#: Gives a VM that waits over such a base, if there is one; it is the caller's then.
Take = Callable[[Shape, Base], "MicroVm | None"]


class MicroVm:
    """A VM in the control group `group`, its monitor's files in `run_dir`."""

    def __init__(self, machine: Machine, group: str, run_dir: Path, records: Records) -> None:
        self._machine = machine
        self.group = group
        self._run_dir = run_dir
        self._records = records
        self._buffer: Buffer | None = None
        self.slot: Slot | None = None
        self.vm: Vm | None = None
        self.lease: Lease | None = None

    @property
    def running(self) -> Vm:
        assert self.vm is not None
        return self.vm

    # Starting.

    async def boot(self, shape: Shape, disk: Disk) -> None:
        """Start it from its kernel. Raises ToolFailed, Exhausted."""
        base = await self._machine.storage.empty_base(shape.memory_mb)
        await self._start(shape, disk, base, incoming=False)

    async def wait(self, shape: Shape, base: Base) -> None:
        """Start it as one that waits for its disk and a device state, to be taken by `restore`."""
        await self._start(shape, None, base, incoming=True)

    async def restore(self, snapshot: Snapshot, disk: Disk, take: Take) -> None:
        """Start it as a snapshot has it, standing still, in a VM that waits for it if there is one.

        Raises Conflict when this host is not one it can run on, Invalid when it is damaged.
        """
        manifest = snapshot.manifest
        manifest.platform.check(self._machine.platform, f"template {manifest.template!r}")
        base = self._machine.storage.base(manifest.base, manifest.memory_mb)
        shape = Shape(vcpus=manifest.vcpus, memory_mb=manifest.memory_mb)
        async with AsyncExitStack() as stack:
            opening = asyncio.ensure_future(asyncio.to_thread(_read, snapshot))
            stack.push_async_callback(_finished, opening)
            waiting = take(shape, base)
            if waiting is None or not await self._take(waiting, disk, opening):
                await self._start(shape, disk, base, incoming=True)
                await self._fill(opening)
            self._records.step("injected")
            state, _, _ = await opening
            await self.running.load(state)
        self._records.step("loaded")

    async def _fill(self, opening: _Opening) -> None:
        """Put the snapshot's pages into the RAM of a VM that waits."""
        _, _, diff = await asyncio.shield(opening)
        if diff is not None:
            await asyncio.to_thread(self._inject, diff)

    async def _take(self, waiting: MicroVm, disk: Disk, opening: _Opening) -> bool:
        """Become `waiting`, with a disk and the pages; False when that has ended it.

        Raises what `opening` does.
        """
        self._records.step("taken")
        own_group, self.group = self.group, waiting.group
        self.slot, self.lease, self.vm = slot, lease, vm = waiting._give_away()
        await self._settle_in(slot)
        self._records.step("place")
        # Its pages need not wait for its disk.
        both = self._insert(disk), self._fill(opening)
        inserted, filled = await asyncio.gather(*both, return_exceptions=True)
        if isinstance(inserted, SandmartinError | OSError):
            _log.warning("a VM that waited cannot be used: %s", inserted)
            await self.end(None, None, "taken")
            self.group = own_group
            return False
        for failure in (inserted, filled):
            if failure is not None:
                raise failure
        self._records.vm(vm.record, RamRecord(lease.base.digest, lease.file))
        self._records.step("vm")
        return True

    async def _insert(self, disk: Disk) -> None:
        """Put the files of a VM that waited in their place, and a disk into its drive."""
        vm = self.running
        _move_files(vm.record.run_dir, self._run_dir)
        vm.move(self._run_dir)
        self._records.step("moved")
        await vm.insert_disk(disk)

    def _give_away(self) -> tuple[Slot, Lease, Vm]:
        assert self.slot is not None and self.lease is not None
        given = self.slot, self.lease, self.running
        self.slot = self.lease = self.vm = None
        return given

    def move(self, run_dir: Path) -> None:
        """Its monitor's files are in another directory by now."""
        self._run_dir = run_dir
        self.running.move(run_dir)

    async def _start(self, shape: Shape, disk: Disk | None, base: Base, *, incoming: bool) -> None:
        machine = self._machine
        slot = self.slot = await machine.network.acquire()
        await self._settle_in(slot)
        self._records.step("slot")
        allowance = Allowance.of(shape.vcpus, shape.memory_mb, machine.accel)
        groups = machine.groups.create(self.group, allowance)
        self._records.step("group")
        lease = self.lease = await machine.bases.acquire(base)
        spec = VmSpec(
            run_dir=self._run_dir,
            vcpus=shape.vcpus,
            memory_mb=shape.memory_mb,
            kernel=machine.kernel,
            initramfs=machine.initramfs,
            command_line=machine.command_line,
            disk=disk,
            netns=slot.netns_path,
            tap=slot.tap,
            mac=slot.guest_mac,
            uid=slot.uid,
            accel=machine.accel,
            cgroups=groups,
            ram_fd=lease.fd,
            incoming=incoming,
        )
        self.vm = await machine.vmm.start(spec)
        self._records.step("started")
        self._records.vm(self.vm.record, RamRecord(base.digest, lease.file))
        self._records.step("vm")

    async def _settle_in(self, slot: Slot) -> None:
        """Have a slot, whose rules are those of its policy before its guest runs there."""
        self._records.place(slot, self.group)
        await self.narrow(self._records.policy())

    async def narrow(self, policy: NetworkPolicy) -> None:
        """Have a slot that was given the default policy reach what `policy` allows instead."""
        if policy != INTERNET:
            await self.restrict(policy)

    async def restrict(self, policy: NetworkPolicy) -> None:
        """Reach what `policy` allows, from now on; without a slot it reaches nothing anyway."""
        if self.slot is not None:
            await self._machine.network.apply(self.slot, policy)

    def _inject(self, diff: Diff) -> None:
        inject(self._ram(), diff)

    def _ram(self) -> Ram:
        assert self.lease is not None
        return Ram.find(self.running.record.process, self.lease.file)

    async def adopt(self, record: VmRecord, ram: RamRecord, memory_mb: int) -> bool:
        """Win back a VM that an earlier agent started; False when it is gone."""
        self.vm = await self._machine.vmm.adopt(record)
        if self.vm is None:
            return False
        base = self._machine.storage.base(ram.base, memory_mb)
        self.lease = await self._machine.bases.adopt(base, record.process, ram.file)
        return True

    # The guest.

    async def introduce(self, guest: Guest, identity: Identity, deadline_s: float) -> str:
        """Tell the guest who it is, and have it confirmed; the version of its protocol.

        Raises TimedOut, ToolFailed.
        """
        return await self._while_it_lives(guest.introduce(identity, deadline_s))

    async def awake(self, guest: Guest, deadline_s: float) -> None:
        """Wait until the guest agent answers anything. Raises TimedOut, ToolFailed."""
        await self._while_it_lives(guest.awake(deadline_s))

    async def start_up(self, guest: Guest, traits: Traits) -> None:
        """Have what its image starts run and be ready. Raises NotReady, GuestSilent, ToolFailed."""
        if traits.starts:
            await self._while_it_lives(start_up(guest, traits))

    async def _while_it_lives(self, work: Coroutine[Any, Any, _T]) -> _T:
        ended = asyncio.ensure_future(self.running.wait_gone())
        working = asyncio.ensure_future(work)
        try:
            await asyncio.wait({ended, working}, return_when=asyncio.FIRST_COMPLETED)
            if not working.done():
                raise ToolFailed(f"the VM ended while it started{await self._last_words()}")
            return await working
        except TimedOut as error:
            raise TimedOut(f"{error.message}{await self._last_words()}", hint=error.hint) from error
        finally:
            for waiting in (ended, working):
                waiting.cancel()
            await asyncio.wait({ended, working})

    async def _last_words(self) -> str:
        """The end of the guest's console, for an error message."""
        with contextlib.suppress(SandmartinError):
            console = (await self.running.read_console())[-_CONSOLE_TAIL:]
            if text := console.decode(errors="replace").strip():
                return f"; its console ends with: {text!r}"
        return ""

    # Freezing.

    async def freeze(self, *, top: Path | None = None, cont: bool = True) -> Frozen:
        """What it is at this moment; with `top` it writes to that layer from then on.

        With `cont` it goes on at once, its pages copied; else it stands still, and they are not.
        The result is good until the next freeze. Raises ToolFailed.
        """
        ram = await asyncio.to_thread(self._ram)
        buffer = self._buffer = Buffer() if self._buffer is None else self._buffer
        if cont:
            await asyncio.to_thread(_make_room, ram, buffer)

        def take() -> tuple[Runs, memoryview | None]:
            runs = ram.scan()
            return runs, ram.read(runs, buffer) if cont else None

        state, (runs, pages) = await self.running.freeze(take, top=top, cont=cont)
        assert self.lease is not None
        return Frozen(state, self.lease.base, runs, pages)

    def pages(self, frozen: Frozen) -> Iterable[memoryview]:
        """The pages of a freeze, in pieces; those that were not copied are read now."""
        if frozen.pages is not None:
            return [frozen.pages]
        return (view for _, view in self._ram().parts(frozen.runs, Buffer()))

    def dump(self, frozen: Frozen, target: Path) -> Base:
        """Write the whole RAM of a VM that stands still as a new base."""
        return dump_base(self._ram(), frozen.base, target)

    def forget_buffer(self) -> None:
        """Give back the memory that a freeze took."""
        self._buffer = None

    # Ending.

    async def end(self, record: VmRecord | None, slot: int | None, during: str) -> None:
        """End it and give back what it took, also what only the records know of. Idempotent.

        `during` is the operation that ends it, for the names of the steps.
        """
        machine = self._machine
        if self.vm is None and record is not None:
            self.vm = await machine.vmm.adopt(record)
        if self.vm is not None:
            await self.vm.kill()
            self.vm = None
        # A VM that was started but not yet recorded is found by its group.
        machine.groups.kill(self.group)
        machine.step(f"{during}:killed")
        await asyncio.to_thread(machine.groups.remove, self.group)
        machine.step(f"{during}:group")
        self.let_go()
        number = self.slot.number if self.slot is not None else slot
        self.slot = None
        if number is not None:
            await machine.network.release(number)

    def let_go(self) -> None:
        """Hold nothing of it any more, without ending it."""
        if self.lease is not None:
            self.lease.release()
            self.lease = None
        self._buffer = None


def _move_files(source: Path, target: Path) -> None:
    for path in source.iterdir():
        path.replace(target / path.name)
    source.rmdir()


def _read(snapshot: Snapshot) -> tuple[bytes, ExitStack, Diff | None]:
    """Device state and diff of a snapshot, verified."""
    files = ExitStack()
    written = snapshot.manifest.diff
    diff = None
    if written is not None:
        diff = files.enter_context(open_diff(snapshot.diff, written.digest))
    return snapshot.read_state(), files, diff


async def _finished(opening: _Opening) -> None:
    with contextlib.suppress(SandmartinError, OSError):
        (await opening)[1].close()


def _make_room(ram: Ram, buffer: Buffer) -> None:
    needed = ram.scan().size_bytes + _BUFFER_SLACK
    if buffer.size_bytes < needed:
        buffer.reserve(needed)


def new_token() -> str:
    """An access token for a guest agent."""
    return secrets.token_hex(20)
