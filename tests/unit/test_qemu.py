"""QEMU's version and its words: what must hold for every VM, without starting one."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from sandmartin.agent.vmm import VmSpec
from sandmartin.agent.vmm.qemu import Installation, QemuVersion, arguments, trim_log
from sandmartin.errors import ToolFailed
from sandmartin.model import Accel

SPEC = VmSpec(
    run_dir=Path("/d/sandboxes/sbone/vm"),
    vcpus=2,
    memory_mb=512,
    kernel=Path("/assets/vmlinuz"),
    initramfs=Path("/assets/initramfs.cpio"),
    command_line="sandmartin.addr=169.254.0.21/30",
    disk=Path("/d/sandboxes/sbone/layer.qcow2"),
    netns=Path("/run/netns/one"),
    tap="tap0",
    mac="02:fc:00:00:00:02",
    uid=2_000_001,
    accel=Accel.TCG,
)


@pytest.mark.parametrize(
    ("said", "number", "text"),
    [
        (
            "QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18)\nCopyright (c) 2003",
            (7, 2, 22),
            "7.2.22 (Debian 1:7.2+dfsg-7+deb12u18)",
        ),
        (
            "QEMU emulator version 8.2.2 (Debian 1:8.2.2+ds-0ubuntu1.10)\n",
            (8, 2, 2),
            "8.2.2 (Debian 1:8.2.2+ds-0ubuntu1.10)",
        ),
        ("QEMU emulator version 10.0.2\n", (10, 0, 2), "10.0.2"),
        ("QEMU emulator version 11.1", (11, 1, 0), "11.1.0"),
    ],
)
def test_version(said: str, number: tuple[int, int, int], text: str) -> None:
    assert QemuVersion.parse(said) == QemuVersion(number, text)


@pytest.mark.parametrize("said", ["", "qemu: no such option", "QEMU emulator version new"])
def test_what_tells_no_version_is_an_error(said: str) -> None:
    with pytest.raises(ToolFailed, match="tells no version"):
        QemuVersion.parse(said)


def _program(path: Path, version: str) -> Path:
    path.write_text(
        "#!/bin/sh\n"
        f'[ "$1" = --version ] && echo "QEMU emulator version {version}" && exit\n'
        "printf 'Accelerators supported in QEMU binary:\\ntcg\\nxen\\n'\n"
    )
    path.chmod(0o755)
    return path


async def test_installation_is_asked_and_old_ones_are_refused(tmp_path: Path) -> None:
    found = await Installation.find(_program(tmp_path / "qemu", "7.2.0"))
    assert found.accels == {Accel.TCG}
    found.require(Accel.TCG)
    with pytest.raises(ToolFailed, match="no kvm accelerator"):
        found.require(Accel.KVM)
    with pytest.raises(ToolFailed, match="too old"):
        await Installation.find(_program(tmp_path / "old", "6.9.9"))
    with pytest.raises(ToolFailed, match="could not be started"):
        await Installation.find(tmp_path / "absent")


def _options(words: list[str]) -> list[tuple[str, str]]:
    """Each option with its value; an option without one has the next option as its value."""
    return [(a, b) for a, b in pairwise([*words, ""]) if a.startswith("-")]


def _values(words: list[str], option: str) -> list[str]:
    return [value for name, value in _options(words) if name == option]


def _json_of(words: list[str], option: str) -> list[dict[str, Any]]:
    return [json.loads(value) for value in _values(words, option) if value.startswith("{")]


def _words(spec: VmSpec, **changes: Any) -> list[str]:
    return arguments(spec, [7, 8], **({"tap_fd": 9, "tsc_khz": 2_000_123} | changes))


@pytest.mark.parametrize("accel", [Accel.TCG, Accel.KVM])
def test_no_vm_is_without_its_fences(accel: Accel) -> None:
    words = _words(replace(SPEC, accel=accel))
    for word in ("-nodefaults", "-no-user-config", "-no-reboot"):
        assert word in words
    (sandbox,) = _values(words, "-sandbox")
    denied = {"obsolete", "elevateprivileges", "spawn", "resourcecontrol"}
    assert set(sandbox.split(",")) == {"on"} | {f"{each}=deny" for each in denied}
    # 10.x has the first two no more, and 7.2 does not know the third.
    assert not {"-runas", "-chroot", "-run-with", "-daemonize"} & set(words)
    (machine,) = _values(words, "-machine")
    assert "dump-guest-core=off" in machine.split(",")


def test_what_snapshots_rest_on() -> None:
    words = _words(SPEC)
    (machine,) = _values(words, "-machine")
    assert {"microvm", "memory-backend=ram", "suppress-vmdesc=on"} <= set(machine.split(","))
    assert "migration.send-configuration=off" in _values(words, "-global")
    (ram,) = (each for each in _json_of(words, "-object") if each["id"] == "ram")
    assert ram["size"] == 512 << 20
    devices = {each["id"]: each for each in _json_of(words, "-device")}
    assert set(devices) == {"rng", "balloon", "root", "net"}
    assert devices["balloon"]["free-page-reporting"] is False
    assert devices["balloon"]["deflate-on-oom"] is False
    assert len(_values(words, "-mon")) == 2


def test_disk_stops_on_a_full_host_and_takes_its_name_literally() -> None:
    layer = Path("/d/a,file.locking=off,b/layer.qcow2")
    words = _words(replace(SPEC, disk=layer, run_dir=Path("/d/a,b/vm")))
    file, disk = _json_of(words, "-blockdev")
    assert (file["filename"], disk["file"], disk["node-name"]) == (str(layer), "layer", "disk")
    assert file["cache"] == disk["cache"] == {"direct": False, "no-flush": True}
    (root,) = (each for each in _json_of(words, "-device") if each["id"] == "root")
    assert (root["werror"], root["rerror"]) == ("enospc", "report")
    assert _values(words, "-name") == ["/d/a,,b/vm"]


def test_descriptors_are_those_handed_over() -> None:
    words = _words(SPEC)
    chardevs = _values(words, "-chardev")
    assert [c.split(",")[2] for c in chardevs if c.startswith("socket")] == ["fd=7", "fd=8"]
    assert _values(words, "-netdev") == ["tap,id=net0,fd=9,vhost=off"]
    bare = _words(replace(SPEC, disk=None, tap=None, netns=None, mac=None), tap_fd=None)
    assert not _values(bare, "-netdev") and not _values(bare, "-blockdev")
    assert {each["id"] for each in _json_of(bare, "-device")} == {"rng", "balloon"}
    with pytest.raises(ValueError, match="zip"):
        arguments(SPEC, [7], tap_fd=None, tsc_khz=1)


def test_clock_under_emulation_is_told_and_not_measured() -> None:
    (tcg,) = _values(_words(SPEC), "-append")
    assert {"tsc_early_khz=2000123", "tsc=reliable", "no_timer_check"} <= set(tcg.split())
    assert tcg.endswith(" sandmartin.addr=169.254.0.21/30")
    (kvm,) = _values(_words(replace(SPEC, accel=Accel.KVM), tsc_khz=0), "-append")
    assert "tsc" not in kvm


def test_log_is_cut_to_its_newer_half_and_still_appended_to(tmp_path: Path) -> None:
    log = tmp_path / "vmm.log"
    trim_log(log)
    with log.open("ab", buffering=0) as writer:
        writer.write(b"short")
        trim_log(log)
        assert log.read_bytes() == b"short"
        writer.write(b"x" * 300 * 1024 + b"the end")
        trim_log(log)
        assert log.stat().st_size == 128 * 1024
        writer.write(b", and more")
    assert log.read_bytes().endswith(b"xthe end, and more")
