"""A sandbox as its journal has it: what it is, what it holds, and each change of that.

The entry is written before what it names is used, and after what it names is gone. A full disk
keeps nothing from ending, and lets nothing begin that could not be found again.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from sandmartin.agent import disk
from sandmartin.agent.journal import Entry, SandboxDir
from sandmartin.agent.machine import Machine
from sandmartin.agent.microvm import MicroVm, Records
from sandmartin.agent.proc import ProcessId
from sandmartin.agent.vmm import Disk
from sandmartin.errors import DiskFull
from sandmartin.model import State, check_transition
from sandmartin.phases import Clock, Phase

_log = logging.getLogger(__name__)

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
#: The phase of an operation that a step ends; one that is not here belongs to what comes after it.
_PHASES = {
    "recorded": "record",
    "renamed": "record",
    "claimed": "record",
    "waking": "record",
    "committed": "record",
    "paused": "record",
    "layer": "disk",
    "place": "slot",
    "slot": "slot",
    "started": "vmm",
    "vm": "vmm",
    "injected": "restore",
    "loaded": "restore",
    "confirmed": "guest",
    "running": "finish",
    "frozen": "freeze",
    "sealed": "freeze",
    "pages": "write",
    "whole": "write",
    "template": "write",
    "written": "write",
    "left": "end",
}


def boot_id() -> str:
    """Changes whenever the host starts anew."""
    return _BOOT_ID.read_text().strip()


class Recorded:
    """The part of a sandbox that is written down, and the VM that belongs to it."""

    def __init__(self, machine: Machine, entry: Entry) -> None:
        self._machine = machine
        self._entry = entry
        #: Of the operation that is being done; the first is its making.
        self.clock = Clock()
        #: What the time of the last operation went to.
        self.phases: tuple[Phase, ...] = ()
        self._microvm = self._new_microvm("create")
        #: The host's full disk has stopped its VM.
        self._disk_full = False
        self._saved_active_at = entry.last_active_at
        #: What `layers` found out, and of what.
        self._layers: tuple[tuple[str, str], tuple[Path, ...]] = ("", ""), ()

    def _new_microvm(self, operation: str) -> MicroVm:
        records = Records(
            place=lambda slot, group: self._record(slot=slot.number, group=group),
            policy=lambda: self._entry.network,
            vm=lambda vm, ram: self._record(vm=vm, ram=ram, boot_id=boot_id()),
            step=lambda name: self._step(f"{operation}:{name}"),
        )
        group = self._entry.group or self.sandbox_id
        return MicroVm(self._machine, group, self._paths.vm, records)

    def _step(self, name: str) -> None:
        """A step of an operation, `OPERATION:STEP`, is done."""
        if (phase := _PHASES.get(name.partition(":")[2])) is not None:
            self.clock.mark(phase)
        self._machine.step(name)

    @property
    def sandbox_id(self) -> str:
        return self._entry.spec.sandbox_id

    @property
    def entry(self) -> Entry:
        return self._entry

    @property
    def state(self) -> State:
        return self._entry.state

    @property
    def reason(self) -> str:
        """Why it cannot be used, empty when it can."""
        if self.state is State.RUNNING and self._disk_full:
            return disk.host_disk_full(self.sandbox_id).message
        return self._entry.reason

    @property
    def host_ip(self) -> str:
        """Address at which the host reaches the guest; empty when it has none."""
        slot = self._microvm.slot
        return str(slot.host_ip) if slot else ""

    @property
    def _paths(self) -> SandboxDir:
        return self._machine.data.sandbox(self.sandbox_id)

    @property
    def idle_s(self) -> float:
        """Seconds since its last activity."""
        return time.time() - self._entry.last_active_at

    @property
    def image(self) -> Path | None:
        """The image below its disk."""
        return self._entry.image

    def idles(self) -> bool:
        """Whether it runs and has idled past its time."""
        limit_s = self._entry.spec.timeout_s
        return self.state is State.RUNNING and 0 < limit_s <= self.idle_s

    def alive(self) -> bool:
        """Whether its VM's process runs."""
        vm = self._microvm.vm
        return vm is not None and vm.record.process.alive()

    # Its record.

    def touch(self) -> None:
        """Reset the idle clock."""
        self._entry = replace(self._entry, last_active_at=time.time())

    def save_activity(self) -> None:
        """Put the last activity on disk unless it is there. Raises DiskFull."""
        # What is being removed must not get a new entry.
        leaving = self.state in {State.STOPPING, State.STOPPED}
        if not leaving and self._entry.last_active_at != self._saved_active_at:
            self._record()

    def _record(self, *, sync: bool = False, **changes: object) -> None:
        """Change the entry, here and on disk. Raises DiskFull, changed here none the less."""
        self._entry = replace(self._entry, **changes)  # type: ignore[arg-type]
        self._machine.data.write(self._entry, sync=sync)
        self._saved_active_at = self._entry.last_active_at

    @contextlib.contextmanager
    def _disk_may_be_full(self) -> Iterator[None]:
        """For what must go on without its record: the next start finds the truth by itself."""
        try:
            yield
        except DiskFull as error:
            _log.warning("sandbox %s: not in its journal: %s", self.sandbox_id, error)
            # It is tried again with the activity.
            self._saved_active_at = 0.0

    @contextlib.contextmanager
    def _all_or_nothing(self) -> Iterator[None]:
        """For what must not begin without its record: a full disk leaves all as it was."""
        before = self._entry
        try:
            yield
        except DiskFull:
            self._entry = before
            raise

    def _become(
        self, state: State, reason: str = "", *, sync: bool = False, **changes: object
    ) -> None:
        """The only place where the state changes. Raises Conflict, DiskFull."""
        check_transition(self.state, state, f"sandbox {self.sandbox_id}")
        _log.info("sandbox %s: %s -> %s %s", self.sandbox_id, self.state, state, reason)
        self._record(sync=sync, state=state, reason=reason, **changes)

    def _fail(self, reason: str) -> None:
        """A sandbox that cannot be used any more, but destroyed."""
        self._machine.sampler.suspend(self.sandbox_id)
        if self.state not in {State.ERROR, State.STOPPED}:
            with self._disk_may_be_full():
                self._become(State.ERROR, reason)

    # Its disk.

    async def _new_top(self, size_mb: int) -> None:
        """A new, empty layer on top of the sealed ones."""
        top = await self._machine.storage.layers.create(self._paths.path, size_mb)
        self._record(top=top.stem)

    @property
    def _disk(self) -> Disk:
        entry, storage = self._entry, self._machine.storage
        assert entry.image is not None
        sealed = tuple(storage.layers.path(name) for name in entry.layers)
        return Disk(image=entry.image, sealed=sealed, top=self._paths.layer(entry.top))

    def _layer(self, name: str) -> Path:
        """File of a layer, sealed or not."""
        own = self._paths.layer(name)
        return own if own.exists() else self._machine.storage.layers.path(name)

    async def _settle_layers(self) -> None:
        """Find out whether the VM has taken the layer it was about to be given, and seal or go.

        Also before anything that cuts the disk: the monitor may not have answered the last time.
        """
        entry = self._entry
        if not entry.next_top:
            return
        if await self._microvm.running.top_layer() == entry.next_top:
            # What may be others' too is not to be changed by a monitor that was taken over.
            await self._microvm.running.only_read(self._layer(entry.top))
            self._machine.storage.layers.seal(self._paths.layer(entry.top))
            layers = (*entry.layers, entry.top)
            self._record(sync=True, layers=layers, top=entry.next_top, next_top="")
        else:
            self._paths.layer(entry.next_top).unlink(missing_ok=True)
            self._record(next_top="")

    async def _settle_layers_left(self) -> None:
        """What `_settle_layers` finds out from a VM, where there is none left to ask.

        The newer layer has been the top if something was written to it, or if the older one is
        sealed already.
        """
        entry, layers = self._entry, self._machine.storage.layers
        if not entry.next_top:
            return
        newer, older = self._paths.layer(entry.next_top), self._paths.layer(entry.top)
        written = disk.holds_data(newer)
        if written or not older.exists():
            layers.seal(older)
            await layers.sync([entry.top])
            top = entry.next_top if written else ""
            self._record(sync=True, layers=(*entry.layers, entry.top), top=top, next_top="")
        else:
            self._record(sync=True, next_top="")
        if not written:
            newer.unlink(missing_ok=True)

    # What the sampler asks of it.

    @property
    def process(self) -> ProcessId:
        """The VM's process."""
        return self._microvm.running.record.process

    @property
    def groups(self) -> tuple[Path, ...]:
        """Directories of the VM's control groups."""
        return self._machine.groups.paths(self._microvm.group)

    @property
    def layers(self) -> tuple[Path, ...]:
        """Files that hold what it wrote."""
        # Asked for twice a second of every sandbox.
        names = self.sandbox_id, self._entry.top
        if self._layers[0] != names:
            self._layers = names, (self._paths.layer(self._entry.top),)
        return self._layers[1]

    async def memory(self) -> int | None:
        """Bytes the guest uses, as it sees it; None when it does not say."""
        return await self._microvm.running.memory_used()
