"""What pages of other sites may ask of guest agents: what anybody may who shows the token.

A browser asks before it sends a token, and what it asks cannot show one; so that is answered here,
and no sandbox is woken for it. Cookies open nothing at a guest agent, and are not allowed either.
"""

from __future__ import annotations

from sandmartin.relay.forwarding import Asked
from sandmartin.relay.headers import Headers, values_of, without
from sandmartin.relay.server import Send

_ORIGIN = b"access-control-allow-origin"
_METHOD = b"access-control-request-method"
_EXPOSED = b"access-control-expose-headers"
_METHODS = b"GET, HEAD, POST, PUT, PATCH, DELETE"
_MAX_AGE_S = 7200
#: Beside those that a page may always read.
_READABLE = (
    b"Connect-Content-Encoding, Content-Encoding, Content-Range, Accept-Ranges, ETag, Location"
)
_OURS: Headers = [(_ORIGIN, b"*"), (_EXPOSED, _READABLE)]


def is_preflight(asked: Asked) -> bool:
    """Whether a browser asks what a page may do."""
    return (
        asked.method == "OPTIONS"
        and bool(values_of(asked.headers, b"origin"))
        and bool(values_of(asked.headers, _METHOD))
    )


def readable(headers: Headers) -> Headers:
    """An answer's headers, so that a page of any site may read it."""
    return without(headers, {_ORIGIN, _EXPOSED, b"access-control-allow-credentials"}) + _OURS


async def answer(send: Send, asked: Asked) -> None:
    """Tell a browser that a page may send what it wants to."""
    # A star would not stand for Authorization.
    wanted = values_of(asked.headers, b"access-control-request-headers")
    headers: Headers = [
        (_ORIGIN, b"*"),
        (b"access-control-allow-methods", _METHODS),
        (b"access-control-max-age", str(_MAX_AGE_S).encode()),
        (b"vary", b"Access-Control-Request-Headers"),
    ]
    if wanted:
        headers.append((b"access-control-allow-headers", b", ".join(wanted)))
    await send({"type": "http.response.start", "status": 204, "headers": headers})
    await send({"type": "http.response.body", "body": b""})
