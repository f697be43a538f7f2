"""The QEMU driver on real VMs: what runs, as whom, with what, and that nothing outlives it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import pickle
import re
import signal
import sys
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sandmartin.agent import proc
from sandmartin.agent.vmm import Disk, VmRecord, VmStatus
from sandmartin.agent.vmm.accel import choose_accel, probe_boot
from sandmartin.agent.vmm.monitor import Monitor
from sandmartin.agent.vmm.qemu import LOG, MONITORS, Qemu
from sandmartin.errors import Invalid, TimedOut, ToolFailed, Unavailable
from sandmartin.model import Accel
from tests.vm import bare
from tests.vm.bare import UID, BareVm, running, vm_directory

pytestmark = [pytest.mark.vm, pytest.mark.root]

_IMAGE_MB, _DISK_MB = 64, 96
_MAC = "02:fc:00:00:00:02"
_CONSOLE_BYTES = 64 * 1024
_ANY = Path("/etc/hostname")


@contextlib.asynccontextmanager
async def _tap_namespace() -> AsyncIterator[Path]:
    name = f"sandmartin-test-{os.getpid()}"
    await proc.run(["ip", "netns", "add", name])
    try:
        # Not `ip -n`, which wants the root to be a mount of its own: below a chroot it is none.
        inside = ["nsenter", f"--net=/run/netns/{name}", "--"]
        await proc.run([*inside, "ip", "tuntap", "add", "tap0", "mode", "tap"])
        yield Path("/run/netns") / name
    finally:
        await proc.run(["ip", "netns", "delete", name])


@pytest.fixture(scope="module")
async def booted() -> AsyncIterator[BareVm]:
    """A VM with disk and network, booted; each test leaves it running."""
    async with contextlib.AsyncExitStack() as stack:
        directory = stack.enter_context(vm_directory())
        netns = await stack.enter_async_context(_tap_namespace())
        spec = replace(bare.make_spec(directory), vcpus=2, netns=netns, tap="tap0", mac=_MAC)
        image = bare.make_image(directory, _IMAGE_MB)
        spec = await bare.with_disk(spec, directory, image, _DISK_MB)
        machine = await stack.enter_async_context(running(spec))
        yield machine


@pytest.fixture
def directory() -> Iterator[Path]:
    with vm_directory() as made:
        yield made


async def test_boots_with_its_devices_and_a_clock_that_holds(booted: BareVm) -> None:
    # The first test of the module: it reads the console from its beginning.
    assert (await booted.hear(r"clocksource=(\S+)\s"))[1] in {"tsc-early", "tsc"}
    assert (await booted.hear(r"kernel-complaints=(-?\d+)"))[1] == "0"
    seen = await booted.hear(r"cpus=(\d+) net=(\S+)\s")
    assert (seen[1], seen[2]) == ("2", _MAC)
    # The layer is larger than the image it lies over.
    assert int((await booted.hear(r"tick \d+ vda=(\d+) "))[1]) == _DISK_MB * 2048
    # The kernel watches the counter for a moment before it settles on it.
    await booted.hear(r"clock=tsc\s")


def _process_status(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def test_process_is_confined(booted: BareVm) -> None:
    for task in Path(f"/proc/{booted.pid}/task").iterdir():
        status = _process_status(int(task.name))
        assert status["Uid"].split() == status["Gid"].split() == [str(UID)] * 4
        assert status["Groups"] == ""
        held = {status[f"Cap{kind}"] for kind in ("Inh", "Prm", "Eff", "Bnd", "Amb")}
        assert {int(each, 16) for each in held} == {0}
        assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")
    process = Path(f"/proc/{booted.pid}")
    assert booted.spec.netns is not None
    assert (process / "ns/net").stat().st_ino == booted.spec.netns.stat().st_ino
    assert (process / "ns/net").stat().st_ino != Path("/proc/self/ns/net").stat().st_ino
    assert (process / "cwd").readlink() == Path("/")
    assert re.search(r"Max core file size +0 +0 ", (process / "limits").read_text())


def test_holds_no_descriptor_beyond_its_own(booted: BareVm) -> None:
    links = [path.readlink() for path in Path(f"/proc/{booted.pid}/fd").iterdir()]
    opened = {str(link) for link in links if str(link).startswith("/")}
    log = str(booted.spec.run_dir / LOG)
    disk = booted.spec.disk
    assert disk is not None
    layer, image = str(disk.top), str(disk.image)
    assert opened - {"/dev/null", "/dev/urandom"} == {log, layer, image, "/dev/net/tun"}


#: What the machine itself is made of, beside the devices we ask for.
_OF_THE_MACHINE = {
    "ISA", "System", "acpi-ged", "acpi-ged-x86", "apic", "container", "fw_cfg_io", "ioapic",
    "isa-i8259", "isa-pit", "isa-serial", "isabus-bridge", "kvmvapic", "max-x86_64-cpu",
    "mc146818rtc", "serial", "virtio-mmio", "virtio-mmio-bus",
}  # fmt: skip
_OURS = {"virtio-rng-device", "virtio-balloon-device", "virtio-blk-device", "virtio-net-device"}


async def _tree(monitor: Monitor, path: str) -> AsyncIterator[str]:
    """Types of all that hangs below a node of the object tree."""
    children: Any = await monitor.execute("qom-list", {"path": path})
    for child in children:
        if (found := re.fullmatch(r"child<(.+)>", child["type"])) is not None:
            yield found[1]
            async for each in _tree(monitor, f"{path}/{child['name']}"):
                yield each


async def test_has_no_device_beyond_ours(booted: BareVm) -> None:
    # The second monitor, so that it is shown to serve.
    monitor = Monitor(booted.spec.run_dir / MONITORS[1], lambda event: None)
    try:
        asked = {kind async for kind in _tree(monitor, "/machine/peripheral")}
        assert asked & _OURS == _OURS
        assert [kind async for kind in _tree(monitor, "/machine/peripheral-anon")] == []
        found = {kind async for kind in _tree(monitor, "/machine")}
        devices = {kind for kind in found if not kind.startswith(("irq", "memory", "qemu:"))}
        assert devices - _OURS - _OF_THE_MACHINE == set()
    finally:
        await monitor.close()


async def test_stops_and_goes_on(booted: BareVm) -> None:
    vm = booted.vm
    assert await vm.status() is VmStatus.RUNNING
    await vm.stop()
    assert await vm.status() is VmStatus.STOPPED
    await vm.read_console()
    assert await vm.read_console() == b""
    await vm.cont()
    assert await vm.status() is VmStatus.RUNNING
    booted.console = ""
    await booted.hear(r"tick \d+ ")


async def test_console_tells_each_word_once(booted: BareVm) -> None:
    first = await booted.hear(r"tick (\d+) ")
    second = await booted.hear(r"tick (\d+) ")
    assert int(second[1]) == int(first[1]) + 1


async def test_disk_grows_while_it_runs_and_never_shrinks(booted: BareVm) -> None:
    await booted.vm.resize_disk((_DISK_MB + 32) << 20)
    await booted.hear(rf"vda={(_DISK_MB + 32) * 2048}\s")
    with pytest.raises(Invalid, match="cannot shrink"):
        await booted.vm.resize_disk(_DISK_MB << 20)
    await booted.vm.resize_disk((_DISK_MB + 32) << 20)


async def test_log_is_kept_bounded_while_somebody_watches(booted: BareVm) -> None:
    log = booted.spec.run_dir / LOG
    watching = asyncio.ensure_future(booted.vm.wait_gone())
    try:
        with log.open("ab") as file:
            file.write(b"x" * 2**20 + b"the newest words")
        await bare.eventually(lambda: asyncio.sleep(0, log.stat().st_size < 2**18))
        assert log.read_bytes().endswith(b"the newest words")
        assert not watching.done()
    finally:
        watching.cancel()
        log.write_bytes(b"")


async def test_is_adopted_after_its_driver_was_dropped(booted: BareVm) -> None:
    record = pickle.loads(pickle.dumps(booted.vm.record))
    await booted.vm.close()
    adopted = await Qemu().adopt(record)
    assert adopted is not None
    assert await adopted.status() is VmStatus.RUNNING
    await BareVm(adopted, booted.spec).hear(r"tick \d+ ")
    await adopted.close()
    # A process that only has the same pid is not taken for it.
    assert await Qemu().adopt(_with_other_start(record, booted.spec.run_dir.parent)) is None


def _with_other_start(record: VmRecord, run_dir: Path) -> VmRecord:
    process = replace(record.process, start_ticks=record.process.start_ticks - 1)
    return replace(record, process=process, run_dir=run_dir)


_STARTER = """
import asyncio, os, pickle, sys
from sandmartin.agent.vmm.qemu import Qemu
vm = asyncio.run(Qemu().start(pickle.load(sys.stdin.buffer)))
sys.stdout.buffer.write(pickle.dumps(vm.record))
sys.stdout.flush()
os._exit(0)
"""


async def test_outlives_its_starter_and_is_endable_when_it_hangs(directory: Path) -> None:
    spec = bare.make_spec(directory)
    starter = await proc.run([sys.executable, "-c", _STARTER], stdin=pickle.dumps(spec))
    record: VmRecord = pickle.loads(starter.stdout)
    vm = await Qemu().adopt(record)
    assert vm is not None
    try:
        await BareVm(vm, spec).hear("guest: init")
        os.kill(record.process.pid, signal.SIGSTOP)
        monitor = Monitor(spec.run_dir / MONITORS[1], lambda event: None)
        with pytest.raises((TimedOut, Unavailable)):
            await monitor.execute("query-status", deadline_s=0.3)
        await vm.close()
        # What does not answer is still won back, for it must be endable.
        vm = await Qemu(answer_deadline_s=0.3).adopt(record)
        assert vm is not None
    finally:
        ended = asyncio.ensure_future(vm.wait_gone() if vm else asyncio.sleep(0))
        await asyncio.gather(*(vm.kill() for _ in range(2) if vm))
    await asyncio.wait_for(ended, 5)
    await vm.kill()
    assert await vm.status() is VmStatus.GONE
    assert await Qemu().adopt(record) is None
    assert bare.leftovers(spec) == []


async def test_console_of_a_loud_guest_is_bounded_and_outlives_it(directory: Path) -> None:
    spec = bare.make_spec(directory)
    spec = replace(spec, command_line="test.shout=80", stay_at_end=True)
    async with running(spec) as machine:
        await bare.eventually(machine.stopped, bare.BOOT_DEADLINE_S)
        console = await machine.vm.read_console()
        assert len(console) == _CONSOLE_BYTES
        assert b"a 000079\r\n" in console[-200:]
        assert await machine.vm.read_console() == b""


async def test_guest_that_ends_is_gone(directory: Path) -> None:
    # A first program that is not there panics the kernel, and a panic ends the VM.
    spec = replace(bare.make_spec(directory), command_line="rdinit=/none init=/none root=/dev/none")
    async with running(spec) as machine:
        await asyncio.wait_for(machine.vm.wait_gone(), bare.BOOT_DEADLINE_S)
        assert await machine.vm.status() is VmStatus.GONE
        with pytest.raises(Unavailable):
            await machine.vm.read_console()


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        ({"kernel": Path("/nonexistent/vmlinuz")}, "could not (load|open)"),
        ({"disk": Disk(image=_ANY, top=_ANY)}, "(?i)not in qcow2"),
        ({"disk": Disk(image=_ANY, top=Path("/nonexistent"))}, "(?i)no such file"),
        ({"cgroups": (Path("/nonexistent"),)}, "(?i)nonexistent"),
        ({"netns": Path("/nonexistent"), "tap": "tap0"}, "(?i)no such file"),
        ({"vcpus": 10_000}, "(?i)cpu"),
    ],
)
async def test_failed_start_says_why_and_leaves_nothing(
    directory: Path, broken: dict[str, Any], said: str
) -> None:
    spec = replace(bare.make_spec(directory), **broken)
    (spec.run_dir / LOG).write_text("words of an earlier run\n")
    with pytest.raises(ToolFailed, match=said) as caught:
        await Qemu().start(spec)
    assert "earlier run" not in caught.value.message
    assert bare.leftovers(spec) == []


async def test_start_that_is_given_up_leaves_nothing(directory: Path) -> None:
    spec = bare.make_spec(directory)
    starting = asyncio.ensure_future(Qemu().start(spec))

    # Looked for at every step of the loop: a monitor that answers is soon there.
    while not any("process" in each for each in bare.leftovers(spec)):
        await asyncio.sleep(0)
        assert not starting.done()
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    assert bare.leftovers(spec) == []


async def test_probe_tells_what_really_boots(tmp_path: Path) -> None:
    assets = bare.assets()
    assert await probe_boot(Qemu(), assets.kernel, assets.initramfs, Accel.TCG, 40) == ""
    choice = await choose_accel(Accel.AUTO, assets.kernel, assets.initramfs, tmp_path)
    if choice.accel is Accel.KVM:
        assert choice.reason == "a guest booted under KVM"
        return
    # KVM is either absent or, as with nested hosts, no guest gets on under it: the reason is told
    # and remembered, and when KVM is demanded the refusal tells it too.
    with pytest.raises(Unavailable) as caught:
        await choose_accel(Accel.KVM, assets.kernel, assets.initramfs, tmp_path)
    assert choice.reason in caught.value.message
    assert choice.reason.startswith(("/dev/kvm ", f"{(await Qemu().installation()).binary} is"))


async def test_probe_tells_of_a_guest_that_never_speaks(directory: Path) -> None:
    failure = await probe_boot(
        Qemu(), bare.assets().kernel, bare.make_spec(directory).initramfs, Accel.TCG, 1.0
    )
    assert failure == "a guest hangs: it did not boot within 1 s"
