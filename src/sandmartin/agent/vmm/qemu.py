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
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sandmartin.agent import proc
from sandmartin.agent.vmm import Vm, VmRecord, VmSpec, VmStatus
from sandmartin.agent.vmm.monitor import DEADLINE_S, Monitor, listen
from sandmartin.agent.vmm.tap import open_tap
from sandmartin.agent.vmm.tsc import measure_tsc_khz
from sandmartin.errors import DiskFull, Invalid, SandmartinError, TimedOut, ToolFailed, Unavailable
from sandmartin.model import Accel

_log = logging.getLogger(__name__)

BINARY = "qemu-system-x86_64"
MACHINE = "microvm"
#: The first is for events and calls, the second for freezing by a thread of its own.
MONITORS = ("monitor", "freezer")
LOG = "vmm.log"
KVM_DEVICE = Path("/dev/kvm")

_START_DEADLINE_S = 30.0
_GONE_DEADLINE_S = 10.0
#: How often what QEMU itself writes is cut down: a guest can provoke warnings.
_TRIM_PERIOD_S = 5.0
#: A write that failed for want of space is tried again at once when the VM goes on.
_RETRY_S = 0.3
_CONSOLE_BYTES = 64 * 1024
_LOG_LIMIT_BYTES = 256 * 1024
_LOG_TAIL_BYTES = 600
#: Translated code of one VM. QEMU's own default takes a share of the host's memory.
_TRANSLATION_MB = 256
_VERSION = re.compile(r"QEMU emulator version (\d+)\.(\d+)(?:\.(\d+))?(?: \(([^()\n]*)\))?")
_OLDEST = (7, 2)


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
        return cls(Path(path), version, frozenset({Accel.KVM, Accel.TCG} & set(listed)))

    def require(self, accel: Accel) -> None:
        """Raises ToolFailed when this QEMU has no such accelerator."""
        if accel not in self.accels:
            raise ToolFailed(
                f"{self.binary} has no {accel} accelerator",
                hint="reinstall qemu-system-x86 and qemu-system-common",
            )


async def qemu_version() -> str:
    """Version of the installed QEMU. Raises ToolFailed when there is none."""
    return (await Installation.find()).version.text


class QemuVm:
    """A VM that runs under QEMU."""

    def __init__(self, record: VmRecord) -> None:
        self._record = record
        self._monitor = Monitor(record.run_dir / MONITORS[0], self._on_event)
        self._status: VmStatus | None = None
        self._changes = 0
        self._stopped = asyncio.Event()

    @property
    def record(self) -> VmRecord:
        return self._record

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
        if not self._record.process.alive():
            return VmStatus.GONE
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
        # This is the one call that lasts as long as the VM, so it also keeps the log bounded.
        while not await self._record.process.gone(_TRIM_PERIOD_S):
            await asyncio.to_thread(trim_log, self._record.run_dir / LOG)

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
        nodes = await self._monitor.execute("query-named-block-nodes", {"flat": True})
        if size_bytes < (now := _disk_size(nodes)):
            # QEMU would cut the disk off under the guest's file system.
            raise Invalid(f"the disk has {now} bytes and cannot shrink to {size_bytes}")
        await self._monitor.execute("block_resize", {"node-name": "disk", "size": size_bytes})

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


def _disk_size(nodes: object) -> int:
    for node in nodes if isinstance(nodes, list) else []:
        match node:
            case {"node-name": "disk", "image": {"virtual-size": int(size)}}:
                return size
    raise ToolFailed("QEMU gave something else than its disks")


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
                    process=await _spawn(spec, installation.binary, khz),
                    run_dir=spec.run_dir,
                    vmm_version=installation.version.text,
                    machine=MACHINE,
                    accel=spec.accel,
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


