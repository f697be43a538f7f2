"""The agent's end of a QMP socket: the only place that knows `qemu.qmp`.

What answers may be a QEMU that its guest has taken over. So every call has a deadline, a message
has a size limit, no event is stored, and whatever goes wrong becomes one of our errors. A
connection that broke or fell silent is dropped, and the next call makes a new one.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from qemu.qmp import ExecuteError, Message, QMPClient, QMPError, Runstate

from sandmartin.errors import TimedOut, ToolFailed, Unavailable

DEADLINE_S = 10.0
#: Largest message taken from QEMU. The console is the largest that is asked for: 64 KiB in base64.
_MESSAGE_LIMIT = 256 * 1024
_SAID_LIMIT = 400
_CLOSE_DEADLINE_S = 2.0


@contextlib.contextmanager
def _short_path(path: Path) -> Iterator[str]:
    """A name for `path` that fits into the 108 bytes of a unix address, however deep it lies."""
    directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{directory}/{path.name}"
    finally:
        os.close(directory)


def listen(path: Path) -> socket.socket:
    """A listening unix socket at `path`; a stale one there is replaced."""
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with _short_path(path) as name:
            listener.bind(name)
        path.chmod(0o600)
        listener.listen(1)
    except OSError:
        listener.close()
        raise
    return listener


def connect(path: Path, deadline_s: float = DEADLINE_S) -> socket.socket:
    """A connection to the monitor at `path`; with a deadline of 0 it never blocks.

    Raises Unavailable.
    """
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.settimeout(deadline_s)
        with _short_path(path) as name:
            connection.connect(name)
    except OSError as error:
        connection.close()
        raise Unavailable(f"the monitor at {path} cannot be reached: {error}") from error
    return connection


class Monitor:
    """One QMP connection, made when first needed.

    `on_event` is called with each event's name, and with "" for each new connection, before which
    events may have been missed.
    """

    def __init__(self, path: Path, on_event: Callable[[str], None]) -> None:
        self._path = path
        self._on_event = on_event
        self._lock = asyncio.Lock()
        self._client: QMPClient | None = None
        self._socket: socket.socket | None = None

    def move(self, path: Path) -> None:
        """The monitor's socket is at `path` from now on; a connection stays."""
        self._path = path

    @property
    def connected(self) -> bool:
        return self._client is not None and self._client.runstate is Runstate.RUNNING

    async def execute(
        self,
        command: str,
        arguments: Mapping[str, object] | None = None,
        *,
        deadline_s: float = DEADLINE_S,
    ) -> object:
        """The answer to a command.

        Raises ToolFailed when QEMU refuses it, TimedOut when no answer comes, Unavailable when
        there is no connection to be had.
        """
        client: QMPClient | None = None
        try:
            async with asyncio.timeout(deadline_s):
                client = await self._connected()
                return await client.execute(command, dict(arguments or {}))
        except ExecuteError as error:
            said = str(error)[:_SAID_LIMIT]
            raise ToolFailed(f"QEMU refused {command}: {said}") from error
        except QMPError as error:
            said = str(error)[:_SAID_LIMIT]
            raise Unavailable(f"the monitor broke off {command}: {said}") from error
        except TimeoutError as error:
            # A late or doubled answer must not be taken for that of a later call. Only the
            # connection that was asked is dropped: by now another call may have made a new one.
            if client is not None and client is self._client:
                await self._drop()
            raise TimedOut(f"QEMU did not answer {command} within {deadline_s:g} s") from error

    async def _connected(self) -> QMPClient:
        async with self._lock:
            if self._client is not None and self.connected:
                return self._client
            await self._drop()
            client = QMPClient("sandmartin", readbuflen=_MESSAGE_LIMIT)
            # Its own log lines quote what the peer sent; what matters reaches us as exceptions.
            client.logger = logging.getLogger(f"{__name__}.qmp")
            client.logger.setLevel(logging.CRITICAL)
            # The default listener keeps every event for ever and cannot be removed: its filter
            # is where we look at them, and it lets none in.
            client.events.event_filter = self._seen
            self._socket = connect(self._path, deadline_s=0)
            try:
                await client.connect(self._socket)
            except BaseException:
                self._socket.close()
                self._socket = None
                raise
            self._client = client
            self._on_event("")
            return client

    def _seen(self, event: Message) -> bool:
        if isinstance(name := event["event"], str):
            self._on_event(name)
        return False

    async def close(self) -> None:
        """End the connection, not QEMU. Idempotent; a later call connects anew."""
        async with self._lock:
            await self._drop()

    async def _drop(self) -> None:
        client, self._client = self._client, None
        connection, self._socket = self._socket, None
        if client is None or connection is None:
            return
        # The library would first wait until the peer has read everything; it may never.
        with contextlib.suppress(OSError):
            connection.shutdown(socket.SHUT_RDWR)
        ending = asyncio.ensure_future(client.disconnect())
        done, _ = await asyncio.wait({ending}, timeout=_CLOSE_DEADLINE_S)
        if done:
            # What broke the connection, if anything: of no use any more, but it must be looked at.
            ending.exception()
        else:
            ending.cancel()
        connection.close()
