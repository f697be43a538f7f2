"""A command that runs: heard whether or not anybody waits for it, fed, signalled."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress

from sandmartin.client.callbacks import Listeners
from sandmartin.client.feed import Feed, Feeds
from sandmartin.client.link import Link
from sandmartin.client.results import CommandFailed, CommandResult, CommandTimedOut, Output
from sandmartin.errors import Conflict, NotFound, TimedOut, Unavailable
from sandmartin.transport import Command, Ended, ExecEvent, PtySize, Started, Stderr, Stdout

SIGKILL = 9
_START_S = 60.0

Stream = AsyncGenerator[ExecEvent, None]


class AsyncCommandHandle:
    """A command that runs.

    Iterating gives its output in order, `Stdout` and `Stderr` with `data` in bytes, from its
    beginning (or from where it was connected to) to its end.

        handle = await sandbox.commands.run("make", background=True)
        async for output in handle:
            print(output.data)
        result = await handle.wait()
    """

    def __init__(
        self,
        feeds: Feeds,
        pid: int,
        first: ExecEvent | None,
        stream: Stream,
        listeners: Listeners,
        timeout_s: float | None = None,
    ) -> None:
        """Takes over a stream whose `first` event was already taken."""
        self._link = feeds.link
        self._feeds = feeds
        self._stream = stream
        self._timeout_s = timeout_s
        self._output = Output()
        self._news = asyncio.Event()
        #: Its number in the sandbox.
        self.pid = pid
        self._listening = asyncio.create_task(
            self._listen(first, listeners), name=f"command {pid} of {self._link.sandbox_id}"
        )
        self._listening.add_done_callback(self._end)

    def __repr__(self) -> str:
        return f"AsyncCommandHandle(sandbox_id={self._link.sandbox_id!r}, pid={self.pid})"

    async def _listen(self, first: ExecEvent | None, listeners: Listeners) -> Ended:
        async with aclosing(self._stream) as stream:
            event = first
            while event is not None:
                if isinstance(event, Ended):
                    await listeners.end()
                    return event
                if not isinstance(event, Started):
                    self._output.add(event)
                    self._tell()
                    await listeners.take(event)
                event = await anext(stream, None)
        raise Unavailable("it was not said how the command ended")

    def _tell(self) -> None:
        self._news.set()
        self._news = asyncio.Event()

    def _end(self, listening: asyncio.Task[Ended]) -> None:
        self._tell()
        if not listening.cancelled():
            self._feeds.forget(self.pid)
            # Whoever waits or iterates is told; that nobody does is no bug.
            listening.exception()

    async def __aiter__(self) -> AsyncGenerator[Stdout | Stderr, None]:
        seen = 0
        while True:
            news = self._news
            seen, event = self._output.after(seen)
            if event is not None:
                yield event
            elif self._listening.done():
                self._ended()
                return
            else:
                await news.wait()

    def _ended(self) -> Ended:
        if self._listening.cancelled():
            raise Conflict(
                f"nobody listens to command {self.pid} any more",
                hint="commands.connect(pid) listens again",
            )
        return self._listening.result()

    async def wait(self, *, check: bool = True) -> CommandResult:
        """Wait for its end.

        Raises CommandFailed, with the result, for an exit code other than 0 unless `check` is
        False; CommandTimedOut, with the result, when its time limit ended it; Unavailable when
        the connection was lost.
        """
        await asyncio.wait({self._listening})
        ended = self._ended()
        result = self._output.result(ended)
        if ended.error:
            raise CommandTimedOut(result, self._timeout_s)
        if check and result.exit_code != 0:
            raise CommandFailed(result)
        return result

    @property
    def exit_code(self) -> int | None:
        """Its exit code; None while it runs, and when that is not known."""
        listening = self._listening
        if not listening.done() or listening.cancelled() or listening.exception():
            return None
        return listening.result().exit_code

    def _feed(self) -> Feed:
        if self.exit_code is not None:
            raise Conflict(f"command {self.pid} has ended, and takes no input")
        return self._feeds.of(self.pid)

    async def send_stdin(self, data: str | bytes) -> None:
        """Give it input; it was started with `stdin`, or on a terminal. Raises Conflict."""
        await self._feed().send(data)

    async def close_stdin(self) -> None:
        """Let it read the end of its input, after all that was sent. Raises Conflict."""
        await self._feed().close()

    async def kill(self, signal: int = SIGKILL) -> bool:
        """Send a signal; SIGKILL ends all that it started, too. False when it is gone."""
        return await send_signal(self._link, self.pid, signal)

    async def resize(self, cols: int, rows: int) -> None:
        """Resize its terminal, in characters. Raises NotFound, Conflict when it has none."""
        size = PtySize(cols, rows)
        await self._link.transport.resize_pty(self._link.sandbox_id, self.pid, size)

    async def disconnect(self) -> None:
        """Stop listening; the command goes on. `commands.connect` listens again."""
        self._listening.cancel()
        await asyncio.wait({self._listening})
        # One that is cancelled before it has begun closes nothing.
        await self._stream.aclose()


async def start(feeds: Feeds, command: Command, listeners: Listeners) -> AsyncCommandHandle:
    """Start a command and listen to it. Raises NotStarted, NotFound, Conflict."""
    link = feeds.link
    stream = link.transport.exec_stream(link.sandbox_id, command)
    started = await _first_of(stream)
    if not isinstance(started, Started):
        await stream.aclose()
        raise Unavailable("it was not said that the command started")
    feeds.forget(started.pid)
    return AsyncCommandHandle(feeds, started.pid, started, stream, listeners, command.timeout_s)


async def listen(feeds: Feeds, pid: int, listeners: Listeners) -> AsyncCommandHandle:
    """Listen to a command that runs; what nobody heard yet comes first. Raises NotFound."""
    link = feeds.link
    stream = link.transport.connect_process(link.sandbox_id, pid)
    return AsyncCommandHandle(feeds, pid, await _first_of(stream), stream, listeners)


async def _first_of(stream: Stream) -> ExecEvent | None:
    """The first event of a stream; until it is there the stream may fail, and is closed then."""
    try:
        async with asyncio.timeout(_START_S):
            return await anext(stream, None)
    except BaseException as error:
        await stream.aclose()
        if isinstance(error, TimeoutError):
            raise TimedOut(f"the command did not start within {_START_S:g} s") from error
        raise


async def give_all(handle: AsyncCommandHandle, data: str | bytes) -> None:
    """Give a command all of its input; it may end without having read all, or anything."""
    with suppress(Conflict, NotFound):
        if data:
            await handle.send_stdin(data)
        await handle.close_stdin()


async def send_signal(link: Link, pid: int, signal: int) -> bool:
    """Send a signal to a command; False when it is gone."""
    try:
        await link.transport.send_signal(link.sandbox_id, pid, signal)
    except NotFound:
        return False
    return True
