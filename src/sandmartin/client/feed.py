"""The standard input of commands, open for as long as somebody may write to it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import suppress

from sandmartin.client.link import Link
from sandmartin.errors import Conflict

_WAITING = 16
_GRACE_S = 5.0


class Feed:
    """Input of one command. Closing it, or the end of the command, ends what is sent over."""

    def __init__(self, link: Link, pid: int) -> None:
        self._link = link
        self._pid = pid
        #: None is the end of the input.
        self._pieces: asyncio.Queue[bytes | None] = asyncio.Queue(_WAITING)
        self._sending: asyncio.Task[None] | None = None
        self._is_closed = False

    async def send(self, data: str | bytes) -> None:
        """Queue input behind what was sent before. Raises Conflict, and what sending raised."""
        if self._is_closed:
            raise Conflict(f"the input of command {self._pid} is closed")
        await self._put(data.encode() if isinstance(data, str) else data)

    async def close(self) -> None:
        """End the input, and wait until all of it is written. Raises Conflict."""
        if not self._is_closed:
            self._is_closed = True
            await self._put(None)
        if self._sending is not None:
            await asyncio.wait({self._sending})
            self._check(self._sending)

    def forget(self) -> None:
        """The command has ended, and takes nothing any more: the sending soon fails by itself."""
        self._is_closed = True
        if self._sending is None or self._sending.done():
            return
        with suppress(asyncio.QueueFull):
            self._pieces.put_nowait(None)
        asyncio.get_running_loop().call_later(_GRACE_S, self._sending.cancel)

    async def _put(self, piece: bytes | None) -> None:
        if self._sending is None:
            self._sending = asyncio.create_task(
                self._link.transport.send_stdin(self._link.sandbox_id, self._pid, self._queued()),
                name=f"input of command {self._pid}",
            )
            self._sending.add_done_callback(_heed)
        putting = asyncio.ensure_future(self._pieces.put(piece))
        try:
            await asyncio.wait({putting, self._sending}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            putting.cancel()
        if self._sending.done():
            self._check(self._sending)

    def _check(self, sending: asyncio.Task[None]) -> None:
        if sending.cancelled():
            raise Conflict(f"command {self._pid} has ended, and takes no input")
        sending.result()

    async def _queued(self) -> AsyncGenerator[bytes, None]:
        while (piece := await self._pieces.get()) is not None:
            yield piece


def _heed(sending: asyncio.Task[None]) -> None:
    """Its failure is told to whoever sends next; that nobody does is no bug."""
    if not sending.cancelled():
        sending.exception()


class Feeds:
    """The inputs of a sandbox's commands, each one and the same for all who write to it."""

    def __init__(self, link: Link) -> None:
        self.link = link
        self._feeds: dict[int, Feed] = {}

    def of(self, pid: int) -> Feed:
        """The one way into the standard input of a command."""
        return self._feeds.setdefault(pid, Feed(self.link, pid))

    def forget(self, pid: int) -> None:
        """The command has ended; its number may become another's."""
        if (feed := self._feeds.pop(pid, None)) is not None:
            feed.forget()
