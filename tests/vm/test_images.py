"""An image that was grown, and made warm ahead, is a real VM's whole disk."""

from __future__ import annotations

import asyncio
import hashlib
import shutil
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

from sandmartin.agent import proc
from sandmartin.agent.images import ext4_bytes
from sandmartin.model import DEFAULT_DISK_SIZE_MB, Settings, Shape, WarmAhead
from tests import world
from tests.vm.conftest import DEADLINE_S, run_agent

_IMAGE_MB, _WRITTEN_MB = 16, 24
_SHAPE = Shape(vcpus=1, memory_mb=256)


def _assets_of_its_own(settings: Settings) -> Path:
    """All that the machine has, but no warm snapshot."""
    made = settings.data_dir.parent / "assets"
    made.mkdir(mode=0o755)
    for path in settings.assets_dir.iterdir():
        if path.is_dir() and path.name != "warm":
            (made / path.name).symlink_to(path)
        elif path.name == "kvm-probe.json":
            shutil.copyfile(path, made / path.name)
    return made


async def _make_small_image(directory: Path, tree: Path) -> Path:
    (tree / "etc").mkdir(parents=True)
    (tree / "etc/passwd").write_text("root:x:0:0:root:/:/bin/sh\n")
    (tree / "held").write_text("what the image holds\n")
    image = directory / "small" / "rootfs.ext4"
    image.parent.mkdir(parents=True)
    await proc.run(["mke2fs", "-q", "-F", "-t", "ext4", "-d", tree, image, f"{_IMAGE_MB}M"])
    return image


async def _zeroes() -> AsyncIterator[bytes]:
    for _ in range(_WRITTEN_MB):
        yield bytes(1 << 20)


async def test_small_image_has_a_whole_disk_and_is_warm_ahead(
    settings: Settings, internet: world.Internet
) -> None:
    settings = replace(
        settings,
        assets_dir=_assets_of_its_own(settings),
        warm_ahead=(WarmAhead(template="small", shape=_SHAPE),),
    )
    settings.data_dir.mkdir(mode=0o711)
    image = await _make_small_image(settings.data_dir / "images", settings.data_dir.parent / "tree")
    async with run_agent(settings) as agent:
        assert ext4_bytes(image) == DEFAULT_DISK_SIZE_MB << 20
        async with asyncio.timeout(DEADLINE_S):
            while not (made := list(settings.assets_dir.glob("warm/[!.]*"))):
                await asyncio.sleep(0.05)
        before = made[0].stat().st_mtime_ns
        shape = {"vcpus": _SHAPE.vcpus, "memory_mb": _SHAPE.memory_mb}
        async with agent.sandbox(template="small", **shape) as sandbox:
            content = [chunk async for chunk in sandbox.read_file("/held", user="root")]
            assert b"".join(content) == b"what the image holds\n"
            # More than the image had room for.
            await sandbox.write_file("/written", _zeroes(), user="root")
            digest = hashlib.sha256()
            async for chunk in sandbox.read_file("/written", user="root"):
                digest.update(chunk)
            assert digest.digest() == hashlib.sha256(bytes(_WRITTEN_MB << 20)).digest()
        # It was restored from what was there, which knows of it.
        assert list(settings.assets_dir.glob("warm/[!.]*")) == made
        assert made[0].stat().st_mtime_ns > before
