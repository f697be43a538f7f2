"""The QEMU driver: one code path for 7.2, 8.2 and 10.x, under KVM or TCG.

Every VM is a `microvm` that runs as a user of its own, in its own network namespace, without
capabilities, with QEMU's whole seccomp filter on. The user is dropped before QEMU starts: its own
ways of doing so differ between versions and do not go with the filter. The monitors' sockets are
bound by us and handed on, so there is no start-up race and the VM's user needs no directory.

Chosen so that a memory snapshot can be taken and loaded later: one memory backend named `ram`,
stable device ids, no configuration section and no description of the device state.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import ctypes
import functools
import grp
import json
import mmap
import os
import re
import shutil
import socket
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from qemu.qmp import QMPClient, QMPError

from sandmartin.agent import proc
from sandmartin.agent.proc import ProcessId
from sandmartin.agent.vmm import Vm, VmRecord, VmSpec, VmStatus
from sandmartin.errors import DiskFull, TimedOut, ToolFailed, Unavailable
from sandmartin.model import Accel

BINARY = "qemu-system-x86_64"
MACHINE = "microvm"
#: The first is for events and calls, the second for freezing by a thread of its own.
MONITORS = ("monitor", "freezer")

_CALL_DEADLINE_S = 10.0
_CONNECT_DEADLINE_S = 15.0
_GONE_DEADLINE_S = 10.0
_CONSOLE_BYTES = 64 * 1024
_LOG_LIMIT_BYTES = 256 * 1024
_LOG_TAIL_BYTES = 600
#: Translated code of one VM. QEMU's own default takes a share of the host's memory.
_TRANSLATION_MB = 256
_NOBODY = 65534


class QemuVm:
    """A VM that runs under QEMU."""

    def __init__(self, record: VmRecord, client: QMPClient) -> None:
        self._record = record
        self._client = client

    @property
    def record(self) -> VmRecord:
        return self._record

    async def _call(self, command: str, arguments: Mapping[str, object] | None = None) -> Any:
        """One QMP call. Raises TimedOut, ToolFailed when QEMU refuses, Unavailable when it is gone."""
        try:
            async with asyncio.timeout(_CALL_DEADLINE_S):
                return await self._client.execute(command, dict(arguments or {}))
        except TimeoutError:
            raise TimedOut(f"QEMU did not answer {command} in time") from None
        except QMPError as error:
            if not self._record.process.alive():
                raise Unavailable("the VM has ended") from error
            raise ToolFailed(f"QEMU refused {command}: {error}") from error

    async def status(self) -> VmStatus:
        try:
            answer = await self._call("query-status")
        except Unavailable:
            return VmStatus.GONE
        match answer.get("status"):
            case "running":
                return VmStatus.RUNNING
            case "io-error":
                return VmStatus.DISK_FULL
        return VmStatus.STOPPED

    async def wait_gone(self) -> None:
        while not await self._record.process.gone(3600.0):
            pass

    async def stop(self) -> None:
        await self._call("stop")

    async def cont(self) -> None:
        await self._call("cont")
        if await self.status() is VmStatus.DISK_FULL:
            raise DiskFull("the host's disk still has no space for the VM")

    async def resize_disk(self, size_bytes: int) -> None:
        await self._call("block_resize", {"node-name": "disk", "size": size_bytes})

    async def read_console(self) -> bytes:
        arguments = {"device": "console", "size": _CONSOLE_BYTES, "format": "base64"}
        return base64.b64decode(str(await self._call("ringbuf-read", arguments)))

    async def kill(self) -> None:
        self._record.process.kill()
        if not await self._record.process.gone(_GONE_DEADLINE_S):
            raise TimedOut(f"QEMU process {self._record.process.pid} does not end")
        await self.close()

    async def close(self) -> None:
        with contextlib.suppress(QMPError, OSError, TimeoutError, EOFError):
            async with asyncio.timeout(_CALL_DEADLINE_S):
                await self._client.disconnect()

    def trim_log(self) -> None:
        """Keep what QEMU itself writes bounded: a guest can provoke warnings."""
        log = self._record.run_dir / "vmm.log"
        with contextlib.suppress(FileNotFoundError):
            if log.stat().st_size > _LOG_LIMIT_BYTES:
                os.truncate(log, 0)


class Qemu:
    """Runs VMs under QEMU."""

    async def start(self, spec: VmSpec) -> Vm:
        version = await qemu_version()
        log = spec.run_dir / "vmm.log"
        with contextlib.ExitStack() as listeners:
            fds = [listeners.enter_context(_listen(spec.run_dir / name)) for name in MONITORS]
            process = proc.spawn_detached(
                [*_confined(spec), BINARY, *_arguments(spec, fds)], output=log, pass_fds=fds
            )
        record = VmRecord(
            process=process,
            run_dir=spec.run_dir,
            vmm_version=version,
            machine=MACHINE,
            accel=spec.accel,
        )
        try:
            for group in spec.cgroups:
                (group / "cgroup.procs").write_text(str(process.pid))
            return QemuVm(record, await _connect(record))
        except BaseException as error:
            process.kill()
            await asyncio.shield(process.gone(_GONE_DEADLINE_S))
            if isinstance(error, OSError | Unavailable):
                raise ToolFailed(f"QEMU did not start: {_tail(log) or error}") from error
            raise

    async def adopt(self, record: VmRecord) -> Vm | None:
        if not record.process.alive():
            return None
        try:
            return QemuVm(record, await _connect(record))
        except Unavailable:
            if record.process.alive():
                raise
            return None


@contextlib.contextmanager
def _listen(path: Path) -> Iterator[int]:
    """A listening unix socket at `path`, which may be longer than a socket's address can hold."""
    path.unlink(missing_ok=True)
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.bind(f"/proc/self/fd/{directory}/{path.name}")
        listener.listen(1)
        yield listener.fileno()
    finally:
        listener.close()
        os.close(directory)


