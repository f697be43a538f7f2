"""One sandbox as its user sees it: its life, its commands and its files, over any transport.

A create or a fork whose outcome never arrived, a cancelled one included, is undone. What a
`temporary_sandbox` created is destroyed on every way out.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine
from contextlib import aclosing, asynccontextmanager
from typing import Any

from sandmartin.errors import AlreadyExists, SandmartinError, TimedOut, Unavailable
from sandmartin.model import new_sandbox_id
from sandmartin.transport import (
    Checkpoint,
    Command,
    CreatedSandbox,
    Ended,
    ExecEvent,
    FileInfo,
    ForkedSandbox,
    MetricPoint,
    NewSandbox,
    Process,
    PtySize,
    SandboxInfo,
    Snapshot,
    Started,
    Stderr,
    Stdout,
    Transport,
)

_START_S = 60.0


class AsyncSandbox:
    """A sandbox that exists."""

    def __init__(self, transport: Transport, sandbox_id: str) -> None:
        self._transport = transport
        self.sandbox_id = sandbox_id

    @classmethod
    async def create(cls, transport: Transport, new: NewSandbox) -> AsyncSandbox:
        """Create a sandbox and wait until it runs; what did not succeed is destroyed."""
        try:
            created = await transport.create(new)
        except AlreadyExists:
            # It is somebody else's.
            raise
        except BaseException as error:
            await _undo_after(error, transport.undo_create(new, error), new.sandbox_id)
            raise
        return cls(transport, created.sandbox_id)

    async def info(self) -> SandboxInfo:
        """Its state and its shape. Raises NotFound."""
        return await self._transport.get_sandbox(self.sandbox_id)

    async def pause(self) -> None:
        """Write it to disk, memory and all, and free its memory. Raises Conflict, DiskFull."""
        await self._transport.pause(self.sandbox_id)

    async def resume(self, timeout_s: int | None = None) -> CreatedSandbox:
        """Go on after a pause, with a new idle limit (0 is none), or with its own for None."""
        return await self._transport.resume(self.sandbox_id, timeout_s)

    async def set_timeout(self, timeout_s: int) -> None:
        """Give it another idle limit (0 is none), and reset its idle clock."""
        await self._transport.set_timeout(self.sandbox_id, timeout_s)

    async def fork(self, count: int = 1, *, timeout_s: int = 0) -> tuple[ForkedSandbox, ...]:
        """Make sandboxes that go on from where this one is, which goes on too.

        A child that could not be made has an `error`. When no answer arrives, all are destroyed.
        """
        ids = tuple(new_sandbox_id() for _ in range(count))
        try:
            return await self._transport.fork(self.sandbox_id, ids, timeout_s)
        except (Unavailable, TimedOut, asyncio.CancelledError) as error:
            undoing = self._transport.undo_fork(self.sandbox_id, ids, timeout_s, error)
            await _undo_after(error, undoing, ", ".join(ids))
            raise

    async def checkpoint(self, comment: str = "") -> Checkpoint:
        """Keep where it is now, to `rollback` to; it goes on."""
        return await self._transport.create_checkpoint(self.sandbox_id, comment)

    async def checkpoints(self) -> tuple[Checkpoint, ...]:
        """Its checkpoints, oldest first."""
        return await self._transport.list_checkpoints(self.sandbox_id)

    async def delete_checkpoint(self, checkpoint_id: str) -> None:
        """Forget a checkpoint. Raises NotFound, Conflict."""
        await self._transport.delete_checkpoint(self.sandbox_id, checkpoint_id)

    async def rollback(self, checkpoint_id: str) -> CreatedSandbox:
        """Return to a checkpoint, in memory and on disk. What came after it is gone."""
        return await self._transport.rollback(self.sandbox_id, checkpoint_id)

    async def snapshot(self, name: str, *, live: bool = False) -> Snapshot:
        """Make a template of it. It stays running if `live`, and is paused if not."""
        return await self._transport.create_snapshot(self.sandbox_id, name, live=live)

    async def metrics(self, time_range: str = "10m") -> tuple[MetricPoint, ...]:
        """What it used, oldest first; the ranges are `10m`, `2h` and `24h`."""
        return await self._transport.metrics(self.sandbox_id, time_range)

    async def read_console(self) -> bytes:
        """The newest that its console said; what is read is forgotten."""
        return await self._transport.read_console(self.sandbox_id)

    async def processes(self) -> tuple[Process, ...]:
        """What was started by a call and runs."""
        return await self._transport.list_processes(self.sandbox_id)

    @asynccontextmanager
    async def exec(self, command: Command) -> AsyncGenerator[Execution, None]:
        """Start a command and listen to it; leaving the context stops the listening.

            async with sandbox.exec(Command(cmd="ls", args=("-l",))) as execution:
                async for event in execution:
                    ...

        Raises NotStarted when the command cannot be started.
        """
        stream = self._transport.exec_stream(self.sandbox_id, command)
        async with aclosing(stream):
            try:
                async with asyncio.timeout(_START_S):
                    first = await anext(stream, None)
            except TimeoutError as error:
                raise TimedOut(f"the command did not start within {_START_S:g} s") from error
            if not isinstance(first, Started):
                raise Unavailable("the agent did not say that the command started")
            yield Execution(self._transport, self.sandbox_id, first.pid, stream)

    async def write_file(self, path: str, chunks: AsyncIterator[bytes], user: str = "") -> None:
        """Write a file of any size, as `user` (root by default)."""
        await self._transport.write_file(self.sandbox_id, path, chunks, user)

    def read_file(self, path: str, user: str = "") -> AsyncGenerator[bytes, None]:
        """Read a file of any size, chunk by chunk, as `user` (root by default)."""
        return self._transport.read_file(self.sandbox_id, path, user)

    async def stat(self, path: str, user: str = "") -> FileInfo:
        """A file or directory. Raises NotFound."""
        return await self._transport.stat_file(self.sandbox_id, path, user)

    async def list_files(
        self, path: str, user: str = "", *, depth: int = 1
    ) -> tuple[FileInfo, ...]:
        """What is below a directory, so many levels down."""
        return await self._transport.list_files(self.sandbox_id, path, user, depth=depth)

    async def make_directory(self, path: str, user: str = "") -> None:
        """Make a directory and its missing parents. Raises AlreadyExists."""
        await self._transport.make_directory(self.sandbox_id, path, user)

    async def move_file(self, source: str, destination: str, user: str = "") -> None:
        """Give a file or a tree another path. Raises NotFound, Denied."""
        await self._transport.move_file(self.sandbox_id, source, destination, user)

    async def remove_file(self, path: str, user: str = "") -> None:
        """Remove a file or a whole tree. One that is not there is no error."""
        await self._transport.remove_file(self.sandbox_id, path, user)

    async def destroy(self) -> None:
        """Destroy the sandbox and all it held. Already gone is success."""
        await self._transport.destroy(self.sandbox_id)


class Execution:
    """A command that runs; iterating gives its output and, last, its end."""

    def __init__(
        self,
        transport: Transport,
        sandbox_id: str,
        pid: int,
        stream: AsyncGenerator[ExecEvent, None],
    ) -> None:
        self._transport = transport
        self._sandbox_id = sandbox_id
        self._stream = stream
        self.pid = pid

    async def __aiter__(self) -> AsyncGenerator[Stdout | Stderr | Ended, None]:
        async for event in self._stream:
            if isinstance(event, Started):
                continue
            yield event
            if isinstance(event, Ended):
                return
        raise Unavailable("the agent did not say how the command ended")

    async def send_stdin(self, chunks: AsyncIterator[bytes]) -> None:
        """Feed standard input, and close it after the last chunk."""
        await self._transport.send_stdin(self._sandbox_id, self.pid, chunks)

    async def signal(self, number: int) -> None:
        """Send a signal. Raises NotFound when the command is gone."""
        await self._transport.send_signal(self._sandbox_id, self.pid, number)

    async def resize(self, size: PtySize) -> None:
        """Resize its terminal. Raises NotFound when the command is gone."""
        await self._transport.resize_pty(self._sandbox_id, self.pid, size)


@asynccontextmanager
async def temporary_sandbox(
    transport: Transport, new: NewSandbox
) -> AsyncGenerator[AsyncSandbox, None]:
    """A sandbox that lives as long as the context.

    When the body succeeded and the destroying fails, that failure is raised; an error of the
    body itself is never hidden by it. A cancellation waits until the destroying is done.
    """
    sandbox = await AsyncSandbox.create(transport, new)
    try:
        yield sandbox
    except BaseException as error:
        await destroy_after(sandbox, error)
        raise
    else:
        await destroy_after(sandbox, None)


async def destroy_after(sandbox: AsyncSandbox, error: BaseException | None) -> None:
    """Destroy a sandbox behind what used it, which ended with `error`."""
    if error is None:
        await _undo(sandbox.destroy(), sandbox.sandbox_id)
    else:
        await _undo_after(error, sandbox.destroy(), sandbox.sandbox_id)


async def _undo_after(error: BaseException, undoing: Coroutine[Any, Any, None], what: str) -> None:
    try:
        await _undo(undoing, what)
    except SandmartinError as second:
        error.add_note(_may_still_run(what, second))


async def _undo(undoing: Coroutine[Any, Any, None], what: str) -> None:
    """Do it to its end, however often we are cancelled meanwhile."""
    task = asyncio.create_task(undoing, name=f"destroy {what}")
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is None:
        return task.result()
    if (failure := task.exception()) is not None:
        cancelled.add_note(_may_still_run(what, failure))
    raise cancelled


def _may_still_run(what: str, failure: BaseException) -> str:
    return f"sandbox {what} may still run: {failure}"
