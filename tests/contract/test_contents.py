"""Templates as archives: out of one host and back in, on VMs with a RAM of their own.

What comes in is hostile: each way in which it can be wrong must leave nothing behind.
"""

from __future__ import annotations

import asyncio
import hashlib
import io
import json
import os
import shutil
import subprocess
import tarfile
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path

import pytest

from sandmartin.agent import archive
from sandmartin.agent.content import Contents
from sandmartin.agent.disk import Image
from sandmartin.agent.host import Host
from sandmartin.errors import (
    AlreadyExists,
    Conflict,
    DiskFull,
    Exhausted,
    Invalid,
    NotFound,
    SandmartinError,
    Unavailable,
)
from sandmartin.transport.agent import AgentSocket
from tests.control.agent_process import dying_agent
from tests.fakes_agent import Fakes, find_leaks, machine_directory, make_machine, make_spec
from tests.fakes_vmm import SCRATCH

pytestmark = pytest.mark.qemu_img

MARK = b"remember this"
MIB = 1 << 20


async def sent(content: bytes, piece: int = 100_000) -> AsyncIterator[bytes]:
    for at in range(0, len(content), piece):
        yield content[at : at + piece]


async def fetched(host: Host, name: str) -> bytes:
    async with aclosing(host.read_template(name)) as pieces:
        return b"".join([piece async for piece in pieces])


@pytest.fixture
async def snapshot(fakes: Fakes, host: Host) -> bytes:
    """The archive of a snapshot that remembers something, and is gone."""
    await host.create(make_spec(), {"A": "1"})
    fakes.vmm.vms["sb1"].write(SCRATCH, MARK)
    await host.create_snapshot("sb1", "marked", live=False)
    content = await fetched(host, "marked")
    await host.destroy("sb1")
    await host.delete_snapshot("marked")
    return content


def make_disk(path: Path, size_mb: int = 64) -> Path:
    """An ext4 file system, sparse."""
    path.touch()
    os.truncate(path, size_mb * MIB)
    subprocess.run(["/sbin/mke2fs", "-q", "-t", "ext4", path], check=True)
    return path


def gnu_tar(directory: Path, *names: str) -> bytes:
    """What GNU tar makes of sparse files."""
    words = ["tar", "--format=posix", "--sparse", "--sparse-version=1.0", "-cf-", *names]
    return subprocess.run(words, check=True, capture_output=True, cwd=directory).stdout


def members(content: bytes) -> dict[str, bytes]:
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        found = ((each.name, tar.extractfile(each)) for each in tar)
        return {name: file.read() for name, file in found if file is not None}


# There and back.


async def test_a_snapshot_goes_on_from_its_archive(
    fakes: Fakes, host: Host, snapshot: bytes, directory: Path
) -> None:
    assert not find_leaks(directory)
    await host.write_template("back", sent(snapshot))
    with pytest.raises(AlreadyExists):
        await host.write_template("back", sent(snapshot))
    await host.create(replace(make_spec("sb2"), template="back"), {})
    assert fakes.vmm.vms["sb2"].read(SCRATCH, len(MARK)) == MARK
    # It stands on its own image, which whatever comes from it needs.
    image = host.get("sb2").image
    assert image == directory / "data/templates/back/rootfs.ext4"
    await host.create_snapshot("sb2", "later", live=True)
    await host.destroy("sb2")
    with pytest.raises(Conflict, match="later"):
        await host.delete_snapshot("back")
    again = await fetched(host, "later")
    await host.delete_snapshot("later")
    await host.delete_snapshot("back")
    assert not find_leaks(directory)
    # Twice, side by side: nothing of one is the other's.
    for name in ("one", "two"):
        await host.write_template(name, sent(again))
    await host.delete_snapshot("one")
    await host.create(replace(make_spec("sb3"), template="two"), {})
    assert fakes.vmm.vms["sb3"].read(SCRATCH, len(MARK)) == MARK


