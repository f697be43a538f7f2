"""Fakes of what a host agent stands on: VMs, network, control groups, guests.

Everything else of the machine is real: data directory, images, layers, tasks. A fake keeps what
it holds where the real part does, outside the agent: a VM is a process that outlives it, a slot
and a group are files. So what a killed agent leaves can be seen, and a next one finds it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import tempfile
from collections.abc import (
    AsyncGenerator,
    AsyncIterable,
    Awaitable,
    Callable,
    Iterable,
    Iterator,
)
from dataclasses import dataclass, field, replace
from pathlib import Path

from sandmartin.agent.disk import ImageStore
from sandmartin.agent.guest import Command, Ended, Guest, Identity, Output, ProcessEvent, Started
from sandmartin.agent.host import Host
from sandmartin.agent.journal import DataDir, Entry
from sandmartin.agent.limits import Allowance, ControlGroups
from sandmartin.agent.network import Network, Slot
from sandmartin.agent.proc import ProcessId, spawn_detached
from sandmartin.agent.sandbox import Machine, Patience
from sandmartin.agent.tasks import Tasks
from sandmartin.agent.vmm import Vm, VmRecord, VmSpec, VmStatus
from sandmartin.errors import (
    DiskFull,
    Exhausted,
    GuestSilent,
    Invalid,
    NotFound,
    ToolFailed,
    Unavailable,
)
from sandmartin.model import Accel, SandboxSpec, Settings

Step = Callable[[str], None]

IMAGE = "base"
IMAGE_MB = 8
DEADLINE_S = 20.0
#: In the environment of each fake VM: the directory of its machine.
_MARK = "SANDMARTIN_FAKE_VM"
_PROCESSES = "cgroup.procs"
#: Of a test's machine: nothing waits for longer than a moment.
HASTE = Patience(
    health_deadline_s=0.05, health_pause_s=0.002, disk_check_s=0.005, activity_save_s=0.005
)


def no_step(_: str) -> None:
    """Go on."""


async def until(condition: Callable[[], bool], what: str) -> None:
    """Wait for `condition`; fails at the deadline."""
    try:
        async with asyncio.timeout(DEADLINE_S):
            while not condition():
                await asyncio.sleep(0.002)
    except TimeoutError:
        raise AssertionError(f"never came: {what}") from None


# VMs.


@dataclass
class FakeVm:
    """A VM whose process sleeps. What its monitor would say is set by the test."""

    record: VmRecord
    condition: VmStatus = VmStatus.RUNNING
    #: Whether the host's disk has room for what the VM wants to write.
    has_space: bool = True
    console: bytes = b""
    #: Raised by `kill`: a process that does not end.
    stuck: Exception | None = None
    closed: bool = False

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
        self.condition = VmStatus.RUNNING

    async def resize_disk(self, size_bytes: int) -> None:
        self._require()

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


class FakeVmm:
    """Starts sleeping processes in their groups, as a monitor is started in its cgroups."""

    def __init__(self, mark: Path, step: Step) -> None:
        self._mark = mark
        self._step = step
        #: By the name of the sandbox's directory, newest first.
        self.vms: dict[str, FakeVm] = {}
        self.specs: dict[str, VmSpec] = {}
        #: Raised by `start`, once the process runs or before it is made.
        self.failure: Exception | None = None
        self.failure_before: Exception | None = None
        self.console = b""

    async def start(self, spec: VmSpec) -> Vm:
        assert spec.disk is not None and spec.disk.exists()
        if self.failure_before is not None:
            raise self.failure_before
        process = spawn_detached(
            # It enters its groups itself, so that one which runs is in them.
            ["sh", "-c", 'for g; do echo $$ >"$g"; done; exec sleep 600', "sh"]
            + [str(group / _PROCESSES) for group in spec.cgroups],
            output=spec.run_dir / "vmm.log",
            env={_MARK: os.fspath(self._mark)},
        )
        await until(lambda: _entered(process, spec.cgroups), "the VM's process in its group")
        self._step("vmm:started")
        if self.failure is not None:
            # As the real driver: what it started before it failed, it ends.
            process.kill()
            assert await process.gone(DEADLINE_S)
            raise self.failure
        record = VmRecord(
            process=process,
            run_dir=spec.run_dir,
            vmm_version="fake 1",
            machine="fake",
            accel=spec.accel,
        )
        name = spec.run_dir.parent.name
        self.specs[name] = spec
        self.vms[name] = FakeVm(record, console=self.console)
        return self.vms[name]

    async def adopt(self, record: VmRecord) -> Vm | None:
        if not record.process.alive():
            record.process.reap()
            return None
        return self.vms.setdefault(record.run_dir.parent.name, FakeVm(record))


def _entered(process: ProcessId, groups: tuple[Path, ...]) -> bool:
    files = [group / _PROCESSES for group in groups]
    # Of `sleep`, and no more of the shell: a signal then finds what the test will look for.
    name = Path(f"/proc/{process.pid}/comm").read_text().strip()
    return name == "sleep" and all(str(process.pid) in file.read_text() for file in files)


# Data directory, network and groups.


class FillableDataDir(DataDir):
    """A real data directory on a disk that can be full."""

    full = False

    def write(self, entry: Entry, *, sync: bool = False) -> None:
        if self.full:
            raise DiskFull("the host's disk is full")
        super().write(entry, sync=sync)


class FakeNetwork(Network):
    """Slots that are numbers; one that is taken is a file."""

    def __init__(self, directory: Path, step: Step) -> None:
        directory.mkdir(exist_ok=True)
        self._directory = directory
        self._step = step
        self._settings = Settings()
        self.limit = 64

    async def start(self, in_use: Iterable[int]) -> None:
        for file in self._directory.iterdir():
            if int(file.name) not in set(in_use):
                file.unlink()

    async def close(self) -> None:
        pass

    async def destroy_all(self) -> None:
        await self.start(())
        self._step("network:emptied")

    async def acquire(self) -> Slot:
        await asyncio.sleep(0)
        for number in range(1, self.limit + 1):
            with contextlib.suppress(FileExistsError):
                (self._directory / str(number)).touch(exist_ok=False)
                self._step("network:taken")
                return self._slot(number)
        raise Exhausted(f"all {self.limit} network slots of this machine are taken")

    def adopted(self, number: int) -> Slot | None:
        return self._slot(number) if (self._directory / str(number)).exists() else None

    async def release(self, number: int) -> None:
        await asyncio.sleep(0)
        (self._directory / str(number)).unlink(missing_ok=True)
        self._step("network:released")

    def _slot(self, number: int) -> Slot:
        settings = self._settings
        # A user that we may give files to without being root.
        base = os.geteuid() - number
        return Slot.of(number, "fake", settings.address_range, settings.link_range, base)


class FakeGroups(ControlGroups):
    """Groups that are directories, each with the file of its processes."""

    def __init__(self, directory: Path, step: Step) -> None:
        self._directory = directory
        self._step = step

    def open(self) -> None:
        self._directory.mkdir(exist_ok=True)

    def create(self, sandbox_id: str, allowance: Allowance) -> tuple[Path, ...]:
        group = self._directory / sandbox_id
        group.mkdir(exist_ok=True)
        self._step("groups:made")
        (group / _PROCESSES).touch()
        return (group,)

    def list(self) -> set[str]:
        return {path.name for path in self._directory.iterdir()}

    def kill(self, sandbox_id: str) -> None:
        for process in self._processes(sandbox_id):
            process.kill()

    def remove(self, sandbox_id: str, deadline_s: float = 1.0) -> None:
        for process in self._processes(sandbox_id):
            # Blocking, as the real one is.
            if not asyncio.run(process.gone(deadline_s)):
                raise ToolFailed(f"control group {sandbox_id} cannot be removed: busy")
        shutil.rmtree(self._directory / sandbox_id, ignore_errors=True)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._directory.rmdir()

    def _processes(self, sandbox_id: str) -> Iterator[ProcessId]:
        try:
            pids = (self._directory / sandbox_id / _PROCESSES).read_text().split()
        except FileNotFoundError:
            return
        for pid in pids:
            if (process := ProcessId.of(int(pid))) is not None:
                yield process


# Guests.


async def no_wait(_: Identity) -> None:
    """Be introduced at once."""


async def echo(command: Command) -> AsyncGenerator[ProcessEvent, None]:
    """Run any command as `echo`."""
    yield Started(7)
    yield Output(" ".join(command.args).encode())
    yield Ended(exit_code=0)


@dataclass
class Guests:
    """What all guests of a machine do; the token each was told outlives the agent in a file."""

    directory: Path
    introducing: Callable[[Identity], Awaitable[None]] = no_wait
    running: Callable[[Command], AsyncGenerator[ProcessEvent, None]] = echo
    #: Guests at these addresses do not answer.
    silent: set[str] = field(default_factory=set)
    #: How often a guest was asked whether it is there.
    checks: int = 0
    identities: dict[str, Identity] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)
    inputs: dict[int, bytes] = field(default_factory=dict)
    signals: list[tuple[int, int]] = field(default_factory=list)

    def tell(self, address: str, identity: Identity) -> None:
        self.directory.mkdir(exist_ok=True)
        (self.directory / address).write_text(identity.token)
        self.identities[address] = identity

    def token(self, address: str) -> str:
        return (self.directory / address).read_text()

    def __call__(self, address: str, token: str) -> Guest:
        return FakeGuest(self, address, token)


class FakeGuest(Guest):
    """The client of one guest of `guests`."""

    def __init__(self, guests: Guests, address: str, token: str) -> None:
        self._guests = guests
        self._address = address
        self._token = token

    async def close(self) -> None:
        pass

    async def introduce(self, identity: Identity, deadline_s: float) -> None:
        await self._guests.introducing(identity)
        self._guests.tell(self._address, identity)

    async def healthy(self, deadline_s: float) -> bool:
        self._guests.checks += 1
        return self._address not in self._guests.silent

    def _check(self) -> None:
        if self._address in self._guests.silent:
            raise GuestSilent("the guest agent does not answer: nobody there")
        if self._guests.token(self._address) != self._token:
            raise Invalid("the token is not this guest's")

    async def start(self, command: Command) -> AsyncGenerator[ProcessEvent, None]:
        self._check()
        async with contextlib.aclosing(self._guests.running(command)) as events:
            async for event in events:
                yield event

    async def send_input(self, pid: int, data: bytes) -> None:
        self._check()
        self._guests.inputs[pid] = self._guests.inputs.get(pid, b"") + data

    async def close_input(self, pid: int) -> None:
        self._check()
        self._guests.inputs[pid] += b"<end>"

    async def signal(self, pid: int, number: int) -> None:
        self._check()
        self._guests.signals.append((pid, number))

    async def upload(self, path: str, user: str, chunks: AsyncIterable[bytes]) -> None:
        self._check()
        content = b"".join([chunk async for chunk in chunks])
        self._guests.files[path] = content

    async def download(self, path: str, user: str) -> AsyncGenerator[bytes, None]:
        self._check()
        if path not in self._guests.files:
            raise NotFound(f"there is no file {path!r}")
        content = self._guests.files[path]
        for at in range(0, len(content), 1 << 16):
            yield content[at : at + (1 << 16)]


# The machine.


@dataclass
class Fakes:
    """A machine of fakes, and its fakes by their own types."""

    machine: Machine
    data: FillableDataDir
    vmm: FakeVmm
    network: FakeNetwork
    groups: FakeGroups
    guests: Guests

    @contextlib.asynccontextmanager
    async def host(self) -> AsyncGenerator[Host, None]:
        """The open host, closed at the end as an agent is that leaves its VMs running."""
        host = Host(self.machine)
        await host.open()
        try:
            yield host
        finally:
            await host.close()
            self.machine.data.close()


def make_machine(
    directory: Path,
    *,
    step: Step = no_step,
    patience: Patience = HASTE,
    **settings: object,
) -> Fakes:
    """A machine in `directory`; a second one on the same finds what the first one left."""
    made = Settings(
        data_dir=directory / "data",
        run_dir=directory / "run",
        disk_floor_mb=0,
        memory_reserve_mb=0,
        cpu_overcommit=1000.0,
    )
    data = FillableDataDir(made.data_dir)
    data.open()
    _make_image(data.images / IMAGE / "rootfs.ext4")
    vmm = FakeVmm(directory, step)
    network = FakeNetwork(directory / "slots", step)
    groups = FakeGroups(directory / "groups", step)
    guests = Guests(directory / "guests")
    machine = Machine(
        settings=replace(made, **settings),  # type: ignore[arg-type]
        data=data,
        images=ImageStore(data.images, {}),
        network=network,
        groups=groups,
        vmm=vmm,
        accel=Accel.TCG,
        kernel=directory / "kernel",
        initramfs=directory / "initramfs",
        tasks=Tasks(),
        guest=guests,
        patience=patience,
        step=step,
    )
    return Fakes(machine, data, vmm, network, groups, guests)


def _make_image(path: Path) -> None:
    if not path.exists():
        path.parent.mkdir()
        path.touch()
        os.truncate(path, IMAGE_MB * 2**20)


def make_spec(sandbox_id: str = "sb1", **shape: int) -> SandboxSpec:
    """A small sandbox, far below what any host has."""
    values: dict[str, int] = {"memory_mb": 128, "disk_size_mb": IMAGE_MB, **shape}
    return SandboxSpec(sandbox_id=sandbox_id, template=IMAGE, **values)


@contextlib.contextmanager
def machine_directory() -> Iterator[Path]:
    """A place for machines that every user can pass through, as a data directory's must be.

    What is left of VMs at the end is ended; whoever cares asks `find_leaks` before.
    """
    path = Path(tempfile.mkdtemp(prefix="sandmartin-fake-"))
    try:
        path.chmod(0o711)
        yield path
    finally:
        for process in find_vms(path):
            process.kill()
            # Only a child of ours is waited for.
            with contextlib.suppress(ChildProcessError):
                os.waitpid(process.pid, 0)
        shutil.rmtree(path)


def find_vms(directory: Path) -> list[ProcessId]:
    """The fake VMs that run of the machine in `directory`, or in directories below it."""
    mark = f"\0{_MARK}={directory}".encode()
    found = []
    for process in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            environment = b"\0" + (process / "environ").read_bytes()
            if process.name.isdigit() and (
                mark + b"\0" in environment or mark + b"/" in environment
            ):
                found.append(ProcessId.of(int(process.name)))
    return [process for process in found if process is not None]


def find_leaks(directory: Path) -> set[str]:
    """All that sandboxes hold in `directory`: processes, slots, groups, files."""
    found = {f"process {process.pid}" for process in find_vms(directory)}
    for place in ("slots", "groups", "data/sandboxes"):
        with contextlib.suppress(FileNotFoundError):
            found |= {f"{place}/{path.name}" for path in (directory / place).iterdir()}
    return found