async def _connect(record: VmRecord) -> QMPClient:
    """Connect to the first monitor. Raises Unavailable when nobody answers, TimedOut."""
    client = QMPClient(f"vm-{record.process.pid}")
    directory = os.open(record.run_dir, os.O_RDONLY | os.O_DIRECTORY)
    try:
        async with asyncio.timeout(_CONNECT_DEADLINE_S):
            await client.connect(f"/proc/self/fd/{directory}/{MONITORS[0]}")
    except TimeoutError:
        raise TimedOut("QEMU's monitor did not answer in time") from None
    except (QMPError, OSError) as error:
        raise Unavailable(f"QEMU's monitor cannot be reached: {error}") from error
    finally:
        os.close(directory)
    return client


def _tail(log: Path) -> str:
    with contextlib.suppress(FileNotFoundError):
        return log.read_bytes()[-_LOG_TAIL_BYTES:].decode(errors="replace").strip()
    return ""


def _confined(spec: VmSpec) -> list[str]:
    """The words before QEMU's own: into the namespace, out of root. Each executes the next."""
    enter = ["nsenter", f"--net={spec.netns}", "--"] if spec.netns else []
    groups = ["--clear-groups"]
    if spec.accel is Accel.KVM:
        with contextlib.suppress(KeyError):
            groups = [f"--groups={grp.getgrnam('kvm').gr_gid}"]
    user = [f"--reuid={spec.uid}", f"--regid={spec.uid}", *groups]
    rights = ["--no-new-privs", "--inh-caps=-all", "--bounding-set=-all"]
    return [*enter, "setpriv", *user, *rights, "--"]