async def test_what_is_read_stays_whole_while_it_is_deleted(host: Host) -> None:
    await host.create(make_spec(), {})
    await host.create_snapshot("sb1", "short", live=True)
    async with aclosing(host.read_template("short")) as pieces:
        content = await anext(pieces)
        await host.destroy("sb1")
        await host.delete_snapshot("short")
        content += b"".join([piece async for piece in pieces])
    await host.write_template("short", sent(content))
    await host.create(replace(make_spec("sb2"), template="short"), {})


async def test_an_image_is_sparse_on_its_way_and_gnu_tar_reads_it(
    fakes: Fakes, host: Host, directory: Path
) -> None:
    made = make_disk(directory / "rootfs.ext4", 1024)
    with made.open("r+b") as file:
        for number in range(30):
            file.seek((number * 30 + 40) * MIB)
            file.write(os.urandom(MIB))
    whole = hashlib.sha256(made.read_bytes()).digest()
    (directory / "template.json").write_text('{"vcpus": 2}')
    await host.write_template("disk", sent(gnu_tar(directory, "template.json", "rootfs.ext4")))
    content = await fetched(host, "disk")
    blocks = made.stat().st_blocks * 512
    assert 30 * MIB < len(content) < blocks + MIB
    (image,) = (
        each for each in host.templates() if isinstance(each, Image) and each.name == "disk"
    )
    assert (image.traits.vcpus, image.size_mb) == (2, 1024)
    assert image.path.stat().st_blocks * 512 <= blocks + MIB
    await host.delete_snapshot("disk")
    await host.write_template("again", sent(content, 511))
    there = directory / "data/images/again/rootfs.ext4"
    assert hashlib.sha256(there.read_bytes()).digest() == whole
    assert there.stat().st_blocks * 512 <= blocks + MIB
    assert there.stat().st_mode & 0o777 == 0o444
    unpacked = directory / "unpacked"
    unpacked.mkdir()
    subprocess.run(["tar", "-xf-", "-C", unpacked], input=content, check=True)
    assert hashlib.sha256((unpacked / "rootfs.ext4").read_bytes()).digest() == whole
    assert (unpacked / "rootfs.ext4").stat().st_blocks * 512 <= blocks + MIB
    await host.delete_snapshot("again")
    for path in (made, unpacked / "rootfs.ext4"):
        path.unlink()
    assert not find_leaks(directory)


# What is refused.


def flip(at: int) -> Callable[[bytes], bytes]:
    def change(content: bytes) -> bytes:
        place = at % len(content)
        return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]

    return change


def offset_of(content: bytes, name: str) -> int:
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        return next(each.offset_data for each in tar if each.name == name)


@pytest.mark.parametrize(
    "part", ["manifest.json", "state", "ram.base", "layers/00.qcow2", "rootfs.ext4", "seal.json"]
)
async def test_a_bit_that_flips_is_found(
    host: Host, snapshot: bytes, part: str, directory: Path
) -> None:
    at = offset_of(snapshot, part) + (30 if part.endswith("json") else 1)
    with pytest.raises(Invalid):
        await host.write_template("bad", sent(flip(at)(snapshot)))
    assert not find_leaks(directory)
    with pytest.raises(NotFound):
        await fetched(host, "bad")


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 0.999])
async def test_what_is_cut_off_is_refused(
    host: Host, snapshot: bytes, share: float, directory: Path
) -> None:
    # The last blocks only say that it ends.
    end = int((len(snapshot) - 1024) * share)
    with pytest.raises(Invalid):
        await host.write_template("bad", sent(snapshot[:end]))
    assert not find_leaks(directory)


