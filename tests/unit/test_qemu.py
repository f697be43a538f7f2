"""QEMU's version and its words: what must hold for every VM, without starting one."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from sandmartin.agent.vmm import Disk, VmSpec
from sandmartin.agent.vmm.qemu import (
    Descriptors,
    Installation,
    QemuVersion,
    arguments,
    machine_type,
    trim_log,
)
from sandmartin.errors import ToolFailed
from sandmartin.model import Accel

SPEC = VmSpec(
    run_dir=Path("/d/sandboxes/sbone/vm"),
    vcpus=2,
    memory_mb=512,
    kernel=Path("/assets/vmlinuz"),
    initramfs=Path("/assets/initramfs.cpio"),
    command_line="sandmartin.addr=169.254.0.21/30",
    disk=Disk(
        image=Path("/d/images/base/rootfs.ext4"),
        sealed=(Path("/d/layers/layer-one.qcow2"), Path("/d/layers/layer-two.qcow2")),
        top=Path("/d/sandboxes/sbone/layer-top.qcow2"),
    ),
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


def _program(path: Path, version: str, backend: str = "prealloc") -> Path:
    path.write_text(
        "#!/bin/sh\n"
        f'[ "$1" = --version ] && echo "QEMU emulator version {version}" && exit\n'
        f'[ "$1" = -object ] && echo "  {backend}=<OnOffAuto>" && exit 1\n'
        "printf 'Accelerators supported in QEMU binary:\\ntcg\\nxen\\n'\n"
    )
    path.chmod(0o755)
    return path


async def test_installation_is_asked_and_old_ones_are_refused(tmp_path: Path) -> None:
    found = await Installation.find(_program(tmp_path / "qemu", "7.2.0"))
    assert found.accels == {Accel.TCG}
    assert not found.reads_bases
    assert (await Installation.find(_program(tmp_path / "new", "10.0.0", "rom"))).reads_bases
    found.require(Accel.TCG)
    with pytest.raises(ToolFailed, match="no kvm accelerator"):
        found.require(Accel.KVM)
    with pytest.raises(ToolFailed, match="too old"):
        await Installation.find(_program(tmp_path / "old", "6.9.9"))
    with pytest.raises(ToolFailed, match="could not be started"):
        await Installation.find(tmp_path / "absent")


FDS = Descriptors(monitors=(7, 8), tap=9, image=10, sealed=(11, 12), top=13, ram=14)


def _options(words: list[str]) -> list[tuple[str, str]]:
    """Each option with its value; an option without one has the next option as its value."""
    return [(a, b) for a, b in pairwise([*words, ""]) if a.startswith("-")]


def _values(words: list[str], option: str) -> list[str]:
    return [value for name, value in _options(words) if name == option]


def _json_of(words: list[str], option: str) -> list[dict[str, Any]]:
    return [json.loads(value) for value in _values(words, option) if value.startswith("{")]


def _words(spec: VmSpec, **changes: Any) -> list[str]:
    return arguments(spec, FDS, **({"tsc_khz": 2_000_123} | changes))


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
    assert "migration.announce-rounds=0" in _values(words, "-global")
    (ram,) = (each for each in _json_of(words, "-object") if each["id"] == "ram")
    assert ram["size"] == 512 << 20
    devices = {each["id"]: each for each in _json_of(words, "-device")}
    assert set(devices) == {"rng", "balloon", "root", "net"}
    assert devices["balloon"]["free-page-reporting"] is False
    assert devices["balloon"]["deflate-on-oom"] is False
    assert len(_values(words, "-mon")) == 2


def test_base_is_mapped_privately_and_by_its_descriptor() -> None:
    (ram,) = (each for each in _json_of(_words(SPEC), "-object") if each["id"] == "ram")
    assert (ram["qom-type"], ram["mem-path"]) == ("memory-backend-file", "/proc/self/fd/14")
    assert ram["share"] is False
    assert not {"readonly", "rom"} & set(ram)
    words = _words(SPEC, reads_bases=True)
    (ram,) = (each for each in _json_of(words, "-object") if each["id"] == "ram")
    assert (ram["readonly"], ram["rom"], ram["share"]) == (True, "off", False)


def test_incoming_vm_waits() -> None:
    assert "-incoming" not in _words(SPEC) and "-S" not in _words(SPEC)
    words = _words(replace(SPEC, incoming=True))
    assert _values(words, "-incoming") == ["defer"]
    assert "-S" in words
    # It never boots, so nothing to boot from takes its memory.
    assert not {"-kernel", "-initrd", "-append"} & set(words)


def test_disk_is_its_layers_over_its_image_and_only_the_top_is_written() -> None:
    nodes = {each["node-name"]: each for each in _json_of(_words(SPEC), "-blockdev")}
    # What lies below a layer is told, and not read from what a guest could forge.
    assert [nodes[name]["backing"] for name in ("layer-top", "layer-two", "layer-one")] == [
        "layer-two",
        "layer-one",
        "image",
    ]
    assert nodes["image"]["driver"] == "raw"
    written = {name for name, node in nodes.items() if not node["read-only"]}
    assert written == {"layer-top", "layer-top-file"}
    pairs = (pair.partition(",set=") for pair in _values(_words(SPEC), "-add-fd"))
    sets = {number: fd for fd, _, number in pairs}
    fds = {
        name: sets[node["filename"].removeprefix("/dev/fdset/")]
        for name, node in nodes.items()
        if node["driver"] == "file"
    }
    assert fds == {
        "image-file": "fd=10",
        "layer-one-file": "fd=11",
        "layer-two-file": "fd=12",
        "layer-top-file": "fd=13",
    }
    for name in written:
        assert nodes[name]["cache"] == {"direct": False, "no-flush": True}
    with pytest.raises(ValueError, match="zip"):
        arguments(SPEC, replace(FDS, sealed=(11,)), tsc_khz=1)


def test_disk_stops_on_a_full_host() -> None:
    words = _words(replace(SPEC, run_dir=Path("/d/a,b/vm")))
    (root,) = (each for each in _json_of(words, "-device") if each["id"] == "root")
    assert (root["drive"], root["werror"], root["rerror"]) == ("layer-top", "enospc", "report")
    assert _values(words, "-name") == ["/d/a,,b/vm"]


def test_descriptors_are_those_handed_over() -> None:
    words = _words(SPEC)
    chardevs = _values(words, "-chardev")
    assert [c.split(",")[2] for c in chardevs if c.startswith("socket")] == ["fd=7", "fd=8"]
    assert _values(words, "-netdev") == ["tap,id=net0,fd=9,vhost=off"]
    assert sorted(FDS.all()) == list(range(7, 15))
    spec = replace(SPEC, disk=None, tap=None, netns=None, mac=None)
    bare = arguments(spec, Descriptors(monitors=(7, 8)), tsc_khz=1)
    assert not _values(bare, "-netdev") and not _values(bare, "-blockdev")
    assert {each["id"] for each in _json_of(bare, "-device")} == {"rng", "balloon"}
    (ram,) = (each for each in _json_of(bare, "-object") if each["id"] == "ram")
    assert ram["qom-type"] == "memory-backend-ram"
    with pytest.raises(ValueError, match="zip"):
        arguments(SPEC, replace(FDS, monitors=(7,)), tsc_khz=1)


def test_clock_under_emulation_is_told_and_not_measured() -> None:
    (tcg,) = _values(_words(SPEC), "-append")
    assert {"tsc_early_khz=2000123", "tsc=reliable", "no_timer_check"} <= set(tcg.split())
    assert tcg.endswith(" sandmartin.addr=169.254.0.21/30")
    (kvm,) = _values(_words(replace(SPEC, accel=Accel.KVM), tsc_khz=0), "-append")
    assert "tsc" not in kvm


def test_emulation_is_spared_the_string_instructions() -> None:
    words = _words(SPEC)
    assert _values(words, "-cpu") == ["max,-erms,-fsrm"]
    assert "clearcpuid=rep_good" in _values(words, "-append")[0].split()
    # A device state of the one processor is none of the other.
    assert machine_type(Accel.TCG) != machine_type(Accel.KVM)
    kvm = _words(replace(SPEC, accel=Accel.KVM), tsc_khz=0)
    assert "clearcpuid" not in _values(kvm, "-append")[0]


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
