"""How VMs get at bases.

A VM is given a descriptor under the name `/proc/self/fd/N`. It is of the file itself where the
VMM opens its RAM's file read-only. A VMM that opens it to write, and keeps it so for life, gets a
copy in memory instead, sealed against every change. What must stay true: a base was verified
before its first lease, is loaded once however many ask, and stays while it is leased.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import os
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path

from sandmartin.agent.memory.base import Base, chunks, digest_of, put_sparse
from sandmartin.agent.memory.ram import FileId
from sandmartin.agent.memory.whole import opened
from sandmartin.agent.proc import ProcessId
from sandmartin.errors import Exhausted, Invalid

_SEALS = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL


class _Held:
    """A base that is open, or is being opened."""

    def __init__(self, digest: str, opening: asyncio.Future[int]) -> None:
        self.digest = digest
        self.opening = opening
        #: None until it is open.
        self.fd: int | None = None
        self.resident_bytes = 0
        self.leases = 0


class Lease:
    """The right to use a base; it lasts until it is released."""

    def __init__(self, store: BaseStore, base: Base, held: _Held, fd: int) -> None:
        self._store = store
        self._held: _Held | None = held
        self.base = base
        #: To be passed on to the VM's process under the same number.
        self.fd = fd
        #: By which the VM's RAM is found, now and after a restart of the agent.
        self.file = FileId.of(self.fd)

    @property
    def path(self) -> Path:
        """What the VM's process opens, once it has `fd`."""
        return Path(f"/proc/self/fd/{self.fd}")

    def release(self) -> None:
        """Give it back. Idempotent."""
        held, self._held = self._held, None
        if held is not None:
            self._store._release(held)


class BaseStore:
    """The bases in use on this host.

    With `in_memory` VMs get sealed copies in memory; those that nobody uses are given up, least
    recently used first, while all together take more than `budget_bytes`.
    """

    def __init__(self, *, in_memory: bool, budget_bytes: int = 0) -> None:
        self._in_memory = in_memory
        self._budget_bytes = budget_bytes
        #: By checksum, least recently used first.
        self._held: OrderedDict[str, _Held] = OrderedDict()
        self._closing: set[asyncio.Future[None]] = set()
        self._verified: set[tuple[str, FileId, int]] = set()

    @property
    def resident_bytes(self) -> int:
        """Host memory that the copies of bases take."""
        return sum(held.resident_bytes for held in self._held.values())

    async def acquire(self, base: Base) -> Lease:
        """A lease of `base`, which is verified and loaded if it is not held.

        Raises NotFound, Exhausted; Invalid when the file is not what `base` says, or is writable.
        """
        held = self._held.get(base.digest)
        if held is None:
            opening = asyncio.ensure_future(asyncio.to_thread(self._open, base))
            held = self._hold(base.digest, opening)
        return await self._lease(base, held)

    async def adopt(self, base: Base, process: ProcessId, file: FileId) -> Lease | None:
        """A lease of the copy that a VM of an earlier agent has open, so that none is made anew.

        None when it has not got one, or another one is held already.
        """
        if base.digest not in self._held:
            found = await asyncio.to_thread(_find_copy, base, process, file)
            if found is None:
                return None
            if base.digest in self._held:
                os.close(found)
            else:
                opening = asyncio.get_running_loop().create_future()
                opening.set_result(found)
                self._hold(base.digest, opening)
        lease = await self.acquire(base)
        if lease.file == file:
            return lease
        lease.release()
        return None

    async def close(self) -> None:
        """Give up everything. VMs keep what they have."""
        openings = [held.opening for held in self._held.values()]
        await asyncio.gather(*openings, return_exceptions=True)
        for digest, held in list(self._held.items()):
            if held.fd is not None:
                self._drop(digest, held.fd)
        await asyncio.gather(*self._closing)

    def _hold(self, digest: str, opening: asyncio.Future[int]) -> _Held:
        held = self._held[digest] = _Held(digest, opening)

        def settle(done: asyncio.Future[int]) -> None:
            if not done.cancelled() and done.exception() is None:
                held.fd = done.result()
                held.resident_bytes = _memory_bytes(held.fd)
            elif self._held.get(digest) is held:
                del self._held[digest]

        if opening.done():
            settle(opening)
        else:
            opening.add_done_callback(settle)
        return held

    async def _lease(self, base: Base, held: _Held) -> Lease:
        # Counted before the waiting, or it could be given up meanwhile.
        held.leases += 1
        try:
            # Not cancelled with the one that asked first: others wait for the same.
            lease = Lease(self, base, held, await asyncio.shield(held.opening))
        except BaseException:
            self._release(held)
            raise
        self._evict()
        return lease

    def _release(self, held: _Held) -> None:
        held.leases -= 1
        if self._held.get(held.digest) is held:
            self._held.move_to_end(held.digest)
            self._evict()

    def _evict(self) -> None:
        for digest, held in list(self._held.items()):
            if held.leases or held.fd is None:
                continue
            # An open file costs no memory, but keeps the disk space of one that was removed.
            if not held.resident_bytes or self.resident_bytes > self._budget_bytes:
                self._drop(digest, held.fd)

    def _drop(self, digest: str, fd: int) -> None:
        del self._held[digest]
        # Closing the last descriptor of a copy frees all its pages.
        closing = asyncio.get_running_loop().run_in_executor(None, os.close, fd)
        self._closing.add(closing)
        closing.add_done_callback(self._closing.discard)

    def _open(self, base: Base) -> int:
        with opened(base.path) as file:
            stat = os.fstat(file)
            if stat.st_mode & 0o222 or stat.st_uid not in {0, os.geteuid()}:
                raise Invalid(f"base {base.path} could be written to by others")
            if self._in_memory:
                return _sealed_copy(base, file)
            known = (base.digest, FileId.of(file), stat.st_ctime_ns)
            if known not in self._verified:
                _check(base, file, digest_of(stat.st_size, chunks(file)))
                self._verified.add(known)
            return os.dup(file)


