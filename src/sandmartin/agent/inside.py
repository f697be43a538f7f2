"""What is done inside a sandbox, over its guest agent: commands, terminals, files.

None of it takes the lock of the sandbox's life cycle, and all of it is activity.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import AbstractAsyncContextManager

from sandmartin.agent.guest import Command, FileInfo, Guest, ProcessEvent, Running, Terminal


class Inside(ABC):
    """The part of a sandbox that works inside it."""

    @abstractmethod
    def touch(self) -> None:
        """Reset the idle clock."""

    @abstractmethod
    def _talking(self) -> AbstractAsyncContextManager[Guest]:
        """The guest agent for one exchange. Raises Conflict when there is none to talk to."""

    async def _active(self, chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        """Each chunk that passes is activity."""
        async for chunk in chunks:
            self.touch()
            yield chunk

    async def exec(self, command: Command) -> AsyncGenerator[ProcessEvent, None]:
        """Run a command; events until its end. Who stops listening does not end the command."""
        async with self._talking() as guest, contextlib.aclosing(guest.start(command)) as events:
            async for event in events:
                self.touch()
                yield event

    async def attach(self, pid: int) -> AsyncGenerator[ProcessEvent, None]:
        """Listen to a command that runs; what nobody heard yet comes first."""
        async with self._talking() as guest, contextlib.aclosing(guest.attach(pid)) as events:
            async for event in events:
                self.touch()
                yield event

    async def send_input(self, pid: int, chunks: AsyncIterator[bytes]) -> None:
        """Feed a command's standard input, then close it."""
        async with self._talking() as guest:
            async for chunk in chunks:
                self.touch()
                await guest.send_input(pid, chunk)
            await guest.close_input(pid)

    async def signal(self, pid: int, number: int) -> None:
        async with self._talking() as guest:
            await guest.signal(pid, number)

    async def write_file(self, path: str, user: str, chunks: AsyncIterator[bytes]) -> None:
        async with self._talking() as guest:
            await guest.upload(path, user, self._active(chunks))

    async def read_file(self, path: str, user: str) -> AsyncGenerator[bytes, None]:
        async with (
            self._talking() as guest,
            contextlib.aclosing(guest.download(path, user)) as chunks,
        ):
            async for chunk in chunks:
                self.touch()
                yield chunk

    async def resize(self, pid: int, size: Terminal) -> None:
        async with self._talking() as guest:
            await guest.resize(pid, size)

    async def processes(self) -> list[Running]:
        """What was started by a call and runs."""
        async with self._talking() as guest:
            return await guest.processes()

    async def stat(self, path: str, user: str) -> FileInfo:
        async with self._talking() as guest:
            return await guest.stat(path, user)

    async def list_files(self, path: str, user: str, depth: int) -> list[FileInfo]:
        async with self._talking() as guest:
            return await guest.list_files(path, user, depth)

    async def make_directory(self, path: str, user: str) -> None:
        async with self._talking() as guest:
            await guest.make_directory(path, user)

    async def move_file(self, source: str, destination: str, user: str) -> None:
        async with self._talking() as guest:
            await guest.move_file(source, destination, user)

    async def remove_file(self, path: str, user: str) -> None:
        async with self._talking() as guest:
            await guest.remove_file(path, user)
