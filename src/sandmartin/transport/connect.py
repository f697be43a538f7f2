"""The Connect protocol, as far as a client needs it, over httpx.

Owns frames, error bodies and deadlines; knows no method of any service. A single call speaks
JSON; the messages of a stream are protobuf's binary form, which is their owner's to encode.
Sizes are checked before anything is stored, so a broken or hostile peer costs at most one frame
of memory. A stream is complete only when its end frame arrived: everything else is Unavailable.
"""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping
from contextlib import aclosing, asynccontextmanager, contextmanager

import httpx

from sandmartin import errors
from sandmartin.errors import SandmartinError, TimedOut, Unavailable
from sandmartin.transport import protobuf
from sandmartin.transport.fields import Message

#: Largest message taken in one piece; longer content comes in several.
MAX_FRAME_BYTES = 16 * 2**20
_HEADER_BYTES = 5
_COMPRESSED, _END = 0x01, 0x02
_ERROR_INFO = "hostagent.v1.ErrorInfo"
_LOST = "the connection to the agent was lost"

#: What a Connect code means when no ErrorInfo says it better.
FROM_CONNECT: Mapping[str, type[SandmartinError]] = {
    "canceled": errors.Unavailable,
    "unknown": errors.SandmartinError,
    "invalid_argument": errors.Invalid,
    "deadline_exceeded": errors.TimedOut,
    "not_found": errors.NotFound,
    "already_exists": errors.AlreadyExists,
    "permission_denied": errors.Denied,
    "resource_exhausted": errors.Exhausted,
    "failed_precondition": errors.Conflict,
    "aborted": errors.Conflict,
    "out_of_range": errors.Invalid,
    "unimplemented": errors.Unimplemented,
    "internal": errors.SandmartinError,
    "unavailable": errors.Unavailable,
    "data_loss": errors.SandmartinError,
    "unauthenticated": errors.Unauthenticated,
}


def malformed(what: str) -> Unavailable:
    return Unavailable(
        f"the agent's answer is malformed: {what}",
        hint="are the agent and this client of the same release?",
    )


def _late(method: str) -> TimedOut:
    return TimedOut(f"the agent did not answer {method} in time")


def parse_message(data: bytes) -> Message:
    """The JSON object in `data`. Raises Unavailable when it is none."""
    try:
        message = json.loads(data)
    # A deeply nested document exhausts the parser's stack.
    except (ValueError, RecursionError) as error:
        raise malformed("it is not JSON") from error
    if not isinstance(message, dict):
        raise malformed("it is not a JSON object")
    return message


def encode_frame(message: bytes) -> bytes:
    """One message of a stream."""
    return b"".join((b"\0", len(message).to_bytes(4, "big"), message))


class FrameReader:
    """Cuts a byte stream into messages; `ended` once the end frame came."""

    def __init__(self, max_frame_bytes: int = MAX_FRAME_BYTES) -> None:
        self._pending: bytes | bytearray = b""
        self._max_frame_bytes = max_frame_bytes
        self.ended = False

    def feed(self, data: bytes) -> Iterator[bytes]:
        """The messages that `data` completes. Raises what the end frame reports, Unavailable."""
        # A frame in many pieces is put together in place; a piece with many is not copied.
        if self._pending:
            self._pending += data
        else:
            self._pending = data
        at = 0
        try:
            while (length := self._next_length(at)) is not None:
                begin, at = at, at + _HEADER_BYTES + length
                yield from self._take(begin, at)
        finally:
            # What is left of a long frame is already where the next piece is added to it.
            if at or isinstance(self._pending, bytes):
                self._pending = bytearray(memoryview(self._pending)[at:])

    def _next_length(self, at: int) -> int | None:
        """Size of the message whose frame begins at `at`, None while it is not whole."""
        left = len(self._pending) - at
        if left < _HEADER_BYTES:
            return None
        length = int.from_bytes(self._pending[at + 1 : at + _HEADER_BYTES], "big")
        if length > self._max_frame_bytes:
            raise malformed(f"a frame of {length} bytes, more than {self._max_frame_bytes}")
        return length if left >= _HEADER_BYTES + length else None

    def _take(self, begin: int, end: int) -> Iterator[bytes]:
        """The message in a whole frame, unless it is the end frame."""
        flags = self._pending[begin]
        if self.ended:
            raise malformed("data follows the end of the stream")
        if flags & ~_END:
            raise malformed(f"a frame has the flags {flags:#04x}")
        body = bytes(memoryview(self._pending)[begin + _HEADER_BYTES : end])
        if not flags & _END:
            yield body
            return
        self.ended = True
        told = parse_message(body)
        if "error" in told:
            raise error_from_body(told["error"])


