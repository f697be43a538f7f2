"""Disk layers: owned by the VM's user, over an image that nothing writes, and a full host disk."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from sandmartin.agent import proc
from sandmartin.agent.disk import Layers, allocated_bytes, check_free, free_mb
from sandmartin.agent.journal import DataDir, Entry
from sandmartin.agent.vmm import VmStatus
from sandmartin.errors import DiskFull, Exhausted
from sandmartin.model import SandboxSpec, State
from tests.vm import bare
from tests.vm.bare import LAYERS_UID, running, vm_directory

pytestmark = [pytest.mark.vm, pytest.mark.root]

_FILL_MB = 48


@pytest.fixture
def directory() -> Iterator[Path]:
    with vm_directory() as made:
        yield made


@contextlib.asynccontextmanager
async def _small_file_system(directory: Path, size_mb: int) -> AsyncIterator[Path]:
    at = directory / "small"
    await proc.run(["mkdir", at])
    await proc.run(["mount", "-t", "tmpfs", "-o", f"size={size_mb}m,mode=711", "none", at])
    try:
        yield at
    finally:
        await proc.run(["umount", at])


async def test_full_host_disk_stops_the_vm_and_loses_nothing(directory: Path) -> None:
    image = bare.make_image(directory, _FILL_MB + 16)
    async with _small_file_system(directory, _FILL_MB // 2) as small:
        spec = replace(bare.make_spec(directory), command_line=f"test.fill={_FILL_MB}")
        spec = await bare.with_disk(spec, small, image, image.size_mb)
        async with running(spec) as machine:
            vm = machine.vm

            async def full() -> bool:
                return await vm.status() is VmStatus.DISK_FULL

            await bare.eventually(full, bare.BOOT_DEADLINE_S)
            with pytest.raises(DiskFull):
                await vm.cont()
            assert await full()
            with pytest.raises(Exhausted, match="below the floor"):
                check_free(small, 1)
            await proc.run(["mount", "-o", f"remount,size={2 * _FILL_MB}m", small])
            await vm.cont()
            assert await vm.status() is VmStatus.RUNNING
            await machine.hear("fill verified")
            assert spec.disk is not None
            assert allocated_bytes(spec.disk.top) >= _FILL_MB << 20
    # All of it went to the layer.
    assert allocated_bytes(image.path) == 0


async def test_layer_has_the_size_asked_for_and_is_nobodys_once_sealed(directory: Path) -> None:
    sealed = directory / "sealed"
    sealed.mkdir()
    layers = Layers(sealed, LAYERS_UID)
    top = await layers.create(directory, 200)
    other = await layers.create(directory, 200)
    assert top.name != other.name
    status = top.stat()
    assert (status.st_uid, status.st_gid, status.st_mode & 0o777) == (0, 0, 0o600)
    info = json.loads((await proc.run(["qemu-img", "info", "--output=json", top])).stdout)
    assert info["virtual-size"] == 200 << 20
    # What is below it is never believed from its own header.
    assert "backing-filename" not in info
    name = layers.seal(top)
    assert (layers.seal(top), layers.names()) == (name, {name})
    assert not top.exists()
    status = layers.path(name).stat()
    assert (status.st_uid, status.st_gid, status.st_mode & 0o777) == (LAYERS_UID, LAYERS_UID, 0o400)


async def test_flattened_image_is_what_the_layers_show(directory: Path) -> None:
    image = bare.make_image(directory, 64)
    sealed = directory / "sealed"
    sealed.mkdir(mode=0o711)
    layers = Layers(sealed, LAYERS_UID)
    names = []
    for pattern, at in ((1, "0"), (2, "64k"), (3, "64k")):
        top = await layers.create(directory, 96)
        write = f"write -P {pattern} {at} 128k"
        await proc.run(["qemu-io", "-f", "qcow2", "-c", write, top])
        names.append(layers.seal(top))
    target = directory / "new" / "rootfs.ext4"
    target.parent.mkdir()
    await layers.flatten(image.path, names, target)
    with target.open("rb") as file:
        content = file.read(256 << 10)
    kib = 1 << 10
    assert content == b"\1" * (64 * kib) + b"\3" * (128 * kib) + bytes(64 * kib)
    status = target.stat()
    assert (status.st_size, status.st_uid, status.st_mode & 0o777) == (96 << 20, 0, 0o444)
    assert allocated_bytes(target) < 1 << 20
    assert [path.name for path in target.parent.iterdir()] == ["rootfs.ext4"]


async def test_layer_that_finds_no_space_says_so(directory: Path) -> None:
    async with _small_file_system(directory, 1) as small:
        with contextlib.suppress(OSError):
            (small / "rest").write_bytes(bytes(2 << 20))
        assert free_mb(small) == 0
        with pytest.raises(DiskFull):
            await Layers(small, LAYERS_UID).create(small, 64)


async def test_full_host_disk_leaves_the_journal_as_it_was(directory: Path) -> None:
    now = time.time()
    entry = Entry(
        spec=SandboxSpec(sandbox_id="sbone", template="base"),
        state=State.RUNNING,
        created_at=now,
        last_active_at=now,
    )
    async with _small_file_system(directory, 1) as small:
        data = DataDir(small / "data")
        data.open()
        with contextlib.closing(data):
            data.create(entry)
            with contextlib.suppress(OSError):
                (small / "rest").write_bytes(bytes(2 << 20))
            with pytest.raises(DiskFull):
                data.write(replace(entry, state=State.ERROR))
            with pytest.raises(DiskFull):
                data.create(replace(entry, spec=replace(entry.spec, sandbox_id="sbtwo")))
            assert list(data.read_all()) == [("sbone", entry)]
            data.remove("sbone")
            assert list(data.read_all()) == []
