"""Fakes of what a host agent stands on: VMs, network, control groups, guests.

Everything else of the machine is real: data directory, images, layers, memory, tasks. A fake keeps
what it holds where the real part does, outside the agent: a VM is a process that outlives it and
maps its RAM, a guest's knowledge of itself lies in that RAM, a slot and a group are files. So what
a killed agent leaves can be seen, a next one finds it, and a snapshot that lost a page is noticed.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import os
import posixpath
import shutil
import tarfile
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
from typing import Any, TypeVar

from sandmartin.agent.disk import ImageStore
from sandmartin.agent.guest import Command, Ended, Guest, Identity, Output, ProcessEvent, Started
from sandmartin.agent.host import Host
from sandmartin.agent.journal import DataDir, Entry
from sandmartin.agent.limits import Allowance, ControlGroups
from sandmartin.agent.machine import Machine, Patience
from sandmartin.agent.memory import PAGE, BaseStore
from sandmartin.agent.network import Network, Slot
from sandmartin.agent.proc import ProcessId
from sandmartin.agent.snapshots import Platform, Signer, Snapshots
from sandmartin.agent.storage import Storage
from sandmartin.agent.tasks import Tasks
from sandmartin.agent.vmm import VmStatus
from sandmartin.errors import (
    DiskFull,
    Exhausted,
    GuestSilent,
    Invalid,
    NotFound,
    ToolFailed,
)
from sandmartin.model import Accel, NetworkPolicy, SandboxSpec, Settings
from sandmartin.relay.line import Line, Lines
from tests.fakes_vmm import (
    IDENTITY,
    MARK,
    PLATFORM,
    PROCESSES,
    FakeVm,
    FakeVmm,
    Step,
)

_T = TypeVar("_T")

IMAGE = "base"
IMAGE_MB = 8
#: Owner of sealed layers where there are other users than one; far from those of any agent.
_LAYERS_UID = 2_980_000
#: Of a test's machine: nothing waits for longer than a moment.
HASTE = Patience(
    health_deadline_s=0.05,
    health_pause_s=0.002,
    disk_check_s=0.005,
    activity_save_s=0.005,
    reap_s=0.005,
    quiet_s=0.01,
    quiet_limit_s=0.05,
)


def no_step(_: str) -> None:
    """Go on."""


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
        #: Raised by `apply`.
        self.failure: Exception | None = None

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

    async def apply(self, slot: Slot, policy: NetworkPolicy) -> None:
        if self.failure is not None:
            raise self.failure
        (self._directory / str(slot.number)).write_text(json.dumps(policy.to_dict()))

    async def keep(self, slot: Slot, policy: NetworkPolicy) -> None:
        if policy != self.policy(slot):
            await self.apply(slot, policy)

    def policy(self, slot: Slot) -> NetworkPolicy:
        """What the rules of a slot are."""
        text = (self._directory / str(slot.number)).read_text()
        return NetworkPolicy.from_dict(json.loads(text) if text else None)

    def adopted(self, number: int) -> Slot | None:
        return self._slot(number) if (self._directory / str(number)).exists() else None

    async def release(self, number: int) -> None:
        await asyncio.sleep(0)
        (self._directory / str(number)).unlink(missing_ok=True)
        self._step("network:released")

    def namespace(self, address: str) -> Path:
        """Where the guest at `address` lives."""
        slots = (self._slot(number) for number in range(1, self.limit + 1))
        return next(slot.netns_path for slot in slots if str(slot.host_ip) == address)

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
        (group / PROCESSES).touch()
        return (group,)

    def paths(self, sandbox_id: str) -> tuple[Path, ...]:
        return (self._directory / sandbox_id,)

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
            pids = (self._directory / sandbox_id / PROCESSES).read_text().split()
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
    """What all guests of a machine do. Who each is lies in its RAM, as a real one's would."""

    vmm: FakeVmm
    network: FakeNetwork
    introducing: Callable[[Identity], Awaitable[None]] = no_wait
    running: Callable[[Command], AsyncGenerator[ProcessEvent, None]] = echo
    #: Guests at these addresses do not answer.
    silent: set[str] = field(default_factory=set)
    #: How often a guest was asked whether it is there.
    checks: int = 0
    #: The version of the protocol that they say they speak.
    envd_version: str = "0.6.13"
    #: What each address was told last.
    identities: dict[str, Identity] = field(default_factory=dict)
    #: Status that what serves HTTP on a port answers with.
    answers: dict[int, int] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)
    inputs: dict[int, bytes] = field(default_factory=dict)
    signals: list[tuple[int, int]] = field(default_factory=list)
    #: Ports inside on which something listens, and where that really is on loopback.
    ports: dict[int, int] = field(default_factory=dict)
    #: Connections that each may have.
    max_lines: int = 4096

    def vm(self, address: str) -> FakeVm:
        """The VM of the guest at `address`. Raises GuestSilent when it does not run."""
        vm = self.vmm.at(self.network.namespace(address))
        if vm is None or address in self.silent or vm.condition is not VmStatus.RUNNING:
            raise GuestSilent("the guest agent does not answer: nobody there")
        return vm

    def memory(self, address: str) -> dict[str, Any]:
        """What the guest at `address` knows of itself; nothing before it was told."""
        known: dict[str, Any] = json.loads(self.vm(address).read(IDENTITY).rstrip(b"\0") or b"{}")
        return known

    def tell(self, address: str, identity: Identity) -> None:
        known = self.memory(address) | {"token": identity.token, "id": identity.sandbox_id}
        if identity.envs is not None:
            known["envs"] = dict(identity.envs)
        self.vm(address).write(IDENTITY, json.dumps(known).encode().ljust(PAGE, b"\0"))
        self.identities[address] = identity

    def __call__(self, address: str, token: str) -> Guest:
        return FakeGuest(self, address, token)


