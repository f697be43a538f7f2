"""A sandbox, and the way to whatever serves it."""

from __future__ import annotations

from dataclasses import dataclass

from sandmartin.client.connection import Connection, connection_to
from sandmartin.transport import Transport
from sandmartin.transport.place import Place


@dataclass(frozen=True)
class Link:
    """One sandbox at one place, reachable from any event loop."""

    place: Place
    sandbox_id: str

    @property
    def connection(self) -> Connection:
        """What the running event loop has open to the place."""
        return connection_to(self.place)

    @property
    def transport(self) -> Transport:
        """The way to whatever serves the sandboxes."""
        return self.connection.transport