async def _spawn(spec: VmSpec, binary: Path, tsc_khz: int) -> proc.ProcessId:
    """Start QEMU with the descriptors it is to have. Raises ToolFailed, OSError."""
    with contextlib.ExitStack() as ours:
        tap = None
        if spec.tap is not None and spec.netns is not None:
            tap = await _opened(spec.netns, spec.tap)
            ours.callback(os.close, tap)
        sockets = [ours.enter_context(listen(spec.run_dir / name)) for name in MONITORS]
        fds = [listener.fileno() for listener in sockets]
        qemu = [os.fspath(binary), *arguments(spec, fds, tap_fd=tap, tsc_khz=tsc_khz)]
        passed = fds if tap is None else [*fds, tap]
        return proc.spawn_detached(
            [*_confined(spec), *qemu],
            output=spec.run_dir / LOG,
            pass_fds=passed,
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
    words += ["setpriv", f"--reuid={spec.uid}", f"--regid={spec.uid}"]
    kvm = kvm_group() if spec.accel is Accel.KVM else None
    words += ["--clear-groups" if kvm is None else f"--groups={kvm}"]
    return [*words, "--no-new-privs", "--inh-caps=-all", "--bounding-set=-all", "--"]


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
    spec: VmSpec, monitor_fds: Sequence[int], *, tap_fd: int | None, tsc_khz: int
) -> list[str]:
    """QEMU's own words for a VM that boots from its kernel."""
    words = ["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]
    if spec.stay_at_end:
        words += ["-action", "shutdown=pause"]
    words += ["-name", str(spec.run_dir).replace(",", ",,")]
    words += ["-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"]
    words += ["-machine", f"{MACHINE},memory-backend=ram,suppress-vmdesc=on,dump-guest-core=off"]
    words += ["-global", "migration.send-configuration=off"]
    # The transport's default is the draft of virtio, without what came with 1.0.
    words += ["-global", "virtio-mmio.force-legacy=off"]
    words += ["-object", _json(qom_type="memory-backend-ram", id="ram", size=spec.memory_mb << 20)]
    words += ["-m", f"{spec.memory_mb}M", "-smp", str(spec.vcpus)]
    words += _accelerator(spec.accel)
    for name, fd in zip(MONITORS, monitor_fds, strict=True):
        words += ["-chardev", f"socket,id={name},fd={fd},server=on,wait=off"]
        words += ["-mon", f"chardev={name},mode=control"]
    words += ["-chardev", f"ringbuf,id=console,size={_CONSOLE_BYTES}", "-serial", "chardev:console"]
    words += _devices(spec, tap_fd)
    words += ["-kernel", os.fspath(spec.kernel), "-initrd", os.fspath(spec.initramfs)]
    return [*words, "-append", _command_line(spec, tsc_khz)]


def _json(**members: object) -> str:
    # As JSON no name or path can be read as an option of its own.
    return json.dumps({name.replace("_", "-"): value for name, value in members.items()})


def _accelerator(accel: Accel) -> list[str]:
    if accel is Accel.KVM:
        return ["-accel", "kvm", "-cpu", "host"]
    return ["-accel", f"tcg,thread=multi,tb-size={_TRANSLATION_MB}", "-cpu", "max"]


def _devices(spec: VmSpec, tap_fd: int | None) -> list[str]:
    words = ["-object", _json(qom_type="rng-random", id="entropy", filename="/dev/urandom")]
    words += _device("virtio-rng", "rng", rng="entropy", max_bytes=65536, period=1000)
    # For statistics only: a page given back would fall back to what a snapshot's base holds.
    words += _device("virtio-balloon", "balloon", deflate_on_oom=False, free_page_reporting=False)
    if spec.disk is not None:
        words += _disk(spec.disk)
        # A full disk stops the VM; what it wanted to write is tried again when it goes on.
        words += _device("virtio-blk", "root", drive="disk", werror="enospc", rerror="report")
    if tap_fd is not None:
        words += ["-netdev", f"tap,id=net0,fd={tap_fd},vhost=off"]
        words += _device("virtio-net", "net", netdev="net0", mac=spec.mac)
    return words


def _device(driver: str, device_id: str, **members: object) -> list[str]:
    return ["-device", _json(driver=f"{driver}-device", id=device_id, **members)]


def _disk(layer: Path) -> list[str]:
    # The layer is synced by the agent where state must survive, never by the guest's flushes.
    cache = {"direct": False, "no-flush": True}
    common = {"discard": "unmap", "cache": cache}
    file = _json(driver="file", node_name="layer", filename=os.fspath(layer), **common)
    disk = _json(driver="qcow2", node_name="disk", file="layer", detect_zeroes="unmap", **common)
    return ["-blockdev", file, "-blockdev", disk]


def _command_line(spec: VmSpec, tsc_khz: int) -> str:
    words = ["console=ttyS0", "quiet", "loglevel=3", "reboot=t", "panic=-1", "random.trust_cpu=on"]
    if spec.accel is Accel.TCG:
        # Without a second timer as reference the calibration fails now and then, and for good;
        # a clock source once called unstable would be frozen into every snapshot.
        words += [f"tsc_early_khz={tsc_khz}", "tsc=reliable", "no_timer_check"]
    return " ".join([*words, spec.command_line]).strip()
