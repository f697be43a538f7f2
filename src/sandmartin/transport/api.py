"""The REST API of a control plane, as far as any of its clients needs it, over httpx.

Owns requests, their deadlines and their repetition, and how errors come back; knows no route. What
is asked again is what changes nothing by being asked twice, and what certainly never arrived. A
stream that is cut is Unavailable: an answer in pieces is complete only with its last one. Sizes are
checked before anything is stored.
"""

from __future__ import annotations

import asyncio
import json
import os
import ssl
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from contextlib import aclosing, asynccontextmanager
from typing import Any, TypeVar

import httpx

from sandmartin import __version__, errors
from sandmartin.errors import Invalid, NotFound, SandmartinError, TimedOut, Unavailable

_T = TypeVar("_T")
Params = Mapping[str, Any]

CALL_S = 30.0
_CONNECT_S = 5.0
#: The other side says something, if only that there is nothing to say, each 15 s.
_QUIET_S = 60.0
_WRITE_S = 120.0
#: Before each repetition.
_PAUSES_S = (0.1, 0.4, 1.0)
#: Far below what proxies and servers keep a connection open for: one that is closed just as it is
#: used costs a request.
_IDLE_S = 15.0
_MAX_ANSWER_BYTES = 64 * 2**20
_MAX_EVENT_BYTES = 16 * 2**20

#: What a status means when no code says it better.
_FROM_STATUS: Mapping[int, type[SandmartinError]] = {
    400: errors.Invalid,
    401: errors.Unauthenticated,
    403: errors.Denied,
    404: errors.NotFound,
    405: errors.Unimplemented,
    408: errors.TimedOut,
    409: errors.Conflict,
    413: errors.Invalid,
    422: errors.Invalid,
    429: errors.Exhausted,
    501: errors.Unimplemented,
    502: errors.Unavailable,
    503: errors.Unavailable,
    504: errors.TimedOut,
}


class Unreached(Unavailable):
    """Nothing was asked, for nobody could be reached."""


