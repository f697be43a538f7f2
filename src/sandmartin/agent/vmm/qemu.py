"""The QEMU driver: one code path for 7.2, 8.2 and 10.x, under KVM or TCG.

Every VM is a `microvm` that runs as a user of its own, in its own network namespace, without
capabilities, with QEMU's whole seccomp filter on. The user is dropped before QEMU starts: its own
ways of doing so differ between versions and do not go with the filter. What the process could not
open itself (the monitors' sockets, the tap) is opened by us and handed on.

Chosen so that a memory snapshot can be taken and loaded later: one memory backend named `ram`,
stable device and node names, no configuration section and no description of the device state, a
balloon for statistics only, a second monitor for freezing by a thread of its own.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from sandmartin.agent import proc
from sandmartin.agent.vmm import Disk, Vm, VmRecord, VmSpec, VmStatus
from sandmartin.agent.vmm.balloon import Balloon
from sandmartin.agent.vmm.freezer import Freezer, urgent
from sandmartin.agent.vmm.monitor import DEADLINE_S, Monitor, listen
from sandmartin.agent.vmm.tap import open_tap
from sandmartin.agent.vmm.tsc import measure_tsc_khz
from sandmartin.errors import DiskFull, Invalid, SandmartinError, TimedOut, ToolFailed, Unavailable
from sandmartin.model import Accel

_log = logging.getLogger(__name__)
_T = TypeVar("_T")
_Node = dict[str, object]

BINARY = "qemu-system-x86_64"
MACHINE = "microvm"
#: `rep movsb` and its like are emulated one step at a time. Without these features C libraries
#: and the kernel copy and clear by plain loops, which is several times faster.
_EMULATED_CPU = "max,-erms,-fsrm"
#: The same feature's older form, which the kernel derives itself.
_NO_STRING_LOOPS = "clearcpuid=rep_good"
#: Those that Debian switches on, without TOMOYO: each is asked at every access, and that one has
#: no policy anywhere.
_SECURITY_MODULES = "lsm=landlock,lockdown,yama,integrity,apparmor,bpf"
#: The first is for events and calls, the second for freezing by a thread of its own.
MONITORS = ("monitor", "freezer")
LOG = "vmm.log"
KVM_DEVICE = Path("/dev/kvm")

_START_DEADLINE_S = 30.0
_GONE_DEADLINE_S = 10.0
#: How often what QEMU itself writes is cut down: a guest can provoke warnings.
_TRIM_PERIOD_S = 5.0
#: How often the process of a VM whose monitor is connected is looked at.
_LOOK_PERIOD_S = 10.0
#: A write that failed for want of space is tried again at once when the VM goes on.
_RETRY_S = 0.3
_CONSOLE_BYTES = 64 * 1024
_LOG_LIMIT_BYTES = 256 * 1024
_LOG_TAIL_BYTES = 600
#: Translated code of one VM. QEMU's own default takes a share of the host's memory.
_TRANSLATION_MB = 256
_VERSION = re.compile(r"QEMU emulator version (\d+)\.(\d+)(?:\.(\d+))?(?: \(([^()\n]*)\))?")
_OLDEST = (7, 2)
#: Name of a file that was handed over, as QEMU tells it.
_PASSED = re.compile(r"/dev/fdset/(\d+)")


@dataclass(frozen=True)
class QemuVersion:
    """A version of QEMU; `text` also has the distribution's own part."""

    number: tuple[int, int, int]
    text: str

    @classmethod
    def parse(cls, said: str) -> QemuVersion:
        """From what `--version` prints. Raises ToolFailed."""
        found = _VERSION.match(said)
        if found is None:
            raise ToolFailed(f"{BINARY} tells no version: {said[:100]!r}")
        major, minor, micro, package = found.groups()
        number = (int(major), int(minor), int(micro or 0))
        text = ".".join(map(str, number))
        return cls(number, f"{text} ({package})" if package else text)