class FakeGuest(Guest):
    """The client of one guest of `guests`."""

    def __init__(self, guests: Guests, address: str, token: str) -> None:
        self._guests = guests
        self._address = address
        self._token = token
        self._lines = Lines()

    async def close(self) -> None:
        self.hang_up()
        await self._lines.closed()

    async def dial(self, port: int) -> Line:
        self._check()
        if port not in self._guests.ports:
            raise NotFound(f"nothing listens on port {port}")
        if len(self._lines) >= self._guests.max_lines:
            raise Exhausted(f"the sandbox has {len(self._lines)} connections")
        return await self._lines.dial("127.0.0.1", self._guests.ports[port])

    def hang_up(self) -> None:
        self._lines.abort()

    async def introduce(self, identity: Identity, deadline_s: float) -> str:
        await self._guests.introducing(identity)
        if self._guests.memory(self._address).get("token", self._token) != self._token:
            raise ToolFailed("the guest did not take its identity: the token is another's")
        self._guests.tell(self._address, identity)
        self._token = identity.token
        return self._guests.envd_version

    async def awake(self, deadline_s: float) -> None:
        self._guests.vm(self._address)

    async def healthy(self, deadline_s: float) -> bool:
        self._guests.checks += 1
        return self._address not in self._guests.silent

    async def sync(self, deadline_s: float) -> None:
        self._check()

    async def ask(self, port: int, path: str, deadline_s: float) -> int | None:
        self._guests.vm(self._address)
        return self._guests.answers.get(port)

    def _check(self) -> None:
        if self._guests.memory(self._address)["token"] != self._token:
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

    async def write_tree(self, directory: str, owner: str, chunks: AsyncIterable[bytes]) -> int:
        self._check()
        content = io.BytesIO(b"".join([chunk async for chunk in chunks]))
        try:
            with tarfile.open(fileobj=content, mode="r:") as tar:
                members = tar.getmembers()
                for each in filter(tarfile.TarInfo.isfile, members):
                    file = tar.extractfile(each)
                    assert file is not None
                    self._guests.files[posixpath.join(directory, each.name)] = file.read()
        except tarfile.TarError as error:
            raise Invalid(f"this is no tar: {error}") from error
        return len(members)

    async def read_tree(self, path: str) -> AsyncGenerator[bytes, None]:
        self._check()
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w") as tar:
            for name, content in self._guests.files.items():
                if posixpath.commonpath([path, name]) == path:
                    member = tarfile.TarInfo(posixpath.relpath(name, posixpath.dirname(path)))
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
        yield packed.getvalue()


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
            await self.machine.bases.close()
            self.machine.data.close()


