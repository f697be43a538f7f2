"""`sandmartin cp`: files and trees between this machine and a sandbox.

What a guest says of its files is not trusted: a name from it is only ever one step down, and no
link is made here. Symbolic links inside a tree are not followed on either side, or a tree that
somebody else wrote would choose what is copied; whatever is left out is told.
"""

from __future__ import annotations

import argparse
import asyncio
import errno
import os
import posixpath
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sandmartin.cli import exitcode
from sandmartin.cli.connection import connected
from sandmartin.cli.options import add_json_flag, add_place_flags, check_utf8
from sandmartin.cli.pipes import ByteSource
from sandmartin.cli.progress import Progress
from sandmartin.cli.talk import print_json, say, say_error
from sandmartin.client.sandbox import AsyncSandbox
from sandmartin.errors import AlreadyExists, Denied, DiskFull, Invalid, NotFound, SandmartinError
from sandmartin.model import check_name
from sandmartin.transport import FileInfo

_DESCRIPTION = """\
Copy a file into a sandbox or out of it. One of SRC and DST is ID:PATH, the other a path on this
machine; one with a colon in it is written ./like:this. A DST that is a directory gets SRC inside.
"""


def configure(verbs: Any) -> None:
    parser: argparse.ArgumentParser = verbs.add_parser(
        "cp",
        help="copy files into a sandbox or out of it",
        usage="sandmartin cp [options] SRC DST",
        description=_DESCRIPTION,
    )
    parser.add_argument("source", metavar="SRC")
    parser.add_argument("destination", metavar="DST")
    parser.add_argument("-r", "--recursive", action="store_true", help="copy directories, too")
    parser.add_argument(
        "-u", "--user", default="", metavar="USER", help="user in the sandbox (default: root)"
    )
    add_place_flags(parser)
    add_json_flag(parser)
    parser.set_defaults(act=_copy)


@dataclass(frozen=True)
class Remote:
    """A place in a sandbox."""

    sandbox_id: str
    path: str


def place_of(text: str) -> Remote | str:
    """The place that a word of the command line names, a path on this machine. Raises Invalid.

    Not a Path, which would lose the last character of `tree/.` and `tree/`: they mean something.
    """
    sandbox_id, colon, path = text.partition(":")
    if not colon or "/" in sandbox_id:
        if not text:
            raise Invalid("a path is empty")
        return text
    if not path:
        raise Invalid(f"{text!r} names no path in the sandbox", hint="use ID:PATH")
    return Remote(check_name(sandbox_id, "sandbox id"), path)


def _copy(args: argparse.Namespace) -> int:
    check_utf8(args.source, args.destination, args.user)
    source, destination = place_of(args.source), place_of(args.destination)

    async def act() -> Copy:
        async with connected(args) as transport:
            if isinstance(source, str) and isinstance(destination, Remote):
                sandbox = AsyncSandbox(transport, destination.sandbox_id)
                copy = Copy(sandbox, args.user, recursive=args.recursive)
                await copy.upload(source, destination.path)
            elif isinstance(source, Remote) and isinstance(destination, str):
                sandbox = AsyncSandbox(transport, source.sandbox_id)
                copy = Copy(sandbox, args.user, recursive=args.recursive)
                await copy.download(source.path, destination)
            else:
                raise Invalid(
                    "one of source and destination must be in a sandbox, and only one",
                    hint="write the one in the sandbox as ID:PATH",
                )
            return copy

    done = asyncio.run(act())
    if args.json:
        said = {"files": done.files, "bytes": done.size_bytes}
        print_json(said | {"left_out": done.left_out, "failed": done.failed})
    return exitcode.FAILED if done.failed else 0


