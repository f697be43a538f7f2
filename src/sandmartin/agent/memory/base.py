"""Bases: sparse files with a whole RAM in them, never written again once they stand.

A base's checksum depends on its content alone, not on which of its zeroes are holes: it is that of
a list of (offset, checksum) of every 256 KiB that are not all zero. Making and checking one takes
time in proportion to its data. A base appears whole: it is linked to its name when it is on disk.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from sandmartin.agent.memory.ram import Buffer, Ram
from sandmartin.agent.memory.runs import PAGE, Runs, stretches
from sandmartin.agent.memory.whole import appearing, opened, read_at, write_at
from sandmartin.errors import Conflict, Invalid

#: Asked now and then by what takes long; it raises to end it.
Check = Callable[[], None]

_CHUNK_BYTES = 2**18
_COPY_BYTES = 2**26
_ZERO_CHUNK = bytes(_CHUNK_BYTES)
_DIGEST_NAME = b"sandmartin base 1\n"
_FICLONE = 0x40049409
_KEEP_SIZE_PUNCH_HOLE = 3
#: How a kernel or a file system says that it has no such call, or not between these two.
_CANNOT = {errno.EOPNOTSUPP, errno.EXDEV, errno.EINVAL, errno.ENOTTY, errno.ENOSYS}

_fallocate = ctypes.CDLL(None, use_errno=True).fallocate
_fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]


@dataclass(frozen=True)
class Base:
    """A base and its checksum."""

    path: Path
    size_bytes: int
    digest: str


def go_on() -> None:
    """A check that ends nothing."""


def get_base(path: Path, check: Check = go_on) -> Base:
    """The base at `path`, its checksum computed. Raises NotFound, Invalid."""
    with opened(path) as file:
        return Base(path, os.fstat(file).st_size, _digest(file, check))


def digest_base(path: Path) -> str:
    """The checksum of what is at `path`. Raises NotFound, Invalid."""
    return get_base(path).digest


def create_empty_base(target: Path, size_bytes: int) -> Base:
    """A base that is all zero: what a VM that boots cold maps. Raises AlreadyExists, DiskFull."""
    if size_bytes <= 0 or size_bytes % PAGE:
        raise Invalid(f"a RAM of {size_bytes} bytes is not whole pages")
    with _standing(target) as file:
        os.ftruncate(file, size_bytes)
        digest = _digest(file)
    return Base(target, size_bytes, digest)


def dump_base(ram: Ram, base: Base, target: Path) -> Base:
    """A new base of the whole RAM of a VM that stands still and maps `base`.

    Raises AlreadyExists, Conflict, DiskFull, ToolFailed.
    """
    if ram.size_bytes != base.size_bytes:
        raise Conflict(f"process {ram.process.pid} maps {ram.size_bytes} bytes of {base.path}")
    return build_base(base, ram.parts(ram.scan(), Buffer()), target)


def build_base(
    base: Base, parts: Iterable[tuple[Runs, memoryview]], target: Path, check: Check = go_on
) -> Base:
    """A new base of `base`, which was verified, with other pages in some places.

    Raises AlreadyExists, DiskFull.
    """
    with opened(base.path) as source, _standing(target) as file:
        _copy(source, file, check)
        for runs, data in parts:
            check()
            _put(file, runs, data)
        return Base(target, os.fstat(file).st_size, _digest(file, check))


@contextlib.contextmanager
def _standing(target: Path) -> Iterator[int]:
    with appearing(target, mode=0o444, sync=True, replace=False) as file:
        yield file


# Content.


def chunks(file: int) -> Iterator[tuple[int, memoryview]]:
    """Every 256 KiB that are not all zero, with their offset; gone when the next are asked for."""
    size_bytes = os.fstat(file).st_size
    chunk = bytearray(_CHUNK_BYTES)
    at = 0
    while (data := _find_data(file, at)) is not None:
        offset = data // _CHUNK_BYTES * _CHUNK_BYTES
        at = offset + _CHUNK_BYTES
        view = memoryview(chunk)[: min(_CHUNK_BYTES, size_bytes - offset)]
        read_at(file, view, offset)
        chunk[len(view) :] = bytes(_CHUNK_BYTES - len(view))
        if chunk != _ZERO_CHUNK:
            yield offset, view


def digest_of(size_bytes: int, content: Iterable[tuple[int, memoryview]]) -> str:
    whole = hashlib.sha256(_DIGEST_NAME + size_bytes.to_bytes(8, "little"))
    for offset, chunk in content:
        whole.update(offset.to_bytes(8, "little") + hashlib.sha256(chunk).digest())
    return whole.hexdigest()


def _digest(file: int, check: Check = go_on) -> str:
    return digest_of(os.fstat(file).st_size, _checked(chunks(file), check))


def _checked(
    content: Iterable[tuple[int, memoryview]], check: Check
) -> Iterator[tuple[int, memoryview]]:
    for part in content:
        check()
        yield part


def _find_data(file: int, at: int) -> int | None:
    """The first data at or after `at`; None when there is only a hole."""
    try:
        return os.lseek(file, at, os.SEEK_DATA)
    except OSError as error:
        if error.errno != errno.ENXIO:
            raise
        return None


def _copy(source: int, target: int, check: Check) -> None:
    """Make `target` the same as `source`: by reference where the file system can, else its data."""
    try:
        fcntl.ioctl(target, _FICLONE, source)
        return
    except OSError as error:
        if error.errno not in _CANNOT:
            raise
    os.ftruncate(target, os.fstat(source).st_size)
    at = 0
    while (begin := _find_data(source, at)) is not None:
        at = os.lseek(source, begin, os.SEEK_HOLE)
        _copy_range(source, target, begin, at, check)


def _copy_range(source: int, target: int, begin: int, end: int, check: Check) -> None:
    while begin < end:
        check()
        try:
            size = min(end - begin, _COPY_BYTES)
            done = os.copy_file_range(source, target, size, begin, begin)
        except OSError as error:
            if error.errno not in _CANNOT:
                raise
            part = memoryview(bytearray(min(end - begin, _CHUNK_BYTES)))
            read_at(source, part, begin)
            write_at(target, part, begin)
            done = len(part)
        if not done:
            raise Invalid("the base became shorter while it was copied")
        begin += done


def _put(file: int, runs: Runs, data: memoryview) -> None:
    """Write pages to their places; those that are all zero become holes."""
    at = 0
    for first, end in runs:
        size = (end - first) * PAGE
        put_sparse(file, first * PAGE, data[at : at + size], punch=True)
        at += size


def put_sparse(file: int, offset: int, data: memoryview, *, punch: bool) -> None:
    """Write what is not zero, and make holes of the rest where there may be none yet."""
    for nonzero, begin, end in stretches(data):
        if nonzero:
            write_at(file, data[begin:end], offset + begin)
        elif punch:
            _punch(file, offset + begin, end - begin)


def _punch(file: int, offset: int, size: int) -> None:
    if _fallocate(file, _KEEP_SIZE_PUNCH_HOLE, offset, size) == 0:
        return
    number = ctypes.get_errno()
    if number != errno.EOPNOTSUPP:
        raise OSError(number, f"fallocate: {os.strerror(number)}")
    write_at(file, bytes(size), offset)
