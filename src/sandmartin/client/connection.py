"""What each event loop has open to a place where sandboxes are served.

All sandboxes of a place share it; it is closed when the loop ends.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import suppress

from sandmartin.client.server import Server
from sandmartin.errors import Unimplemented
from sandmartin.transport import Transport
from sandmartin.transport.place import Place
from sandmartin.transport.rest import Rest


class Connection:
    """What one event loop has open to one place."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self._server: Server | None = None
        self.keeper: AsyncGenerator[None, None] | None = None
        transport = place.transport()
        self.transport: Transport = transport
        if isinstance(transport, Rest):
            self._server = Server(transport)

    def server(self, what: str) -> Server:
        """The control plane, which `what` needs. Raises Unimplemented when there is none."""
        if self._server is None:
            raise Unimplemented(
                f"{what} needs a control plane, and {self._place} is none",
                hint="run `sandmartin up`, and set SANDMARTIN_URL and SANDMARTIN_API_KEY",
            )
        return self._server

    async def aclose(self) -> None:
        """Close what is open."""
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
