"""What a request must show to reach a sandbox's port, and what is taken from it before it does.

The guest agent's port asks for the access token; a file's address may be signed with it instead.
Other ports are open to all, or with private traffic to whoever has the traffic token. Nothing
that opens the platform or another port reaches a guest.
"""

from __future__ import annotations

import hmac
import re
import time
from dataclasses import dataclass, replace
from urllib.parse import parse_qsl, urlencode

from sandmartin.control.address import ID_HEADER, PORT_HEADER, Address
from sandmartin.control.sessions import COOKIES
from sandmartin.control.tokens import Tokens
from sandmartin.errors import Denied, Invalid, Unauthenticated
from sandmartin.relay.forwarding import Asked
from sandmartin.relay.headers import Headers, end_to_end, values_of, without, without_own
from sandmartin.relay.target import GUEST_PORT, INTERPRETER_PORT

_ACCESS = b"x-access-token"
_TRAFFIC = (b"e2b-traffic-access-token", b"x-traffic-token")
#: What clients ask of the guest agent.
_OF_GUEST = re.compile(rb"/(?:process\.Process/|filesystem\.Filesystem/|files(?:/|$)|health$)")
_TOKEN = re.compile(rb"[0-9a-f]{64}")
_TAKEN_OUT = frozenset(
    {
        _ACCESS,
        *_TRAFFIC,
        ID_HEADER,
        PORT_HEADER,
        b"x-api-key",
        # What we say of where a request comes from, and nobody else.
        b"forwarded",
        b"x-real-ip",
    }
)
_FORWARDED_PREFIX = b"x-forwarded-"
_PLATFORM_BEARER = re.compile(rb"bearer\s+e2b_", re.IGNORECASE)
_COOKIES = frozenset(each.encode() for each in COOKIES)
_SIGNED = "signature"
_EXPIRES = "signature_expiration"
_OPERATIONS = {"GET": "read", "HEAD": "read", "POST": "write"}
_SIGNATURE = re.compile(r"v1_[A-Za-z0-9+/]{43}")
EXPIRED = "signature is already expired"


@dataclass(frozen=True)
class Signed:
    """A file that a request may read or write by the signature in its address."""

    fields: tuple[tuple[str, str], ...]
    operation: str

    def field(self, name: str) -> str:
        return dict(self.fields).get(name, "")

    @property
    def query(self) -> bytes:
        """The same query, written so that nobody reads it in another way."""
        return urlencode(self.fields, errors="surrogateescape").encode()

    def fits(self, tokens: Tokens, sandbox_id: str) -> bool:
        expected = tokens.signature(
            sandbox_id,
            self.field("path"),
            self.operation,
            self.field("username"),
            self.field(_EXPIRES),
        )
        return hmac.compare_digest(expected, self.field(_SIGNED))

    def check_time(self) -> None:
        """Raises Unauthenticated once its time is over."""
        expires = self.field(_EXPIRES)
        if expires and (not expires.isdecimal() or int(expires) < time.time()):
            raise Unauthenticated(EXPIRED)


def signed_of(asked: Asked) -> Signed | None:
    """The file whose signed address a request has; None when it has none.

    Raises Invalid for a query that can be read in more than one way.
    """
    if asked.raw_path != b"/files" or b"signature=" not in asked.query:
        return None
    operation = _OPERATIONS.get(asked.method)
    try:
        fields = parse_qsl(
            asked.query.decode("ascii"), keep_blank_values=True, errors="surrogateescape"
        )
    except ValueError as error:
        raise Invalid("the query cannot be read") from error
    names = [name for name, _ in fields]
    if len(set(names)) != len(names) or b";" in asked.query:
        raise Invalid("the query has a name twice, or a semicolon")
    signed = Signed(tuple(fields), operation or "")
    if operation is None or not _SIGNATURE.fullmatch(signed.field(_SIGNED)):
        return None
    return signed


def lone_token_of(asked: Asked) -> bytes | None:
    """The access token that alone says which sandbox a call of its guest agent is for.

    Some older clients, connected to a sandbox that somebody else has made, do not name it.
    """
    if not _OF_GUEST.match(asked.raw_path):
        return None
    tokens = values_of(asked.headers, _ACCESS)
    return tokens[0] if len(tokens) == 1 and _TOKEN.fullmatch(tokens[0]) else None


def check(asked: Asked, to: Address, tokens: Tokens, *, public: bool) -> Asked:
    """The request, if it may reach a sandbox's port. Raises Unauthenticated, Denied, Invalid."""
    if to.port == GUEST_PORT:
        return _check_guest(asked, to, tokens)
    if public:
        return asked
    given = [each for name in _TRAFFIC for each in values_of(asked.headers, name)]
    if any(tokens.is_traffic(to.sandbox_id, each) for each in given):
        return asked
    if to.port == INTERPRETER_PORT and _has_access(asked, to, tokens):
        return asked
    if not given:
        raise Denied(
            "the traffic of this sandbox is private, and no traffic token is given",
            hint="send it as E2b-Traffic-Access-Token",
        )
    raise Denied("the traffic token is not this sandbox's")


def is_anybodys(asked: Asked, to: Address, tokens: Tokens, *, public: bool) -> bool:
    """Whether a request that may reach a sandbox's port shows nothing that not everybody has."""
    if _has_access(asked, to, tokens):
        return False
    return _asks_for_health(asked) if to.port == GUEST_PORT else public


def _asks_for_health(asked: Asked) -> bool:
    return (asked.method, asked.raw_path) == ("GET", b"/health")


def _check_guest(asked: Asked, to: Address, tokens: Tokens) -> Asked:
    if _asks_for_health(asked) or _has_access(asked, to, tokens):
        return asked
    if (signed := signed_of(asked)) is not None:
        if not signed.fits(tokens, to.sandbox_id):
            raise Unauthenticated("invalid signature")
        signed.check_time()
        return replace(asked, query=signed.query)
    raise Unauthenticated("missing or wrong access token", hint="send it as X-Access-Token")


def _has_access(asked: Asked, to: Address, tokens: Tokens) -> bool:
    given = values_of(asked.headers, _ACCESS)
    return len(given) == 1 and tokens.is_access(to.sandbox_id, given[0])


# What is taken out.


def cleaned(headers: Headers) -> Headers:
    """A request's headers without what is not for a guest."""
    kept: Headers = []
    for name, value in without_own(without(end_to_end(headers), _TAKEN_OUT)):
        if name.startswith(_FORWARDED_PREFIX):
            continue
        if name == b"authorization" and _PLATFORM_BEARER.match(value.strip()):
            continue
        if name == b"cookie":
            value = _without_ours(value)
            if not value:
                continue
        kept.append((name, value))
    return kept


def _without_ours(cookies: bytes) -> bytes:
    pairs = (each.strip() for each in cookies.split(b";"))
    kept = (each for each in pairs if each and each.partition(b"=")[0].strip() not in _COOKIES)
    return b"; ".join(kept)


def without_our_cookies(headers: Headers) -> Headers:
    """An answer's headers: no guest sets a cookie of the platform's."""
    return [
        (name, value)
        for name, value in headers
        if name != b"set-cookie" or value.partition(b"=")[0].strip() not in _COOKIES
    ]


def forwarded(client: str, scheme: str, host: bytes) -> Headers:
    """What we say of where a request comes from."""
    told = [(b"x-forwarded-proto", scheme.encode()), (b"x-forwarded-host", host)]
    return [(b"x-forwarded-for", client.encode()), *told] if client else told
