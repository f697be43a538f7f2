"""The RAM of a VM that runs: where its process maps it, what was dirtied, its pages in and out.

The process is hostile: what it maps is checked, never trusted. It must stand still meanwhile.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import re
import struct
from array import array
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import starmap
from pathlib import Path

from sandmartin.agent.memory.runs import PAGE, Runs
from sandmartin.agent.proc import ProcessId
from sandmartin.errors import Conflict, Invalid, ToolFailed

#: Pages that are moved at a time where all need not be in memory at once.
_BATCH_PAGES = 2**20 // PAGE
_MAX_VECTORS = 1024
#: Threads that move pages: two are faster than one, and more are not.
MOVERS = 2
_LEAST_SHARE = 4 * 2**20 // PAGE

_libc = ctypes.CDLL(None, use_errno=True)
_Transfer = Callable[[int, "ctypes.Array[ctypes.c_uint64]", int, int, int, int], int]


def _transfer_call(name: str) -> _Transfer:
    call = _libc[name]
    word, pointer = ctypes.c_ulong, ctypes.c_void_p
    call.argtypes = [ctypes.c_int, pointer, word, pointer, word, word]
    call.restype = ctypes.c_ssize_t
    found: _Transfer = call
    return found


_readv = _transfer_call("process_vm_readv")
_writev = _transfer_call("process_vm_writev")


class Buffer:
    """Memory of our own that is resident before it is needed. For one thread at a time."""

    def __init__(self, size_bytes: int = _BATCH_PAGES * PAGE) -> None:
        self.reserve(size_bytes)

    def reserve(self, size_bytes: int) -> None:
        """Have room for exactly so many bytes, whole pages of them; what was held is lost.

        Takes some 0.3 ms per MB, so never while a VM stands still.
        """
        self.size_bytes = max(PAGE, -(-size_bytes // PAGE) * PAGE)
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE
        self._map = mmap.mmap(-1, self.size_bytes, flags=flags)
        # A guest's memory belongs into no core dump, and starting a child must not pay for it.
        self._map.madvise(mmap.MADV_DONTDUMP)
        self._map.madvise(mmap.MADV_DONTFORK)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))

    def view(self, size_bytes: int) -> memoryview:
        return memoryview(self._map)[:size_bytes]


@dataclass(frozen=True)
class FileId:
    """What /proc knows a file by, whether or not it still has a name."""

    device: int
    inode: int

    @classmethod
    def of(cls, file: int | Path) -> FileId:
        stat = os.fstat(file) if isinstance(file, int) else file.stat()
        return cls(stat.st_dev, stat.st_ino)


@dataclass(frozen=True)
class Piece:
    """One mapping of some pages of the RAM's file."""

    address: int
    pages: range

    @property
    def end(self) -> int:
        return self.address + len(self.pages) * PAGE

    @property
    def shift(self) -> int:
        """The address at which page 0 of the file would be."""
        return self.address - self.pages.start * PAGE


