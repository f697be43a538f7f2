"""Why a request does not reach a guest: the words that an agent has for it.

They stand in a header of the answer, which is never taken from a guest.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from enum import StrEnum

from sandmartin.relay.headers import OWN_PREFIX, values_of
from sandmartin.relay.server import Send

HEADER = OWN_PREFIX + b"refusal"


class Refusal(StrEnum):
    #: No such sandbox, or one that is over.
    NOT_FOUND = "not_found"
    PAUSED = "paused"
    #: Something is being done to the sandbox.
    MOVING = "moving"
    #: Nothing listens on the port.
    PORT_CLOSED = "port_closed"
    #: A route that is for the host alone.
    CONTROL_ROUTE = "control_route"
    #: The request itself cannot be passed on.
    INVALID = "invalid"
    #: Too many connections to the sandbox.
    CROWDED = "crowded"
    #: What came from the guest is no answer.
    GARBLED = "garbled"
    #: Nothing came from the guest.
    SILENT = "silent"


STATUS = {
    Refusal.NOT_FOUND: 502,
    Refusal.PAUSED: 502,
    Refusal.MOVING: 409,
    Refusal.PORT_CLOSED: 502,
    Refusal.CONTROL_ROUTE: 404,
    Refusal.INVALID: 400,
    Refusal.CROWDED: 429,
    Refusal.GARBLED: 502,
    Refusal.SILENT: 504,
}


def refusal_of(headers: Iterable[tuple[bytes, bytes]]) -> Refusal | None:
    """What an agent's answer says; None for an answer of the guest's."""
    told = values_of(headers, HEADER)
    if not told:
        return None
    try:
        return Refusal(told[0].decode())
    except ValueError:
        return Refusal.GARBLED


async def refuse(send: Send, refusal: Refusal, message: str) -> None:
    """Answer a request that cannot be passed on."""
    body = json.dumps({"code": refusal, "message": message}).encode()
    headers = [
        (HEADER, refusal.encode()),
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
    ]
    start = {"type": "http.response.start", "status": STATUS[refusal], "headers": headers}
    await send(start)
    await send({"type": "http.response.body", "body": body})
