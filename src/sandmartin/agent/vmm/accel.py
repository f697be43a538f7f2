"""Which accelerator a host really has.

/dev/kvm may exist, open and answer, and yet no guest ever gets on (nested hosts): so the real
kernel is booted under KVM, with a deadline, and the answer is remembered until the host boots
anew or kernel or QEMU change.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from sandmartin.agent.journal import write_whole
from sandmartin.agent.vmm import VmSpec
from sandmartin.agent.vmm.qemu import Qemu, qemu_version
from sandmartin.errors import SandmartinError, Unavailable
from sandmartin.model import Accel

_DEVICE = Path("/dev/kvm")
_PROBE_DEADLINE_S = 6.0
_PROBE_MEMORY_MB = 128
_SIGN = b"sandmartin-probe-ok"
_NOBODY = 65534


@dataclass(frozen=True)
class AccelChoice:
    """The accelerator in use and, in a sentence, why."""

    accel: Accel
    reason: str


async def choose_accel(
    wanted: Accel, kernel: Path, initramfs: Path, cache: Path, *, fresh: bool = False
) -> AccelChoice:
    """The accelerator to use. Raises Unavailable when KVM is demanded and does not work."""
    if wanted is Accel.TCG:
        return AccelChoice(Accel.TCG, "chosen by setting")
    works, reason = await _kvm_works(kernel, initramfs, cache, fresh=fresh)
    if works:
        return AccelChoice(Accel.KVM, reason)
    if wanted is Accel.KVM:
        raise Unavailable(
            f"KVM does not work on this host: {reason}",
            hint="use --accel auto to fall back to QEMU's emulation",
        )
    return AccelChoice(Accel.TCG, reason)


async def _kvm_works(
    kernel: Path, initramfs: Path, cache: Path, *, fresh: bool
) -> tuple[bool, str]:
    if not _DEVICE.exists():
        return False, f"{_DEVICE} does not exist"
    boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    key = f"{boot_id} {kernel.resolve()} {initramfs.resolve()} {await qemu_version()}"
    file = cache / "kvm-probe.json"
    with contextlib.suppress(OSError, ValueError, KeyError):
        kept = json.loads(file.read_bytes())
        if not fresh and kept["key"] == key:
            return bool(kept["works"]), str(kept["reason"])
    works, reason = await probe_kvm(kernel, initramfs)
    with contextlib.suppress(OSError):
        content = json.dumps({"key": key, "works": works, "reason": reason})
        write_whole(file, content.encode(), mode=0o644)
    return works, reason


async def probe_kvm(kernel: Path, initramfs: Path) -> tuple[bool, str]:
    """Boot the kernel under KVM and wait for its user space to speak."""
    try:
        os.close(os.open(_DEVICE, os.O_RDWR))
    except OSError as error:
        return False, f"{_DEVICE} cannot be opened: {error.strerror}"
    with tempfile.TemporaryDirectory(prefix="sandmartin-probe-") as directory:
        spec = VmSpec(
            run_dir=Path(directory),
            vcpus=1,
            memory_mb=_PROBE_MEMORY_MB,
            kernel=kernel,
            initramfs=initramfs,
            command_line="sandmartin.probe=1",
            disk=None,
            netns=None,
            tap=None,
            mac=None,
            uid=_NOBODY,
            accel=Accel.KVM,
        )
        try:
            return await _watch_probe(spec)
        except SandmartinError as error:
            return False, f"QEMU cannot use {_DEVICE}: {error.message}"


async def _watch_probe(spec: VmSpec) -> tuple[bool, str]:
    vm = await Qemu().start(spec)
    console, until = b"", time.monotonic() + _PROBE_DEADLINE_S
    try:
        while time.monotonic() < until:
            with contextlib.suppress(Unavailable):
                console += await vm.read_console()
            if _SIGN in console:
                return True, "a guest booted under KVM"
            if not vm.record.process.alive():
                return False, f"the guest ended under KVM without a word: {console[-200:]!r}"
            await asyncio.sleep(0.05)
    finally:
        await vm.kill()
    return False, f"{_DEVICE} opens, but a guest did not boot within {_PROBE_DEADLINE_S:g} s"
