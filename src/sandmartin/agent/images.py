"""Growing of an agent's own images: none stays smaller than a sandbox's default disk.

It is done at the start, before anything can begin to use an image, and never to one that
something depends on: what lies in a layer fits the very blocks below it. An image is changed as a
copy and then replaced, so that whoever kills us leaves the old one or the new one, and beside it
what the next start removes. Whether one has grown is asked of its superblock, not of its length.

A file system is what a guest made of it. Our own reading ends with two fields of the superblock;
the rest is left to programs without any right, and with bounds on memory, file size and time.
"""

from __future__ import annotations

import asyncio
import logging
import os
import struct
import tempfile
from collections.abc import Callable, Collection
from pathlib import Path

from sandmartin.agent import disk, proc
from sandmartin.agent.storage import remove
from sandmartin.errors import Invalid, SandmartinError, ToolFailed
from sandmartin.model import DEFAULT_DISK_SIZE_MB

_log = logging.getLogger(__name__)

_MB = 2**20
_COPY_DEADLINE_S = 600.0
_TOOL_DEADLINE_S = 120.0
_TOOL_MEMORY_MB = 1024

#: struct ext4_super_block, 1024 bytes into the file system (ext4 in the kernel's documentation):
#: low half of the block count, block size, magic, incompatible features, high half.
_SUPERBLOCK = struct.Struct("<4xI16xI28xH38xI236xI")
_SUPERBLOCK_AT = 1024
_MAGIC = 0xEF53
_EXTENTS, _64BIT = 0x40, 0x80
_MAX_LOG_BLOCK_SIZE = 6


def ext4_bytes(image: Path) -> int | None:
    """Size of the ext4 file system in a file, as it says itself; None when there is none."""
    with image.open("rb") as file:
        file.seek(_SUPERBLOCK_AT)
        block = file.read(_SUPERBLOCK.size)
    if len(block) < _SUPERBLOCK.size:
        return None
    low, log_size, magic, features, high = _SUPERBLOCK.unpack(block)
    if magic != _MAGIC or not features & _EXTENTS or log_size > _MAX_LOG_BLOCK_SIZE:
        return None
    blocks = low | high << 32 if features & _64BIT else low
    return int(blocks << (10 + log_size))


class Growth:
    """Grows the images below a directory; `uid` is nobody's, and its programs read them."""

    def __init__(
        self,
        directory: Path,
        uid: int,
        *,
        size_mb: int = DEFAULT_DISK_SIZE_MB,
        floor_mb: int = 0,
        step: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._directory = directory
        self._uid = uid
        self._size_bytes = size_mb * _MB
        self._floor_mb = floor_mb
        self._step = step

    async def run(self, needed: Collection[Path]) -> None:
        """Grow every image that is too small, but those that are `needed` as they are."""
        kept = {path.resolve() for path in needed}
        for image in sorted(self._directory.glob("*/rootfs.ext4")):
            name = image.parent.name
            try:
                for left in image.parent.glob(".*"):
                    await asyncio.to_thread(remove, left)
                if not self._is_small(image):
                    continue
                if image.resolve() in kept:
                    _log.info("image %s stays small: something depends on it", name)
                else:
                    await self._grow(image)
                    _log.info("image %s was grown to %d MB", name, self._size_bytes // _MB)
            except (SandmartinError, OSError) as error:
                _log.warning("image %s stays small: %s", name, error)

    def _is_small(self, image: Path) -> bool:
        size_bytes = ext4_bytes(image)
        if size_bytes is None or size_bytes >= self._size_bytes:
            return False
        if size_bytes > image.stat().st_size:
            # Made longer it would look whole, with zeroes where its files were.
            raise Invalid("the file is shorter than its file system")
        return True

    async def _grow(self, image: Path) -> None:
        """Raises ToolFailed, TimedOut, Exhausted; the image is then as it was."""
        # Two copies stand beside it for a moment.
        room_mb = 2 * disk.allocated_bytes(image) // _MB
        disk.check_free(image.parent, self._floor_mb + room_mb)
        # The directory is root's: the tools can change one file, and put no other in its place.
        with tempfile.TemporaryDirectory(prefix=".grow-", dir=image.parent) as directory:
            work, grown = Path(directory, "work"), Path(directory, "rootfs.ext4")
            await _copy(image, work, "--reflink=auto")
            self._step("grow:copied")
            # One that is longer than its file system keeps its length.
            size_bytes = max(self._size_bytes, os.stat(image).st_size)  # noqa: PTH116
            _hand_over(work, self._uid, size_bytes)
            self._step("grow:truncated")
            await self._grow_copy(work, size_bytes)
            self._step("grow:resized")
            # Another file: a program that got out of hand may hold the first one open. This also
            # leaves out the zeroes that resize2fs allocates.
            await _copy(work, grown, "--reflink=never")
            await asyncio.to_thread(disk.publish, grown, image)
            self._step("grow:published")

    async def _grow_copy(self, work: Path, size_bytes: int) -> None:
        # 1 says that something was repaired.
        await self._as_nobody(["e2fsck", "-f", "-p", work], size_bytes, {0, 1})
        self._step("grow:checked")
        await self._as_nobody(["resize2fs", work], size_bytes, {0})
        if (found := ext4_bytes(work)) is None or found < self._size_bytes:
            raise ToolFailed(f"resize2fs left a file system of {found} bytes")

    async def _as_nobody(
        self, words: list[str | Path], size_bytes: int, codes: Collection[int]
    ) -> None:
        limits = ["prlimit", f"--as={_TOOL_MEMORY_MB * _MB}", f"--fsize={size_bytes}", "--core=0"]
        # The guest would otherwise zero the new inode tables, in each sandbox anew.
        env = {"RESIZE2FS_FORCE_ITABLE_INIT": "1"}
        argv = [*proc.unprivileged(self._uid), *limits, "--", *words]
        done = await proc.run(argv, env=env, deadline_s=_TOOL_DEADLINE_S, check=False)
        if done.returncode not in codes:
            said = " ".join((done.stdout + done.stderr).decode(errors="replace").split())[:300]
            raise ToolFailed(f"{words[0]} exited {done.returncode}: {said!r}")


def _hand_over(work: Path, uid: int, size_bytes: int) -> None:
    """Make a file so long, and give it to a user who can reach it and nothing beside it."""
    work.parent.chmod(0o711)
    os.truncate(work, size_bytes)
    os.chown(work, uid, uid)
    work.chmod(0o600)


async def _copy(source: Path, target: Path, reflink: str) -> None:
    command = ["cp", "--sparse=always", reflink, "--no-preserve=all"]
    await proc.run([*command, source, target], deadline_s=_COPY_DEADLINE_S)
