"""Which accelerator a host really has.

/dev/kvm may exist, open and answer, and yet no guest ever gets on (nested hosts): so the real
kernel is booted under KVM, with a deadline, and the answer is remembered until the host boots
anew, or kernel, initramfs, QEMU or the device's rights change.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from sandmartin.agent.journal import write_whole
from sandmartin.agent.vmm import VmSpec, VmStatus
from sandmartin.agent.vmm.qemu import KVM_DEVICE, Qemu, kvm_mode_fits
from sandmartin.errors import SandmartinError, Unavailable
from sandmartin.model import Accel

_log = logging.getLogger(__name__)

_CACHE = "kvm-probe.json"
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_SIGN = b"sandmartin-probe-ok"
_DEADLINE_S = 6.0
_POLL_S = 0.05
_MEMORY_MB = 128
_CONSOLE_TAIL = 200


@dataclass(frozen=True)
class AccelChoice:
    """The accelerator in use and, in a sentence, why; `hint` says how to get a faster one."""

    accel: Accel
    reason: str
    hint: str = ""


@dataclass(frozen=True)
class Verdict:
    """Whether KVM serves on this host, and why not."""

    works: bool
    reason: str
    hint: str = ""


async def choose_accel(
    wanted: Accel,
    kernel: Path,
    initramfs: Path,
    cache_dir: Path,
    *,
    fresh: bool = False,
    qemu: Qemu | None = None,
) -> AccelChoice:
    """The accelerator to use; `fresh` probes anew instead of believing what is remembered.

    Raises Unavailable when KVM is demanded and does not work, ToolFailed when QEMU is missing or
    has no such accelerator.
    """
    qemu = qemu or Qemu()
    installation = await qemu.installation()
    if wanted is Accel.TCG:
        installation.require(Accel.TCG)
        return AccelChoice(Accel.TCG, "chosen by setting")
    verdict = await _kvm_verdict(qemu, kernel, initramfs, cache_dir / _CACHE, fresh=fresh)
    if verdict.works:
        return AccelChoice(Accel.KVM, verdict.reason)
    if wanted is Accel.KVM:
        raise Unavailable(
            f"KVM does not work on this host: {verdict.reason}",
            hint=verdict.hint or "set the accelerator to auto or tcg to run on QEMU's emulation",
        )
    installation.require(Accel.TCG)
    return AccelChoice(Accel.TCG, verdict.reason, verdict.hint)


async def _kvm_verdict(
    qemu: Qemu, kernel: Path, initramfs: Path, cache: Path, *, fresh: bool
) -> Verdict:
    installation = await qemu.installation()
    if Accel.KVM not in installation.accels:
        return Verdict(False, f"{installation.binary} is built without KVM")
    key = await asyncio.to_thread(_key, installation.version.text, kernel, initramfs)
    if not fresh and (kept := await asyncio.to_thread(_remembered, cache, key)):
        return kept
    verdict = await probe_kvm(qemu, kernel, initramfs)
    await asyncio.to_thread(_remember, cache, key, verdict)
    return verdict


def _key(version: str, kernel: Path, initramfs: Path) -> list[str]:
    """All that the answer depends on."""
    key = [_BOOT_ID.read_text().strip(), version]
    for path in (KVM_DEVICE, kernel, initramfs):
        try:
            found = path.stat()
        except OSError:
            key.append(f"{path} missing")
            continue
        if path == KVM_DEVICE:
            key.append(f"{path} {found.st_mode:o} {found.st_uid} {found.st_gid}")
        else:
            key.append(f"{path.resolve()} {found.st_size} {found.st_mtime_ns}")
    return key


def _remembered(cache: Path, key: list[str]) -> Verdict | None:
    try:
        kept = json.loads(cache.read_bytes())
        if kept["key"] != key:
            return None
        verdict = kept["verdict"]
        return Verdict(bool(verdict["works"]), str(verdict["reason"]), str(verdict["hint"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _remember(cache: Path, key: list[str], verdict: Verdict) -> None:
    content = json.dumps({"key": key, "verdict": asdict(verdict)}, indent=1)
    try:
        write_whole(cache, content.encode(), mode=0o644)
    except OSError as error:
        _log.warning("the probe of KVM cannot be remembered in %s: %s", cache, error)


async def probe_kvm(qemu: Qemu, kernel: Path, initramfs: Path) -> Verdict:
    """Boot the kernel under KVM and wait for its user space to speak."""
    if refusal := await asyncio.to_thread(_refusal):
        return refusal
    failure = await probe_boot(qemu, kernel, initramfs, Accel.KVM, _DEADLINE_S)
    if failure:
        return Verdict(False, f"{KVM_DEVICE} opens, but {failure}")
    if not kvm_mode_fits():
        return Verdict(
            False,
            f"{KVM_DEVICE} works, but for root alone, and VMs run as users of their own",
            f"let a group use it: `chgrp kvm {KVM_DEVICE} && chmod 660 {KVM_DEVICE}`",
        )
    return Verdict(True, "a guest booted under KVM")


def _refusal() -> Verdict | None:
    """Why there is no need to boot anything, if so."""
    try:
        os.close(os.open(KVM_DEVICE, os.O_RDWR | os.O_CLOEXEC))
    except FileNotFoundError:
        return Verdict(
            False,
            f"{KVM_DEVICE} does not exist",
            "load the module kvm_intel or kvm_amd, and switch virtualisation on in the firmware"
            " or, in a VM, nested virtualisation on its host",
        )
    except OSError as error:
        hint = "" if os.geteuid() == 0 else "run the agent as root"
        return Verdict(False, f"{KVM_DEVICE} cannot be opened: {error.strerror}", hint)
    return None


async def probe_boot(
    qemu: Qemu, kernel: Path, initramfs: Path, accel: Accel, deadline_s: float
) -> str:
    """Boot the kernel until its user space speaks; why it did not, or nothing when it did."""
    with tempfile.TemporaryDirectory(prefix="sandmartin-probe-") as directory:
        spec = VmSpec(
            run_dir=Path(directory),
            vcpus=1,
            memory_mb=_MEMORY_MB,
            kernel=kernel,
            initramfs=initramfs,
            command_line="sandmartin.probe=1",
            disk=None,
            netns=None,
            tap=None,
            mac=None,
            # Root without its rights, for what it boots is our own: whether the device serves
            # and whether a VM's user may open it are two answers.
            uid=0,
            accel=accel,
            stay_at_end=True,
        )
        try:
            return await _watch(qemu, spec, deadline_s)
        except SandmartinError as error:
            return f"QEMU cannot use it: {error.message}"


async def _watch(qemu: Qemu, spec: VmSpec, deadline_s: float) -> str:
    until = time.monotonic() + deadline_s
    vm = await qemu.start(spec)
    console = b""
    try:
        while time.monotonic() < until:
            # Asked first: what a guest said before it ended is then in the console.
            ended = await vm.status() is not VmStatus.RUNNING
            console += await vm.read_console()
            if _SIGN in console:
                return ""
            if ended:
                said = console[-_CONSOLE_TAIL:].decode(errors="replace").strip()
                return f"the guest ended early: {said or 'without a word'}"
            await asyncio.sleep(_POLL_S)
    finally:
        await vm.kill()
    return f"a guest hangs: it did not boot within {deadline_s:g} s"
