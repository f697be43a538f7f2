"""The way to any port of a guest, also to what listens on its loopback alone.

A port is dialled from outside first. Where that is refused, the guest agent is asked to connect
from inside, which takes it a moment, and nothing before that moment: nobody there looks for
listeners all the time.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator

import h11

from sandmartin.errors import Exhausted, GuestSilent, NotFound
from sandmartin.relay.line import Line, Lines

_CONNECT_S = 10.0
_TUNNEL_S = 10.0
_MAX_ANSWER_BYTES = 16 * 1024
#: Connections that one guest may have at a time.
MAX_LINES = 4096


class Passage:
    """The connections to one guest, at `address`; its agent listens on `guest_port`."""

    def __init__(self, address: str, guest_port: int, max_lines: int = MAX_LINES) -> None:
        self._address = address
        self._guest_port = guest_port
        self._max_lines = max_lines
        self._lines = Lines()

    async def dial_agent(self) -> Line:
        """A connection to the guest agent. Raises GuestSilent, Exhausted."""
        try:
            return await self._dial(self._guest_port)
        except ConnectionRefusedError as error:
            raise GuestSilent("the guest agent does not listen") from error

    async def dial(self, port: int, token: str) -> Line:
        """A connection to a port; `token` is the guest agent's.

        Raises NotFound when nothing listens there, GuestSilent, Exhausted.
        """
        try:
            return await self._dial(port)
        except ConnectionRefusedError:
            return await self._dial_from_inside(port, token)

    async def _dial(self, port: int) -> Line:
        if len(self._lines) >= self._max_lines:
            raise Exhausted(
                f"the sandbox has {self._max_lines} connections", hint="close some of them"
            )
        with _silence_as_ours():
            async with asyncio.timeout(_CONNECT_S):
                return await self._lines.dial(self._address, port)

    async def _dial_from_inside(self, port: int, token: str) -> Line:
        line = await self.dial_agent()
        try:
            with _silence_as_ours():
                async with asyncio.timeout(_TUNNEL_S):
                    switched, early = await _ask_for_tunnel(line, port, token)
            if not switched:
                raise NotFound(f"nothing listens on port {port}")
        except BaseException:
            line.abort()
            raise
        line.unread(early)
        return line

    def abort(self) -> None:
        """End all connections at once."""
        self._lines.abort()

    async def closed(self) -> None:
        """Wait until no connection is open any more."""
        await self._lines.closed()


async def _ask_for_tunnel(line: Line, port: int, token: str) -> tuple[bool, bytes]:
    """Whether the line leads to the port from now on, and what came from there already."""
    http = h11.Connection(h11.CLIENT, max_incomplete_event_size=_MAX_ANSWER_BYTES)
    headers = [
        ("host", "guest"),
        ("connection", "Upgrade"),
        ("upgrade", "tcp"),
        ("x-access-token", token),
    ]
    request = h11.Request(method="GET", target=f"/tunnel?port={port}", headers=headers)
    await line.write((http.send(request) or b"") + (http.send(h11.EndOfMessage()) or b""))
    while True:
        event = http.next_event()
        if event is h11.NEED_DATA:
            http.receive_data(await line.read())
        elif isinstance(event, h11.InformationalResponse) and event.status_code == 101:
            return True, http.trailing_data[0]
        elif not isinstance(event, h11.InformationalResponse):
            return False, b""


@contextlib.contextmanager
def _silence_as_ours() -> Iterator[None]:
    try:
        yield
    except ConnectionRefusedError:
        raise
    except (OSError, TimeoutError, h11.RemoteProtocolError) as error:
        raise GuestSilent(f"the guest does not answer: {error or 'it took too long'}") from error
