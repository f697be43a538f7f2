"""What listens in a guest, by its kernel's own tables `/proc/net/tcp` and `/proc/net/tcp6`.

They come out of the guest, which may say there whatever it likes: what is no line of such a table
is left out, and so is what exceeds the bounds.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterator
from dataclasses import dataclass

#: The tables, and how much of one is looked at. What listens stands before what is connected.
TABLES = ("/proc/net/tcp", "/proc/net/tcp6")
MOST_BYTES = 1 << 20
MOST_LISTENERS = 1024
#: Slot, local address and port, remote ones, state; proc_pid_net(5). Addresses are the machine's
#: words of 32 bits in hex: one of IPv4, four of IPv6. `0A` is TCP_LISTEN.
_LISTENING = re.compile(
    rb" *[0-9]{1,8}: ([0-9A-F]{32}|[0-9A-F]{8}):([0-9A-F]{4}) [0-9A-F]{8,32}:0000 0A(?: .{0,200})?"
)
_WORD = 8


@dataclass(frozen=True, order=True)
class Listener:
    """A TCP port that takes connections, and the address that it is bound to."""

    port: int
    address: str
    #: Only what is in the guest itself connects to that address.
    loopback: bool


def read_listeners(table: bytes) -> list[Listener]:
    """Those of a table, by port, at most `MOST_LISTENERS`."""
    found: set[Listener] = set()
    for line in table[:MOST_BYTES].split(b"\n"):
        found.update(_read_line(line))
        if len(found) == MOST_LISTENERS:
            break
    return sorted(found)


def _read_line(line: bytes) -> Iterator[Listener]:
    if (match := _LISTENING.fullmatch(line)) is None:
        return
    address, port = _address(match[1].decode()), int(match[2], 16)
    if port:
        yield Listener(port, str(address), address.is_loopback)


def _address(words: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    # All our guests' machines are little-endian.
    starts = range(0, len(words), _WORD)
    raw = b"".join(bytes.fromhex(words[at : at + _WORD])[::-1] for at in starts)
    address = ipaddress.ip_address(raw)
    return getattr(address, "ipv4_mapped", None) or address
