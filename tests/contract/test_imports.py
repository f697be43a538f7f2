"""Images on their way to be templates, when the host dies of it or has no room; no VM is needed."""

from __future__ import annotations

import asyncio
import os
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing
from pathlib import Path

import pytest

from sandmartin.errors import DiskFull, Exhausted, Unavailable
from sandmartin.transport.agent import AgentSocket
from tests.control.agent_process import dying_agent
from tests.fakes_agent import IMAGE, machine_directory, make_machine
from tests.ociimages import OciImage, member, tar
from tests.waiting import until

pytestmark = [pytest.mark.root, pytest.mark.registry]

MIB = 1 << 20


@pytest.fixture
def directory() -> Iterator[Path]:
    with machine_directory() as path:
        yield path


def archive(size_mb: int, *, packs: bool = False) -> bytes:
    """Of an image of so much; it cannot be compressed, unless it packs."""
    content = b"word" * (size_mb * MIB // 4) if packs else os.urandom(size_mb * MIB)
    return OciImage([tar([member("file", content)])]).archive()


async def sent(content: bytes) -> AsyncIterator[bytes]:
    for at in range(0, len(content), MIB):
        yield content[at : at + MIB]


def left(directory: Path) -> list[str]:
    """What is there of images that are none."""
    return [each.name for each in (directory / "data/images").iterdir() if each.name != IMAGE]


def running(directory: Path) -> bool:
    """Whether a program still works on something there."""
    mark = os.fsencode(directory / "data/images")
    for process in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if mark in process.read_bytes():
                return True
        except OSError:
            continue
    return False


@pytest.mark.parametrize("step", ["received", "unpacked", "made"])
async def test_a_killed_agent_leaves_what_the_next_removes(directory: Path, step: str) -> None:
    async with dying_agent(directory, f"import:{step}") as process:
        async with aclosing(AgentSocket(directory / "data/agent.sock")) as transport:
            with pytest.raises(Unavailable):
                await transport.import_archive("half", sent(archive(1)))
        await process.wait()
    assert left(directory)
    async with make_machine(directory).host() as host:
        assert not left(directory)
        image = await host.import_archive("half", sent(archive(1)))
        assert image.size_bytes > MIB


async def test_no_program_outlives_a_killed_agent(directory: Path) -> None:
    socket = directory / "data/agent.sock"
    async with (
        dying_agent(directory, "never") as process,
        aclosing(AgentSocket(socket)) as transport,
    ):
        importing = asyncio.create_task(transport.import_archive("half", sent(archive(100))))
        await until(lambda: running(directory), "a program")
        process.kill()
        with pytest.raises(Unavailable):
            await importing
    await until(lambda: not running(directory), "the end of all programs")


@pytest.mark.parametrize(("size_mb", "packs"), [(8, False), (24, False), (8, True), (24, True)])
async def test_a_full_disk_is_told_and_nothing_stays(
    directory: Path, size_mb: int, packs: bool
) -> None:
    """Too small for the archive, its layout, what is unpacked, the file system."""
    data = directory / "data"
    data.mkdir()
    options = ["-t", "tmpfs", "-o", f"size={size_mb}m,mode=711"]
    subprocess.run(["mount", *options, "tmpfs", data], check=True)
    try:
        async with make_machine(directory).host() as host:
            with pytest.raises(DiskFull):
                await host.import_archive("full", sent(archive(16, packs=packs)))
            assert not left(directory)
    finally:
        subprocess.run(["umount", data], check=True)


async def test_the_floor_of_free_disk_holds(directory: Path) -> None:
    async with make_machine(directory, disk_floor_mb=1 << 30).host() as host:
        with pytest.raises(Exhausted, match="below the floor"):
            await host.import_archive("more", sent(archive(1)))
        assert not left(directory)
