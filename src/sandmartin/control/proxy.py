"""Traffic of sandboxes on the control plane's port: each request finds its sandbox anew.

What is for a sandbox never reaches the API, and what is for the API never a sandbox. A request is
checked and cleaned, its sandbox is woken if it may be, and then it is passed on to the agent of
its host, whose answer comes back as it is.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Collection
from functools import partial
from urllib.parse import urlsplit

from sandmartin.control import cors, passes, refusals
from sandmartin.control.address import Address, address_of, host_name
from sandmartin.control.entrance import Found, find, list_running
from sandmartin.control.limits import TooMany
from sandmartin.control.platform import Platform
from sandmartin.control.refusals import Refused
from sandmartin.control.settings import ControlSettings
from sandmartin.errors import (
    Denied,
    Invalid,
    SandmartinError,
    TimedOut,
    ToolFailed,
    Unauthenticated,
    Unavailable,
)
from sandmartin.model import State
from sandmartin.relay.exchange import Answer, ClientGone, Exchange, Request, pass_back
from sandmartin.relay.forwarding import Asked
from sandmartin.relay.headers import OWN_PREFIX, without
from sandmartin.relay.refusal import Refusal, refusal_of
from sandmartin.relay.server import App, Receive, Scope, Send, connection_of
from sandmartin.relay.target import GUEST_PORT, is_control_route, path_of
from sandmartin.transport.agent import Agent

_log = logging.getLogger(__name__)

_EXPECTS = OWN_PREFIX + b"expects"
#: In which the guest can be asked: a fork or a live snapshot stops it for a moment only.
_REACHABLE = frozenset({State.RUNNING, State.SNAPSHOTTING})
_OVER = frozenset({State.ERROR, State.MISSING, State.STOPPED, State.PAUSED})


def api_hosts(settings: ControlSettings) -> frozenset[str]:
    """Names by which the API itself is asked for."""
    names = {urlsplit(settings.base_url).hostname or ""}
    if settings.domain:
        domain = host_name(settings.domain)
        names |= {domain, f"api.{domain}", f"sandbox.{domain}"}
    return frozenset(names - {""})


def is_traffic(scope: Scope, hosts: Collection[str]) -> bool:
    """Whether a request is for a sandbox, or is none that could be for anybody."""
    try:
        return address_of(list(scope["headers"]), scope["path"], hosts) is not None
    except Invalid:
        return True


class Proxy:
    """ASGI: passes on what is for sandboxes, and leaves the rest to `app`."""

    def __init__(self, app: App, platform: Platform) -> None:
        self._app = app
        self._platform = platform
        self._hosts = api_hosts(platform.settings)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        asked: Asked | None = None
        to: Address | None = None
        try:
            asked = _asked_of(scope)
            to = await self._address(asked)
            if to is None:
                await self._app(scope, receive, send)
                return
            if to.port == GUEST_PORT and cors.is_preflight(asked):
                await cors.answer(send, asked)
                return
            await self._pass_on(asked, to, scope, receive, send)
        except Refused as refused:
            readable = to is not None and to.port == GUEST_PORT
            await refusals.answer(send, refused, asked, readable=readable)
        except ClientGone:
            return

    async def _address(self, asked: Asked) -> Address | None:
        try:
            to = address_of(asked.headers, asked.raw_path.decode("latin-1"), self._hosts)
            if to is None and (signed := passes.signed_of(asked)) is not None:
                return await self._signer(signed)
            if to is None and (token := passes.lone_token_of(asked)) is not None:
                return await self._holder(token)
        except Invalid as error:
            raise Refused(status=400, message=_sentence(error)) from error
        return to

    async def _signer(self, signed: passes.Signed) -> Address:
        """The sandbox with whose token the address of a file is signed."""
        tokens = self._platform.tokens
        for sandbox_id in await list_running(self._platform.db):
            if signed.fits(tokens, sandbox_id):
                return Address(sandbox_id, GUEST_PORT)
        raise Refused(status=401, message="invalid signature")

    async def _holder(self, token: bytes) -> Address:
        """The running sandbox that has an access token."""
        for sandbox_id in await list_running(self._platform.db):
            if self._platform.tokens.is_access(sandbox_id, token):
                return Address(sandbox_id, GUEST_PORT)
        raise Refused.by(Refusal.NOT_FOUND, "", GUEST_PORT)

    async def _pass_on(
        self, asked: Asked, to: Address, scope: Scope, receive: Receive, send: Send
    ) -> None:
        if to.port == GUEST_PORT and is_control_route(asked.raw_path):
            raise Refused.by(Refusal.CONTROL_ROUTE, to.sandbox_id, to.port)
        found = await self._find(to)
        by_anybody = passes.is_anybodys(
            asked, to, self._platform.tokens, public=found.row.public_traffic
        )
        asked = self._checked(asked, to, found)
        request = _for_agent(asked, to, scope)
        until = time.monotonic() + self._platform.settings.wake_s
        while True:
            found, agent = await self._awake(to, found, by_anybody=by_anybody)
            refusal = await self._send(agent, request, to, scope, receive, send)
            if refusal is None:
                return
            again = await self._platform.waking.note(found.row, refusal)
            if not again or time.monotonic() > until:
                raise Refused.by(refusal, to.sandbox_id, to.port)
            found = await self._find(to)

    async def _find(self, to: Address) -> Found:
        try:
            found = await find(self._platform.db, self._platform.hosts, to.sandbox_id)
        except Unavailable as error:
            message = "The platform does not answer; try again in a moment"
            raise Refused(status=503, message=message, sandbox_id=to.sandbox_id) from error
        if found is None:
            raise Refused.by(Refusal.NOT_FOUND, to.sandbox_id, to.port)
        return found

    def _checked(self, asked: Asked, to: Address, found: Found) -> Asked:
        tokens, public = self._platform.tokens, found.row.public_traffic
        try:
            return passes.check(asked, to, tokens, public=public)
        except Unauthenticated as error:
            named = "" if error.message == passes.EXPIRED else to.sandbox_id
            raise Refused(status=401, message=_sentence(error), sandbox_id=named) from error
        except Denied as error:
            raise Refused(status=403, message=_sentence(error), sandbox_id=to.sandbox_id) from error
        except Invalid as error:
            raise Refused(status=400, message=_sentence(error), sandbox_id=to.sandbox_id) from error

    async def _awake(self, to: Address, found: Found, *, by_anybody: bool) -> tuple[Found, Agent]:
        """The sandbox as it runs, woken if it may be, and its host's agent."""
        waking = self._platform.waking
        if waking.can_wake(found.row):
            try:
                woken = await waking.wake(found, by_anybody=by_anybody)
            except TimedOut as error:
                message = "The sandbox did not wake up in time"
                raise Refused(status=504, message=message, sandbox_id=to.sandbox_id) from error
            except TooMany as error:
                raise Refused(
                    status=429,
                    message="The sandbox is woken up too often",
                    sandbox_id=to.sandbox_id,
                    retry_after_s=error.retry_after_s,
                ) from error
            except SandmartinError as error:
                raise Refused(
                    status=502,
                    message="The sandbox could not be woken up",
                    sandbox_id=to.sandbox_id,
                ) from error
            if woken is None:
                raise Refused.by(Refusal.NOT_FOUND, to.sandbox_id, to.port)
            found = woken
        if found.row.state in _OVER:
            raise Refused.by(Refusal.NOT_FOUND, to.sandbox_id, to.port)
        if found.row.state not in _REACHABLE:
            raise Refused.by(Refusal.MOVING, to.sandbox_id, to.port)
        if found.agent is None:
            raise Refused.by(Refusal.SILENT, to.sandbox_id, to.port)
        return found, found.agent

    async def _send(
        self,
        agent: Agent,
        request: Request,
        to: Address,
        scope: Scope,
        receive: Receive,
        send: Send,
    ) -> Refusal | None:
        """Pass a request on, and its answer back; or why it came to no guest."""
        try:
            line = await agent.dial(to.sandbox_id)
        except SandmartinError as error:
            _log.warning("sandbox %s: %s", to.sandbox_id, error)
            return Refusal.SILENT
        try:
            keep = partial(agent.keep, to.sandbox_id)
            exchange = Exchange(line, request, receive, keep=keep)
            async with exchange.answered() as answer:
                if (refusal := refusal_of(answer.headers)) is not None:
                    return refusal
                headers = _for_client(answer, to.port)
                connection = connection_of(scope)
                await pass_back(exchange, answer, headers, connection, receive, send)
        except (Unavailable, ToolFailed) as error:
            _log.warning("sandbox %s: its host: %s", to.sandbox_id, error)
            return Refusal.GARBLED
        return None