def error_from_body(body: object, http_status: int = 200) -> SandmartinError:
    """The error that a Connect error body reports."""
    if not isinstance(body, dict) or not isinstance(body.get("code"), str):
        return Unavailable(
            f"the agent answered HTTP {http_status} without saying why",
            hint="is it really a Sandmartin agent that listens there?",
        )
    message = str(body.get("message") or "")
    cls, hint = FROM_CONNECT.get(body["code"], SandmartinError), ""
    details = body.get("details")
    for detail in details if isinstance(details, list) else ():
        if isinstance(detail, dict) and detail.get("type") == _ERROR_INFO:
            info = _decode_error_info(str(detail.get("value", "")))
            # A code of a newer release is understood as far as Connect's own goes.
            cls, hint = errors.BY_CODE.get(info.get(1, ""), cls), info.get(2, "")
    error = cls(message, hint=hint)
    error.answered = True
    return error


def _decode_error_info(value: str) -> dict[int, str]:
    """Text fields of a protobuf message by number; none of one that is damaged.

    `debug`, its JSON form, is optional by the protocol.
    """
    try:
        fields = protobuf.decode(base64.b64decode(value + "=" * (-len(value) % 4)))
    except ValueError:
        return {}
    return {
        number: field.decode(errors="replace")
        for number, field in fields.items()
        if isinstance(field, bytes)
    }


@contextmanager
def foreign_errors_as_ours(what: str) -> Iterator[None]:
    """httpx's errors become ours, but for ConnectError: its owner knows where it went."""
    try:
        yield
    except httpx.ConnectError:
        raise
    except httpx.ConnectTimeout as error:
        raise Unavailable("the agent does not accept connections", hint="is it stopped?") from error
    except httpx.TimeoutException as error:
        raise _late(what) from error
    except httpx.TransportError as error:
        raise Unavailable(_LOST) from error


class ConnectChannel:
    """Calls of one Connect service through one httpx client."""

    def __init__(self, client: httpx.AsyncClient, service: str) -> None:
        self._client = client
        self._service = service

    async def unary(self, method: str, message: Message, *, deadline_s: float) -> Message:
        """One request, one answer. Raises TimedOut after `deadline_s`."""
        body = json.dumps(message, separators=(",", ":")).encode()
        # httpx's own timeouts are for each read, and a peer that trickles never reaches them.
        timeout = httpx.Timeout(None, connect=5)
        try:
            async with (
                asyncio.timeout(deadline_s),
                self._post(method, "application/json", body, timeout) as response,
            ):
                answer = await _read_whole(response)
        except TimeoutError as error:
            raise _late(method) from error
        if response.status_code != 200:
            raise error_from_body(_parse_or_none(answer), response.status_code)
        return parse_message(answer)

    async def server_stream(self, method: str, message: bytes) -> AsyncGenerator[bytes, None]:
        """One request, many answers, for as long as they come."""
        timeout = httpx.Timeout(None, connect=5, write=60)
        async with aclosing(self._stream(method, encode_frame(message), timeout)) as answers:
            async for answer in answers:
                yield answer

    async def client_stream(
        self, method: str, messages: AsyncIterator[bytes], *, deadline_s: float | None
    ) -> bytes:
        """Many requests, one answer.

        `deadline_s` bounds each write and the wait for the answer, never the whole.
        """
        timeout = httpx.Timeout(deadline_s, connect=5)
        body = (encode_frame(message) async for message in messages)
        async with aclosing(self._stream(method, body, timeout)) as answers:
            return b"".join([answer async for answer in answers])

    async def _stream(
        self, method: str, body: bytes | AsyncIterator[bytes], timeout: httpx.Timeout
    ) -> AsyncGenerator[bytes, None]:
        async with self._post(method, "application/connect+proto", body, timeout) as response:
            if response.status_code != 200:
                answer = _parse_or_none(await _read_whole(response))
                raise error_from_body(answer, response.status_code)
            reader = FrameReader()
            async for piece in response.aiter_raw():
                for message in reader.feed(piece):
                    yield message
        if not reader.ended:
            raise Unavailable(_LOST)

    @asynccontextmanager
    async def _post(
        self,
        method: str,
        content_type: str,
        body: bytes | AsyncIterator[bytes],
        timeout: httpx.Timeout,
    ) -> AsyncGenerator[httpx.Response, None]:
        headers = {
            "content-type": content_type,
            "connect-protocol-version": "1",
            "accept-encoding": "identity",
        }
        url = f"/{self._service}/{method}"
        with foreign_errors_as_ours(method):
            request = self._client.build_request(
                "POST", url, content=body, headers=headers, timeout=timeout
            )
            response = await self._client.send(request, stream=True)
            try:
                yield response
            finally:
                await response.aclose()


async def _read_whole(response: httpx.Response) -> bytes:
    answer = bytearray()
    async for piece in response.aiter_raw():
        answer += piece
        if len(answer) > MAX_FRAME_BYTES:
            raise malformed(f"it is longer than {MAX_FRAME_BYTES} bytes")
    return bytes(answer)


def _parse_or_none(answer: bytes) -> object:
    try:
        return json.loads(answer)
    except (ValueError, RecursionError):
        return None
