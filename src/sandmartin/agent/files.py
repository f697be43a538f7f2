"""What every writer of files needs: a full disk told as such, files that outlive a power cut."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from sandmartin.errors import DiskFull


def disk_full(path: Path) -> DiskFull:
    """The error of whoever could not write to `path`."""
    return DiskFull(f"the host's disk is full where {path} is", hint="free disk space on the host")


@contextlib.contextmanager
def space_errors(path: Path) -> Iterator[None]:
    """What the block cannot write for want of space is raised as DiskFull."""
    try:
        yield
    except OSError as error:
        if error.errno not in {errno.ENOSPC, errno.EDQUOT}:
            raise
        raise disk_full(path) from error


def sync(path: Path) -> None:
    """Make a file, or the names in a directory, survive a power cut."""
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
