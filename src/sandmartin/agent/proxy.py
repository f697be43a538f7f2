"""Traffic of sandboxes on the agent's listener: `/sandbox/{id}/{port}/...` goes to that port.

Who may connect here may reach any port: the control plane has asked for tokens before. What it
sends is passed on as it is, but for the guest agent's own token, and for routes that are for this
host alone. Errors of the agent's have a header that no guest's answer can have.
"""

from __future__ import annotations

import logging
import re
from typing import Any

from sandmartin.agent.host import Host
from sandmartin.agent.sandbox import Sandbox
from sandmartin.errors import (
    Conflict,
    DiskFull,
    Exhausted,
    Invalid,
    NotFound,
    SandmartinError,
    ToolFailed,
)
from sandmartin.model import State
from sandmartin.relay.exchange import ClientGone, Exchange, Request, pass_back
from sandmartin.relay.forwarding import Asked
from sandmartin.relay.headers import OWN_PREFIX, end_to_end, values_of, without, without_own
from sandmartin.relay.line import Line
from sandmartin.relay.refusal import Refusal, refuse
from sandmartin.relay.server import Receive, Scope, Send, connection_of
from sandmartin.relay.target import GUEST_PORT, INTERPRETER_PORT, MAX_PORT, is_control_route

_log = logging.getLogger(__name__)

_PREFIX = b"/sandbox/"
_PLACE = re.compile(rb"/sandbox/([a-z0-9][a-z0-9._-]{0,63})/([1-9][0-9]{0,4})(/.*)?", re.DOTALL)
_TOKEN = b"x-access-token"
#: Tells the guest agent that who asks may ask for any user, root too.
_RAISED = OWN_PREFIX + b"raised"
#: Said by the control plane where the client itself waits to be asked for its body.
EXPECTS = OWN_PREFIX + b"expects"
#: How long a server in a guest may take to ask for it; many never do.
_PATIENCE_S = 1.0


def is_proxied(scope: Scope) -> bool:
    """Whether a request is for a sandbox's port."""
    return bytes(scope.get("raw_path") or b"").startswith(_PREFIX)


class _Refused(Exception):
    def __init__(self, refusal: Refusal, message: str) -> None:
        super().__init__(message)
        self.refusal = refusal


class Proxy:
    """ASGI: passes on what is for sandboxes, and leaves the rest to `app`."""

    def __init__(self, host: Host, app: Any) -> None:
        self._host = host
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not is_proxied(scope):
            await self._app(scope, receive, send)
            return
        try:
            await self._pass_on(scope, receive, send)
        except _Refused as refused:
            await refuse(send, refused.refusal, str(refused))
        except ClientGone:
            return

    async def _pass_on(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            asked = Asked.of(scope)
            sandbox_id, port, path = _place_of(asked.raw_path)
        except Invalid as error:
            raise _Refused(Refusal.INVALID, error.message) from error
        if port == GUEST_PORT and is_control_route(path):
            raise _Refused(Refusal.CONTROL_ROUTE, "this route is for the host alone")
        try:
            sandbox = self._host.get(sandbox_id)
        except NotFound as error:
            raise _Refused(Refusal.NOT_FOUND, error.message) from error
        line, token = await _dial(sandbox, port)
        request = _for_guest(asked, port, path, token)
        exchange = Exchange(line, request, receive, sandbox.flows)
        try:
            async with exchange.answered() as answer:
                await pass_back(
                    exchange, answer, answer.end_to_end(), connection_of(scope), receive, send
                )
        except SandmartinError as error:
            if isinstance(error, ToolFailed):
                _log.warning("sandbox %s, port %s: %s", sandbox_id, port, error)
            raise _Refused(Refusal.GARBLED, error.message) from error
        finally:
            sandbox.flows()


def _place_of(raw_path: bytes) -> tuple[str, int, bytes]:
    match = _PLACE.fullmatch(raw_path)
    if match is None or int(match[2]) > MAX_PORT:
        raise Invalid("the path is none of a sandbox's port", hint="use /sandbox/ID/PORT/PATH")
    return match[1].decode(), int(match[2]), match[3] or b"/"


async def _dial(sandbox: Sandbox, port: int) -> tuple[Line, str]:
    try:
        return await sandbox.dial(port)
    except NotFound as error:
        raise _Refused(Refusal.PORT_CLOSED, error.message) from error
    except Conflict as error:
        raise _Refused(_refusal_in(sandbox.state), error.message) from error
    except SandmartinError as error:
        crowded = isinstance(error, Exhausted) and not isinstance(error, DiskFull)
        raise _Refused(Refusal.CROWDED if crowded else Refusal.SILENT, error.message) from error


def _refusal_in(state: State) -> Refusal:
    match state:
        case State.PAUSED:
            return Refusal.PAUSED
        case State.ERROR | State.STOPPED:
            return Refusal.NOT_FOUND
        case _:
            return Refusal.MOVING


def _for_guest(asked: Asked, port: int, path: bytes, token: str) -> Request:
    headers = without(without_own(end_to_end(asked.headers)), {_TOKEN})
    if port in {GUEST_PORT, INTERPRETER_PORT}:
        headers.append((_TOKEN, token.encode()))
    if port == GUEST_PORT:
        headers.append((_RAISED, b"1"))
    waits = asked.expects and bool(values_of(asked.headers, EXPECTS))
    return asked.sent_to(path, headers, patient=waits, patience_s=_PATIENCE_S)