@dataclass(frozen=True)
class Installation:
    """The QEMU of this host."""

    binary: Path
    version: QemuVersion
    accels: frozenset[Accel]
    #: It can map a file as RAM that it may only read.
    reads_bases: bool

    @classmethod
    async def find(cls, binary: Path | None = None) -> Installation:
        """The installed QEMU, or the one at `binary`. Raises ToolFailed when there is none fit."""
        search = proc.clean_environment()["PATH"]
        path = str(binary) if binary else shutil.which(BINARY, path=search)
        if path is None:
            raise ToolFailed(f"{BINARY} is not installed", hint="run `sandmartin setup`")
        said = (await proc.run([path, "--version"], deadline_s=10)).stdout.decode(errors="replace")
        version = QemuVersion.parse(said)
        if version.number < _OLDEST:
            raise ToolFailed(
                f"QEMU {version.text} is too old", hint="use QEMU 7.2 (Debian 12) or later"
            )
        # Debian ships accelerators as modules of their own: only those that are there are listed.
        listed = (await proc.run([path, "-accel", "help"], deadline_s=10)).stdout.decode().split()
        backend = [path, "-object", "memory-backend-file,help"]
        known = (await proc.run(backend, deadline_s=10, check=False)).stdout
        accels = frozenset({Accel.KVM, Accel.TCG} & set(listed))
        return cls(Path(path), version, accels, b" rom=" in known)

    def require(self, accel: Accel) -> None:
        """Raises ToolFailed when this QEMU has no such accelerator."""
        if accel not in self.accels:
            raise ToolFailed(
                f"{self.binary} has no {accel} accelerator",
                hint="reinstall qemu-system-x86 and qemu-system-common",
            )


def machine_type(accel: Accel) -> str:
    """What a device state is bound to: the machine and its processor."""
    return f"{MACHINE} {_EMULATED_CPU}" if accel is Accel.TCG else MACHINE


async def qemu_version() -> str:
    """Version of the installed QEMU. Raises ToolFailed when there is none."""
    return (await Installation.find()).version.text


