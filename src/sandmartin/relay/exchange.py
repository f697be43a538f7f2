"""One request that is passed on over a line, and the answer that comes back.

Bodies pass in both directions at once, no faster than they are taken. The request's body is not
touched before the other side wants it, where that was asked for: until then it can be told
elsewhere. A client that goes away ends the exchange; an answer that breaks off is never completed.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field

import h11

from sandmartin.errors import SandmartinError, ToolFailed, Unavailable
from sandmartin.relay.headers import Headers, end_to_end, values_of, without_own
from sandmartin.relay.line import Line, splice
from sandmartin.relay.server import Connection, Receive, Send

_MAX_HEAD_BYTES = 64 * 1024
_CONTINUE, _SWITCHING, _NO_CONTENT, _MAX_STATUS = 100, 101, 204, 599
_LENGTH = b"content-length"
#: Answers before the answer; a server that goes on with them has none.
_MAX_EARLY = 64


class ClientGone(Exception):
    """Nobody waits for the answer any more."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """The head of a request, as it is sent on."""

    method: bytes
    target: bytes
    headers: Headers = field(repr=False)
    #: How long the body is, as a header; none without a body.
    framing: Headers = field(default_factory=list)
    #: The protocol to switch to; empty for none.
    upgrade: bytes = b""
    #: The body waits until the other side asks for it.
    patient: bool = False
    #: Or until this has passed; None is for ever.
    patience_s: float | None = None

    def event(self) -> h11.Request:
        """The head as h11 writes it."""
        headers = [*self.headers, *self.framing]
        if self.upgrade:
            headers += [(b"connection", b"Upgrade"), (b"upgrade", self.upgrade)]
        if self.patient:
            headers.append((b"expect", b"100-continue"))
        return h11.Request(method=self.method, target=self.target, headers=headers)


@dataclass(frozen=True, kw_only=True)
class Answer:
    """The head of an answer."""

    status: int
    headers: Headers = field(repr=False)

    @property
    def switches(self) -> bool:
        """Whether what follows is not HTTP any more."""
        return self.status == _SWITCHING

    def end_to_end(self) -> Headers:
        """Its headers as they are passed on; what the two of us tell each other stays here."""
        kept = without_own(end_to_end(self.headers))
        if self.status == _NO_CONTENT or values_of(self.headers, b"transfer-encoding"):
            return kept
        # Also where there is no body, as in an answer to HEAD.
        return kept + [(_LENGTH, value) for value in values_of(self.headers, _LENGTH)]


def _nothing() -> None:
    """Nobody wants to know."""


class Exchange:
    """A request on its way, and its answer. `flows` is called whenever something passes.

    At its end the line is ended too, unless both were whole and `keep` takes it.
    """

    def __init__(
        self,
        line: Line,
        request: Request,
        receive: Receive,
        flows: Callable[[], None] = _nothing,
        keep: Callable[[Line], None] = Line.abort,
    ) -> None:
        self._line = line
        self._request = request
        self._receive = receive
        self._flows = flows
        self._keep = keep
        self._http = h11.Connection(h11.CLIENT, max_incomplete_event_size=_MAX_HEAD_BYTES)
        self._wanted = asyncio.Event()
        self._client_gone = False
        self._sending: asyncio.Task[None] | None = None

    @contextlib.asynccontextmanager
    async def answered(self) -> AsyncIterator[Answer]:
        """The head of the answer; with the context the line is ended, or kept.

        Raises Unavailable when none came, ToolFailed for what is none, ClientGone.
        """
        end: Callable[[Line], None] = Line.abort
        try:
            with self._errors_as_ours():
                await self._line.write(self._http.send(self._request.event()) or b"")
                self._sending = asyncio.create_task(self._send_body(), name="request body")
                answer = await self._head()
            yield answer
            end = self._keep if self._is_whole() else Line.abort
        finally:
            try:
                await self._stop_sending()
            finally:
                end(self._line)

    def _is_whole(self) -> bool:
        """Whether request and answer have both come to their end, and another may follow."""
        states = {self._http.our_state, self._http.their_state}
        return states == {h11.DONE} and self._http.trailing_data == (b"", False)

    async def _stop_sending(self) -> None:
        if self._sending is not None:
            self._sending.cancel()
            await asyncio.wait({self._sending})

    async def _head(self) -> Answer:
        for _ in range(_MAX_EARLY):
            event = await self._next()
            if isinstance(event, h11.InformationalResponse):
                if event.status_code == _CONTINUE:
                    self._wanted.set()
                elif event.status_code == _SWITCHING:
                    return Answer(status=_SWITCHING, headers=list(event.headers))
            elif isinstance(event, h11.Response):
                if event.status_code > _MAX_STATUS:
                    raise ToolFailed(f"what came is no answer: its status is {event.status_code}")
                return Answer(status=event.status_code, headers=list(event.headers))
            else:
                raise Unavailable("the connection ended before an answer came")
        raise ToolFailed(f"what came is no answer, but {_MAX_EARLY} of those before one")

    async def _next(self) -> object:
        """The next part of the answer."""
        while True:
            event = self._http.next_event()
            if event is not h11.NEED_DATA:
                return event
            self._http.receive_data(await self._line.read())
            self._flows()

    # The request's body.

    async def _send_body(self) -> None:
        if self._request.patient:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._request.patience_s):
                    await self._wanted.wait()
        # Who does not take all of the body may have answered all the same.
        with contextlib.suppress(ConnectionError, h11.LocalProtocolError):
            await self._send_chunks()
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self._end_for_client()

    async def _send_chunks(self) -> None:
        more = True
        while more:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                self._end_for_client()
                return
            self._flows()
            if body := message.get("body"):
                await self._line.write(self._http.send(h11.Data(data=body)) or b"")
            more = bool(message.get("more_body"))
        await self._line.write(self._http.send(h11.EndOfMessage()) or b"")

    def _end_for_client(self) -> None:
        if self._is_whole():
            # The server says so too once it has sent the answer.
            return
        self._client_gone = True
        self._line.abort()

    # The answer.

    async def chunks(self) -> AsyncGenerator[bytes, None]:
        """The body of the answer. Raises Unavailable when it breaks off, ToolFailed, ClientGone."""
        with self._errors_as_ours():
            while True:
                event = await self._next()
                if isinstance(event, h11.Data):
                    yield bytes(event.data)
                elif isinstance(event, h11.EndOfMessage):
                    return
                else:
                    raise Unavailable("the answer broke off")

    async def switch(self, connection: Connection, headers: Headers) -> None:
        """Take over the client's connection, and pass on whatever comes at either end."""
        await self._stop_sending()
        early, _ = self._http.trailing_data
        switched = [(b"connection", b"Upgrade"), (b"upgrade", self._request.upgrade)]
        client = connection.take([*headers, *switched])
        self._line.unread(early)
        await splice(client, self._line, self._flows)

    @contextlib.contextmanager
    def _errors_as_ours(self) -> Iterator[None]:
        try:
            yield
        except (h11.RemoteProtocolError, ConnectionError, SandmartinError) as error:
            if self._client_gone:
                raise ClientGone from error
            if isinstance(error, h11.RemoteProtocolError):
                raise ToolFailed(f"what came is no answer: {error}") from error
            if isinstance(error, ConnectionError):
                raise Unavailable(str(error)) from error
            raise


async def pass_back(
    exchange: Exchange,
    answer: Answer,
    headers: Headers,
    connection: Connection | None,
    receive: Receive,
    send: Send,
) -> None:
    """Send the answer on, with these headers. One that breaks off ends the client's connection.

    Raises ClientGone.
    """
    if connection is not None:
        connection.relays()
        if answer.switches:
            await exchange.switch(connection, headers)
            return
    try:
        await send({"type": "http.response.start", "status": answer.status, "headers": headers})
        async for chunk in exchange.chunks():
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
        await send({"type": "http.response.body", "body": b""})
    except (Unavailable, ToolFailed):
        if connection is None:
            raise
        await connection.cut(receive)