def _asked_of(scope: Scope) -> Asked:
    try:
        asked = Asked.of(scope)
        return asked.at(path_of(asked.raw_path, asked.host))
    except Invalid as error:
        raise Refused(status=400, message=_sentence(error)) from error


def _for_agent(asked: Asked, to: Address, scope: Scope) -> Request:
    connection = connection_of(scope)
    # Of the scope both may be what a header says.
    client, scheme = (connection.peer, connection.scheme) if connection else ("", scope["scheme"])
    headers = passes.cleaned(asked.headers)
    headers += passes.forwarded(client, scheme or "http", asked.host)
    if asked.expects:
        headers.append((_EXPECTS, b"1"))
    path = f"/sandbox/{to.sandbox_id}/{to.port}".encode() + asked.raw_path
    # The body stays here until it is known that the sandbox is there to take it.
    return asked.sent_to(path, headers, patient=True)


def _for_client(answer: Answer, port: int) -> list[tuple[bytes, bytes]]:
    # The server has a date of its own.
    headers = passes.without_our_cookies(without(answer.end_to_end(), {b"date"}))
    return cors.readable(headers) if port == GUEST_PORT else headers


def _sentence(error: SandmartinError) -> str:
    return f"{error.message}: {error.hint}" if error.hint else error.message
