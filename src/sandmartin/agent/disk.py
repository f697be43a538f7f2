"""Disks: read-only images, and the layers over them that VMs write to.

An image is a sparse raw ext4 file, mode 0444, and is never written again once it is listed. A
layer is a qcow2 file; what lies below one is kept by whoever owns the disk, and never believed
from the layer's own header. VMs are handed descriptors and need no right to any file.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import os
import stat
import struct
import tempfile
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sandmartin.agent import files
from sandmartin.agent.proc import run, unprivileged
from sandmartin.agent.traits import Traits
from sandmartin.errors import DiskFull, Exhausted, Invalid, NotFound, ToolFailed
from sandmartin.model import random_id

_MB = 2**20
_COPY_DEADLINE_S = 600.0


@dataclass(frozen=True)
class Image:
    """A root file system; `size_mb` is its logical size."""

    name: str
    path: Path

    @property
    def size_mb(self) -> int:
        return -(-self.path.stat().st_size // _MB)

    @property
    def traits(self) -> Traits:
        """What it says of its sandboxes. Raises Invalid."""
        return Traits.of(self.path)


class ImageStore:
    """The images of one agent: those of its data directory, and the built-in ones."""

    def __init__(self, directory: Path, built_in: Mapping[str, Path]) -> None:
        self._directory = directory
        self._built_in = built_in

    def names(self) -> list[str]:
        own = {path.parent.name for path in self._directory.glob("*/rootfs.ext4")}
        return sorted(own | set(self._built_in))

    def get(self, name: str) -> Image:
        """The image `name`, which has passed `check_name`. Raises NotFound."""
        own = self._directory / name / "rootfs.ext4"
        path = own if own.exists() else self._built_in.get(name)
        if path is None:
            raise NotFound(
                f"there is no template {name!r} on this host",
                hint="the templates here are: " + (", ".join(self.names()) or "none"),
            )
        return Image(name, path)


class Layers:
    """The qcow2 layers of one agent: those that VMs write to, and those that are sealed.

    A layer's name is the stem of its file, unique for ever. A sealed layer is never written again
    and belongs to a user of its own, who is no VM's: as that user programs read layers, whose
    content guests have made.
    """

    def __init__(self, directory: Path, uid: int) -> None:
        self._directory = directory
        self._uid = uid
        #: An empty layer of each size, to copy.
        self._blanks: dict[int, bytes] = {}

    def path(self, name: str) -> Path:
        """File of a sealed layer."""
        return self._directory / f"{name}.qcow2"

    def names(self) -> set[str]:
        """All sealed layers."""
        return {path.stem for path in self._directory.glob("*.qcow2")}

    async def create(self, directory: Path, size_mb: int) -> Path:
        """Make an empty layer in `directory`. Raises DiskFull."""
        if size_mb not in self._blanks:
            self._blanks[size_mb] = await self._make_blank(size_mb)
        top = directory / f"layer-{random_id(12)}.qcow2"
        with files.space_errors(top):
            top.write_bytes(self._blanks[size_mb])
        top.chmod(0o600)
        return top

    async def _make_blank(self, size_mb: int) -> bytes:
        with tempfile.TemporaryDirectory(prefix="sandmartin-") as directory:
            blank = Path(directory, "blank.qcow2")
            await run(["qemu-img", "create", "-q", "-f", "qcow2", blank, f"{size_mb}M"])
            return await asyncio.to_thread(blank.read_bytes)

    def seal(self, top: Path) -> str:
        """Take a layer that is no longer written into the store; its name. Idempotent."""
        sealed = self.path(top.stem)
        if not sealed.exists():
            self.seal_in_place(top)
            top.rename(sealed)
        return top.stem

    def seal_in_place(self, top: Path) -> None:
        """Seal a layer that stays where it is."""
        check_layer(top)
        os.chown(top, self._uid, self._uid)
        top.chmod(0o400)

    async def sync(self, names: Iterable[str]) -> None:
        """Make sealed layers survive a power cut."""
        for name in names:
            await asyncio.to_thread(files.sync, self.path(name))
        await asyncio.to_thread(files.sync, self._directory)

    async def adopt(self, layer: Path) -> str:
        """Take a sealed layer of another directory into the store as well; its name."""
        await link_or_copy(layer, self.path(layer.stem))
        return layer.stem

    def remove(self, name: str) -> None:
        """Remove a sealed layer, which nothing needs any more."""
        self.path(name).unlink(missing_ok=True)

    async def flatten(self, image: Path, names: Sequence[str], target: Path) -> None:
        """Write an image and the layers over it as one sparse raw image to `target`.

        Raises ToolFailed, DiskFull.
        """
        with tempfile.TemporaryDirectory(prefix=".flatten-", dir=target.parent) as directory:
            # The program that writes here may reach nothing else.
            os.chown(directory, self._uid, self._uid)
            target.parent.chmod(0o711)
            flat = Path(directory, "rootfs.ext4")
            source = "json:" + json.dumps(self._chain(image, names))
            await self._convert("-O", "raw", source, os.fspath(flat), target=target)
            # Nobody puts another file there from here on.
            os.chown(directory, 0, 0)
            await asyncio.to_thread(publish, flat, target)

    async def _convert(self, *words: str, target: Path, cwd: Path | None = None) -> None:
        """Run `qemu-img convert` as the layers' owner. Raises ToolFailed, DiskFull."""
        # It parses what guests wrote, so it is nobody's program, and it ends with the agent.
        argv = [*unprivileged(self._uid), "qemu-img", "convert", "-W", "-S", "4k", *words]
        try:
            await run(argv, deadline_s=_COPY_DEADLINE_S, cwd=cwd)
        except ToolFailed as error:
            if os.strerror(errno.ENOSPC) in error.message:
                raise files.disk_full(target) from error
            raise

    async def merge(
        self, names: Sequence[str], size_mb: int, merged: str, pause: Callable[[], Awaitable[None]]
    ) -> None:
        """Write what sealed layers hold, the lowest first, as one sealed layer `merged`.

        It stands over whatever stands below the lowest, and survives a power cut. `pause` is
        waited for before each of them.
        Raises ToolFailed, DiskFull.
        """
        with tempfile.TemporaryDirectory(prefix=".merge-", dir=self._directory) as directory:
            os.chown(directory, self._uid, self._uid)
            new = await self.create(Path(directory), size_mb)
            os.chown(new, self._uid, self._uid)
            for name in names:
                await pause()
                await self._lay_over(name, new, size_mb)
            self.seal_in_place(new)
            await asyncio.to_thread(files.sync, new)
            new.rename(self.path(merged))
        await asyncio.to_thread(files.sync, self._directory)

    async def _lay_over(self, name: str, new: Path, size_mb: int) -> None:
        """Write what one layer itself holds over what is in `new`, zeroes too."""
        check_layer(self.path(name))
        # Below both stands something of the disk's size, so that what a layer does not hold is
        # told from what it holds as zero, and is left out; it is never read.
        below = {"driver": "null-co", "size": size_mb * _MB, "read-zeroes": True}
        layer = {"driver": "qcow2", "file": _file_node(self.path(name)), "backing": below}
        onto = f"driver=qcow2,file.driver=file,file.filename={new.name}"
        onto += f",backing.driver=null-co,backing.size={size_mb * _MB}"
        words = ["-n", "-B", "below", "-F", "raw", "--target-image-opts"]
        source = "json:" + json.dumps(layer)
        await self._convert(*words, source, onto, target=self._directory, cwd=new.parent)

    def _chain(self, image: Path, names: Sequence[str]) -> dict[str, object]:
        node: dict[str, object] = {"driver": "raw", "file": _file_node(image)}
        for name in names:
            check_layer(self.path(name))
            node = {"driver": "qcow2", "file": _file_node(self.path(name)), "backing": node}
        return node


