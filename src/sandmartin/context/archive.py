"""Reading a context that somebody uploaded: tar, gzipped tar or zip, and nothing on trust.

What leaves this module has names that stay inside, files, directories and links, and nothing else;
names, sizes, counts and depths are bounded before anything is held, and no link is followed when
content is read. Meant for a child without rights (`python -m sandmartin.context`), but safe
without one:
all it ever writes is an unnamed temporary file that holds what was compressed.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import stat
import struct
import tarfile
import tempfile
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, cast

from sandmartin.context.source import InvalidBuild, quoted
from sandmartin.context.tree import Entry, Kind, Selection, Tree, write_tar

_CHUNK_BYTES = 2**18
#: What one tar header with its extensions may take.
_HEADER_BYTES = 2**16
_LONGEST_NAME_BYTES = 255
_LONGEST_PATH_BYTES = 4095
_ZIP_ENTRY, _ZIP_END, _ZIP64_LOCATOR = b"PK\x01\x02", b"PK\x05\x06", b"PK\x06\x07"
_ZIP_END_BYTES, _ZIP64_LOCATOR_BYTES = 22, 20
_HINT = "send a tar, a gzipped tar or a zip of files, directories and links"


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What an archive may hold, unpacked."""

    size_bytes: int = 2 * 2**30
    count: int = 100_000

    def check_size(self, size_bytes: int) -> None:
        if size_bytes > self.size_bytes:
            raise InvalidBuild(
                f"the archive holds more than {self.size_bytes} bytes",
                hint="leave out what the build does not need with a .dockerignore",
            )

    def check_count(self, count: int) -> None:
        if count > self.count:
            raise InvalidBuild(
                f"the archive has more than {self.count} members",
                hint="leave out what the build does not need with a .dockerignore",
            )


class Archive(ABC):
    """An archive that was checked: its tree, and the content of its files."""

    tree: Tree

    @abstractmethod
    def open(self, path: str) -> IO[bytes]:
        """The content of the file at `path` of the tree."""

    def write(self, out: IO[bytes]) -> None:
        """Write all of it as the one plain tar that stands for these files."""
        write_tar(out, sorted(self.tree.entries.items()), self.open)

    def write_selection(self, selection: Selection, out: IO[bytes], name: str = "") -> None:
        """Write what a COPY takes as a tar to be unpacked at its destination.

        `name` is what a single file is called there, when the destination is the file itself.
        """
        if name and selection.needs_directory:
            raise ValueError("only a single file can be renamed")
        taken = {name or each.to: each for each in selection.taken}
        entries = ((to, each.entry) for to, each in taken.items())
        write_tar(out, entries, lambda to: self.open(taken[to].path))


@contextlib.contextmanager
def open_archive(file: IO[bytes], limits: Limits | None = None) -> Iterator[Archive]:
    """The archive in `file`, which can seek. Raises InvalidBuild, which names the bad member."""
    limits = limits or Limits()
    with contextlib.ExitStack() as stack:
        # Not around the yield: what the caller does with the archive is not the archive's fault.
        with _refusals():
            start = file.read(2)
            file.seek(0)
            if start == b"\x1f\x8b":
                file = stack.enter_context(_unpacked(file, limits))
            archive: Archive = (_Zip if start == b"PK" else _Tar)(file, limits)
        yield archive


@contextlib.contextmanager
def _refusals() -> Iterator[None]:
    """What the standard library says about a broken archive becomes ours."""
    try:
        yield
    except (
        tarfile.TarError,
        zipfile.BadZipFile,
        zlib.error,
        struct.error,
        EOFError,
        gzip.BadGzipFile,
        NotImplementedError,
        ValueError,
        OverflowError,
        IndexError,
        RecursionError,
    ) as error:
        raise InvalidBuild("the archive cannot be read; it is damaged", hint=_HINT) from error


def _unpacked(file: IO[bytes], limits: Limits) -> IO[bytes]:
    """What was gzipped, in a file without a name: a seek in gzip would unpack all before it."""
    # Padding and headers come on top of the content; the content itself is counted later.
    allowed = limits.size_bytes + limits.count * 3 * tarfile.BLOCKSIZE + tarfile.RECORDSIZE
    with contextlib.ExitStack() as stack:
        plain = stack.enter_context(tempfile.TemporaryFile())
        with gzip.GzipFile(fileobj=file) as zipped:
            size = 0
            while chunk := zipped.read(_CHUNK_BYTES):
                size += len(chunk)
                if size > allowed:
                    limits.check_size(size)
                plain.write(chunk)
        plain.seek(0)
        stack.pop_all()
        return plain