async def test_another_hosts_snapshot_is_refused_and_its_image_is_not(
    host: Host, snapshot: bytes, directory: Path
) -> None:
    make_disk(directory / "rootfs.ext4")
    await host.write_template("disk", sent(gnu_tar(directory, "rootfs.ext4")))
    disk = await fetched(host, "disk")
    with machine_directory() as elsewhere:
        other = make_machine(elsewhere)
        async with other.host() as there:
            with pytest.raises(Invalid, match="not made by this machine") as refused:
                await there.write_template("foreign", sent(snapshot))
            assert "image" in refused.value.hint
            assert not find_leaks(elsewhere)
            await there.write_template("disk", sent(disk))
            assert "disk" in [each.name for each in there.templates() if isinstance(each, Image)]


async def test_it_is_refused_at_its_manifest(
    host: Host, snapshot: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = json.loads(members(snapshot)["manifest.json"])
    sent_bytes = 0

    async def pieces() -> AsyncIterator[bytes]:
        nonlocal sent_bytes
        for at in range(0, len(snapshot), 512):
            sent_bytes += 512
            yield snapshot[at : at + 512]

    async def refused(contents: Contents, error: type[SandmartinError], said: str) -> None:
        nonlocal sent_bytes
        sent_bytes = 0
        with pytest.raises(error, match=said):
            await contents.write("bad", pieces())
        # With the piece that ends the manifest, or the one behind it.
        assert sent_bytes <= len(json.dumps(manifest, indent=1)) + 4 * 512 < len(snapshot) / 2

    with monkeypatch.context() as patch:
        patch.setattr(host._machine.storage.snapshots.signer, "_key", bytes(32))
        await refused(host._contents, Invalid, "not made by this machine")
    # Ours, of another VMM.
    platform = replace(host._machine.platform, vmm_version="0.1")
    machine = replace(host._machine, platform=platform)
    other = Contents(machine, host._contents._templates, asyncio.Lock())
    await refused(other, Conflict, "vmm_version")
    await host.write_template("good", pieces())


def repacked(content: bytes, change: Callable[[dict[str, bytes]], None]) -> bytes:
    """The same members, changed, under a seal of whoever changed them."""
    parts = members(content)
    seal = json.loads(parts.pop("seal.json"))
    change(parts)

    def make(digests: object) -> bytes:
        return json.dumps({"sha256": digests, "signature": seal["signature"]}).encode()

    return b"".join(archive.pack(parts, {}, ("seal.json", make)))


async def test_only_what_was_signed_is_a_snapshot(
    host: Host, snapshot: bytes, directory: Path
) -> None:
    def other_state(parts: dict[str, bytes]) -> None:
        parts["state"] = b"evil"

    def as_image(parts: dict[str, bytes]) -> None:
        parts["manifest.json"] = b'{"format": 1, "kind": "image"}'

    def unsealed(parts: dict[str, bytes]) -> None:
        parts.pop("manifest.json")

    for change in (other_state, as_image, unsealed):
        with pytest.raises(Invalid):
            await host.write_template("bad", sent(repacked(snapshot, change)))
        assert not find_leaks(directory)


def crafted(name: str, content: bytes = b"", **fields: object) -> bytes:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for field, value in fields.items():
        setattr(info, field, value)
    padded = content.ljust(archive.in_blocks(len(content)), b"\0")
    return info.tobuf(tarfile.PAX_FORMAT) + padded + bytes(1024)


def sparse(index: bytes, real: int = MIB, data: bytes = b"") -> bytes:
    numbers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": str(real)}
    content = index.ljust(archive.in_blocks(len(index)), b"\0") + data
    return crafted("rootfs.ext4", content, pax_headers=numbers)


HOSTILE = {
    "nothing": b"",
    "no tar": b"x" * 4096,
    "no image": bytes(1024),
    "a way out": crafted("../../etc/passwd", b"x"),
    "an absolute name": crafted("/etc/passwd", b"x"),
    "a link": crafted("rootfs.ext4", type=tarfile.SYMTYPE, linkname="/etc/passwd"),
    "a device": crafted("rootfs.ext4", type=tarfile.BLKTYPE),
    "no file system": crafted("rootfs.ext4", bytes(8192)),
    "twice": crafted("rootfs.ext4", bytes(8192))[:-1024] + crafted("rootfs.ext4", bytes(8192)),
    "a huge text": crafted("template.json", bytes(2 * MIB)),
    "a huge header": crafted("rootfs.ext4", pax_headers={"a": "b" * 100_000}),
    "a huge file": sparse(b"1\n0\n0\n", 1 << 50),
    "too many pieces": sparse(b"9000000\n"),
    "a map without numbers": sparse(b"one\n"),
    "a map that goes back": sparse(b"2\n4096\n512\n0\n512\n", data=bytes(1024)),
    "a map beyond the end": sparse(b"1\n1048576\n512\n", data=bytes(512)),
    "a map of more than there is": sparse(b"1\n0\n4096\n", data=bytes(512)),
    "a map without an end": sparse(b"1" * 5000),
    "an old form": crafted("rootfs.ext4", pax_headers={"GNU.sparse.major": "0"}),
    "no end": crafted("x" * 10, type=tarfile.DIRTYPE)[:-1024] * 300,
    "more than its end": bytes(3 * MIB),
}


@pytest.mark.parametrize("what", HOSTILE)
async def test_hostile_archives_are_refused(host: Host, what: str, directory: Path) -> None:
    with pytest.raises(Invalid):
        await host.write_template("bad", sent(HOSTILE[what]))
    assert not find_leaks(directory)


async def test_a_full_disk_and_a_client_that_goes_leave_nothing(
    fakes: Fakes, host: Host, snapshot: bytes, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def breaking_off() -> AsyncIterator[bytes]:
        yield snapshot[: len(snapshot) // 2]
        raise SandmartinError("the client has gone")

    with pytest.raises(SandmartinError, match="has gone"):
        await host.write_template("bad", breaking_off())
    assert not find_leaks(directory)
    # As a file system that is full says it, in the middle.
    limited = [0]

    def write_at(file: int, data: memoryview | bytes, offset: int) -> None:
        limited[0] += len(data)
        if limited[0] > 10_000:
            raise OSError(28, "No space left on device")
        os.pwrite(file, data, offset)

    with monkeypatch.context() as patch:
        patch.setattr("sandmartin.agent.memory.base.write_at", write_at)
        with pytest.raises(DiskFull):
            await host.write_template("bad", sent(snapshot))
    assert not find_leaks(directory)
    await host.write_template("good", sent(snapshot))


async def test_a_host_keeps_its_free_space(directory: Path, tmp_path: Path) -> None:
    content = gnu_tar(make_disk(tmp_path / "rootfs.ext4").parent, "rootfs.ext4")
    async with make_machine(directory, disk_floor_mb=1 << 40).host() as host:
        with pytest.raises(Exhausted, match="below the floor"):
            await host.write_template("disk", sent(content))
    assert not find_leaks(directory)


@pytest.mark.parametrize("step", ["content:received", "content:sealed"])
async def test_an_agent_that_is_killed_leaves_nothing(
    host: Host, snapshot: bytes, step: str
) -> None:
    key = key_of(host)
    with machine_directory() as elsewhere:
        (elsewhere / "assets").mkdir()
        shutil.copy(key, elsewhere / "assets")
        async with dying_agent(elsewhere, step) as process:
            async with aclosing(AgentSocket(elsewhere / "data/agent.sock")) as transport:
                with pytest.raises(Unavailable):
                    await transport.write_template("half", sent(snapshot))
            await process.wait()
        second = make_machine(elsewhere)
        async with second.host() as there:
            assert not find_leaks(elsewhere)
            await there.write_template("whole", sent(snapshot))
            await there.create(replace(make_spec(), template="whole"), {})
            assert second.vmm.vms["sb1"].read(SCRATCH, len(MARK)) == MARK
            await there.terminate()


def key_of(host: Host) -> Path:
    return host._machine.settings.assets_dir / "platform.key"
