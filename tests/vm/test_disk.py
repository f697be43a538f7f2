"""Disk layers: owned by the VM's user, over an image that nothing writes, and a full host disk."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from sandmartin.agent import proc
from sandmartin.agent.disk import Image, allocated_bytes, check_free, create_layer, free_mb
from sandmartin.agent.journal import DataDir, Entry
from sandmartin.agent.vmm import VmStatus
from sandmartin.errors import DiskFull, Exhausted, Invalid
from sandmartin.model import SandboxSpec, State
from tests.vm import bare
from tests.vm.bare import UID, running, vm_directory

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
            assert allocated_bytes(spec.disk) >= _FILL_MB << 20
    # All of it went to the layer.
    assert allocated_bytes(image.path) == 0


def _relative(image: Image) -> Image:
    return replace(image, path=Path(os.path.relpath(image.path)))


async def test_layer_belongs_to_its_vm_alone_and_has_the_size_asked_for(directory: Path) -> None:
    image = bare.make_image(directory, 64)
    layer = directory / "layer.qcow2"
    with pytest.raises(Invalid, match="64"):
        await create_layer(image, layer, 63, UID)
    assert not layer.exists()
    # A relative image is one beside the agent, not beside the layer.
    await create_layer(_relative(image), layer, 200, UID)
    info = await proc.run(["qemu-img", "info", "--output=json", "--backing-chain", layer])
    top, below = json.loads(info.stdout)
    assert (top["virtual-size"], below["virtual-size"]) == (200 << 20, 64 << 20)
    assert below["format"] == "raw"
    assert top["backing-filename"] == str(_relative(image).path.absolute())
    status = layer.stat()
    assert (status.st_uid, status.st_gid, status.st_mode & 0o777) == (UID, UID, 0o600)


async def test_layer_that_finds_no_space_says_so(directory: Path) -> None:
    image = bare.make_image(directory, 64)
    async with _small_file_system(directory, 1) as small:
        with contextlib.suppress(OSError):
            (small / "rest").write_bytes(bytes(2 << 20))
        assert free_mb(small) == 0
        with pytest.raises(DiskFull):
            await create_layer(image, small / "layer.qcow2", 64, UID)


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
