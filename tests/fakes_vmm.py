"""Fake VMs: processes that sleep on a RAM of theirs; what a monitor knows is in a file."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import sys
from collections.abc import (
    Callable,
)
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from sandmartin.agent.journal import write_whole
from sandmartin.agent.memory import PAGE
from sandmartin.agent.proc import ProcessId, spawn_detached
from sandmartin.agent.snapshots import Platform
from sandmartin.agent.vmm import Disk, Vm, VmRecord, VmSpec, VmStatus
from sandmartin.errors import (
    DiskFull,
    ToolFailed,
    Unavailable,
)
from sandmartin.model import Accel
from tests.waiting import DEADLINE_S, until

Step = Callable[[str], None]
_T = TypeVar("_T")

#: In the environment of each fake VM: the directory of its machine.
MARK = "SANDMARTIN_FAKE_VM"
PROCESSES = "cgroup.procs"
#: What the monitor of a fake VM knows, beside its process.
_MONITOR = "monitor.json"
_USED_BYTES = 48 << 20
PLATFORM = Platform(vmm_version="fake 1", machine="fake", accel=Accel.TCG, tsc_khz=2_000_000)

#: Pages of a guest's RAM: what its boot left, who it is, and one for a test to write to.
BOOTED, IDENTITY, SCRATCH = 3, 5, 7
_WATCHED = range(SCRATCH + 1)
#: Maps its RAM as a monitor does; a boot dirties some of it, the last page too. It enters its
#: groups itself once that is done, so that one which runs is in them.
_MACHINE = """
import mmap, os, signal, sys
fd, size, incoming, *groups = sys.argv[1:]
if os.geteuid():
    # Where only a parent may look into a process, the next agent must be able to.
    import ctypes
    ctypes.CDLL(None).prctl(0x59616D61, ctypes.c_ulong(-1), 0, 0, 0)
ram = mmap.mmap(int(fd), int(size), flags=mmap.MAP_PRIVATE)
if incoming == "False":
    for at in (0, BOOTED, len(ram) - PAGE):
        ram[at:at + PAGE] = b"B" * PAGE
for group in groups:
    with open(group, "w") as file:
        file.write(str(os.getpid()))
while True:
    signal.pause()