class QemuVm:
    """A VM that runs under QEMU."""

    def __init__(self, record: VmRecord) -> None:
        self._record = record
        self._monitor = Monitor(record.run_dir / MONITORS[0], self._on_event)
        self._balloon = Balloon(self._monitor.execute, record.memory_mb << 20)
        self._status: VmStatus | None = None
        self._changes = 0
        #: When to look at the process again; an open connection to its monitor says that it lives.
        self._look_at = 0.0
        self._stopped = asyncio.Event()

    @property
    def record(self) -> VmRecord:
        return self._record

    def move(self, run_dir: Path) -> None:
        self._record = replace(self._record, run_dir=run_dir)
        self._monitor.move(run_dir / MONITORS[0])

    async def insert_disk(self, disk: Disk) -> None:
        def insert() -> None:
            with Freezer(self.freezer) as freezer:
                _insert(freezer, disk)

        await asyncio.to_thread(insert)

    @property
    def freezer(self) -> Path:
        """Socket of the second monitor, for `monitor.connect`."""
        return self._record.run_dir / MONITORS[1]

    def _on_event(self, name: str) -> None:
        # Every change of the run state comes with an event, so what was asked stays true until one.
        self._status = None
        self._changes += 1
        if name == "STOP":
            self._stopped.set()

    async def connect(self, deadline_s: float) -> None:
        """Make sure that QEMU answers. Raises Unavailable, TimedOut."""
        await self._monitor.execute("query-status", deadline_s=deadline_s)

    async def status(self) -> VmStatus:
        if time.monotonic() < self._look_at and self._status and self._monitor.connected:
            return self._status
        if not self._record.process.alive():
            return VmStatus.GONE
        self._look_at = time.monotonic() + _LOOK_PERIOD_S
        if self._status is not None and self._monitor.connected:
            return self._status
        changes = self._changes
        try:
            now = _status(await self._monitor.execute("query-status"))
        except Unavailable:
            if not self._record.process.alive():
                return VmStatus.GONE
            raise
        if changes == self._changes:
            self._status = now
        return now

    async def wait_gone(self) -> None:
        # This is the one call that lasts as long as the VM, so it also keeps the log bounded. To
        # look takes no thread: many VMs idle for long.
        while not await self._record.process.gone(_TRIM_PERIOD_S):
            if log_is_long(log := self._record.run_dir / LOG):
                await asyncio.to_thread(trim_log, log)
        self._look_at = 0.0

    async def stop(self) -> None:
        await self._monitor.execute("stop")

    async def cont(self) -> None:
        full = await self.status() is VmStatus.DISK_FULL
        self._stopped.clear()
        await self._monitor.execute("cont")
        if not full:
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_RETRY_S):
                await self._stopped.wait()
        if await self.status() is VmStatus.DISK_FULL:
            raise DiskFull("the host's disk still has no space for what the VM wants to write")

    async def resize_disk(self, size_bytes: int) -> None:
        node, now = _root_disk(await self._monitor.execute("query-block"))
        if size_bytes < now:
            # QEMU would cut the disk off under the guest's file system.
            raise Invalid(f"the disk has {now} bytes and cannot shrink to {size_bytes}")
        await self._monitor.execute("block_resize", {"node-name": node, "size": size_bytes})

    async def top_layer(self) -> str:
        node, _ = _root_disk(await self._monitor.execute("query-block"))
        return node

    async def freeze(
        self, while_stopped: Callable[[], _T], *, top: Path | None = None, cont: bool = True
    ) -> tuple[bytes, _T]:
        work = asyncio.to_thread(self._freeze, while_stopped, top, cont)
        return await asyncio.shield(asyncio.ensure_future(work))

    def _freeze(
        self, while_stopped: Callable[[], _T], top: Path | None, cont: bool
    ) -> tuple[bytes, _T]:
        with urgent(), Freezer(self.freezer) as freezer, freezer.state_file() as state:
            below = ""
            if top is not None:
                below, _ = _root_disk(freezer.execute("query-block"))
                _add_node(freezer, top, _layer_node(top.stem, None))
            began = time.monotonic()
            # Saving changes nothing of the RAM, so both are done at once; what has begun has come
            # to its end before the VM goes on.
            with freezer.stopped(cont=cont), ThreadPoolExecutor(1, "freeze") as beside:
                work = beside.submit(while_stopped)
                freezer.save_state(state)
                if top is not None:
                    switch = {"node": below, "overlay": top.stem}
                    freezer.execute("blockdev-snapshot", switch)
                done = work.result()
            if cont:
                stopped_s = time.monotonic() - began
                # The number stands in the record too, for whoever measures.
                _log.info("a VM stood still for %.1f ms", stopped_s * 1000, extra={"s": stopped_s})
            return state.read(), done

    async def relink(self, disk: Disk) -> None:
        def relink() -> None:
            with Freezer(self.freezer) as freezer:
                _relink(freezer, disk)

        await asyncio.shield(asyncio.ensure_future(asyncio.to_thread(relink)))

    async def only_read(self, layer: Path) -> None:
        def reopen() -> None:
            with Freezer(self.freezer) as freezer:
                _reopen_to_read(freezer, layer)

        await asyncio.to_thread(reopen)

    async def load(self, state: bytes) -> None:
        def load() -> None:
            with Freezer(self.freezer) as freezer:
                freezer.load_state(state)

        await asyncio.to_thread(load)

    async def memory_used(self) -> int | None:
        return await self._balloon.used_bytes()

    async def read_console(self) -> bytes:
        arguments = {"device": "console", "size": _CONSOLE_BYTES, "format": "base64"}
        answer = await self._monitor.execute("ringbuf-read", arguments)
        try:
            return base64.b64decode(answer if isinstance(answer, str) else "?", validate=True)
        except binascii.Error as error:
            raise ToolFailed("QEMU gave something else than the console's text") from error

    async def kill(self) -> None:
        process = self._record.process
        process.kill()
        if not await process.gone(_GONE_DEADLINE_S):
            raise TimedOut(f"QEMU process {process.pid} does not end")
        await self.close()
        _remove_sockets(self._record.run_dir)

    async def close(self) -> None:
        await self._monitor.close()


