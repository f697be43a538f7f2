"""What an ASGI scope says of a request, in the words of an exchange."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from sandmartin.relay.exchange import Request
from sandmartin.relay.headers import Headers, framing_of, upgrade_of, values_of, words_of
from sandmartin.relay.server import Scope

_EMPTY = (b"content-length", b"0")


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A request as it came."""

    method: str
    #: As it was written, without the query.
    raw_path: bytes
    query: bytes
    headers: Headers = field(repr=False)
    framing: Headers
    #: The protocol to switch to; empty for none.
    upgrade: bytes
    #: Whether the body is only sent once it is asked for.
    expects: bool

    @classmethod
    def of(cls, scope: Scope) -> Asked:
        """Raises Invalid when it cannot be said how long its body is."""
        headers: Headers = list(scope["headers"])
        modern = scope["http_version"] == "1.1"
        return cls(
            method=scope["method"],
            raw_path=scope.get("raw_path") or scope["path"].encode(),
            query=scope["query_string"],
            headers=headers,
            framing=framing_of(headers),
            upgrade=upgrade_of(headers) if modern else b"",
            expects=modern and b"100-continue" in words_of(headers, b"expect"),
        )

    def at(self, raw_path: bytes) -> Asked:
        """The same request for another path."""
        return replace(self, raw_path=raw_path)

    @property
    def host(self) -> bytes:
        """What its Host says; empty for none."""
        return next(iter(values_of(self.headers, b"host")), b"")

    @property
    def has_body(self) -> bool:
        """Whether content follows its head."""
        return self.framing not in ([], [_EMPTY])

    def sent_to(
        self,
        path: bytes,
        headers: Headers,
        *,
        patient: bool = False,
        patience_s: float | None = None,
    ) -> Request:
        """The same request, for another path and with other headers."""
        return Request(
            method=self.method.encode(),
            target=path + (b"?" + self.query if self.query else b""),
            headers=headers,
            framing=self.framing,
            upgrade=self.upgrade,
            patient=patient and self.has_body,
            patience_s=patience_s,
        )
