"""A folder of this machine as one tar, made while it is sent.

All of it is root's, and was changed now: what is sent is what a sandbox would have if each file
were written to it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import posixpath
import tarfile
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from sandmartin.errors import Conflict

_PIECE_BYTES = 512 << 10
_END = bytes(2 * tarfile.BLOCKSIZE)


@dataclass(frozen=True, kw_only=True)
class Contents:
    """What a folder holds; paths are below it, "" is itself."""

    #: Mode of each.
    directories: Mapping[str, int]
    #: Size, which may change yet, and mode of each.
    files: Mapping[str, tuple[int, int]]
    #: Text of each.
    links: Mapping[str, str]


#: What a file is read within.
Reading = Callable[[Path], contextlib.AbstractContextManager[None]]
#: Told the path of a file, how much more of it was read, and whether that was all.
OnRead = Callable[[str, int, bool], Awaitable[None]]


async def nothing() -> AsyncGenerator[bytes, None]:
    """A tar without members."""
    yield _END


class Packing:
    """One folder on its way, under the name that it gets."""

    def __init__(
        self, source: Path, name: str, contents: Contents, *, reading: Reading, on_read: OnRead
    ) -> None:
        self._source = source
        self._name = name
        self._contents = contents
        self._reading = reading
        self._on_read = on_read
        self._now = int(time.time())
        self._pending = bytearray()

    async def pieces(self) -> AsyncGenerator[bytes, None]:
        """Raises Conflict for a file that becomes shorter meanwhile."""
        for path, mode in self._contents.directories.items():
            self._pending += self._header(path, tarfile.DIRTYPE, mode)
        for path, (_, mode) in self._contents.files.items():
            async with contextlib.aclosing(self._file(path, mode)) as pieces:
                async for piece in pieces:
                    yield piece
        for path, text in self._contents.links.items():
            self._pending += self._header(path, tarfile.SYMTYPE, 0o777, text=text)
        yield bytes(self._pending) + _END

    def _header(self, path: str, kind: bytes, mode: int, *, size: int = 0, text: str = "") -> bytes:
        member = tarfile.TarInfo(posixpath.join(self._name, path) if path else self._name)
        member.type, member.mode, member.size, member.linkname = kind, mode, size, text
        member.mtime = self._now
        return member.tobuf(tarfile.PAX_FORMAT, "utf-8", "strict")

    async def _file(self, path: str, mode: int) -> AsyncGenerator[bytes, None]:
        local = self._source / path
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._reading(local))
            file, piece, size = await asyncio.to_thread(_begin, local)
            stack.enter_context(file)
            left = size
            self._pending += self._header(path, tarfile.REGTYPE, mode, size=size)
            while piece:
                # What it has grown by since is left to the next time.
                piece = piece[:left]
                left -= len(piece)
                self._pending += piece
                await self._on_read(path, len(piece), False)
                if len(self._pending) >= _PIECE_BYTES:
                    yield bytes(self._pending)
                    self._pending.clear()
                piece = await asyncio.to_thread(file.read, _PIECE_BYTES) if left else b""
        if left:
            raise Conflict(f"{local} became shorter while it was read", hint="copy it again")
        self._pending += bytes(-size % tarfile.BLOCKSIZE)
        await self._on_read(path, 0, True)


def _begin(local: Path) -> tuple[IO[bytes], bytes, int]:
    """A file, how it begins, and how much of it will be read.

    Of a short one that is what was read: the kernel's files tell no true size.
    """
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(local.open("rb"))
        piece = file.read(_PIECE_BYTES)
        size = len(piece)
        if size == _PIECE_BYTES:
            size = max(os.fstat(file.fileno()).st_size, size)
        stack.pop_all()
        return file, piece, size