class Api:
    """One control plane, asked with one API key. Every failure is a SandmartinError."""

    def __init__(self, url: str, api_key: str) -> None:
        """Raises Invalid for an address or a key that can be none."""
        self.url = _checked_url(url)
        if not (api_key.isascii() and api_key.isprintable()) or " " in api_key:
            raise Invalid("the API key is none", hint="`sandmartin up` prints one")
        self._http = httpx.AsyncClient(
            base_url=self.url,
            headers={
                **({"x-api-key": api_key} if api_key else {}),
                "accept-encoding": "identity",
                "user-agent": f"sandmartin/{__version__}",
            },
            # Loading certificates takes longer than a request: not where there is no TLS.
            verify=self.url.startswith("https:"),
            # A stream holds its connection: any limit would be one on running commands.
            limits=httpx.Limits(
                max_connections=None, max_keepalive_connections=20, keepalive_expiry=_IDLE_S
            ),
        )

    async def aclose(self) -> None:
        await self._http.aclose()

    async def ask(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None = None,
        *,
        params: Params | None = None,
        deadline_s: float = CALL_S,
        key: str = "",
        repeatable: bool = False,
        headers: Mapping[str, str] | None = None,
    ) -> Any:
        """What is answered, None for nothing. Raises what is said, TimedOut, Unavailable.

        What is `repeatable` is asked again when its answer was lost, as is what only reads, and
        what has an idempotency `key`.
        """
        sent = {**(headers or {}), **({"idempotency-key": key} if key else {})}
        # httpx's own timeouts are for each read, and a peer that trickles never reaches them.
        timeout = httpx.Timeout(None, connect=_CONNECT_S)
        options = {"json": body, "params": params, "headers": sent, "timeout": timeout}

        async def attempt() -> bytes:
            async with self._request(method, path, **options) as response:
                return await _read_whole(response)

        repeatable = repeatable or bool(key) or method == "GET"
        try:
            async with asyncio.timeout(deadline_s):
                answer = await _repeated(attempt, repeatable=repeatable)
        except TimeoutError as error:
            raise self._late() from error
        return self._parsed(answer)

    async def exists(self, path: str) -> bool:
        """Whether there is something at `path`."""
        timeout = httpx.Timeout(_QUIET_S, connect=_CONNECT_S)

        async def attempt() -> bool:
            async with self._request("HEAD", path, timeout=timeout):
                return True

        try:
            return await _repeated(attempt, repeatable=True)
        except NotFound:
            return False

    async def read(
        self, method: str, path: str, *, params: Params | None = None
    ) -> AsyncGenerator[bytes, None]:
        """An answer of any size, in pieces."""
        timeout = httpx.Timeout(_QUIET_S, connect=_CONNECT_S)
        async with self._request(method, path, params=params, timeout=timeout) as response:
            async for piece in response.aiter_raw():
                if piece:
                    yield piece

    async def write(
        self,
        method: str,
        path: str,
        chunks: AsyncIterator[bytes],
        *,
        params: Params | None = None,
        deadline_s: float | None,
    ) -> Any:
        """Send a body of any size; what is answered, None for nothing.

        `deadline_s` bounds the wait for the answer to it.
        """
        timeout = httpx.Timeout(deadline_s, connect=_CONNECT_S, write=deadline_s and _WRITE_S)

        async def body() -> AsyncGenerator[bytes, None]:
            async for chunk in chunks:
                if chunk:
                    yield chunk

        async with (
            aclosing(body()) as content,
            self._request(
                method, path, content=content, params=params, timeout=timeout
            ) as response,
        ):
            answer = await _read_whole(response)
        return self._parsed(answer)

    async def events(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None = None,
        *,
        params: Params | None = None,
    ) -> AsyncGenerator[tuple[str, dict[str, Any]], None]:
        """Server-sent events as kind and fields. Raises what an event `error` says."""
        options = {
            "json": body,
            "params": params,
            "headers": {"accept": "text/event-stream"},
            "timeout": httpx.Timeout(_QUIET_S, connect=_CONNECT_S),
        }
        async with (
            self._request(method, path, **options) as response,
            aclosing(_blocks(response)) as blocks,
        ):
            async for block in blocks:
                if (event := self._event(block)) is None:
                    continue
                if event[0] == "error":
                    raise _error_of(event[1], response.status_code)
                yield event

    def _event(self, block: bytes) -> tuple[str, dict[str, Any]] | None:
        """The event in a block of lines, None for a comment."""
        kind, data = "", b""
        for line in block.split(b"\n"):
            name, _, value = line.partition(b": ")
            if name == b"event":
                kind = value.decode(errors="replace")
            elif name == b"data":
                data = value
        if not kind:
            return None
        fields = self._parsed(data)
        if not isinstance(fields, dict):
            raise self._foreign("an event is no object")
        return kind, fields

    @asynccontextmanager
    async def _request(
        self, method: str, path: str, **options: Any
    ) -> AsyncGenerator[httpx.Response, None]:
        """The answer to one request, its body still to come. Raises what an error says."""
        try:
            async with self._http.stream(method, path, **options) as response:
                if not response.is_success:
                    answer = await _read_whole(response)
                    if method == "HEAD":
                        raise _refusal_without_words(self.url, response.status_code)
                    raise self._refusal(response.status_code, answer)
                yield response
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            raise Unreached(
                f"the control plane at {self.url} cannot be reached: {_why(error)}",
                hint="is its address right, and does it run?",
            ) from error
        except httpx.ReadTimeout as error:
            raise self._late() from error
        except httpx.TransportError as error:
            raise Unavailable(f"the connection to {self.url} was lost") from error
        except RuntimeError as error:
            if not self._http.is_closed:
                raise
            raise Unavailable(f"the connection to {self.url} was closed") from error

    def _late(self) -> TimedOut:
        return TimedOut(f"the control plane at {self.url} did not answer in time")

    def _foreign(self, what: str) -> Unavailable:
        return Unavailable(
            f"what answers at {self.url} is no control plane: {what}",
            hint="is its address right, and what stands between?",
        )

    def _parsed(self, answer: bytes) -> Any:
        try:
            return json.loads(answer) if answer else None
        # A deeply nested document exhausts the parser's stack.
        except (ValueError, RecursionError) as error:
            raise self._foreign("the answer is no JSON") from error

    def _refusal(self, status: int, answer: bytes) -> SandmartinError:
        try:
            told = json.loads(answer)["error"]
        except (ValueError, RecursionError, TypeError, KeyError):
            told = None
        if isinstance(told, dict):
            return _error_of(told, status)
        return self._foreign(f"HTTP {status} that does not say why")


