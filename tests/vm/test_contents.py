"""A template leaves its host as an archive and comes back, with what was alive in it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path

import pytest

from sandmartin.errors import Conflict, Invalid, NotFound
from tests.vm.conftest import RunningAgent
from tests.vm.test_snapshots import call, count, output, start_counter

MIB = 1 << 20


async def fetch(agent: RunningAgent, name: str, target: Path) -> None:
    with target.open("wb") as file:
        async with aclosing(agent.transport.read_template(name)) as chunks:
            async for chunk in chunks:
                file.write(chunk)


async def pieces(source: Path, flipped_at: int = -1) -> AsyncIterator[bytes]:
    """A file, with a bit that is wrong in one place."""
    at = 0
    with source.open("rb") as file:
        while chunk := bytearray(file.read(MIB)):
            if at <= flipped_at < at + len(chunk):
                chunk[flipped_at - at] ^= 1
            at += len(chunk)
            yield bytes(chunk)


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("archives")


@pytest.mark.full
async def test_a_living_process_goes_on_after_its_template_was_away(
    agent: RunningAgent, archives: Path
) -> None:
    archive = archives / "living.tar"
    async with agent.sandbox() as sandbox:
        await start_counter(sandbox)
        await output(sandbox, "echo one >/root/file; echo two >/dev/shm/file")
        pid, before = await count(sandbox)
        await call(agent, "CreateSnapshot", sandboxId=sandbox.sandbox_id, name="living")
    await fetch(agent, "living", archive)
    await agent.transport.delete_snapshot("living")
    with pytest.raises(NotFound):
        await fetch(agent, "living", archives / "none")
    size = archive.stat().st_size
    # The disk has 5 GB, and the memory half of one.
    assert 150 * MIB < size < 1500 * MIB
    with pytest.raises(Invalid):
        await agent.transport.write_template("bad", pieces(archive, size // 2))
    await agent.transport.write_template("back", pieces(archive))
    archive.unlink()
    async with agent.sandbox(template="back") as first, agent.sandbox(template="back") as other:
        assert await count(first) == (pid, before + 1)
        assert await count(other) == (pid, before + 1)
        assert await output(first, "cat /root/file /dev/shm/file; hostname") == (
            f"one\ntwo\n{first.sandbox_id}"
        )
        # Its disk can be written, read after a sleep, and made an image of.
        await output(first, "dd if=/dev/urandom of=/root/big bs=1M count=20 2>/dev/null; sync")
        digest = await output(first, "sha256sum /root/big")
        await first.pause()
        await first.resume()
        assert await output(first, "sha256sum /root/big") == digest
        with pytest.raises(Conflict, match="is needed by"):
            await agent.transport.delete_snapshot("back")
        await call(agent, "FlattenRootfs", sandboxId=other.sandbox_id, name="flat")
    await agent.transport.delete_snapshot("back")
    async with agent.sandbox(template="flat") as flat:
        assert await output(flat, "cat /root/file") == "one"
    await agent.transport.delete_snapshot("flat")


async def test_an_image_of_5_gb_moves_what_it_holds(agent: RunningAgent, archives: Path) -> None:
    archive = archives / "disk.tar"
    async with agent.sandbox() as sandbox:
        await output(sandbox, "echo kept >/root/kept")
        answer = await call(agent, "FlattenRootfs", sandboxId=sandbox.sandbox_id, name="disk")
    await fetch(agent, "disk", archive)
    held = int(answer["sizeBytes"])
    assert abs(archive.stat().st_size - held) < 4 * MIB
    await agent.transport.delete_snapshot("disk")
    await agent.transport.write_template("disk", pieces(archive))
    (found,) = (each for each in await agent.transport.list_templates() if each.name == "disk")
    assert (found.kind, found.disk_size_mb) == ("image", 5120)
    assert abs(found.size_bytes - held) < 4 * MIB
    async with agent.sandbox(template="disk") as sandbox:
        assert await output(sandbox, "cat /root/kept") == "kept"
    await agent.transport.delete_snapshot("disk")
