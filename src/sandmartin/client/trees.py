"""Files and folders copied between this machine and a sandbox, several files at once.

What a guest says of its files is not trusted. A name from it is only ever one step down; nothing
is written through a link that was there before; links are made last, and only such as cannot lead
out of the folder, alone or one through the other.
"""

from __future__ import annotations

import asyncio
import errno
import os
import posixpath
import stat
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from sandmartin.client import packing
from sandmartin.client.callbacks import OnEach, call
from sandmartin.client.concurrent import at_once
from sandmartin.client.link import Link
from sandmartin.client.shell import link_all, read_links, set_modes
from sandmartin.errors import (
    AlreadyExists,
    Denied,
    DiskFull,
    Exhausted,
    Invalid,
    NotFound,
    Unimplemented,
)
from sandmartin.transport import FileInfo

_PIECE_BYTES = 512 << 10
_DIRECTORY_MODE, _FILE_MODE = 0o755, 0o644
_MODE = 0o777
#: Names of the user whose files may go as one tar, and from how many on they do.
_ROOT = frozenset({"", "root", "0"})
_FEW = 16


@dataclass(frozen=True, kw_only=True)
class CopyProgress:
    """How far a copying has come."""

    #: Path of the file at hand, below the folder; empty when the file itself is copied.
    path: str
    files: int
    size_bytes: int
    #: Of what is known so far, to which more may come.
    total_files: int
    total_bytes: int


@dataclass(frozen=True, kw_only=True)
class Copied:
    """What was copied."""

    files: int
    directories: int
    links: int
    size_bytes: int
    #: Paths of what was left out, below the folder: what is neither file, folder nor link, and
    #: links that lead out of it.
    left_out: tuple[str, ...]


@dataclass
class _Found:
    """What there is to be copied; paths are below the folder, "" is the folder itself."""

    directories: dict[str, int] = field(default_factory=dict)
    #: Size and mode of each.
    files: dict[str, tuple[int, int]] = field(default_factory=dict)
    links: dict[str, str] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)


class _Copy:
    """One copying, in either direction."""

    def __init__(self, link: Link, user: str, on_progress: OnEach[CopyProgress] | None) -> None:
        self._link = link
        self._user = user
        self._on_progress = on_progress
        self._found = _Found()
        self._files = self._size_bytes = 0

    async def _progress(self, path: str, size: int, *, is_whole: bool = False) -> None:
        self._size_bytes += size
        self._files += is_whole
        if self._on_progress is not None:
            now = CopyProgress(
                path=path,
                files=self._files,
                size_bytes=self._size_bytes,
                total_files=len(self._found.files),
                total_bytes=sum(size for size, _ in self._found.files.values()),
            )
            await call(self._on_progress, now)

    def _copied(self) -> Copied:
        found = self._found
        return Copied(
            files=self._files,
            directories=len(found.directories),
            links=len(found.links),
            size_bytes=self._size_bytes,
            left_out=tuple(sorted(found.left_out)),
        )


# Into a sandbox.