class _Members:
    """Collects checked entries, and counts."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._size_bytes = 0
        self._count = 0
        self.entries: dict[str, Entry] = {}

    def take_name(self, raw: str) -> str:
        """The path that a member is at; empty for the root. Raises InvalidBuild."""
        self._count += 1
        self._limits.check_count(self._count)
        parts = [part for part in raw.split("/") if part not in ("", ".")]
        path = "/".join(parts)
        try:
            sizes = [len(part.encode()) for part in parts]
        except UnicodeEncodeError:
            raise _bad(raw, "its name is not UTF-8") from None
        if raw.startswith("/"):
            raise _bad(raw, "its path is absolute")
        if ".." in parts:
            raise _bad(raw, "its path climbs out of the archive")
        if "\0" in raw:
            raise _bad(raw, "its name has a zero byte")
        if (
            max(sizes, default=0) > _LONGEST_NAME_BYTES
            or sum(sizes) + len(sizes) > _LONGEST_PATH_BYTES
        ):
            raise _bad(raw, "its name is too long")
        return path

    def take_size(self, raw: str, size_bytes: int) -> None:
        """Count content before it is read."""
        if size_bytes < 0:
            raise _bad(raw, "its size is negative")
        self._size_bytes += size_bytes
        self._limits.check_size(self._size_bytes)

    def add(self, raw: str, path: str, entry: Entry) -> None:
        if not path:
            if entry.kind is not Kind.DIRECTORY:
                raise _bad(raw, "it has no name")
            return
        if entry.kind is Kind.LINK:
            _check_target(raw, entry.target)
        old = self.entries.get(path)
        if old is not None and old.kind is not entry.kind:
            raise _bad(raw, f"it is there twice, as a {old.kind} and a {entry.kind}")
        self.entries[path] = entry

    def tree(self) -> Tree:
        tree = Tree(self.entries)
        self._limits.check_count(len(tree.entries))
        return tree


def _bad(raw: str, why: str) -> InvalidBuild:
    return InvalidBuild(
        f"member {quoted(raw)} of the archive is refused: {why}", text=raw, hint=_HINT
    )


def _check_target(raw: str, target: str) -> None:
    """A link may lead anywhere, as it will in the sandbox: here nobody ever follows it."""
    try:
        encoded = target.encode()
    except UnicodeEncodeError:
        raise _bad(raw, "what it links to is not UTF-8") from None
    if not target or "\0" in target or len(encoded) > _LONGEST_PATH_BYTES:
        raise _bad(raw, "what it links to is no path")


def _sha256(content: IO[bytes], raw: str, size_bytes: int) -> str:
    digest, left = hashlib.sha256(), size_bytes
    while chunk := content.read(min(_CHUNK_BYTES, left + 1)):
        left -= len(chunk)
        if left < 0:
            break
        digest.update(chunk)
    if left:
        raise _bad(raw, "it is not as long as it says")
    return digest.hexdigest()


class _Bounded(io.RawIOBase):
    """A tar's file, of which headers may not take more than they should.

    The library reads an extended header whole, however long it says it is.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.left = _HEADER_BYTES

    def read(self, size: int = -1) -> bytes:
        if size < 0 or size > self.left:
            raise InvalidBuild("the archive has a header that is too long", hint=_HINT)
        self.left -= size
        return self._file.read(size)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()


class _Tar(Archive):
    def __init__(self, file: IO[bytes], limits: Limits) -> None:
        self._file = file
        self._places: dict[str, tuple[int, int]] = {}
        members = _Members(limits)
        bounded = _Bounded(file)
        with tarfile.open(fileobj=cast("IO[bytes]", bounded), mode="r:") as tar:
            while (member := tar.next()) is not None:
                self._take(member, members)
                # It keeps all that it has seen.
                tar.members.clear()  # type: ignore[attr-defined]
                bounded.left = _HEADER_BYTES
        self.tree = members.tree()

    def _take(self, member: tarfile.TarInfo, members: _Members) -> None:
        raw = member.name
        path = members.take_name(raw)
        mode = member.mode & 0o7777
        if member.issparse():
            raise _bad(raw, "it is sparse")
        members.take_size(raw, member.size)
        if member.isdir():
            entry = Entry(Kind.DIRECTORY, mode)
        elif member.issym():
            entry = Entry(Kind.LINK, 0o777, target=member.linkname)
        elif member.islnk():
            entry = self._linked(raw, path, member.linkname, members)
        elif member.isreg():
            entry = self._file_entry(raw, path, member, mode)
        else:
            raise _bad(raw, "it is neither a file nor a directory nor a link")
        members.add(raw, path, entry)

    def _file_entry(self, raw: str, path: str, member: tarfile.TarInfo, mode: int) -> Entry:
        here = self._file.tell()
        self._places[path] = (member.offset_data, member.size)
        with self.open(path) as content:
            sha256 = _sha256(content, raw, member.size)
        self._file.seek(here)
        return Entry(Kind.FILE, mode, member.size, sha256)

    def _linked(self, raw: str, path: str, target: str, members: _Members) -> Entry:
        """A hard link is the same file once more, and must come after it."""
        first = "/".join(part for part in target.split("/") if part not in ("", "."))
        entry = members.entries.get(first)
        if entry is None or entry.kind is not Kind.FILE:
            raise _bad(raw, f"it is a hard link to {quoted(target)}, which is no file before it")
        members.take_size(raw, entry.size_bytes)
        self._places[path] = self._places[first]
        return entry

    def open(self, path: str) -> IO[bytes]:
        offset, size_bytes = self._places[path]
        return cast("IO[bytes]", io.BufferedReader(_Part(self._file, offset, size_bytes)))


