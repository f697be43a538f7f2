"""How long somebody may take nothing of what waits for them.

A stream on which nothing is to be sent is none of this: it may be silent for as long as it likes.
"""

from __future__ import annotations

import asyncio
import socket
import struct

#: Within which something must be taken, be it ever so little.
STALL_S = 120.0
#: `tcpi_bytes_acked` of struct tcp_info in linux/tcp.h. What waits in a transport's own buffers
#: says less: over TLS there are two, and one of them is not shown.
_ACKED = struct.Struct("120xQ")


def reset(transport: asyncio.Transport) -> None:
    """End a connection so that nobody takes what came by it for whole."""
    connected = transport.get_extra_info("socket")
    if connected is not None and connected.family != socket.AF_UNIX:
        # Reset, not closed: a client of HTTP/1.0 takes the latter for the end.
        linger = struct.pack("ii", 1, 0)
        connected.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    transport.abort()


class Progress:
    """Watches what waits to be sent, from `begin` to `end`, and cuts off who takes none of it."""

    def __init__(self, transport: asyncio.Transport, stall_s: float = STALL_S) -> None:
        self._transport = transport
        self._stall_s = stall_s
        self._taken = 0
        self._timer: asyncio.TimerHandle | None = None

    def begin(self) -> None:
        """More waits than should."""
        if self._timer is None:
            self._look_later(self._taken_bytes())

    def end(self) -> None:
        """Enough was taken, or the connection is gone. Idempotent."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _look_later(self, taken: int) -> None:
        self._taken = taken
        self._timer = asyncio.get_running_loop().call_later(self._stall_s, self._look)

    def _look(self) -> None:
        self._timer = None
        if (taken := self._taken_bytes()) > self._taken:
            self._look_later(taken)
        else:
            reset(self._transport)

    def _taken_bytes(self) -> int:
        """Grows with what the other side has taken."""
        connected: socket.socket | None = self._transport.get_extra_info("socket")
        if connected is None or connected.family == socket.AF_UNIX:
            # Nobody adds to it meanwhile: whoever writes waits.
            return -self._transport.get_write_buffer_size()
        told = connected.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _ACKED.size)
        return int(_ACKED.unpack(told)[0])