def _status(answer: object) -> VmStatus:
    match answer:
        case {"status": "running"}:
            return VmStatus.RUNNING
        # With `werror=enospc` a VM stops for no other error than a full disk.
        case {"status": "io-error"}:
            return VmStatus.DISK_FULL
        case {"status": str()}:
            return VmStatus.STOPPED
    raise ToolFailed("QEMU gave something else than its status")


def _root_disk(devices: object) -> tuple[str, int]:
    """Name and size in bytes of what the guest's disk is on, from `query-block`."""
    for device in devices if isinstance(devices, list) else []:
        match device:
            case {
                "qdev": str(path),
                "inserted": {"node-name": str(name), "image": {"virtual-size": int(size)}},
            } if "root" in path.split("/"):
                return name, size
    raise ToolFailed("QEMU gave something else than its disks")


def _add_node(freezer: Freezer, path: Path, node: _Node) -> None:
    """Have QEMU open a file as `node`, not yet part of any disk."""
    read_only = bool(node["read-only"])
    handle = os.open(path, (os.O_RDONLY if read_only else os.O_RDWR) | os.O_CLOEXEC)
    try:
        with freezer.passed(handle) as name:
            file = _file_node(str(node["file"]), name, read_only=read_only)
            freezer.execute("blockdev-add", file)
            freezer.execute("blockdev-add", node)
    finally:
        os.close(handle)


def _insert(freezer: Freezer, disk: Disk) -> None:
    """Put a disk into the drive of a VM that has an empty one."""
    for node, path in _chain(disk):
        _add_node(freezer, path, node)
    drive = {"path": "/machine/peripheral/root", "property": "drive", "value": disk.top.stem}
    freezer.execute("qom-set", drive)
    freezer.execute("blockdev-del", {"node-name": _NO_DISK})


def _relink(freezer: Freezer, disk: Disk) -> None:
    """Have QEMU use the layers of `disk`; those it used before are closed."""
    _, *layers = _chain(disk)
    there = _layer_files(freezer)
    for node, path in layers:
        if node["node-name"] not in there:
            _add_node(freezer, path, node)
    # All at once or not at all; each must be told again what it is.
    freezer.execute("blockdev-reopen", {"options": [node for node, _ in layers]})
    used = {node["node-name"] for node, _ in layers}
    unused = {name: there[name] for name in there if name not in used}
    while unused:
        closed = [name for name in unused if _close_layer(freezer, name, unused[name])]
        if not closed:
            _log.warning("QEMU keeps layers open: %s", ", ".join(unused))
            return
        for name in closed:
            del unused[name]


def _layer_files(freezer: Freezer) -> dict[str, str]:
    """The layers that QEMU has open, the newest first, and by which name it opened each."""
    nodes = freezer.execute("query-named-block-nodes", {"flat": True})
    layers, opened = [], {}
    for node in nodes if isinstance(nodes, list) else []:
        match node:
            case {"node-name": str(name), "drv": "qcow2"}:
                layers.append(name)
            case {"node-name": str(name), "drv": "file", "file": str(file)}:
                opened[name] = file
    return {name: opened.get(f"{name}-file", "") for name in layers}


def _close_layer(freezer: Freezer, name: str, file: str) -> bool:
    """Have QEMU close a layer; False while another stands over it."""
    try:
        freezer.execute("blockdev-del", {"node-name": name})
    except ToolFailed:
        return False
    freezer.execute("blockdev-del", {"node-name": f"{name}-file"})
    if passed := _PASSED.fullmatch(file):
        # What came with QEMU's start would stay open, and its space taken, as long as QEMU lives.
        with contextlib.suppress(ToolFailed):
            freezer.execute("remove-fd", {"fdset-id": int(passed[1])})
    return True