class Upload(_Copy):
    """Files of this machine to a sandbox."""

    async def copy(self, source: Path, target: str) -> Copied:
        """Raises Invalid, NotFound, Denied, DiskFull."""
        with _local_errors(source, "read"):
            await asyncio.to_thread(_walk, source, self._found)
        if await self._can_go_whole(target):
            await self._send_whole(source, target)
        else:
            await self._send_each(source, target)
        return self._copied()

    async def _can_go_whole(self, target: str) -> bool:
        """Whether one tar makes just what file by file would.

        That is done with root's rights, and follows no links that others could have made.
        """
        if self._user not in _ROOT or len(self._found.files) < _FEW or not target.startswith("/"):
            return False
        transport = self._link.transport
        try:
            await transport.stat_file(self._link.sandbox_id, target, self._user)
        except NotFound:
            above = posixpath.dirname(target.rstrip("/"))
            try:
                await transport.write_tree(self._link.sandbox_id, above, packing.nothing())
            except (Invalid, NotFound, Denied, Unimplemented):
                # It is on such a way, or the other side of an earlier release.
                return False
            return True
        return False

    async def _send_whole(self, source: Path, target: str) -> None:
        above, name = posixpath.split(target.rstrip("/"))
        found = self._found
        contents = packing.Contents(
            directories=found.directories, files=found.files, links=found.links
        )

        whole = packing.Packing(
            source,
            name,
            contents,
            reading=lambda local: _local_errors(local, "read"),
            on_read=lambda path, size, is_whole: self._progress(path, size, is_whole=is_whole),
        )
        async with aclosing(whole.pieces()) as pieces:
            await self._link.transport.write_tree(self._link.sandbox_id, above, pieces)

    async def _send_each(self, source: Path, target: str) -> None:
        directories = [_below(target, each) for each in self._found.directories]
        for path in directories:
            await self._make_directory(path)
        await at_once(self._send(source, path, target) for path in self._found.files)
        links = [(text, _below(target, path)) for path, text in self._found.links.items()]
        await link_all(self._link, links, self._user)
        await set_modes(self._link, self._modes(target), self._user)

    def _modes(self, target: str) -> Iterator[tuple[int, str]]:
        """What has other modes than it was made with, in the order in which they can be set."""
        files = ((mode, path) for path, (_, mode) in self._found.files.items())
        yield from (
            (mode, _below(target, path)) for mode, path in sorted(files) if mode != _FILE_MODE
        )
        # The deepest first: a directory that is closed to its user hides what is in it.
        for path, mode in sorted(self._found.directories.items(), reverse=True):
            if mode != _DIRECTORY_MODE:
                yield mode, _below(target, path)

    async def _make_directory(self, path: str) -> None:
        transport = self._link.transport
        try:
            await transport.make_directory(self._link.sandbox_id, path, self._user)
        except AlreadyExists:
            info = await transport.stat_file(self._link.sandbox_id, path, self._user)
            if info.type != "directory":
                raise

    async def _send(self, source: Path, path: str, target: str) -> None:
        local = source / path if path else source
        with _local_errors(local, "read"):
            async with aclosing(self._content(local, path)) as content:
                await self._link.transport.write_file(
                    self._link.sandbox_id, _below(target, path), content, self._user
                )
        await self._progress(path, 0, is_whole=True)

    async def _content(self, local: Path, path: str) -> AsyncGenerator[bytes, None]:
        with await asyncio.to_thread(local.open, "rb") as file:
            while piece := await asyncio.to_thread(file.read, _PIECE_BYTES):
                yield piece
                await self._progress(path, len(piece))


def _walk(source: Path, found: _Found) -> None:
    """All of a tree, links not followed, in an order in which directories can be made."""
    status = source.stat()
    if not stat.S_ISDIR(status.st_mode):
        if not stat.S_ISREG(status.st_mode):
            raise Invalid(f"{source} is neither a file nor a folder")
        found.files[""] = status.st_size, status.st_mode & _MODE
        return
    found.directories[""] = status.st_mode & _MODE
    rest = [""]
    while rest:
        directory = rest.pop()
        with os.scandir(source / directory) as entries:
            for entry in sorted(entries, key=lambda each: each.name):
                path = posixpath.join(directory, _utf8(entry.name))
                status = entry.stat(follow_symlinks=False)
                if entry.is_symlink():
                    found.links[path] = _utf8(os.readlink(entry.path))  # noqa: PTH115 a Path would change it
                elif stat.S_ISDIR(status.st_mode):
                    found.directories[path] = status.st_mode & _MODE
                    rest.append(path)
                elif stat.S_ISREG(status.st_mode):
                    found.files[path] = status.st_size, status.st_mode & _MODE
                else:
                    found.left_out.append(path)


def _utf8(name: str) -> str:
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise Invalid(f"the name {name!r} is no UTF-8", hint="rename it") from error
    return name


# Out of a sandbox.