def _arguments(spec: VmSpec, monitor_fds: list[int]) -> list[str]:
    words = ["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]
    words += ["-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"]
    words += ["-machine", f"{MACHINE},memory-backend=ram,suppress-vmdesc=on"]
    words += ["-global", "migration.send-configuration=off"]
    words += ["-object", f"memory-backend-ram,id=ram,size={spec.memory_mb}M"]
    words += ["-m", f"{spec.memory_mb}M", "-smp", str(spec.vcpus)]
    words += _accelerator(spec.accel)
    for name, fd in zip(MONITORS, monitor_fds, strict=True):
        words += ["-chardev", f"socket,id={name},fd={fd},server=on,wait=off"]
        words += ["-mon", f"chardev={name},mode=control"]
    words += ["-chardev", f"ringbuf,id=console,size={_CONSOLE_BYTES}", "-serial", "chardev:console"]
    words += ["-object", "rng-random,id=entropy,filename=/dev/urandom"]
    words += ["-device", "virtio-rng-device,id=rng,rng=entropy,max-bytes=65536,period=1000"]
    # For statistics only: a page given back would fall back to what a snapshot's base holds.
    words += ["-device", "virtio-balloon-device,id=balloon"]
    if spec.disk is not None:
        words += _disk(spec.disk)
    if spec.tap is not None:
        words += ["-netdev", f"tap,id=net0,ifname={spec.tap},script=no,downscript=no,vhost=off"]
        words += ["-device", f"virtio-net-device,id=net,netdev=net0,mac={spec.mac}"]
    words += ["-kernel", os.fspath(spec.kernel), "-initrd", os.fspath(spec.initramfs)]
    return [*words, "-append", _command_line(spec)]


def _accelerator(accel: Accel) -> list[str]:
    if accel is Accel.KVM:
        return ["-accel", "kvm", "-cpu", "host"]
    return ["-accel", f"tcg,thread=multi,tb-size={_TRANSLATION_MB}", "-cpu", "max"]


def _disk(layer: Path) -> list[str]:
    # The layer is synced by the agent where state must survive, never by the guest's flushes.
    cache = {"direct": False, "no-flush": True}
    file = {
        "driver": "file",
        "node-name": "layer",
        "filename": os.fspath(layer),
        "discard": "unmap",
        "cache": cache,
    }
    disk = {
        "driver": "qcow2",
        "node-name": "disk",
        "file": "layer",
        "discard": "unmap",
        "detect-zeroes": "unmap",
        "cache": cache,
    }
    words = ["-blockdev", json.dumps(file), "-blockdev", json.dumps(disk)]
    # A full disk stops the VM; what it wanted to write is tried again when it goes on.
    device = "virtio-blk-device,id=root,drive=disk,werror=enospc,rerror=report"
    return [*words, "-device", device]


def _command_line(spec: VmSpec) -> str:
    words = ["console=ttyS0", "quiet", "loglevel=3", "reboot=t", "panic=-1", "random.trust_cpu=on"]
    if spec.accel is Accel.TCG and (khz := tsc_khz()):
        # Without a second timer as reference the calibration fails now and then, and for good.
        words += [f"tsc_early_khz={khz}", "tsc=reliable", "no_timer_check"]
    return " ".join([*words, spec.command_line])


_VERSION = re.compile(r"version (\d+\.\d+(?:\.\d+)?)")
_version: dict[str, str] = {}


async def qemu_version() -> str:
    """Version of the installed QEMU. Raises ToolFailed when there is none."""
    binary = shutil.which(BINARY, path=proc.clean_environment()["PATH"])
    if binary is None:
        raise ToolFailed(f"{BINARY} is not installed", hint="run `sandmartin setup`")
    if binary not in _version:
        said = (await proc.run([binary, "--version"], deadline_s=10)).stdout.decode()
        found = _VERSION.search(said)
        if found is None:
            raise ToolFailed(f"{BINARY} tells no version: {said[:100]!r}")
        _version[binary] = found.group(1)
    return _version[binary]


_PERF_EVENT_OPEN = 298
_PERF_TYPE_SOFTWARE = 1
_CAP_USER_TIME = 1 << 3


@functools.cache
def tsc_khz() -> int:
    """Rate of the host's time stamp counter in kHz, 0 when the kernel does not tell.

    The kernel publishes how it turns counts into nanoseconds in the first page of any perf event
    (perf_event_open(2), time_mult and time_shift).
    """
    # struct perf_event_attr, version 0: type, size, config; `disabled` is the first flag bit.
    attributes = struct.pack("IIQQQQQ", _PERF_TYPE_SOFTWARE, 64, 0, 0, 0, 0, 1).ljust(64, b"\0")
    libc = ctypes.CDLL(None, use_errno=True)
    fd = libc.syscall(_PERF_EVENT_OPEN, attributes, 0, -1, -1, 0)
    if fd < 0:
        return 0
    try:
        with mmap.mmap(fd, mmap.PAGESIZE, mmap.MAP_SHARED, mmap.PROT_READ) as page:
            (capabilities,) = struct.unpack_from("Q", page, 40)
            shift, mult = struct.unpack_from("HI", page, 50)[0], struct.unpack_from("I", page, 52)[0]
    except OSError:
        return 0
    finally:
        os.close(fd)
    if not capabilities & _CAP_USER_TIME or not mult:
        return 0
    return round(1_000_000 * 2**shift / mult)