class _Part(io.RawIOBase):
    """A stretch of a file that others read too."""

    def __init__(self, file: IO[bytes], offset: int, size_bytes: int) -> None:
        self._file = file
        self._at = offset
        self._left = size_bytes

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        self._file.seek(self._at)
        chunk = self._file.read(min(len(buffer), self._left))
        buffer[: len(chunk)] = chunk
        self._at += len(chunk)
        self._left -= len(chunk)
        return len(chunk)


class _Zip(Archive):
    def __init__(self, file: IO[bytes], limits: Limits) -> None:
        _check_zip_directory(file, limits)
        self._zip = zipfile.ZipFile(file)
        self._infos: dict[str, zipfile.ZipInfo] = {}
        members = _Members(limits)
        for info in self._zip.infolist():
            self._take(info, members)
        self.tree = members.tree()

    def _take(self, info: zipfile.ZipInfo, members: _Members) -> None:
        # The name that is opened; `filename` of a name with a zero byte is cut.
        raw = info.orig_filename
        path = members.take_name(raw)
        if info.flag_bits & 0x1:
            raise _bad(raw, "it is encrypted")
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise _bad(raw, "it is compressed in a way that is not supported")
        members.take_size(raw, info.file_size)
        unix = info.external_attr >> 16
        kind = stat.S_IFMT(unix)
        if raw.endswith("/"):
            entry = Entry(Kind.DIRECTORY, unix & 0o7777 or 0o755)
        elif kind == stat.S_IFLNK:
            entry = Entry(Kind.LINK, 0o777, target=self._target(raw, info))
        elif kind in (0, stat.S_IFREG):
            self._infos[path] = info
            with self._zip.open(info) as content:
                sha256 = _sha256(content, raw, info.file_size)
            entry = Entry(Kind.FILE, unix & 0o7777 or 0o644, info.file_size, sha256)
        else:
            raise _bad(raw, "it is neither a file nor a directory nor a link")
        members.add(raw, path, entry)

    def _target(self, raw: str, info: zipfile.ZipInfo) -> str:
        with self._zip.open(info) as content:
            target = content.read(_LONGEST_PATH_BYTES + 1)
        try:
            return target.decode()
        except UnicodeDecodeError:
            raise _bad(raw, "what it links to is not UTF-8") from None

    def open(self, path: str) -> IO[bytes]:
        return self._zip.open(self._infos[path])


def _check_zip_directory(file: IO[bytes], limits: Limits) -> None:
    """Count a zip's directory, which the library then reads whole, by its entries' signatures."""
    tail = max(0, file.seek(0, io.SEEK_END) - 2**16 - _ZIP_END_BYTES)
    file.seek(tail)
    end = file.read()
    at = len(end) - _ZIP_END_BYTES
    if not (end[max(0, at) :].startswith(_ZIP_END) and end.endswith(b"\0\0")):
        at = end.rfind(_ZIP_END)
    if at < 0 or len(end) < at + _ZIP_END_BYTES:
        raise zipfile.BadZipFile
    if end[max(0, at - _ZIP64_LOCATOR_BYTES) : at].startswith(_ZIP64_LOCATOR):
        raise InvalidBuild("a zip with 64-bit sizes is not supported", hint="send a gzipped tar")
    (size_bytes,) = struct.unpack_from("<I", end, at + 12)
    file.seek(max(0, tail + at - size_bytes))
    found, before = 0, b""
    while size_bytes > 0 and (chunk := file.read(min(_CHUNK_BYTES, size_bytes))):
        size_bytes -= len(chunk)
        found += (before + chunk).count(_ZIP_ENTRY)
        limits.check_count(found)
        before = chunk[-3:]