@dataclass
class Copy:
    """One copying between this machine and a sandbox."""

    sandbox: AsyncSandbox
    user: str
    recursive: bool = field(kw_only=True)
    files: int = 0
    size_bytes: int = 0
    left_out: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    progress: Progress = field(default_factory=Progress)

    async def upload(self, source: str, target: str) -> None:
        """Copy `source` to `target`, or into it if that is a directory."""
        is_tree = _is_local_directory(Path(source))
        if is_tree and not self.recursive:
            raise _needs_recursion(source)
        if await self._is_directory(target) or (target.endswith("/") and not is_tree):
            target = posixpath.join(target, _own_name(source))
        if is_tree:
            await self._upload_tree(Path(source), target)
        else:
            await self._upload_file(Path(source), target)

    async def download(self, source: str, target: str) -> None:
        """Copy `source` to `target`, or into it if that is a directory."""
        info = await self.sandbox.stat(source, self.user)
        is_tree = info.type == "directory"
        if is_tree and not self.recursive:
            raise _needs_recursion(source)
        place = Path(target)
        if _is_local_directory(place):
            place /= _own_name(source)
        elif target.endswith("/") and not is_tree:
            raise Invalid(f"there is no directory {target}", hint=f"mkdir {target}")
        if is_tree:
            await self._download_tree(source, place)
        else:
            await self._download_file(source, info, place)

    async def _is_directory(self, path: str) -> bool:
        try:
            return (await self.sandbox.stat(path, self.user)).type == "directory"
        except NotFound:
            return False

    async def _upload_tree(self, source: Path, target: str) -> None:
        # Not by recursion: a tree may be deeper than Python's stack.
        rest = [(source, target)]
        while rest:
            directory, path = rest.pop()
            await self._make_directory(path)
            entries: list[os.DirEntry[str]] = []
            with self._told(os.fspath(directory)):
                entries = await asyncio.to_thread(_entries, directory)
            for entry in entries:
                check_utf8(entry.name)
                below = posixpath.join(path, entry.name)
                if entry.is_dir(follow_symlinks=False):
                    rest.append((Path(entry.path), below))
                elif entry.is_file(follow_symlinks=False):
                    with self._told(entry.path):
                        await self._upload_file(Path(entry.path), below)
                else:
                    self._leave_out(entry.path)

    async def _make_directory(self, path: str) -> None:
        try:
            await self.sandbox.make_directory(path, self.user)
        except AlreadyExists:
            if not await self._is_directory(path):
                raise

    async def _upload_file(self, source: Path, target: str) -> None:
        with local_errors(source, "read"):
            fd = os.open(source, os.O_RDONLY | os.O_CLOEXEC)
            try:
                with self.progress.of(str(source), os.fstat(fd).st_size):
                    content = self._counted(aiter(ByteSource(fd)))
                    await self.sandbox.write_file(target, content, self.user)
            finally:
                os.close(fd)
        self.files += 1

    async def _download_tree(self, source: str, target: Path) -> None:
        rest = [(source, target)]
        while rest:
            path, directory = rest.pop()
            with local_errors(directory, "made"):
                directory.mkdir(exist_ok=True)
            listed: tuple[FileInfo, ...] = ()
            with self._told(path):
                listed = await self.sandbox.list_files(path, self.user)
            for info in listed:
                name = _step(info.name)
                below, local = posixpath.join(path, name), directory / name
                if info.symlink_target or info.type not in {"directory", "file"}:
                    self._leave_out(below)
                elif info.type == "directory":
                    rest.append((below, local))
                else:
                    with self._told(below):
                        await self._download_file(below, info, local)

    async def _download_file(self, source: str, info: FileInfo, target: Path) -> None:
        mode = 0o777 if info.mode & 0o111 else 0o666
        content = self._counted(self.sandbox.read_file(source, self.user))
        with self.progress.of(source, info.size_bytes), local_errors(target, "written"):
            async with aclosing(content) as chunks:
                # What cannot be read does not cost the file that is here.
                chunk = await anext(chunks, b"")
                with os.fdopen(_open_new(target, mode), "wb") as file:
                    while chunk:
                        await asyncio.to_thread(file.write, chunk)
                        chunk = await anext(chunks, b"")
        self.files += 1

    async def _counted(self, chunks: AsyncIterator[bytes]) -> AsyncGenerator[bytes, None]:
        async for chunk in chunks:
            yield chunk
            self.size_bytes += len(chunk)
            self.progress.add(len(chunk))

    @contextmanager
    def _told(self, path: str) -> Iterator[None]:
        """What may not be read or is gone meanwhile is told; the rest of the tree is copied."""
        try:
            yield
        except (Denied, NotFound, Invalid) as error:
            say_error(error)
            self.failed.append(path)

    def _leave_out(self, path: str) -> None:
        self.left_out.append(path)
        say(f"left out, for it is no file or directory: {path}")


def _is_local_directory(path: Path) -> bool:
    return path.is_dir()


def _entries(directory: Path) -> list[os.DirEntry[str]]:
    with local_errors(directory, "read"), os.scandir(directory) as entries:
        return sorted(entries, key=lambda entry: entry.name)


def _open_new(path: Path, mode: int) -> int:
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, mode)


def _own_name(path: str) -> str:
    """What the copy is called inside a directory; `.` and `..` mean the content alone."""
    name = posixpath.basename(path.rstrip("/"))
    return "" if name in {".", ".."} else name


def _step(name: str) -> str:
    """A name from the guest if it leads one step down and nowhere else."""
    if name in {"", ".", ".."} or "/" in name or "\0" in name:
        raise SandmartinError(f"the sandbox lists a file named {name[:80]!r}")
    return name


def _needs_recursion(path: str) -> Invalid:
    return Invalid(f"{path} is a directory", hint="copy it with -r")


@contextmanager
def local_errors(path: Path, done: str) -> Iterator[None]:
    """What this machine's files cannot do is raised as ours; `done` is a participle."""
    try:
        yield
    except OSError as error:
        # No other file of a tree fares better on a full disk.
        cls = DiskFull if error.errno == errno.ENOSPC else Invalid
        raise cls(f"{path} cannot be {done}: {error.strerror}") from error
