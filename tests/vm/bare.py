"""Bare VMs: the real kernel, and instead of the guest agent a program that reports on the console.

What a test makes lies in a directory that the VM's own user can pass through, as in an agent's
data directory; it is removed with all that is in it, and no process is left.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import re
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from sandmartin.agent.assets import Assets, Member, archive
from sandmartin.agent.disk import Image, Layers
from sandmartin.agent.proc import clean_environment
from sandmartin.agent.vmm import Disk, Vm, VmSpec, VmStatus
from sandmartin.agent.vmm.qemu import Qemu
from sandmartin.model import Accel, Settings

#: Far from the users that an agent claims.
UID = 2_990_000
#: Owner of sealed layers.
LAYERS_UID = 2_999_999
BOOT_DEADLINE_S = 60.0
_GUEST = Path(__file__).with_name("test_qemu_guest.go")
_KEPT = 4096


@functools.cache
def assets() -> Assets:
    return Assets.find(Settings.load())


@functools.cache
def _initramfs() -> bytes:
    """The test guest as /init, and the kernel's modules beside it."""
    with tempfile.TemporaryDirectory() as directory:
        program = Path(directory) / "init"
        go = Path(sys.executable).with_name("go")
        env = clean_environment({"CGO_ENABLED": "0", "GOFLAGS": "-buildvcs=false"})
        subprocess.run([go, "build", "-o", program, _GUEST], env=env, check=True, timeout=100)
        init = program.read_bytes()
    modules = assets().kernel.with_name("modules")
    members = [Member(name, stat.S_IFDIR | 0o755) for name in ("dev", "proc", "sys", "modules")]
    members.append(Member("dev/console", stat.S_IFCHR | 0o600, device=(5, 1)))
    members.append(Member("init", stat.S_IFREG | 0o755, init))
    for path in sorted(modules.iterdir()):
        members.append(Member(f"modules/{path.name}", stat.S_IFREG | 0o644, path.read_bytes()))
    return b"".join(archive(members))


@contextlib.contextmanager
def vm_directory() -> Iterator[Path]:
    """A directory that every user can pass through."""
    directory = Path(tempfile.mkdtemp(prefix="sandmartin-test-"))
    try:
        directory.chmod(0o711)
        yield directory
    finally:
        shutil.rmtree(directory)


def make_spec(directory: Path) -> VmSpec:
    """A VM in `directory`, without disk and network."""
    initramfs = directory / "initramfs.cpio"
    if not initramfs.exists():
        initramfs.write_bytes(_initramfs())
    run_dir = directory / "vm"
    run_dir.mkdir(mode=0o700, exist_ok=True)
    return VmSpec(
        run_dir=run_dir,
        vcpus=1,
        memory_mb=128,
        kernel=assets().kernel,
        initramfs=initramfs,
        command_line="",
        disk=None,
        netns=None,
        tap=None,
        mac=None,
        uid=UID,
        accel=Accel.TCG,
    )


def make_image(directory: Path, size_mb: int) -> Image:
    """An empty image."""
    path = directory / "image.raw"
    with path.open("wb") as file:
        file.truncate(size_mb << 20)
    path.chmod(0o444)
    return Image("empty", path)


async def with_disk(spec: VmSpec, directory: Path, image: Image, size_mb: int) -> VmSpec:
    top = await Layers(directory, LAYERS_UID).create(directory, size_mb)
    return replace(spec, disk=Disk(image=image.path, top=top))


@dataclass
class BareVm:
    """A running VM, and the newest of what it said."""

    vm: Vm
    spec: VmSpec
    console: str = ""

    @property
    def pid(self) -> int:
        return self.vm.record.process.pid

    async def stopped(self) -> bool:
        return await self.vm.status() is VmStatus.STOPPED

    async def hear(self, pattern: str, deadline_s: float = BOOT_DEADLINE_S) -> re.Match[str]:
        """Wait until the guest says something from now on that `pattern` matches."""
        until = time.monotonic() + deadline_s
        while time.monotonic() < until:
            self.console += (await self.vm.read_console()).decode(errors="replace")
            if found := re.search(pattern, self.console):
                self.console = self.console[found.end() :]
                return found
            await asyncio.sleep(0.05)
        raise AssertionError(f"the guest did not say {pattern!r}: {self.console[-_KEPT:]!r}")


@contextlib.asynccontextmanager
async def running(spec: VmSpec, qemu: Qemu | None = None) -> AsyncIterator[BareVm]:
    """A VM that was started and is ended, with a check that it left nothing."""
    vm = await (qemu or Qemu()).start(spec)
    try:
        yield BareVm(vm, spec)
    finally:
        await vm.kill()
        assert leftovers(spec) == []


def leftovers(spec: VmSpec) -> list[str]:
    """Sockets of a VM, and processes that carry its name."""
    found = [path.name for path in spec.run_dir.iterdir() if path.is_socket()]
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (process / "cmdline").read_bytes().split(b"\0")
            if os.fsencode(spec.run_dir) in words:
                found.append(f"process {process.name}")
    return found


async def eventually(condition: Callable[[], Awaitable[bool]], deadline_s: float = 20.0) -> None:
    """Wait until `condition` holds."""
    until = time.monotonic() + deadline_s
    while not await condition():
        assert time.monotonic() < until, "the condition never came true"
        await asyncio.sleep(0.05)
