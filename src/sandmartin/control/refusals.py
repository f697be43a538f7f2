"""What is answered where a request does not reach a sandbox: JSON for programs, a page for people.

Clients of E2B's read the messages of status 502, so those that they look for are never changed.
"""

from __future__ import annotations

import html
import json
import math
from dataclasses import dataclass

from sandmartin.control import cors
from sandmartin.relay.forwarding import Asked
from sandmartin.relay.headers import Headers, values_of
from sandmartin.relay.refusal import STATUS, Refusal
from sandmartin.relay.server import Send

#: Clients look for "was not found" and "port is not open".
MESSAGES = {
    Refusal.NOT_FOUND: "The sandbox was not found",
    Refusal.PAUSED: "The sandbox was not found",
    Refusal.MOVING: "The sandbox is being started, paused or ended; try again in a moment",
    Refusal.PORT_CLOSED: "The sandbox is running but port is not open",
    Refusal.CONTROL_ROUTE: "There is no such route",
    Refusal.INVALID: "The request is not valid",
    Refusal.CROWDED: "There are too many connections to the sandbox",
    Refusal.GARBLED: "The server in the sandbox did not answer as HTTP has it",
    Refusal.SILENT: "The sandbox does not answer",
}
_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{status}</title>
<meta name="viewport" content="width=device-width">
<style>body{{font:16px/1.5 system-ui,sans-serif;max-width:34rem;margin:20vh auto;padding:0 1rem}}
small{{color:#777}}</style></head>
<body><h1>{message}</h1><p><small>{detail}</small></p></body></html>
"""


@dataclass(frozen=True, kw_only=True)
class Refused(Exception):
    """A request is not passed on."""

    status: int
    message: str
    sandbox_id: str = ""
    port: int | None = None
    #: After which another try makes sense; 0 when that is not known.
    retry_after_s: float = 0.0

    @classmethod
    def by(cls, refusal: Refusal, sandbox_id: str, port: int, message: str = "") -> Refused:
        return cls(
            status=STATUS[refusal],
            message=message or MESSAGES[refusal],
            sandbox_id=sandbox_id,
            port=port if refusal is Refusal.PORT_CLOSED else None,
        )

    @property
    def retryable(self) -> bool:
        return self.status in {409, 429, 504}

    def body(self, asked: Asked | None) -> tuple[bytes, bytes]:
        """Type and content."""
        if asked is not None and _is_browser(asked):
            port = f", port {self.port}" if self.port else ""
            detail = f"{self.status} · {self.sandbox_id}{port}" if self.sandbox_id else self.status
            page = _PAGE.format(
                status=self.status,
                message=html.escape(self.message),
                detail=html.escape(str(detail)),
            )
            return b"text/html; charset=utf-8", page.encode()
        told: dict[str, object] = {"sandboxId": self.sandbox_id} if self.sandbox_id else {}
        told |= {"message": self.message, "code": self.status}
        if self.port is not None:
            told["port"] = self.port
        return b"application/json", json.dumps(told).encode()


def _is_browser(asked: Asked) -> bool:
    return any(b"text/html" in each for each in values_of(asked.headers, b"accept"))


async def answer(
    send: Send, refused: Refused, asked: Asked | None, *, readable: bool = False
) -> None:
    """Send a refusal, that pages of any site may read or not.

    Without `asked` nothing that follows on the connection can be believed.
    """
    kind, body = refused.body(asked)
    headers: Headers = [
        (b"content-type", kind),
        (b"content-length", str(len(body)).encode()),
        (b"cache-control", b"no-store"),
        (b"should-retry", b"true" if refused.retryable else b"false"),
    ]
    if refused.retry_after_s:
        headers.append((b"retry-after", str(math.ceil(refused.retry_after_s)).encode()))
    if readable:
        headers = cors.readable(headers)
    if asked is None:
        headers.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": refused.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
