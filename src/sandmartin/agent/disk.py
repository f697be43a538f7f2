"""Disks: read-only images, and the layer each sandbox writes to.

An image is a sparse raw ext4 file, mode 0444, and is never written again once it is listed. A
layer is a qcow2 file over it that belongs to the VM's own user.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from sandmartin.agent.proc import run
from sandmartin.errors import DiskFull, Exhausted, Invalid, NotFound, ToolFailed

_MB = 2**20


@dataclass(frozen=True)
class Image:
    """A root file system; `size_mb` is its logical size."""

    name: str
    path: Path

    @property
    def size_mb(self) -> int:
        return -(-self.path.stat().st_size // _MB)


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


async def create_layer(image: Image, layer: Path, size_mb: int, uid: int) -> None:
    """Make the qcow2 layer of a sandbox over `image`, owned by the VM's user.

    Raises Invalid when `size_mb` is below the image's size, DiskFull when the host has no space.
    """
    if size_mb < image.size_mb:
        raise Invalid(
            f"disk_size_mb is {size_mb}, but template {image.name!r} is {image.size_mb} MB",
            hint=f"use {image.size_mb} or more",
        )
    # A relative name would be looked up beside the layer.
    backing = os.fspath(image.path.absolute())
    create = ["qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", backing]
    try:
        await run([*create, os.fspath(layer), f"{size_mb}M"])
    except ToolFailed as error:
        if os.strerror(errno.ENOSPC) in error.message:
            raise DiskFull(
                f"the host's disk is full where {layer.parent} is",
                hint="free disk space on the host",
            ) from error
        raise
    await asyncio.to_thread(_give, layer, uid)


def _give(layer: Path, uid: int) -> None:
    layer.chmod(0o600)
    os.chown(layer, uid, uid)


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