@dataclass(frozen=True)
class Ram:
    """The RAM of one process: a file that it maps privately, in one or more pieces."""

    process: ProcessId
    pieces: tuple[Piece, ...]

    @classmethod
    def find(cls, process: ProcessId, file: FileId) -> Ram:
        """Where `process` maps `file`.

        Raises Conflict when it does not, not privately, or not each page once; ToolFailed when
        the kernel does not say.
        """
        with _kernel_errors(process):
            maps = Path(f"/proc/{process.pid}/maps").read_bytes().splitlines()
            pieces = sorted(_pieces(process, maps, file), key=lambda piece: piece.pages.start)
        _check_alive(process)
        if not pieces:
            raise Conflict(f"process {process.pid} does not map this base")
        stop = 0
        for piece in pieces:
            if piece.pages.start != stop:
                raise Conflict(f"process {process.pid} maps page {stop} of its base not just once")
            stop = piece.pages.stop
        return cls(process, tuple(pieces))

    @property
    def pages(self) -> int:
        return self.pieces[-1].pages.stop

    @property
    def size_bytes(self) -> int:
        return self.pages * PAGE

    def scan(self) -> Runs:
        """The pages the process has dirtied, zeroed ones among them. Raises ToolFailed."""
        try:
            return self.scan_by_ioctl()
        except ToolFailed as error:
            if not isinstance(error.__cause__, OSError) or error.__cause__.errno != errno.ENOTTY:
                raise
            return self.scan_by_entries()

    def scan_by_ioctl(self) -> Runs:
        """As `scan`; a kernel before 6.7 has no such call."""
        return self._scan(_scan_by_ioctl)

    def scan_by_entries(self) -> Runs:
        """As `scan`, on every kernel."""
        return self._scan(_scan_by_entries)

    def _scan(self, scan: Callable[[int, Piece], tuple[array[int], array[int]]]) -> Runs:
        firsts, ends = array("Q"), array("Q")
        _check_alive(self.process)
        with _kernel_errors(self.process):
            handle = os.open(f"/proc/{self.process.pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
            try:
                for piece in self.pieces:
                    begins, stops = scan(handle, piece)
                    firsts.extend((address - piece.shift) // PAGE for address in begins)
                    ends.extend((address - piece.shift) // PAGE for address in stops)
            finally:
                os.close(handle)
        return Runs.of(firsts, ends)

    def read(self, runs: Runs, buffer: Buffer) -> memoryview:
        """Copy pages into `buffer`, one after the other; it grows if it must. Raises ToolFailed."""
        if runs.size_bytes > buffer.size_bytes:
            buffer.reserve(runs.size_bytes)
        self._transfer(_readv, runs, buffer)
        return buffer.view(runs.size_bytes)

    def parts(self, runs: Runs, buffer: Buffer) -> Iterator[tuple[Runs, memoryview]]:
        """Pages a buffer at a time; each part is gone when the next is asked for."""
        for part in runs.batches(buffer.size_bytes // PAGE):
            yield part, self.read(part, buffer)

    def write(self, runs: Runs, buffer: Buffer) -> None:
        """Write what the buffer holds, page after page, to `runs`. Raises ToolFailed."""
        if runs.size_bytes > buffer.size_bytes:
            raise Invalid(f"the buffer holds less than {runs.pages} pages")
        self._transfer(_writev, runs, buffer)

    def _transfer(self, call: _Transfer, runs: Runs, buffer: Buffer) -> None:
        share = max(_LEAST_SHARE, -(-runs.pages // MOVERS))
        parts, local = [], buffer.address
        for part in runs.batches(share):
            parts.append((local, *self._where(part)))
            local += part.size_bytes
        _check_alive(self.process)
        move = partial(_move, call, self.process.pid)
        with _kernel_errors(self.process):
            if len(parts) < 2:
                list(starmap(move, parts))
                return
            with ThreadPoolExecutor(MOVERS, "pages") as movers:
                list(movers.map(move, *zip(*parts, strict=True)))

    def _where(self, runs: Runs) -> tuple[array[int], array[int]]:
        """Addresses and sizes, in the process, of some pages. Raises Invalid."""
        addresses, sizes = array("Q"), array("Q")
        for piece in self.pieces:
            part, shift = runs.within(piece.pages), piece.shift
            addresses.extend(first * PAGE + shift for first in part.firsts)
            sizes.extend((end - first) * PAGE for first, end in part)
        if sum(sizes) != runs.size_bytes:
            raise Invalid(f"the pages are not all inside a RAM of {self.pages} pages")
        return addresses, sizes


def _check_alive(process: ProcessId) -> None:
    # The number alone could by now be another process's.
    if not process.alive():
        raise ToolFailed(f"process {process.pid} has ended")


@contextlib.contextmanager
def _kernel_errors(process: ProcessId) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ToolFailed(
            f"the memory of process {process.pid} is out of reach: {error.strerror}"
        ) from error


# Where it is.


def _pieces(process: ProcessId, maps: list[bytes], file: FileId) -> list[Piece]:
    found = []
    for line in maps:
        span, permissions, offset, device, inode, *_ = line.split(None, 5)
        if int(inode) != file.inode or not _same_device(process, span, device, file):
            continue
        if permissions[3:4] != b"p":
            raise Conflict(f"process {process.pid} maps its base shared")
        begin, end = (int(address, 16) for address in span.split(b"-"))
        first = int(offset, 16) // PAGE
        found.append(Piece(begin, range(first, first + (end - begin) // PAGE)))
    return found


def _same_device(process: ProcessId, span: bytes, device: bytes, file: FileId) -> bool:
    major, minor = (int(number, 16) for number in device.split(b":"))
    if os.makedev(major, minor) == file.device:
        return True
    # A subvolume of btrfs has another device number for stat than for the kernel's list; that a
    # link into a process may be followed needs a capability.
    with contextlib.suppress(PermissionError, FileNotFoundError):
        return FileId.of(Path(f"/proc/{process.pid}/map_files/{span.decode()}")) == file
    return False


# What was dirtied: present or swapped, and not a page of the file. A page swapped out of a private
# mapping is always a copy; but a file's page that is just being migrated says "swapped" as well.

_SCAN = struct.Struct("@12Q")
_PAGEMAP_SCAN = 0xC0606610
_IS_FILE, _IS_PRESENT, _IS_SWAPPED = 1 << 2, 1 << 3, 1 << 4
_REGIONS = 1024


def _scan_by_ioctl(handle: int, piece: Piece) -> tuple[array[int], array[int]]:
    """Begins and ends of dirtied regions, by the kernel's own scan."""
    begins, ends = array("Q"), array("Q")
    regions = array("Q", bytes(_REGIONS * 24))
    at = piece.address
    while at < piece.end:
        either = _IS_PRESENT | _IS_SWAPPED
        call = bytearray(
            _SCAN.pack(
                *(_SCAN.size, 0, at, piece.end, 0),
                *(regions.buffer_info()[0], _REGIONS, 0),
                # Inverted and then required; either of; told in the answer (never, so that
                # regions which differ in nothing else are one).
                *(_IS_FILE, _IS_FILE, either, _IS_FILE),
            )
        )
        found = fcntl.ioctl(handle, _PAGEMAP_SCAN, call)
        begins.extend(regions[0 : found * 3 : 3])
        ends.extend(regions[1 : found * 3 : 3])
        # Not by the kernel's own word for where it stopped: after a walk of several rounds that
        # came to its end, that is left over from an earlier round, and regions would come twice.
        at = ends[-1] if found == _REGIONS else piece.end
    return begins, ends


_ENTRY_BYTES = 8
_ENTRIES_READ = 2**17
#: The topmost byte of an entry: bit 63 present, 62 swapped, 61 a page of the file.
_DIRTIED = re.compile(
    b"[%b]+" % re.escape(bytes(top for top in range(256) if top & 0xC0 and not top & 0x20))
)


def _scan_by_entries(handle: int, piece: Piece) -> tuple[array[int], array[int]]:
    """The same from the table with an entry for each page."""
    tops = bytearray()
    at, stop = (address // PAGE * _ENTRY_BYTES for address in (piece.address, piece.end))
    while at < stop:
        entries = os.pread(handle, min(_ENTRIES_READ * _ENTRY_BYTES, stop - at), at)
        if not entries:
            raise OSError(errno.ESRCH, os.strerror(errno.ESRCH))
        tops += entries[7::8]
        at += len(entries)
    begins, ends = array("Q"), array("Q")
    for found in _DIRTIED.finditer(tops):
        begins.append(piece.address + found.start() * PAGE)
        ends.append(piece.address + found.end() * PAGE)
    return begins, ends


# Pages in and out.


def _move(call: _Transfer, pid: int, local: int, addresses: array[int], sizes: array[int]) -> None:
    """Move all that lies at `addresses` from or to memory of ours, where it is one piece."""
    at = 0
    while at < len(addresses):
        until = min(at + _MAX_VECTORS, len(addresses))
        remote = array("Q", bytes(16 * (until - at)))
        remote[0::2], remote[1::2] = addresses[at:until], sizes[at:until]
        want = sum(sizes[at:until])
        mine = (ctypes.c_uint64 * 2)(local, want)
        done = call(pid, mine, 1, remote.buffer_info()[0], until - at, 0)
        if done <= 0:
            number = ctypes.get_errno() if done else errno.EFAULT
            raise OSError(number, os.strerror(number))
        local += done
        if done == want:
            at = until
            continue
        while done >= sizes[at]:
            done -= sizes[at]
            at += 1
        addresses[at] += done
        sizes[at] -= done
