"""Headers that are for one connection alone, and how long a body is."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from sandmartin.errors import Invalid

Headers = list[tuple[bytes, bytes]]

#: What control plane and agent tell each other; never sent to a guest, or believed of one.
OWN_PREFIX = b"sandmartin-"
_HOP_BY_HOP = frozenset(
    {
        b"connection",
        b"keep-alive",
        b"proxy-authenticate",
        b"proxy-authorization",
        b"proxy-connection",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
        # Of the body, whose length is told anew.
        b"content-length",
        b"expect",
    }
)


def values_of(headers: Iterable[tuple[bytes, bytes]], name: bytes) -> list[bytes]:
    return [value for each, value in headers if each == name]


def words_of(headers: Iterable[tuple[bytes, bytes]], name: bytes) -> list[bytes]:
    """The words of a header that is a list, in lower case."""
    joined = b",".join(values_of(headers, name))
    return [word for each in joined.split(b",") if (word := each.strip().lower())]


def end_to_end(headers: Iterable[tuple[bytes, bytes]]) -> Headers:
    """Without what is for one connection alone, and without the body's length."""
    headers = list(headers)
    named = {*words_of(headers, b"connection")} - {b"host"}
    return without(headers, _HOP_BY_HOP | named)


def without(headers: Iterable[tuple[bytes, bytes]], names: Collection[bytes]) -> Headers:
    return [(name, value) for name, value in headers if name not in names]


def without_own(headers: Iterable[tuple[bytes, bytes]]) -> Headers:
    return [(name, value) for name, value in headers if not name.startswith(OWN_PREFIX)]


def framing_of(headers: Iterable[tuple[bytes, bytes]]) -> Headers:
    """The header that says how long a request's body is; none without one.

    Raises Invalid when two say different things: whoever believes the other one would take a part
    of the body for another request.
    """
    headers = list(headers)
    lengths, codings = (
        values_of(headers, b"content-length"),
        words_of(headers, b"transfer-encoding"),
    )
    if codings and lengths:
        raise Invalid("the request has both Content-Length and Transfer-Encoding")
    if len(lengths) > 1 or any(not each.isdigit() for each in lengths):
        raise Invalid("the request has more than one Content-Length, or one that is no number")
    if codings and codings != [b"chunked"]:
        raise Invalid("the request has a Transfer-Encoding other than chunked")
    if codings:
        return [(b"transfer-encoding", b"chunked")]
    return [(b"content-length", lengths[0])] if lengths else []


def upgrade_of(headers: Iterable[tuple[bytes, bytes]]) -> bytes:
    """The protocol that a request wants to switch to; empty for none.

    Never another HTTP: nothing would look at the requests in it.
    """
    headers = list(headers)
    wanted = words_of(headers, b"upgrade")
    if b"upgrade" not in words_of(headers, b"connection") or len(wanted) != 1:
        return b""
    return b"" if wanted[0].startswith((b"h2", b"http", b"tls")) else wanted[0]
