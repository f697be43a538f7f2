"""Growing of images: real file systems and the real tools, on small sizes."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import signal
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sandmartin.agent import proc
from sandmartin.agent.disk import allocated_bytes
from sandmartin.agent.images import Growth, ext4_bytes

_SMALL_MB, _GROWN_MB = 12, 160
_UID = 2_980_001
_CONTENT = b"what an image holds\n" * 5000
#: An agent of its own, which ends itself at a step.
_AGENT = f"""
import asyncio, os, signal, sys
from pathlib import Path
from sandmartin.agent.images import Growth
def step(name):
    if name == sys.argv[2]:
        os.kill(os.getpid(), signal.SIGKILL)
asyncio.run(Growth(Path(sys.argv[1]), {_UID}, size_mb={_GROWN_MB}, step=step).run(()))
"""


@pytest.fixture
def directory() -> Iterator[Path]:
    """A place for images that every user can reach."""
    with tempfile.TemporaryDirectory(prefix="smtest-", dir="/var/tmp") as path:
        Path(path).chmod(0o711)
        yield Path(path)


def _run(*words: str | Path) -> bytes:
    environment = proc.clean_environment()
    return subprocess.run(words, check=True, capture_output=True, env=environment).stdout


def _make(directory: Path, name: str) -> Path:
    image = directory / name / "rootfs.ext4"
    image.parent.mkdir()
    with tempfile.TemporaryDirectory() as tree, image.open("wb") as file:
        Path(tree, "held").write_bytes(_CONTENT)
        file.truncate(_SMALL_MB << 20)
        _run("mke2fs", "-q", "-F", "-t", "ext4", "-d", tree, image)
    image.chmod(0o444)
    return image


def _read(image: Path) -> bytes:
    return _run("debugfs", "-R", "cat /held", image)


def _digest(image: Path) -> str:
    return hashlib.sha256(image.read_bytes()).hexdigest()


def _assert_grown(image: Path) -> None:
    assert ext4_bytes(image) == _GROWN_MB << 20
    status = image.stat()
    assert (status.st_size, status.st_uid) == (_GROWN_MB << 20, 0)
    assert status.st_mode & 0o777 == 0o444
    assert _read(image) == _CONTENT
    _run("e2fsck", "-f", "-n", image)
    assert list(image.parent.iterdir()) == [image]


def _growth(directory: Path, step: Callable[[str], None] = lambda _: None) -> Growth:
    return Growth(directory, _UID, size_mb=_GROWN_MB, step=step)


# Reading a superblock.


def _superblock(
    *, low: int = 100, log_size: int = 2, magic: int = 0xEF53, features: int = 0x40, high: int = 0
) -> bytes:
    block = bytearray(2048)
    for at, value in ((4, low), (24, log_size), (96, features), (336, high)):
        struct.pack_into("<I", block, 1024 + at, value)
    struct.pack_into("<H", block, 1024 + 56, magic)
    return bytes(block)


@pytest.mark.parametrize(
    ("content", "size_bytes"),
    [
        (_superblock(), 100 << 12),
        (_superblock(log_size=0, features=0xC0, high=1), (100 + (1 << 32)) << 10),
        # The high half means nothing where the file system does not say so.
        (_superblock(high=1), 100 << 12),
        (_superblock(low=2**32 - 1, high=2**32 - 1, features=0xC0), (2**64 - 1) << 12),
        (_superblock()[: 1024 + 339], None),
        (b"", None),
        (_superblock(magic=0xEF54), None),
        (_superblock(features=0), None),
        (_superblock(log_size=7), None),
        (_superblock(log_size=2**32 - 1), None),
    ],
)
def test_size_is_what_the_superblock_says(
    tmp_path: Path, content: bytes, size_bytes: int | None
) -> None:
    image = tmp_path / "rootfs.ext4"
    image.write_bytes(content)
    assert ext4_bytes(image) == size_bytes


# Growing.


@pytest.mark.root
async def test_small_image_is_grown_once(directory: Path) -> None:
    image = _make(directory, "small")
    taken = allocated_bytes(image)
    # As one is that somebody has only made longer.
    longer = _make(directory, "longer")
    os.truncate(longer, _GROWN_MB << 20)
    needed = _make(directory, "needed")
    before = _digest(needed)
    seen: list[str] = []
    growth = _growth(directory, seen.append)
    await growth.run({needed})
    for each in (image, longer):
        _assert_grown(each)
    # The new inode tables are holes.
    assert allocated_bytes(image) < taken + (1 << 20)
    assert _digest(needed) == before
    once = len(seen)
    await growth.run({needed})
    assert len(seen) == once > 0
    # Nothing needs it any more.
    await growth.run(())
    _assert_grown(needed)


@pytest.mark.root
async def test_unclean_image_is_repaired_and_grown(directory: Path) -> None:
    image = _make(directory, "unclean")
    # One that was not unmounted, and whose file has a name fewer than it says.
    image.chmod(0o644)
    for change in ("ssv state 0", "sif /held links_count 2"):
        _run("debugfs", "-w", "-R", change, image)
    with pytest.raises(subprocess.CalledProcessError):
        _run("e2fsck", "-f", "-n", image)
    await _growth(directory).run(())
    _assert_grown(image)


@pytest.mark.root
async def test_killed_at_every_step_it_is_old_or_new(directory: Path) -> None:
    steps: list[str] = []
    _make(directory, "whole")
    await _growth(directory, steps.append).run(())
    assert len(set(steps)) == len(steps) > 3
    for number, step in enumerate(steps):
        place = directory / f"place{number}"
        place.mkdir(mode=0o711)
        image = _make(place, "image")
        before = _digest(image)
        killed = await proc.run(
            [sys.executable, "-c", _AGENT, place, step],
            env={"PYTHONPATH": os.pathsep.join(sys.path)},
            check=False,
        )
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        if step == steps[-1]:
            assert ext4_bytes(image) == _GROWN_MB << 20
        else:
            assert _digest(image) == before, step
        assert len(list(image.parent.iterdir())) == 2, "a draft beside the image"
        await _growth(place).run(())
        _assert_grown(image)


def _no_groups(image: Path) -> None:
    """A superblock that is right, and nothing that is right behind it."""
    with image.open("r+b") as file:
        file.seek(2048)
        file.write(b"\xff" * (2 << 20))


def _cut_off(image: Path) -> None:
    os.truncate(image, 1 << 20)


def _huge(image: Path) -> None:
    with image.open("r+b") as file:
        file.seek(1024 + 4)
        file.write(struct.pack("<I", 2**32 - 1))


def _no_superblock(image: Path) -> None:
    os.truncate(image, 1500)


@pytest.mark.root
@pytest.mark.parametrize("damage", [_no_groups, _cut_off, _huge, _no_superblock])
async def test_hostile_image_stays_as_it_is_and_keeps_none_back(
    directory: Path, damage: Callable[[Path], None]
) -> None:
    hostile, good = _make(directory, "hostile"), _make(directory, "later")
    damage(hostile)
    before = _digest(hostile)
    await _growth(directory).run(())
    assert _digest(hostile) == before
    assert list(hostile.parent.iterdir()) == [hostile]
    _assert_grown(good)


@pytest.mark.root
async def test_full_disk_leaves_it_as_it_was(directory: Path) -> None:
    image = _make(directory, "image")
    before = _digest(image)
    floor_mb = os.statvfs(directory).f_bavail * os.statvfs(directory).f_frsize // (1 << 20) + 4096
    await Growth(directory, _UID, size_mb=_GROWN_MB, floor_mb=floor_mb).run(())
    assert _digest(image) == before


@pytest.mark.root
async def test_ending_in_the_middle_leaves_nothing(directory: Path) -> None:
    image = _make(directory, "image")
    before = _digest(image)
    reached = asyncio.Event()

    def step(name: str) -> None:
        if name == "grow:truncated":
            reached.set()

    growing = asyncio.create_task(_growth(directory, step).run(()))
    async with asyncio.timeout(20):
        await reached.wait()
    growing.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await growing
    assert _digest(image) == before
    assert list(image.parent.iterdir()) == [image]


@pytest.mark.root
async def test_programs_for_hostile_content_have_no_right() -> None:
    words = [*proc.unprivileged(_UID), "cat", "/proc/self/status"]
    status = (await proc.run(words)).stdout.decode().splitlines()
    facts = {line.partition(":")[0]: line.partition(":")[2].split() for line in status}
    assert facts["Uid"] == facts["Gid"] == [str(_UID)] * 4
    assert (facts["Groups"], facts["NoNewPrivs"]) == ([], ["1"])
    for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
        assert int(facts[name][0], 16) == 0, name