""".replace("PAGE", str(PAGE)).replace("BOOTED", str(BOOTED * PAGE))


class FakeVm:
    """A VM whose process sleeps on a RAM that it maps. What its monitor knows outlives the agent.

    A test sets what the monitor would say, and reads and writes the guest's memory.
    """

    def __init__(self, record: VmRecord, step: Step, vms: dict[str, FakeVm]) -> None:
        self.record = record
        self._step = step
        self._vms = vms
        #: Whether the host's disk has room for what the VM wants to write.
        self.has_space = True
        self.console = b""
        #: Raised by `kill`: a process that does not end.
        self.stuck: Exception | None = None
        #: Raised by `freeze` while the VM stands still, and by `load`.
        self.freeze_failure: Exception | None = None
        self.load_failure: Exception | None = None
        self.relink_failure: Exception | None = None
        self.closed = False

    # What the monitor knows.

    @property
    def _file(self) -> Path:
        return self.record.run_dir / _MONITOR

    def _know(self) -> dict[str, Any]:
        known: dict[str, Any] = json.loads(self._file.read_bytes())
        return known

    def learn(self, **facts: object) -> None:
        known = self._know() if self._file.exists() else {}
        write_whole(self._file, json.dumps(known | facts).encode())

    @property
    def condition(self) -> VmStatus:
        return VmStatus(self._know()["condition"])

    @condition.setter
    def condition(self, condition: VmStatus) -> None:
        self.learn(condition=condition)

    @property
    def netns(self) -> str:
        return str(self._know()["netns"])

    @property
    def sealed(self) -> list[str]:
        """The layers below the one it writes, the lowest first."""
        return list(self._know()["sealed"])

    @property
    def disk_bytes(self) -> int:
        """Size to which the disk was grown; 0 when it was not."""
        return int(self._know()["disk_bytes"])

    # The guest's memory.

    def _address(self, page: int) -> int:
        maps = Path(f"/proc/{self.record.process.pid}/maps").read_text().splitlines()
        (line,) = (line for line in maps if "sandmartin-base-" in line)
        return int(line.partition("-")[0], 16) + page * PAGE

    def read(self, page: int, size: int = PAGE) -> bytes:
        with Path(f"/proc/{self.record.process.pid}/mem").open("rb", buffering=0) as memory:
            return os.pread(memory.fileno(), size, self._address(page))

    def write(self, page: int, data: bytes) -> None:
        with Path(f"/proc/{self.record.process.pid}/mem").open("rb+", buffering=0) as memory:
            os.pwrite(memory.fileno(), data, self._address(page))

    def _rings(self) -> str:
        """What devices look for in RAM when their state is loaded."""
        pages = self.read(0, PAGE * len(_WATCHED))
        return hashlib.sha256(pages).hexdigest()

    # The monitor.

    async def status(self) -> VmStatus:
        return self.condition if self.record.process.alive() else VmStatus.GONE

    async def wait_gone(self) -> None:
        while not await self.record.process.gone(60.0):
            pass

    async def stop(self) -> None:
        self._require()
        self.condition = VmStatus.STOPPED

    async def cont(self) -> None:
        self._require()
        if self.condition is VmStatus.DISK_FULL and not self.has_space:
            raise DiskFull("the host's disk still has no space for what the VM wants to write")
        if self._know()["incoming"]:
            raise ToolFailed("it has no device state yet")
        self.condition = VmStatus.RUNNING

    def move(self, run_dir: Path) -> None:
        self.record = replace(self.record, run_dir=run_dir)
        self._vms[run_dir.parent.name] = self

    async def insert_disk(self, disk: Disk) -> None:
        self._require()
        known = self._know()
        if not known["incoming"] or known["top"]:
            raise ToolFailed("it waits for no disk")
        check_disk(disk)
        self.learn(top=disk.top.stem, sealed=[file.stem for file in disk.sealed])

    async def resize_disk(self, size_bytes: int) -> None:
        self._require()
        self.learn(disk_bytes=size_bytes)

    async def top_layer(self) -> str:
        self._require()
        return str(self._know()["top"])

    async def freeze(
        self, while_stopped: Callable[[], _T], *, top: Path | None = None, cont: bool = True
    ) -> tuple[bytes, _T]:
        work = asyncio.to_thread(self._freeze, while_stopped, top, cont)
        return await asyncio.shield(asyncio.ensure_future(work))

    def _freeze(
        self, while_stopped: Callable[[], _T], top: Path | None, cont: bool
    ) -> tuple[bytes, _T]:
        self._require()
        if top is not None:
            assert top.stat().st_size > 0
        self.condition = VmStatus.STOPPED
        self._step("vmm:stopped")
        try:
            if self.freeze_failure is not None:
                raise self.freeze_failure
            done = while_stopped()
            if top is not None:
                self.learn(top=top.stem, sealed=[*self.sealed, self._know()["top"]])
                self._step("vmm:switched")
        except BaseException:
            self.condition = VmStatus.RUNNING
            raise
        state = json.dumps({"memory_mb": self.record.memory_mb, "rings": self._rings()})
        if cont:
            self.condition = VmStatus.RUNNING
        return state.encode(), done

    async def relink(self, disk: Disk) -> None:
        self._require()
        if self.relink_failure is not None:
            raise self.relink_failure
        assert disk.top.stem == self._know()["top"]
        assert not any(file.stat().st_mode & 0o222 for file in disk.sealed)
        self.learn(sealed=[file.stem for file in disk.sealed])

    async def only_read(self, layer: Path) -> None:
        self._require()
        assert layer.exists() and layer.stem != self._know()["top"]

    async def load(self, state: bytes) -> None:
        self._require()
        if self.load_failure is not None:
            raise self.load_failure
        if not self._know()["incoming"] or not self._know()["top"]:
            raise ToolFailed("it waits for no device state")
        if json.loads(state) != {"memory_mb": self.record.memory_mb, "rings": self._rings()}:
            raise ToolFailed("the device state does not fit what is in RAM")
        self.learn(incoming=False)

    async def memory_used(self) -> int | None:
        self._require()
        return _USED_BYTES

    async def read_console(self) -> bytes:
        self._require()
        said, self.console = self.console, b""
        return said

    async def kill(self) -> None:
        if self.stuck is not None:
            raise self.stuck
        self.record.process.kill()
        assert await self.record.process.gone(DEADLINE_S)
        await self.close()

    async def close(self) -> None:
        self.closed = True

    def _require(self) -> None:
        if not self.record.process.alive():
            raise Unavailable("the monitor cannot be reached")


def check_disk(disk: Disk) -> None:
    """All of it is there, and what is sealed is written no more."""
    for file in (disk.image, *disk.sealed, disk.top):
        assert file.exists(), file
    assert not any(file.stat().st_mode & 0o222 for file in disk.sealed)


class FakeVmm:
    """Starts sleeping processes in their groups, as a monitor is started in its cgroups."""

    def __init__(self, mark: Path, step: Step) -> None:
        self._mark = mark
        self._step = step
        #: By the name of the sandbox's directory, newest first.
        self.vms: dict[str, FakeVm] = {}
        self.specs: dict[str, VmSpec] = {}
        #: Starts, by whether the VM waited for a device state.
        self.booted = self.restored = 0
        #: Raised by `start`, once the process runs or before it is made.
        self.failure: Exception | None = None
        self.failure_before: Exception | None = None
        #: Raised by the `load` of each VM that is started.
        self.load_failure: Exception | None = None
        self.console = b""

    async def start(self, spec: VmSpec) -> Vm:
        disk = spec.disk
        assert spec.ram_fd is not None
        assert disk is not None or spec.incoming
        if disk is not None:
            check_disk(disk)
        if self.failure_before is not None:
            raise self.failure_before
        self.booted, self.restored = (
            self.booted + (not spec.incoming),
            self.restored + spec.incoming,
        )
        words = [spec.ram_fd, spec.memory_mb << 20, spec.incoming]
        process = spawn_detached(
            [sys.executable, "-IS", "-c", _MACHINE, *map(str, words)]
            + [str(group / PROCESSES) for group in spec.cgroups],
            output=spec.run_dir / "vmm.log",
            pass_fds=[spec.ram_fd],
            env={MARK: os.fspath(self._mark)},
        )
        try:
            await until(lambda: _entered(process, spec.cgroups), "the VM's process in its group")
        except BaseException:
            process.kill()
            raise
        self._step("vmm:started")
        if self.failure is not None:
            # As the real driver: what it started before it failed, it ends.
            process.kill()
            assert await process.gone(DEADLINE_S)
            raise self.failure
        record = VmRecord(
            process=process,
            run_dir=spec.run_dir,
            vmm_version=PLATFORM.vmm_version,
            machine=PLATFORM.machine,
            accel=spec.accel,
            memory_mb=spec.memory_mb,
        )
        name = spec.run_dir.parent.name
        self.specs[name] = spec
        vm = self.vms[name] = FakeVm(record, self._step, self.vms)
        vm.learn(
            condition=VmStatus.STOPPED if spec.incoming else VmStatus.RUNNING,
            incoming=spec.incoming,
            top=disk.top.stem if disk is not None else "",
            sealed=[file.stem for file in disk.sealed] if disk is not None else [],
            netns=os.fspath(spec.netns or ""),
            disk_bytes=0,
        )
        vm.console, vm.load_failure = self.console, self.load_failure
        return vm

    async def adopt(self, record: VmRecord) -> Vm | None:
        if not record.process.alive():
            record.process.reap()
            return None
        vm = FakeVm(record, self._step, self.vms)
        return self.vms.setdefault(record.run_dir.parent.name, vm)

    def at(self, netns: Path) -> FakeVm | None:
        """The VM that runs in a network namespace."""
        for vm in self.vms.values():
            if vm.record.process.alive() and vm.netns == os.fspath(netns):
                return vm
        return None


def _entered(process: ProcessId, groups: tuple[Path, ...]) -> bool:
    assert process.alive(), "the VM's process ended at once"
    return all(str(process.pid) in (group / PROCESSES).read_text() for group in groups)