def publish(image: Path, target: Path) -> None:
    """Put an image in its place, whole, root's and read-only; it then survives a power cut.

    Raises ToolFailed when it is not a plain file, as a program that a guest misled might leave.
    """
    try:
        handle = os.open(image, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise ToolFailed(f"image {target.parent.name} was not made: {error.strerror}") from error
    try:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode) or status.st_nlink != 1:
            raise ToolFailed(f"image {target.parent.name} was not made as a file of its own")
        os.fchown(handle, 0, 0)
        os.fchmod(handle, 0o444)
        os.fsync(handle)
    finally:
        os.close(handle)
    image.rename(target)
    files.sync(target.parent)


def _file_node(path: Path) -> dict[str, object]:
    return {"driver": "file", "filename": os.fspath(path), "read-only": True}


#: qcow2, docs/interop/qcow2.txt of QEMU: magic, version, and what a reader must know of.
_QCOW2 = struct.Struct(">4sI64xQ")
_QCOW2_MAGIC = b"QFI\xfb"
#: Dirty, corrupt, compression type, extended entries; but no data in another file.
_KNOWN_FEATURES = 0b11011


def check_layer(path: Path) -> None:
    """Raises Invalid when a layer, whose header a guest may have forged, names other files."""
    with path.open("rb") as file:
        header = file.read(_QCOW2.size)
    if len(header) < _QCOW2.size:
        raise Invalid(f"layer {path.stem} is cut off")
    magic, version, features = _QCOW2.unpack(header)
    if magic != _QCOW2_MAGIC or version != 3 or features & ~_KNOWN_FEATURES:
        raise Invalid(f"layer {path.stem} is damaged", hint="destroy the sandbox it belongs to")