def _reopen_to_read(freezer: Freezer, layer: Path) -> None:
    """Have QEMU hold no descriptor of `layer`, which lies below its top, that can write."""
    # Putting a layer over another reopens the latter's format, but not the file below that.
    name = f"{layer.stem}-file"
    nodes = freezer.execute("query-named-block-nodes", {"flat": True})
    (node,) = (each for each in nodes if each["node-name"] == name)
    number = int(str(node["file"]).removeprefix("/dev/fdset/"))
    if not node["ro"]:
        handle = os.open(layer, os.O_RDONLY | os.O_CLOEXEC)
        try:
            freezer.execute("add-fd", {"fdset-id": number}, fd=handle)
        finally:
            os.close(handle)
        options = _file_node(name, str(node["file"]), read_only=True)
        freezer.execute("blockdev-reopen", {"options": [options]})
    # All of them: what QEMU reads by is a descriptor beside these.
    with contextlib.suppress(ToolFailed):
        freezer.execute("remove-fd", {"fdset-id": number})


def log_is_long(log: Path) -> bool:
    """Whether a log grew over its limit."""
    with contextlib.suppress(FileNotFoundError):
        return log.stat().st_size > _LOG_LIMIT_BYTES
    return False


def trim_log(log: Path) -> None:
    """Cut a log that grew over its limit down to its newer half."""
    # QEMU writes with O_APPEND, so it goes on at the new end.
    with contextlib.suppress(FileNotFoundError), log.open("rb+") as file:
        size = file.seek(0, os.SEEK_END)
        if size <= _LOG_LIMIT_BYTES:
            return
        file.seek(size - _LOG_LIMIT_BYTES // 2)
        kept = file.read(_LOG_LIMIT_BYTES // 2)
        file.truncate(0)
        file.seek(0)
        file.write(kept)


def _remove_sockets(run_dir: Path) -> None:
    for name in MONITORS:
        (run_dir / name).unlink(missing_ok=True)


class Qemu:
    """Runs VMs under QEMU: the installed one, or the one at `binary`.

    `answer_deadline_s` is how long the monitor of a VM that is adopted may take to answer.
    """

    def __init__(
        self, binary: Path | None = None, *, answer_deadline_s: float = DEADLINE_S
    ) -> None:
        self._binary = binary
        self._answer_deadline_s = answer_deadline_s
        self._installation: Installation | None = None
        self._tsc_khz = 0

    async def installation(self) -> Installation:
        """What this host has, asked once. Raises ToolFailed."""
        if self._installation is None:
            self._installation = await Installation.find(self._binary)
        return self._installation

    async def tsc_khz(self) -> int:
        """The rate of this host's time stamp counter, measured once. Raises ToolFailed."""
        if not self._tsc_khz:
            self._tsc_khz = await asyncio.to_thread(measure_tsc_khz)
        return self._tsc_khz

    async def start(self, spec: VmSpec) -> Vm:
        installation = await self.installation()
        installation.require(spec.accel)
        khz = await self.tsc_khz() if spec.accel is Accel.TCG else 0
        log = _Log(spec.run_dir / LOG)
        try:
            vm = QemuVm(
                VmRecord(
                    process=await _spawn(spec, installation, khz),
                    run_dir=spec.run_dir,
                    vmm_version=installation.version.text,
                    machine=machine_type(spec.accel),
                    accel=spec.accel,
                    memory_mb=spec.memory_mb,
                )
            )
        except (OSError, ToolFailed) as error:
            _remove_sockets(spec.run_dir)
            raise log.failure(error) from error
        try:
            await vm.connect(_START_DEADLINE_S)
        except BaseException as error:
            # Shielded: a start that is given up leaves no process behind.
            await asyncio.shield(vm.kill())
            if isinstance(error, Unavailable):
                raise log.failure(error) from error
            raise
        return vm

    async def adopt(self, record: VmRecord) -> Vm | None:
        if not record.process.alive():
            record.process.reap()
            _remove_sockets(record.run_dir)
            return None
        vm = QemuVm(record)
        try:
            await vm.connect(self._answer_deadline_s)
        except SandmartinError as error:
            if not record.process.alive():
                await vm.kill()
                return None
            # It is ours by pid and start time. One that does not answer must still be endable.
            _log.warning("VM process %d does not answer: %s", record.process.pid, error)
        return vm


class _Log:
    """What QEMU says from now on; earlier runs may have written to the same file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._begin = path.stat().st_size if path.exists() else 0

    def failure(self, error: Exception) -> ToolFailed:
        said = b""
        with contextlib.suppress(FileNotFoundError), self._path.open("rb") as file:
            end = file.seek(0, os.SEEK_END)
            file.seek(max(self._begin, end - _LOG_TAIL_BYTES))
            said = file.read(_LOG_TAIL_BYTES)
        text = " ".join(said.decode(errors="replace").split())
        return ToolFailed(
            f"QEMU did not start: {text or error}",
            hint="`sandmartin doctor` checks what a VM needs of this host",
        )


@dataclass(frozen=True, kw_only=True)
class Descriptors:
    """What QEMU is handed, open."""

    monitors: tuple[int, ...]
    tap: int | None = None
    image: int | None = None
    sealed: tuple[int, ...] = ()
    top: int | None = None
    ram: int | None = None

    def all(self) -> list[int]:
        some = (self.tap, self.image, *self.sealed, self.top, self.ram)
        return [*self.monitors, *(fd for fd in some if fd is not None)]


async def _spawn(spec: VmSpec, installation: Installation, tsc_khz: int) -> proc.ProcessId:
    """Start QEMU with the descriptors it is to have. Raises ToolFailed, OSError."""
    with contextlib.ExitStack() as ours:

        def opened(path: Path, flags: int) -> int:
            handle = os.open(path, flags | os.O_CLOEXEC)
            ours.callback(os.close, handle)
            return handle

        tap = None
        if spec.tap is not None and spec.netns is not None:
            tap = await _opened(spec.netns, spec.tap)
            ours.callback(os.close, tap)
        sockets = [ours.enter_context(listen(spec.run_dir / name)) for name in MONITORS]
        disk = spec.disk
        fds = Descriptors(
            monitors=tuple(listener.fileno() for listener in sockets),
            tap=tap,
            image=opened(disk.image, os.O_RDONLY) if disk else None,
            sealed=tuple(opened(path, os.O_RDONLY) for path in disk.sealed) if disk else (),
            top=opened(disk.top, os.O_RDWR) if disk else None,
            ram=spec.ram_fd,
        )
        qemu = [
            os.fspath(installation.binary),
            *arguments(spec, fds, tsc_khz=tsc_khz, reads_bases=installation.reads_bases),
        ]
        return proc.spawn_detached(
            [*_confined(spec), *qemu],
            output=spec.run_dir / LOG,
            pass_fds=fds.all(),
            # It outlives us, and would keep the file system we were started on busy.
            cwd=Path("/"),
        )


async def _opened(netns: Path, tap: str) -> int:
    opening = asyncio.ensure_future(asyncio.to_thread(open_tap, netns, tap))
    try:
        return await asyncio.shield(opening)
    except asyncio.CancelledError:
        # The thread goes on, and a tap that stays open could not be attached again.
        opening.add_done_callback(_close_opened)
        raise


def _close_opened(opening: asyncio.Future[int]) -> None:
    if not opening.cancelled() and opening.exception() is None:
        os.close(opening.result())


# The command.

#: Enters the control groups before anything else, so that a VM that was started but not yet
#: recorded can always be found by its group; each word then executes the next, in one process.
_ENTER = (
    'ulimit -c 0; while [ "$1" != -- ]; do echo 0 >"$1" || exit 1; shift; done; shift; exec "$@"'
)


def _confined(spec: VmSpec) -> list[str]:
    """The words before QEMU's own: into the groups and the namespace, out of root."""
    groups = [str(group / "cgroup.procs") for group in spec.cgroups]
    words = ["/bin/sh", "-c", _ENTER, "sandmartin-vm", *groups, "--"]
    if spec.netns is not None:
        words += ["nsenter", f"--net={spec.netns}", "--"]
    kvm = kvm_group() if spec.accel is Accel.KVM else None
    return words + proc.unprivileged(spec.uid, kvm, outlives=True)


def kvm_group() -> int | None:
    """The group with which a VM's user may open /dev/kvm; None when it needs none."""
    try:
        device = KVM_DEVICE.stat()
    except OSError:
        return None
    return None if device.st_mode & 0o006 == 0o006 else device.st_gid


def kvm_mode_fits() -> bool:
    """Whether a VM's user, given the device's group, may open /dev/kvm."""
    try:
        mode = KVM_DEVICE.stat().st_mode
    except OSError:
        return False
    return mode & 0o006 == 0o006 or mode & 0o060 == 0o060


def arguments(
    spec: VmSpec, fds: Descriptors, *, tsc_khz: int, reads_bases: bool = False
) -> list[str]:
    """QEMU's own words for a VM that boots from its kernel, or waits for a device state."""
    words = ["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]
    if spec.stay_at_end:
        words += ["-action", "shutdown=pause"]
    words += ["-name", str(spec.run_dir).replace(",", ",,")]
    words += ["-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"]
    words += ["-machine", f"{MACHINE},memory-backend=ram,suppress-vmdesc=on,dump-guest-core=off"]
    words += ["-global", "migration.send-configuration=off"]
    # A restored guest would tell the network five times where it is, where nobody but the host
    # is, and the host knows.
    words += ["-global", "migration.announce-rounds=0"]
    # The transport's default is the draft of virtio, without what came with 1.0.
    words += ["-global", "virtio-mmio.force-legacy=off"]
    words += ["-object", _ram(spec.memory_mb << 20, fds.ram, reads_bases=reads_bases)]
    words += ["-m", f"{spec.memory_mb}M", "-smp", str(spec.vcpus)]
    words += _accelerator(spec.accel)
    for name, fd in zip(MONITORS, fds.monitors, strict=True):
        words += ["-chardev", f"socket,id={name},fd={fd},server=on,wait=off"]
        words += ["-mon", f"chardev={name},mode=control"]
    words += ["-chardev", f"ringbuf,id=console,size={_CONSOLE_BYTES}", "-serial", "chardev:console"]
    words += _devices(spec, fds)
    if spec.incoming:
        # A kernel to boot from would be read into the memory of a VM that never boots.
        return [*words, "-S", "-incoming", "defer"]
    words += ["-kernel", os.fspath(spec.kernel), "-initrd", os.fspath(spec.initramfs)]
    return [*words, "-append", _command_line(spec, tsc_khz)]


def _json(**members: object) -> str:
    # As JSON no name or path can be read as an option of its own.
    return json.dumps({name.replace("_", "-"): value for name, value in members.items()})


def _accelerator(accel: Accel) -> list[str]:
    if accel is Accel.KVM:
        return ["-accel", "kvm", "-cpu", "host"]
    return ["-accel", f"tcg,thread=multi,tb-size={_TRANSLATION_MB}", "-cpu", _EMULATED_CPU]


def _ram(size: int, fd: int | None, *, reads_bases: bool) -> str:
    if fd is None:
        return _json(qom_type="memory-backend-ram", id="ram", size=size)
    path = f"/proc/self/fd/{fd}"
    # A QEMU that knows no better opens even a private mapping's file for writing: see BaseStore.
    kind = {"readonly": True, "rom": "off"} if reads_bases else {}
    return _json(
        qom_type="memory-backend-file", id="ram", size=size, mem_path=path, share=False, **kind
    )


def _devices(spec: VmSpec, fds: Descriptors) -> list[str]:
    words = ["-object", _json(qom_type="rng-random", id="entropy", filename="/dev/urandom")]
    words += _device("virtio-rng", "rng", rng="entropy", max_bytes=65536, period=1000)
    # For statistics only: a page given back would fall back to what a snapshot's base holds.
    words += _device("virtio-balloon", "balloon", deflate_on_oom=False, free_page_reporting=False)
    drive = None
    if spec.disk is not None:
        words += _disk(spec.disk, fds)
        drive = spec.disk.top.stem
    elif spec.incoming:
        words += ["-blockdev", _json(driver="null-co", node_name=_NO_DISK, size=_NO_DISK_BYTES)]
        drive = _NO_DISK
    if drive is not None:
        # A full disk stops the VM; what it wanted to write is tried again when it goes on.
        words += _device("virtio-blk", "root", drive=drive, werror="enospc", rerror="report")
    if fds.tap is not None:
        words += ["-netdev", f"tap,id=net0,fd={fds.tap},vhost=off"]
        words += _device("virtio-net", "net", netdev="net0", mac=spec.mac)
    return words


def _device(driver: str, device_id: str, **members: object) -> list[str]:
    return ["-device", _json(driver=f"{driver}-device", id=device_id, **members)]


#: The layer is synced by the agent where state must survive, never by the guest's flushes.
_CACHE = {"direct": False, "no-flush": True}
#: What is in the drive of a VM that waits for its disk.
_NO_DISK = "no-disk"
_NO_DISK_BYTES = 1 << 30


def _file_node(name: str, path: str, *, read_only: bool = False) -> _Node:
    return {
        "driver": "file",
        "node-name": name,
        "filename": path,
        "read-only": read_only,
        "discard": "unmap",
        "cache": _CACHE,
    }


def _layer_node(name: str, backing: str | None, *, read_only: bool = False) -> _Node:
    # What stands in a layer's own header about the one below is the guest's to forge.
    node: _Node = {"driver": "qcow2", "node-name": name, "file": f"{name}-file", "backing": backing}
    node |= {"read-only": read_only, "discard": "unmap", "cache": _CACHE}
    return node if read_only else node | {"detect-zeroes": "unmap"}


def _chain(disk: Disk) -> list[tuple[_Node, Path]]:
    """The nodes of a disk from the bottom up, and the file below each."""
    image: _Node = {"driver": "raw", "node-name": "image", "file": "image-file", "read-only": True}
    chain, below = [(image, disk.image)], "image"
    for path in disk.sealed:
        chain.append((_layer_node(path.stem, below, read_only=True), path))
        below = path.stem
    return [*chain, (_layer_node(disk.top.stem, below), disk.top)]


def _disk(disk: Disk, fds: Descriptors) -> list[str]:
    assert fds.image is not None and fds.top is not None
    words: list[str] = []
    handles = (fds.image, *fds.sealed, fds.top)
    for number, ((node, _), fd) in enumerate(zip(_chain(disk), handles, strict=True), 1):
        words += ["-add-fd", f"fd={fd},set={number}"]
        opened = f"/dev/fdset/{number}"
        file = _file_node(str(node["file"]), opened, read_only=bool(node["read-only"]))
        words += ["-blockdev", json.dumps(file), "-blockdev", json.dumps(node)]
    return words


def _command_line(spec: VmSpec, tsc_khz: int) -> str:
    words = ["console=ttyS0", "quiet", "loglevel=3", "reboot=t", "panic=-1", "random.trust_cpu=on"]
    words += [_SECURITY_MODULES]
    if spec.accel is Accel.TCG:
        # Without a second timer as reference the calibration fails now and then, and for good;
        # a clock source once called unstable would be frozen into every snapshot.
        words += [f"tsc_early_khz={tsc_khz}", "tsc=reliable", "no_timer_check", _NO_STRING_LOOPS]
        # Nothing is executed speculatively that the guest's kernel could guard: its jumps are the
        # host's code, translated.
        words += ["mitigations=off"]
    return " ".join([*words, spec.command_line]).strip()