def _check(base: Base, file: int, digest: str) -> None:
    if (os.fstat(file).st_size, digest) != (base.size_bytes, base.digest):
        raise Invalid(
            f"base {base.path} is not what was written: its checksum is {digest[:12]},"
            f" not {base.digest[:12]}"
        )


def _sealed_copy(base: Base, file: int) -> int:
    """A copy in memory that nobody can change; what is in it was verified. Its name is for `ps`."""
    with contextlib.ExitStack() as undo:
        flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
        copy = os.memfd_create(f"sandmartin-base-{base.digest[:12]}", flags)
        undo.callback(os.close, copy)
        size_bytes = os.fstat(file).st_size
        try:
            os.ftruncate(copy, size_bytes)
            _check(base, file, digest_of(size_bytes, _copied(file, copy)))
        except OSError as error:
            if error.errno not in {errno.ENOMEM, errno.ENOSPC}:
                raise
            raise Exhausted(
                f"the host has too little memory for base {base.path}",
                hint="destroy sandboxes, or use a QEMU that opens a base read-only (10 or later)",
            ) from error
        fcntl.fcntl(copy, fcntl.F_ADD_SEALS, _SEALS)
        undo.pop_all()
        return copy


def _copied(source: int, target: int) -> Iterator[tuple[int, memoryview]]:
    for offset, chunk in chunks(source):
        put_sparse(target, offset, chunk, punch=False)
        yield offset, chunk


def _sealed(file: int) -> bool:
    try:
        return fcntl.fcntl(file, fcntl.F_GET_SEALS) & _SEALS == _SEALS
    except OSError:
        return False


def _memory_bytes(file: int) -> int:
    return os.fstat(file).st_blocks * 512 if _sealed(file) else 0


def _find_copy(base: Base, process: ProcessId, file: FileId) -> int | None:
    """A descriptor of the copy of `base` that `process` has open, verified; or None."""
    copy = None
    with contextlib.suppress(OSError):
        for handle in Path(f"/proc/{process.pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                if FileId.of(handle) == file:
                    copy = os.open(handle, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
                    break
    if copy is None:
        return None
    # The process is hostile: only what is sealed and has the right content is what we made.
    if process.alive() and FileId.of(copy) == file and _sealed(copy):
        with contextlib.suppress(Invalid):
            _check(base, copy, digest_of(os.fstat(copy).st_size, chunks(copy)))
            return copy
    os.close(copy)
    return None
