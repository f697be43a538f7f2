"""Diff files: the dirtied pages of one RAM, over one base.

A file is one head (magic, sizes, the base's checksum, the runs), filled up to whole pages, and
the runs' pages one after the other. Its checksum covers every byte and is kept by its owner: no
file is used whose checksum is not the one asked for.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import struct
from array import array
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from sandmartin.agent.memory.base import Base, Check, build_base, go_on
from sandmartin.agent.memory.ram import MOVERS, Buffer, Ram
from sandmartin.agent.memory.runs import PAGE, Runs
from sandmartin.agent.memory.whole import appearing, begin_sync, opened, read_at, write_at
from sandmartin.errors import Invalid

_MAGIC = b"SNDMDIFF"
_VERSION = 1
#: Magic, version, page size, RAM bytes, checksum of the base, number of runs, number of pages.
_HEAD = struct.Struct("<8sIIQ32sQQ")
_RUN_BYTES = 16
#: What goes to disk at a time while the rest is written.
_SYNC_BYTES = 4 << 20
#: Fewer pages are no work for a thread of their own.
_LEAST_SHARE = 4 * 2**20 // PAGE
#: More RAM than any host gives one VM; bounds what a foreign file can make us do.
_MAX_RAM_BYTES = 2**44


@dataclass(frozen=True)
class Written:
    """A file that was written; `digest` is what its owner must keep."""

    size_bytes: int
    digest: str


def write_diff(
    path: Path, base: Base, runs: Runs, data: Iterable[memoryview], *, sync: bool
) -> Written:
    """Write a diff over `base`, replacing what was at `path` in one step.

    `data` are the pages of `runs` in order. With `sync` it survives a power cut. Raises DiskFull.
    """
    if not runs.fit(base.size_bytes // PAGE):
        raise Invalid(f"the pages are not all inside {base.path}")
    head = _HEAD.pack(
        *(_MAGIC, _VERSION, PAGE, base.size_bytes, bytes.fromhex(base.digest)),
        *(len(runs), runs.pages),
    )
    head += runs.firsts.tobytes() + runs.ends.tobytes()
    head += bytes(-len(head) % PAGE)
    digest = hashlib.sha256(head)
    with (
        appearing(path, mode=0o600, sync=sync, replace=True) as file,
        ThreadPoolExecutor(1, "diff-digest") as beside,
    ):
        write_at(file, head, 0)
        size_bytes = len(head)
        begun = 0
        for part in data:
            hashed = beside.submit(digest.update, part)
            write_at(file, part, size_bytes)
            size_bytes += len(part)
            if sync and size_bytes - begun >= _SYNC_BYTES:
                begin_sync(file, begun, size_bytes - begun)
                begun = size_bytes
            hashed.result()
        if size_bytes != len(head) + runs.size_bytes:
            raise Invalid(f"{runs.pages} pages were announced and others came")
    return Written(size_bytes, digest.hexdigest())


@dataclass(frozen=True)
class Diff:
    """A diff that was verified; usable while it is open."""

    ram_bytes: int
    base_digest: str
    runs: Runs
    _file: int
    _data_offset: int

    def shares(self, count: int) -> Iterator[Diff]:
        """The same in at most so many diffs, for as many threads."""
        at = self._data_offset
        for runs in self.runs.batches(max(_LEAST_SHARE, -(-self.runs.pages // count))):
            yield replace(self, runs=runs, _data_offset=at)
            at += runs.size_bytes

    def parts(self, buffer: Buffer) -> Iterator[tuple[Runs, memoryview]]:
        """Its pages a buffer at a time; each part is gone when the next is asked for."""
        at = self._data_offset
        for part in self.runs.batches(buffer.size_bytes // PAGE):
            view = buffer.view(part.size_bytes)
            read_at(self._file, view, at)
            at += len(view)
            yield part, view


@contextlib.contextmanager
def open_diff(path: Path, digest: str) -> Iterator[Diff]:
    """Verify a diff in full; it stays open in the block.

    Raises NotFound, and Invalid when it is damaged, foreign, or not the one with this digest.
    """
    with opened(path) as file:
        head = _read_head(path, file)
        with open(file, "rb", buffering=0, closefd=False) as whole:
            found = hashlib.file_digest(whole, "sha256").hexdigest()
        if found != digest:
            raise Invalid(
                f"{path} is not what was written: its checksum is {found[:12]}, not {digest[:12]}"
            )
        yield Diff(head.ram_bytes, head.base.hex(), _read_runs(path, file, head), file, head.stop)


class _Head(NamedTuple):
    magic: bytes
    version: int
    page: int
    ram_bytes: int
    base: bytes
    run_count: int
    page_count: int

    @property
    def stop(self) -> int:
        """Where the runs end and the pages begin."""
        return -(-(_HEAD.size + self.run_count * _RUN_BYTES) // PAGE) * PAGE


def _read_head(path: Path, file: int) -> _Head:
    """The head, checked against itself and the size of the file."""
    size_bytes = os.fstat(file).st_size
    content = bytearray(_HEAD.size)
    if size_bytes < len(content):
        raise Invalid(f"{path} is damaged: {size_bytes} bytes are no memory diff")
    read_at(file, memoryview(content), 0)
    head = _Head(*_HEAD.unpack(content))
    if head.magic != _MAGIC:
        raise Invalid(f"{path} is not a memory diff")
    if head.version != _VERSION:
        raise Invalid(f"{path} is a memory diff of version {head.version}, not {_VERSION}")
    if head.page != PAGE:
        raise Invalid(f"{path} has pages of {head.page} bytes, this host has pages of {PAGE}")
    ram_pages, rest = divmod(head.ram_bytes, PAGE)
    if (
        rest
        or head.ram_bytes > _MAX_RAM_BYTES
        or not head.run_count <= head.page_count <= ram_pages
    ):
        raise Invalid(f"{path} is damaged: its sizes cannot be true")
    if size_bytes != head.stop + head.page_count * PAGE:
        raise Invalid(f"{path} is damaged: it has {size_bytes} bytes, not what its head says")
    return head


def _read_runs(path: Path, file: int, head: _Head) -> Runs:
    index = memoryview(bytearray(head.run_count * _RUN_BYTES))
    read_at(file, index, _HEAD.size)
    half = len(index) // 2
    runs = Runs(array("Q", index[:half].tobytes()), array("Q", index[half:].tobytes()))
    if not runs.fit(head.ram_bytes // PAGE) or runs.pages != head.page_count:
        raise Invalid(f"{path} is damaged: its runs do not fit its RAM")
    return runs


def inject(ram: Ram, diff: Diff) -> None:
    """Put a diff into the RAM of a fresh VM over the same base, before its device state is loaded.

    Raises Invalid and ToolFailed; the VM must then be ended.
    """
    if ram.size_bytes != diff.ram_bytes:
        raise Invalid(f"a diff of {diff.ram_bytes} bytes of RAM does not fit {ram.size_bytes}")

    def put(share: Diff) -> None:
        buffer = Buffer()
        for part, _ in share.parts(buffer):
            ram.write(part, buffer)

    # Each page is copied twice on its way, and once more when its place first becomes its own.
    with ThreadPoolExecutor(MOVERS, "inject") as movers:
        for _ in movers.map(put, diff.shares(MOVERS)):
            pass


def fold(base: Base, diff: Diff, target: Path, check: Check = go_on) -> Base:
    """A new base of `base`, which was verified, and a diff over it.

    Raises AlreadyExists, DiskFull, Invalid.
    """
    if (diff.base_digest, diff.ram_bytes) != (base.digest, base.size_bytes):
        raise Invalid(f"this diff is not over {base.path}")
    return build_base(base, diff.parts(Buffer()), target, check)
