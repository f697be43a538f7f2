"""Files of a sandbox: content of any size, directories, whole trees, and what changes in them."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator, AsyncIterable, Iterable, Mapping
from contextlib import aclosing
from pathlib import Path
from typing import IO, Literal, overload

from sandmartin.client.callbacks import OnEach
from sandmartin.client.concurrent import at_once
from sandmartin.client.link import Link
from sandmartin.client.trees import Copied, CopyProgress, Download, Upload
from sandmartin.client.watch import AsyncWatch, FileEvent, open_watch
from sandmartin.errors import AlreadyExists, NotFound
from sandmartin.transport import FileInfo

#: What a file can be written from.
Content = str | bytes | IO[bytes] | Iterable[bytes] | AsyncIterable[bytes]

_PIECE_BYTES = 512 << 10


class AsyncFiles:
    """Files of a sandbox: `sandbox.files`.

    `user` is a name or a number, root by default: whose rights hold, and who owns what is made.
    """

    def __init__(self, link: Link) -> None:
        self._link = link

    @overload
    async def read(self, path: str, *, format: Literal["text"] = "text", user: str = "") -> str: ...

    @overload
    async def read(self, path: str, *, format: Literal["bytes"], user: str = "") -> bytes: ...

    async def read(
        self, path: str, *, format: Literal["text", "bytes"] = "text", user: str = ""
    ) -> str | bytes:
        """The content of a file, as text (UTF-8; what is none is replaced) or as bytes.

        Raises NotFound, Denied, Invalid for a directory.
        """
        content = b"".join([piece async for piece in self.stream(path, user=user)])
        return content if format == "bytes" else content.decode(errors="replace")

    def stream(self, path: str, *, user: str = "") -> AsyncGenerator[bytes, None]:
        """The content of a file of any size, piece by piece. Raises as `read`."""
        return self._link.transport.read_file(self._link.sandbox_id, path, user)

    async def write(self, path: str, content: Content, *, user: str = "") -> None:
        """Write a file, and the directories above it.

        The content is a text, bytes, an open binary file, or anything that gives bytes piece by
        piece; of the latter no more is held than the piece at hand. Raises Denied, DiskFull.
        """
        async with aclosing(pieces_of(content)) as pieces:
            await self._link.transport.write_file(self._link.sandbox_id, path, pieces, user)

    async def write_many(self, files: Mapping[str, Content], *, user: str = "") -> None:
        """Write several files, some of them at once. Raises what the first that fails raises."""
        await at_once(self.write(path, content, user=user) for path, content in files.items())

    async def list(self, path: str, *, depth: int = 1, user: str = "") -> tuple[FileInfo, ...]:
        """What is below a directory, so many levels down. Raises NotFound, Invalid."""
        transport = self._link.transport
        return await transport.list_files(self._link.sandbox_id, path, user, depth=depth)

    async def exists(self, path: str, *, user: str = "") -> bool:
        """Whether there is a file or directory of this name."""
        try:
            await self.info(path, user=user)
        except NotFound:
            return False
        return True

    async def info(self, path: str, *, user: str = "") -> FileInfo:
        """Kind, size, mode and owner of a file or directory. Raises NotFound."""
        return await self._link.transport.stat_file(self._link.sandbox_id, path, user)

    async def mkdir(self, path: str, *, user: str = "") -> bool:
        """Make a directory and its missing parents. False when it was there."""
        try:
            await self._link.transport.make_directory(self._link.sandbox_id, path, user)
        except AlreadyExists:
            return False
        return True

    async def rename(self, source: str, destination: str, *, user: str = "") -> None:
        """Rename or move a file or directory. Raises NotFound."""
        transport = self._link.transport
        await transport.move_file(self._link.sandbox_id, source, destination, user)

    async def remove(self, path: str, *, user: str = "") -> None:
        """Remove a file or a whole tree. One that is not there is no error."""
        await self._link.transport.remove_file(self._link.sandbox_id, path, user)

    async def watch(
        self,
        path: str,
        *,
        recursive: bool = False,
        user: str = "",
        on_event: OnEach[FileEvent] | None = None,
    ) -> AsyncWatch:
        """Be told what changes in a directory, from now until `stop`.

            async with await sandbox.files.watch("/work") as watch:
                async for event in watch:
                    print(event.type, event.path)

        Raises NotFound, Denied, and Unimplemented without a control plane.
        """
        return await open_watch(self._link, path, recursive=recursive, user=user, on_event=on_event)

    async def upload(
        self,
        source: str | os.PathLike[str],
        destination: str,
        *,
        user: str = "",
        on_progress: OnEach[CopyProgress] | None = None,
    ) -> Copied:
        """Copy a file or a whole folder of this machine to `destination` in the sandbox.

        Content, mode bits and symbolic links are kept; a folder's content is merged into what is
        there. What is neither file, folder nor link is left out, and told in the answer.
        """
        return await Upload(self._link, user, on_progress).copy(Path(source), destination)

    async def download(
        self,
        source: str,
        destination: str | os.PathLike[str],
        *,
        user: str = "",
        max_files: int = 100_000,
        max_bytes: int | None = None,
        on_progress: OnEach[CopyProgress] | None = None,
    ) -> Copied:
        """Copy a file or a whole folder of the sandbox to `destination` on this machine.

        As `upload`, and nothing is written outside of `destination`, whatever the sandbox says:
        a link that leads out of the folder is left out, a name that does is refused. Raises
        Exhausted beyond `max_files` or `max_bytes`.
        """
        download = Download(self._link, user, on_progress, max_files, max_bytes)
        return await download.copy(source, Path(destination))


async def pieces_of(content: Content) -> AsyncGenerator[bytes, None]:
    """What a user gave as content, piece by piece."""
    if isinstance(content, str):
        yield content.encode()
    elif isinstance(content, bytes | bytearray | memoryview):
        yield bytes(content)
    elif isinstance(content, AsyncIterable):
        async for piece in content:
            yield piece
    elif hasattr(content, "read"):
        while read := await asyncio.to_thread(content.read, _PIECE_BYTES):
            yield read
    else:
        pieces = iter(content)

        def following() -> bytes | None:
            return next(pieces, None)

        while (taken := await asyncio.to_thread(following)) is not None:
            yield taken