def make_machine(
    directory: Path,
    *,
    step: Step = no_step,
    patience: Patience = HASTE,
    platform: Platform = PLATFORM,
    **settings: object,
) -> Fakes:
    """A machine in `directory`; a second one on the same finds what the first one left.

    It boots what it creates, unless `warm` is set.
    """
    made = Settings(
        data_dir=directory / "data",
        assets_dir=directory / "assets",
        run_dir=directory / "run",
        disk_floor_mb=0,
        memory_reserve_mb=0,
        cpu_overcommit=1000.0,
        warm=False,
        vm_pool_size=0,
    )
    data = FillableDataDir(made.data_dir)
    data.open()
    made.assets_dir.mkdir(exist_ok=True)
    _make_image(data.images / IMAGE / "rootfs.ext4")
    signer = Signer.open(made.assets_dir / "platform.key")
    vmm = FakeVmm(directory, step)
    network = FakeNetwork(directory / "slots", step)
    groups = FakeGroups(directory / "groups", step)
    guests = Guests(vmm, network)
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
        storage=Storage(
            data, Snapshots(signer), _LAYERS_UID if os.geteuid() == 0 else os.geteuid()
        ),
        bases=BaseStore(in_memory=True),
        platform=platform,
        guest=guests,
        patience=patience,
        step=step,
    )
    return Fakes(machine, data, vmm, network, groups, guests)


def _make_image(path: Path) -> None:
    if not path.exists():
        path.parent.mkdir()
        path.write_bytes(b"an image")
        os.truncate(path, IMAGE_MB * 2**20)
        path.chmod(0o444)


def make_spec(
    sandbox_id: str = "sb1", *, network: NetworkPolicy | None = None, **shape: int
) -> SandboxSpec:
    """A small sandbox, far below what any host has."""
    values: dict[str, Any] = {"memory_mb": 128, "disk_size_mb": IMAGE_MB, **shape}
    return SandboxSpec(sandbox_id=sandbox_id, template=IMAGE, network=network, **values)


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
    mark = f"\0{MARK}={directory}".encode()
    found = []
    for process in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            environment = b"\0" + (process / "environ").read_bytes()
            if process.name.isdigit() and (
                mark + b"\0" in environment or mark + b"/" in environment
            ):
                found.append(ProcessId.of(int(process.name)))
    return [process for process in found if process is not None]


#: What an agent keeps beside its sandboxes; the empty bases among it take no room.
_KEPT = ("data/layers", "data/bases", "data/templates", "data/forks", "data/images", "assets/warm")


def find_leaks(directory: Path) -> set[str]:
    """All that sandboxes hold in `directory`, and templates: processes, slots, groups, files."""
    found = {f"process {process.pid}" for process in find_vms(directory)}
    for place in ("slots", "groups", "data/sandboxes", *_KEPT):
        with contextlib.suppress(FileNotFoundError):
            found |= {f"{place}/{path.name}" for path in (directory / place).iterdir()}
    found -= {f"data/images/{IMAGE}"}
    empty = (path.name for path in (directory / "data/bases").glob("*.ram") if not _blocks(path))
    found -= {f"data/bases/{name}" for name in empty}
    # Drafts and what was to be renamed lie beside the whole, wherever it is.
    found |= {os.fspath(path.relative_to(directory)) for path in directory.rglob(".*")}
    return {name for name in found if not name.endswith(".lock")}


def _blocks(path: Path) -> int:
    return path.stat().st_blocks
