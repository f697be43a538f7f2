"""Where sandboxes are served, and what each event loop has open to there.

A place is found from what is given, SANDMARTIN_URL and SANDMARTIN_API_KEY, the stored login, and
then the agent of this machine, in this order. All sandboxes of a place share one connection pool
per event loop; it is closed when the loop ends.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from sandmartin.client.server import Server
from sandmartin.errors import Invalid, Unimplemented
from sandmartin.model import Settings
from sandmartin.transport import Transport
from sandmartin.transport.agent import AgentSocket

_UNIX = "unix:"


@dataclass(frozen=True)
class Place:
    """A control plane by URL and key, or a host agent by its socket."""

    url: str = ""
    api_key: str = field(default="", repr=False)
    socket: Path | None = None

    def __str__(self) -> str:
        return self.url or f"the agent on {self.socket}"


class Connection:
    """What one event loop has open to one place."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self._server: Server | None = None
        self.keeper: AsyncGenerator[None, None] | None = None
        if place.socket is not None:
            self.transport: Transport = AgentSocket(place.socket)
        else:
            self._server = Server(place.url, place.api_key)
            self.transport = self._server.rest

    def server(self, what: str) -> Server:
        """The control plane, which `what` needs. Raises Unimplemented when there is none."""
        if self._server is None:
            raise Unimplemented(
                f"{what} needs a control plane, and {self._place} is none",
                hint="run `sandmartin up`, and set SANDMARTIN_URL and SANDMARTIN_API_KEY",
            )
        return self._server

    async def aclose(self) -> None:
        if self._server is not None:
            await self._server.aclose()
        await self.transport.aclose()


_open: dict[asyncio.AbstractEventLoop, dict[Place, Connection]] = {}


def connection_to(place: Place) -> Connection:
    """What the running event loop has open to `place`, opened if need be. Raises Invalid."""
    loop = asyncio.get_running_loop()
    for closed in [each for each in _open if each.is_closed()]:
        del _open[closed]
    connections = _open.setdefault(loop, {})
    if place not in connections:
        connections[place] = Connection(place)
        _close_at_end(connections[place])
    return connections[place]


def _close_at_end(connection: Connection) -> None:
    """Have the running loop close the connection when it ends.

    It closes all async generators that have begun, and this one has what is to be closed.
    """

    async def keep() -> AsyncGenerator[None, None]:
        try:
            yield
        finally:
            await connection.aclose()

    connection.keeper = keep()
    with suppress(StopIteration):
        connection.keeper.__anext__().send(None)


def find_place(url: str | None = None, api_key: str | None = None) -> Place:
    """Where sandboxes are served. A URL `unix:/path` is an agent's socket. Raises Invalid."""
    url = url or os.environ.get("SANDMARTIN_URL", "")
    if url.startswith(_UNIX):
        return Place(socket=Path(url.removeprefix(_UNIX)))
    api_key = api_key or os.environ.get("SANDMARTIN_API_KEY", "")
    if url and api_key:
        return Place(url=url, api_key=api_key)
    if url or api_key:
        raise Invalid(
            f"there is no {'API key' if url else 'URL'} of the control plane",
            hint="set SANDMARTIN_URL and SANDMARTIN_API_KEY, as `sandmartin up` prints them",
        )
    return Place(socket=Settings.load().socket)
