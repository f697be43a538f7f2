"""What changes in a directory of a sandbox, told as it happens by the guest's own watcher."""

from __future__ import annotations

import asyncio
import base64
import json
import posixpath
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from sandmartin.client.callbacks import OnEach, call
from sandmartin.client.link import Link
from sandmartin.client.server import GUEST_PORT
from sandmartin.errors import TimedOut, Unavailable
from sandmartin.transport.connect import FrameReader, encode_frame, parse_message

_PATH = "/filesystem.Filesystem/WatchDir"
_WAITING = 1024
_START_S = 30.0
#: The guest says something, if only that there is nothing to say, each so many seconds.
_KEEPALIVE_S = 50
_QUIET_S = 120.0


class FileEventType(StrEnum):
    """What happened to a file."""

    CREATE = "create"
    WRITE = "write"
    REMOVE = "remove"
    RENAME = "rename"
    CHMOD = "chmod"
    #: Of a newer release.
    OTHER = "other"


@dataclass(frozen=True, kw_only=True)
class FileEvent:
    """Something that happened to a file."""

    type: FileEventType
    #: Below the directory that is watched.
    name: str
    path: str


class AsyncWatch:
    """A watched directory. Iterating gives its events until `stop`; leaving the context stops it.

    Raises Unavailable when the connection is lost.
    """

    def __init__(
        self,
        directory: str,
        messages: AsyncGenerator[dict[str, Any], None],
        on_event: OnEach[FileEvent] | None,
    ) -> None:
        self._directory = directory
        self._messages = messages
        self._on_event = on_event
        #: None: there is no more.
        self._events: asyncio.Queue[FileEvent | None] = asyncio.Queue(_WAITING)
        self._stopped = False
        self._listening = asyncio.create_task(self._listen(), name=f"watch of {directory}")

    def __repr__(self) -> str:
        return f"AsyncWatch({self._directory!r})"

    async def _listen(self) -> None:
        try:
            async with aclosing(self._messages) as messages:
                async for message in messages:
                    if (event := self._event(message)) is None:
                        continue
                    if self._on_event is not None:
                        await call(self._on_event, event)
                    else:
                        await self._events.put(event)
        finally:
            self._end()

    def _end(self) -> None:
        self._stopped = True
        # Whoever waits for the next event is woken; the queue may be full of those before.
        if self._events.empty():
            self._events.put_nowait(None)

    def _event(self, message: dict[str, Any]) -> FileEvent | None:
        told = message.get("filesystem")
        if not isinstance(told, dict):
            return None
        word = str(told.get("type", "")).removeprefix("EVENT_TYPE_").lower()
        known = word in FileEventType.__members__.values()
        name = str(told.get("name", ""))
        return FileEvent(
            type=FileEventType(word) if known else FileEventType.OTHER,
            name=name,
            path=posixpath.join(self._directory, name),
        )

    async def __aiter__(self) -> AsyncGenerator[FileEvent, None]:
        while not (self._stopped and self._events.empty()):
            if (event := await self._events.get()) is None:
                break
            yield event
        if not self._listening.cancelled():
            await self._listening

    async def stop(self) -> None:
        """Watch no more. Raises what the watching or `on_event` raised."""
        self._listening.cancel()
        await asyncio.wait({self._listening})
        # One that is cancelled before it has begun closes nothing.
        await self._messages.aclose()
        self._end()
        if not self._listening.cancelled():
            self._listening.result()

    async def __aenter__(self) -> AsyncWatch:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.stop()


async def open_watch(
    link: Link, path: str, *, recursive: bool, user: str, on_event: OnEach[FileEvent] | None
) -> AsyncWatch:
    """Watch a directory. What happens once this has returned is told."""
    messages = _messages(link, path, recursive=recursive, user=user or "root")
    try:
        async with asyncio.timeout(_START_S):
            await anext(messages, None)
    except BaseException as error:
        await messages.aclose()
        if isinstance(error, TimeoutError):
            raise TimedOut(f"the watching of {path} did not begin") from error
        raise
    return AsyncWatch(path, messages, on_event)


async def _messages(
    link: Link, path: str, *, recursive: bool, user: str
) -> AsyncGenerator[dict[str, Any], None]:
    request = json.dumps({"path": path, "recursive": recursive}).encode()
    headers = {
        "authorization": f"Basic {base64.b64encode(f'{user}:'.encode()).decode()}",
        "content-type": "application/connect+json",
        "connect-protocol-version": "1",
        "keepalive-ping-interval": str(_KEEPALIVE_S),
    }
    server = link.connection.server("watching files")
    async with server.open(
        link.sandbox_id,
        GUEST_PORT,
        _PATH,
        content=encode_frame(request),
        headers=headers,
        quiet_s=_QUIET_S,
    ) as response:
        reader = FrameReader()
        async for piece in response.aiter_raw():
            for message in reader.feed(piece):
                yield parse_message(message)
    if not reader.ended:
        raise Unavailable("the connection to the sandbox was lost")