class Download(_Copy):
    """Files of a sandbox to this machine."""

    def __init__(
        self,
        link: Link,
        user: str,
        on_progress: OnEach[CopyProgress] | None,
        max_files: int,
        max_bytes: int | None,
    ) -> None:
        super().__init__(link, user, on_progress)
        self._max_files = max_files
        self._max_bytes = max_bytes
        self._entries = 0

    async def copy(self, source: str, target: Path) -> Copied:
        """Raises Invalid, NotFound, Denied, DiskFull, Exhausted."""
        info = await self._link.transport.stat_file(self._link.sandbox_id, source, self._user)
        if info.type == "directory":
            await self._list(source, info)
        elif info.type == "file":
            self._found.files[""] = info.size_bytes, info.mode & _MODE
        else:
            raise Invalid(f"{source} is neither a file nor a folder")
        for path in self._found.directories:
            _make_directory(target / path, is_top=not path)
        await at_once(self._fetch(source, path, target) for path in self._found.files)
        self._make_links(target)
        for path, mode in sorted(self._found.directories.items(), reverse=True):
            with _local_errors(target / path, "changed"):
                # What cannot be written to or looked into is of no use to its owner.
                (target / path).chmod(mode | stat.S_IRWXU)
        return self._copied()

    async def _list(self, source: str, info: FileInfo) -> None:
        """Find all that is below a directory, level by level."""
        self._found.directories[""] = info.mode & _MODE
        level, links = [""], list[str]()
        while level:
            listed = await at_once(self._list_one(source, path) for path in level)
            links += [path for _, found in listed for path in found]
            level = [path for found, _ in listed for path in found]
        texts = await read_links(self._link, [_below(source, path) for path in links], self._user)
        for path, text in zip(links, texts, strict=True):
            if text and _stays_inside(path, text):
                self._found.links[path] = text
            else:
                self._found.left_out.append(path)

    async def _list_one(self, source: str, directory: str) -> tuple[list[str], list[str]]:
        """Note what is in a directory; its directories and its links."""
        directories, links = list[str](), list[str]()
        listed = await self._link.transport.list_files(
            self._link.sandbox_id, _below(source, directory), self._user
        )
        self._entries += len(listed)
        if self._entries > self._max_files:
            raise Exhausted(
                f"there are more than {self._max_files} files", hint="raise `max_files`"
            )
        for info in listed:
            path = posixpath.join(directory, _step(info.name))
            if info.symlink_target or info.type == "symlink":
                links.append(path)
            elif info.type == "directory":
                self._found.directories[path] = info.mode & _MODE
                directories.append(path)
            elif info.type == "file":
                self._found.files[path] = info.size_bytes, info.mode & _MODE
            else:
                self._found.left_out.append(path)
        return directories, links

    async def _fetch(self, source: str, path: str, target: Path) -> None:
        local = target / path if path else target
        _, mode = self._found.files[path]
        content = self._link.transport.read_file(
            self._link.sandbox_id, _below(source, path), self._user
        )
        async with aclosing(content) as pieces:
            # What cannot be read does not cost the file that is here.
            piece = await anext(pieces, b"")
            with _local_errors(local, "written"), _open_new(local, mode) as file:
                while piece:
                    await asyncio.to_thread(file.write, piece)
                    await self._progress(path, len(piece))
                    if self._max_bytes is not None and self._size_bytes > self._max_bytes:
                        raise Exhausted(
                            f"there are more than {self._max_bytes} bytes",
                            hint="raise `max_bytes`",
                        )
                    piece = await anext(pieces, b"")
        await self._progress(path, 0, is_whole=True)

    def _make_links(self, target: Path) -> None:
        for path, text in self._found.links.items():
            local = target / path
            with _local_errors(local, "made"):
                if local.is_symlink():
                    local.unlink()
                local.symlink_to(text)


def _make_directory(path: Path, *, is_top: bool) -> None:
    with _local_errors(path, "made"):
        path.mkdir(parents=is_top, exist_ok=True)
    # The folder itself may be reached by a link: that is the caller's own word.
    if path.is_symlink() and not is_top:
        raise Invalid(f"{path} is there, and is a link", hint="copy into an empty folder")


def _open_new(path: Path, mode: int) -> IO[bytes]:
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
    fd = os.open(path, flags, 0o600)
    os.fchmod(fd, mode)
    return os.fdopen(fd, "wb")


def _step(name: str) -> str:
    """A name from the guest if it leads one step down and nowhere else."""
    if name in {"", ".", ".."} or "/" in name or "\0" in name:
        raise Denied(f"the sandbox lists a file named {name[:80]!r}, which is refused")
    return name


def _stays_inside(path: str, text: str) -> bool:
    """Whether a link at `path` leads nowhere but into the folder, whatever the other links are.

    Steps up are counted at its beginning alone, where what is above is known to be a directory:
    behind a name, which may be that of another link, one could lead anywhere.
    """
    if text.startswith("/") or "\0" in text:
        return False
    steps = [each for each in text.split("/") if each not in {"", "."}]
    up = next((at for at, each in enumerate(steps) if each != ".."), len(steps))
    return up <= path.count("/") and ".." not in steps[up:]


def _below(directory: str, path: str) -> str:
    return posixpath.join(directory, path) if path else directory


@contextmanager
def _local_errors(path: Path, done: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        kinds = {errno.ENOSPC: DiskFull, errno.ENOENT: NotFound, errno.EACCES: Denied}
        kind = kinds.get(error.errno or 0, Invalid)
        raise kind(f"{path} cannot be {done}: {error.strerror or error}") from error
