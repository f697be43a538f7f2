"""Files that appear whole or not at all, and complete reads and writes of them."""

from __future__ import annotations

import contextlib
import ctypes
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from sandmartin.agent import files
from sandmartin.errors import AlreadyExists, Invalid, NotFound
from sandmartin.model import random_id

_libc = ctypes.CDLL(None, use_errno=True)
_SYNC_FILE_RANGE_WRITE = 2


@contextlib.contextmanager
def appearing(path: Path, *, mode: int, sync: bool, replace: bool) -> Iterator[int]:
    """A descriptor to write a file with that becomes `path` when the block ends well.

    With `sync` it survives a power cut. Raises DiskFull, and AlreadyExists without `replace`.
    """
    beside = path.with_name(f".{path.name}.{random_id(6)}")
    with contextlib.ExitStack() as stack:
        stack.enter_context(files.space_errors(path))
        file = os.open(beside, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        stack.callback(os.close, file)
        stack.callback(beside.unlink, missing_ok=True)
        yield file
        os.fchmod(file, mode)
        if sync:
            os.fsync(file)
        if replace:
            beside.replace(path)
        else:
            try:
                # Unlike a renaming, this never takes the place of what already stands there.
                os.link(beside, path)
            except FileExistsError:
                raise AlreadyExists(f"{path} exists already and is never written again") from None
            beside.unlink()
        if sync:
            files.sync(path.parent)


@contextlib.contextmanager
def opened(path: Path) -> Iterator[int]:
    """A descriptor to read the file at `path`. Raises NotFound; Invalid when it is no file."""
    try:
        # Not waiting: a pipe in its place would have us wait for ever.
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError as error:
        raise NotFound(f"there is no {path}") from error
    except OSError as error:
        raise Invalid(f"{path} cannot be opened: {error.strerror}") from error
    try:
        if not stat.S_ISREG(os.fstat(file).st_mode):
            raise Invalid(f"{path} is not a file")
        yield file
    finally:
        os.close(file)


def write_at(file: int, data: memoryview | bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        done = os.pwrite(file, view, offset)
        view, offset = view[done:], offset + done


def begin_sync(file: int, offset: int, size_bytes: int) -> None:
    """Have what was written go to disk meanwhile, so that the sync at the end has less to wait for.

    Only a hint: whatever goes wrong is told by that sync.
    """
    part = ctypes.c_int64(offset), ctypes.c_int64(size_bytes)
    _libc.sync_file_range(file, *part, _SYNC_FILE_RANGE_WRITE)


def read_at(file: int, view: memoryview, offset: int) -> None:
    """Fill `view`. Raises Invalid when the file ends before."""
    while view:
        done = os.preadv(file, [view], offset)
        if not done:
            raise Invalid("the file became shorter while it was read")
        view, offset = view[done:], offset + done
