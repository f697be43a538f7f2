"""One sandbox as its user sees it: commands and files, over any transport.

What a `temporary_sandbox` created is destroyed on every way out, a cancelled create included.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager

from sandmartin.client.transport import (
    Command,
    Ended,
    ExecEvent,
    NewSandbox,
    Started,
    Stderr,
    Stdout,
    Transport,
)
from sandmartin.errors import AlreadyExists, SandmartinError, TimedOut, Unavailable

_START_S = 60.0


class AsyncSandbox:
    """A sandbox that exists."""

    def __init__(self, transport: Transport, sandbox_id: str) -> None:
        self._transport = transport
        self.sandbox_id = sandbox_id

    @classmethod
    async def create(cls, transport: Transport, new: NewSandbox) -> AsyncSandbox:
        """Create a sandbox and wait until it runs."""
        created = await transport.create(new)
        return cls(transport, created.sandbox_id)

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


@asynccontextmanager
async def temporary_sandbox(
    transport: Transport, new: NewSandbox
) -> AsyncGenerator[AsyncSandbox, None]:
    """A sandbox that lives as long as the context.

    When the body succeeded and the destroying fails, that failure is raised; an error of the
    body itself is never hidden by it. A cancellation waits until the destroying is done.
    """
    sandbox = AsyncSandbox(transport, new.sandbox_id)
    owned = True
    try:
        try:
            await transport.create(new)
        except AlreadyExists:
            # It is somebody else's.
            owned = False
            raise
        yield sandbox
    except BaseException as error:
        if owned:
            await _destroy_after(error, sandbox)
        raise
    else:
        await _destroy(sandbox)


async def _destroy_after(error: BaseException, sandbox: AsyncSandbox) -> None:
    try:
        await _destroy(sandbox)
    except SandmartinError as second:
        error.add_note(_may_still_run(sandbox, second))


async def _destroy(sandbox: AsyncSandbox) -> None:
    task = asyncio.create_task(sandbox.destroy(), name=f"destroy {sandbox.sandbox_id}")
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is None:
        return task.result()
    if (failure := task.exception()) is not None:
        cancelled.add_note(_may_still_run(sandbox, failure))
    raise cancelled


def _may_still_run(sandbox: AsyncSandbox, failure: BaseException) -> str:
    return f"sandbox {sandbox.sandbox_id} may still run: {failure}"