def _refusal_without_words(url: str, status: int) -> SandmartinError:
    """What an answer means that has no body, as those to HEAD."""
    return _FROM_STATUS.get(status, Unavailable)(f"{url} answers with HTTP {status}")


def _error_of(told: Mapping[str, Any], status: int) -> SandmartinError:
    """The error that an answer or an event tells."""
    code, message, hint = (str(told.get(name) or "") for name in ("code", "message", "hint"))
    # A code of a newer release is understood as far as its status goes.
    cls = errors.BY_CODE.get(code, _FROM_STATUS.get(status, SandmartinError))
    error = cls(message, hint=hint)
    # A control plane that could not wait for its host does not know either what came of it.
    error.answered = not isinstance(error, Unavailable | TimedOut)
    return error


async def _repeated(attempt: Callable[[], Awaitable[_T]], *, repeatable: bool) -> _T:
    """The first attempt that succeeds, of so many as it is worth making."""
    for pause_s in _PAUSES_S:
        try:
            return await attempt()
        except Unavailable as error:
            # Others that are unavailable have waited long enough themselves.
            if not isinstance(error, Unreached) and not (
                repeatable and error.code == Unavailable.code
            ):
                raise
        await asyncio.sleep(pause_s)
    return await attempt()


async def _read_whole(response: httpx.Response) -> bytes:
    answer = bytearray()
    async for piece in response.aiter_raw():
        answer += piece
        if len(answer) > _MAX_ANSWER_BYTES:
            raise Unavailable(f"the answer is longer than {_MAX_ANSWER_BYTES} bytes")
    return bytes(answer)


async def _blocks(response: httpx.Response) -> AsyncGenerator[bytes, None]:
    """What lies between the blank lines of a body."""
    pending = bytearray()
    async for piece in response.aiter_raw():
        searched = max(len(pending) - 1, 0)
        pending += piece
        while (end := pending.find(b"\n\n", searched)) >= 0:
            block = bytes(memoryview(pending)[:end])
            del pending[: end + 2]
            searched = 0
            yield block
        if len(pending) > _MAX_EVENT_BYTES:
            raise Unavailable(f"an event is longer than {_MAX_EVENT_BYTES} bytes")


def _checked_url(url: str) -> str:
    hint = "use http://HOST:PORT or https://HOST"
    try:
        parsed = httpx.URL(url)
    except (httpx.InvalidURL, UnicodeError) as error:
        raise Invalid("the address of the control plane cannot be read", hint=hint) from error
    if parsed.scheme not in {"http", "https"} or not parsed.host:
        raise Invalid(f"{url[:80]!r} is no address of a control plane", hint=hint)
    if parsed.userinfo or parsed.query or parsed.fragment:
        raise Invalid("the address of the control plane has more than a host and a path", hint=hint)
    return str(parsed).rstrip("/")


def _why(error: BaseException) -> str:
    """What the operating system, the resolver or the certificate had to say."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ssl.SSLCertVerificationError):
            return f"its certificate is not good: {cause.verify_message}"
        if isinstance(cause, OSError) and cause.errno:
            # What asyncio says in its place is an address.
            return os.strerror(cause.errno) if cause.errno > 0 else str(cause.strerror)
        cause = cause.__cause__ or cause.__context__
    return str(error) or "it does not answer"
