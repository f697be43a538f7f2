"""Archives: tar files whose members are sparse where files are, written and read as they pass.

The form is POSIX tar, with sparse files as GNU tar writes them (PAX, version 1.0), so that any
recent tar unpacks one, and can make one. A hole costs nothing on the way. Nothing is held but the
piece at hand and the map of one file, both of bounded size: what comes in is hostile. A member's
digest is of its bytes in the archive, map and data, so it costs what was written and no more.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import tarfile
from array import array
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from sandmartin.agent.memory.base import put_sparse
from sandmartin.agent.memory.runs import PAGE
from sandmartin.agent.memory.whole import read_at, write_at
from sandmartin.errors import Invalid

_BLOCK = 512
PIECE_BYTES = 512 * 2**10
#: Pieces of data of one sparse file; what has more is sent with some of its zeroes.
_MAX_EXTENTS = 1 << 19
_MAX_MEMBERS = 200
_MAX_RECORDS_BYTES = 64 << 10
_MAX_TAIL_BYTES = 1 << 20
#: More than any disk or memory of a sandbox; bounds what a map can make us do.
_MAX_FILE_BYTES = 1 << 42
_SPARSE = "GNU.sparse."
_SKIPPED = {tarfile.XGLTYPE, tarfile.DIRTYPE}
_FILES = {tarfile.REGTYPE, tarfile.AREGTYPE}


def in_blocks(size: int) -> int:
    """`size` rounded up to whole blocks."""
    return -(-size // _BLOCK) * _BLOCK


# Writing.


def pack(
    contents: Mapping[str, bytes],
    files: Mapping[str, int],
    seal: tuple[str, Callable[[Mapping[str, str]], bytes]],
) -> Iterator[bytes]:
    """An archive of contents and of open files, in this order, in pieces.

    `seal` names its last member, and makes that of the digests of all others. Raises Invalid when
    a file becomes shorter meanwhile.
    """
    digests: dict[str, str] = {}
    for name, content in contents.items():
        yield _head(name, len(content)) + _padded(content)
        digests[name] = hashlib.sha256(content).hexdigest()
    for name, file in files.items():
        digest = hashlib.sha256()
        yield from _file(name, file, digest.update)
        digests[name] = digest.hexdigest()
    name, make = seal
    content = make(digests)
    yield _head(name, len(content)) + _padded(content) + bytes(2 * _BLOCK)


async def in_thread(pieces: Iterator[bytes]) -> AsyncGenerator[bytes, None]:
    """The same pieces, each made in a thread."""
    while (piece := await asyncio.to_thread(next, pieces, None)) is not None:
        yield piece


def _padded(content: bytes) -> bytes:
    return content.ljust(in_blocks(len(content)), b"\0")


def _head(name: str, size_bytes: int, **sparse: int) -> bytes:
    info = tarfile.TarInfo(f"GNUSparseFile.0/{name}" if sparse else name)
    info.size, info.mode = size_bytes, 0o600
    if sparse:
        numbers = {_SPARSE + key: str(value) for key, value in sparse.items()}
        info.pax_headers = {_SPARSE + "name": name, **numbers}
    return info.tobuf(tarfile.PAX_FORMAT)


def _file(name: str, file: int, update: Callable[[bytes | memoryview], None]) -> Iterator[bytes]:
    size_bytes = os.fstat(file).st_size
    extents = _extents(file, size_bytes)
    numbers = (number for extent in extents for number in extent)
    index = _padded(b"".join(b"%d\n" % number for number in (len(extents), *numbers)))
    total = len(index) + sum(size for _, size in extents)
    yield _head(name, total, major=1, minor=0, realsize=size_bytes)
    update(index)
    yield index
    for offset, size in extents:
        for at in range(offset, offset + size, PIECE_BYTES):
            piece = memoryview(bytearray(min(PIECE_BYTES, offset + size - at)))
            read_at(file, piece, at)
            update(piece)
            yield bytes(piece)
    if rest := bytes(-total % _BLOCK):
        yield rest


def _extents(file: int, size_bytes: int) -> Sequence[tuple[int, int]]:
    """Where a file has data, as offset and size; at its end, if need be, nothing of size 0."""
    gap = 1
    while len(found := list(_data(file, size_bytes, gap))) > _MAX_EXTENTS:
        gap = max(PAGE, gap * 2)
    if not found or sum(found[-1]) < size_bytes:
        # By which a tar knows how long the file is.
        found.append((size_bytes, 0))
    return found


def _data(file: int, size_bytes: int, gap: int) -> Iterator[tuple[int, int]]:
    """Pieces of data that have holes of `gap` bytes at least between them."""
    begin = end = at = 0
    while at < size_bytes:
        try:
            data = os.lseek(file, at, os.SEEK_DATA)
        except OSError:
            # There is none any more.
            break
        at = min(os.lseek(file, data, os.SEEK_HOLE), size_bytes)
        if end and data - end < gap:
            end = at
            continue
        if end:
            yield begin, end - begin
        begin, end = data, at
    if end:
        yield begin, end - begin


# Reading.


class _Source:
    """A stream of bytes, taken in pieces of the size that is asked for."""

    def __init__(self, chunks: AsyncIterator[bytes]) -> None:
        self._chunks = chunks
        self._chunk = memoryview(b"")

    async def take(self, size: int) -> bytes:
        """The next `size` bytes. Raises Invalid when there are no more."""
        parts: list[memoryview] = []
        while size:
            if not self._chunk:
                chunk = await anext(self._chunks, None)
                if chunk is None:
                    raise Invalid("the archive is cut off", hint="send it again, whole")
                self._chunk = memoryview(chunk)
            part, self._chunk = self._chunk[:size], self._chunk[size:]
            parts.append(part)
            size -= len(part)
        return b"".join(parts)

    async def drain(self) -> None:
        """Take what is left, as a tar fills up its last record. Raises Invalid for much."""
        left = _MAX_TAIL_BYTES
        async for chunk in self._chunks:
            left -= len(chunk)
            if left < 0:
                raise Invalid("the archive goes on after its end")


@dataclass
class Member:
    """A member, which must be read or saved before the next is asked for."""

    name: str
    #: Of a sparse file, how long it is; None for any other.
    real_bytes: int | None
    _left: int
    _source: _Source

    def __post_init__(self) -> None:
        self._size_bytes = self._left
        self._digest = hashlib.sha256()

    @property
    def digest(self) -> str:
        """Of all that was read."""
        return self._digest.hexdigest()

    async def read(self, limit: int) -> bytes:
        """A small content. Raises Invalid when it is larger than `limit`."""
        if self.real_bytes is not None or self._left > limit:
            raise Invalid(f"{self.name} in the archive is larger than {limit} bytes")
        return await self._take(self._left)

    async def save(self, file: int, check: Callable[[], None]) -> None:
        """Write it to an open, empty file; `check` is called before every piece.

        Raises Invalid, OSError.
        """
        extents = [(0, self._left)] if self.real_bytes is None else await self._map()
        size_bytes = self._left if self.real_bytes is None else self.real_bytes
        if size_bytes > _MAX_FILE_BYTES:
            raise Invalid(f"{self.name} in the archive is larger than {_MAX_FILE_BYTES} bytes")
        await asyncio.to_thread(os.ftruncate, file, size_bytes)
        place = _Place(file, extents)
        while self._left:
            piece = await self._take(min(PIECE_BYTES, self._left), update=False)
            check()
            await asyncio.to_thread(self._put, place, piece)

    def _put(self, place: _Place, piece: bytes) -> None:
        self._digest.update(piece)
        place.put(memoryview(piece))

    async def _take(self, size: int, *, update: bool = True) -> bytes:
        if size > self._left:
            raise self._bad_map()
        content = await self._source.take(size)
        self._left -= size
        if update:
            self._digest.update(content)
        return content

    async def _map(self) -> list[tuple[int, int]]:
        """Where its data goes. Raises Invalid."""
        numbers, rest = array("Q"), b""
        while not numbers or len(numbers) < 1 + 2 * numbers[0]:
            *lines, rest = (rest + await self._take(_BLOCK)).split(b"\n")
            if len(rest) > _BLOCK or not all(each.isdigit() and len(each) < 19 for each in lines):
                raise self._bad_map()
            numbers.extend(map(int, lines))
            if numbers and numbers[0] > _MAX_EXTENTS + 1:
                raise self._bad_map()
        extents = list(zip(numbers[1::2], numbers[2::2], strict=True))
        at = 0
        for offset, size in extents:
            if offset < at:
                raise self._bad_map()
            at = offset + size
        if at > (self.real_bytes or 0) or sum(numbers[2::2]) != self._left:
            raise self._bad_map()
        return extents

    def _bad_map(self) -> Invalid:
        return Invalid(f"the map of {self.name} in the archive cannot be true")

    async def finish(self) -> None:
        """Pass what fills up its last block."""
        if self._left:
            raise AssertionError(f"{self.name} was not read")
        await self._source.take(-self._size_bytes % _BLOCK)


class _Place:
    """A file that is filled extent by extent; what is zero becomes or stays a hole."""

    def __init__(self, file: int, extents: Sequence[tuple[int, int]]) -> None:
        self._file = file
        self._extents = iter(extents)
        self._at = self._left = 0

    def put(self, data: memoryview) -> None:
        while data:
            while not self._left:
                self._at, self._left = next(self._extents)
            size = min(self._left, len(data))
            self._write(data[:size])
            data = data[size:]
            self._at, self._left = self._at + size, self._left - size

    def _write(self, data: memoryview) -> None:
        whole = len(data) // PAGE * PAGE
        put_sparse(self._file, self._at, data[:whole], punch=False)
        write_at(self._file, data[whole:], self._at + whole)


async def members(chunks: AsyncIterator[bytes]) -> AsyncGenerator[Member, None]:
    """The files in an archive, as they come. Raises Invalid when it is none, or cut off."""
    source = _Source(chunks)
    records: dict[str, str] = {}
    for _ in range(_MAX_MEMBERS):
        info = _parse(await source.take(_BLOCK))
        if info is None:
            await source.drain()
            return
        if info.type == tarfile.XHDTYPE:
            records = _records(await _skip(source, info.size))
        elif info.type in _SKIPPED:
            await _skip(source, info.size)
            records = {}
        elif info.type in _FILES:
            member = _member(info, records, source)
            records = {}
            yield member
            await member.finish()
        else:
            raise Invalid(f"{info.name[:80]!r} in the archive is no file")
    raise Invalid(f"the archive has more than {_MAX_MEMBERS} members")


def _parse(block: bytes) -> tarfile.TarInfo | None:
    """A header; None for the end. Raises Invalid."""
    if not any(block):
        return None
    try:
        info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError as error:
        raise Invalid(
            "this is no archive of a template, or is damaged",
            hint="`sandmartin template pull` makes one",
        ) from error
    if info.size < 0:
        raise Invalid(f"{info.name[:80]!r} in the archive has a size that cannot be true")
    return info


async def _skip(source: _Source, size: int) -> bytes:
    """What is no file: records of the next one."""
    if size > _MAX_RECORDS_BYTES:
        raise Invalid(f"a header of {size} bytes in the archive cannot be true")
    return (await source.take(in_blocks(size)))[:size]


def _records(content: bytes) -> dict[str, str]:
    """PAX records: a length, a space, a name, `=`, a value, a line's end. Raises Invalid."""
    found: dict[str, str] = {}
    while content:
        length, space, _ = content.partition(b" ")
        if not space or not length.isdigit() or len(length) > 6:
            raise Invalid("a header of the archive is damaged")
        record, content = content[: int(length)], content[int(length) :]
        name, equals, value = record[len(length) + 1 :].partition(b"=")
        if not equals or not value.endswith(b"\n"):
            raise Invalid("a header of the archive is damaged")
        found[name.decode(errors="replace")] = value[:-1].decode(errors="replace")
    return found


def _member(info: tarfile.TarInfo, records: Mapping[str, str], source: _Source) -> Member:
    name = records.get(_SPARSE + "name") or records.get("path") or info.name
    size_bytes = _number(records, "size", info.size)
    real_bytes = None
    if any(key.startswith(_SPARSE) for key in records):
        version = records.get(_SPARSE + "major"), records.get(_SPARSE + "minor")
        if version != ("1", "0"):
            raise Invalid(
                "a sparse file in the archive is of an old form",
                hint="make it with tar --format=posix --sparse --sparse-version=1.0",
            )
        real_bytes = _number(records, _SPARSE + "realsize", 0)
    return Member(name.removeprefix("./"), real_bytes, size_bytes, source)


def _number(records: Mapping[str, str], name: str, default: int) -> int:
    text = records.get(name, str(default))
    if not (text.isascii() and text.isdigit()) or len(text) > 18:
        raise Invalid(f"{name} of a file in the archive is no number")
    return int(text)