#: Number and place of the entries of its first table, in the same document: one that is not
#: zero leads to clusters.
_QCOW2_TABLE = struct.Struct(">36xIQ")
_MAX_TABLE_BYTES = 32 << 20


def holds_data(layer: Path) -> bool:
    """Whether anything was written to a layer; not to one that is gone or cut off."""
    try:
        with layer.open("rb") as file:
            count, at = _QCOW2_TABLE.unpack(file.read(_QCOW2_TABLE.size))
            if at > layer.stat().st_size:
                return False
            file.seek(at)
            return any(file.read(min(8 * count, _MAX_TABLE_BYTES)))
    except (FileNotFoundError, struct.error):
        return False


def check_size(image: Image, size_mb: int) -> None:
    """Raises Invalid when a disk of `size_mb` is smaller than its image."""
    if size_mb < image.size_mb:
        raise Invalid(
            f"disk_size_mb is {size_mb}, but template {image.name!r} is {image.size_mb} MB",
            hint=f"use {image.size_mb} or more",
        )


async def link_or_copy(source: Path, target: Path) -> None:
    """Have a file that is never written again under a second name, or else as a sparse copy."""
    if not _link(source, target):
        beside = target.with_name(f".{target.name}.{random_id(6)}")
        copy = ["cp", "--sparse=always", "--reflink=auto", "--preserve=all"]
        await run([*copy, source, beside], deadline_s=_COPY_DEADLINE_S)
        os.replace(beside, target)  # noqa: PTH105


def _link(source: Path, target: Path) -> bool:
    """Whether `target` is there now, under both names."""
    try:
        target.hardlink_to(source)
    except FileExistsError:
        return True
    except OSError as error:
        if error.errno not in {errno.EXDEV, errno.EPERM, errno.EMLINK}:
            raise
        return False
    return True


def free_mb(path: Path) -> int:
    """Space that is left where `path` lives."""
    stat = os.statvfs(path)
    return stat.f_bavail * stat.f_frsize // _MB


def check_free(path: Path, floor_mb: int) -> None:
    """Raises Exhausted when less than `floor_mb` is left where `path` lives."""
    if (free := free_mb(path)) < floor_mb:
        raise Exhausted(
            f"the host's disk has {free} MB left where {path} is, below the floor of {floor_mb} MB",
            hint="destroy sandboxes, free disk space, or lower SANDMARTIN_DISK_FLOOR_MB",
        )


def host_disk_full(sandbox_id: str) -> DiskFull:
    """The error of a sandbox that the monitor stopped because the host's disk is full."""
    return DiskFull(
        f"sandbox {sandbox_id} stands still because the host's disk is full",
        hint="free disk space on the host; the sandbox goes on by itself and has lost nothing",
    )


def allocated_bytes(path: Path) -> int:
    """Blocks a file really takes; 0 when it is gone."""
    with contextlib.suppress(FileNotFoundError):
        return path.stat().st_blocks * 512
    return 0
