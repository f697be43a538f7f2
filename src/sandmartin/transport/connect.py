"""The Connect protocol with JSON, as far as a client needs it, over httpx.

Owns frames, error bodies and deadlines; knows no method of any service. Sizes are checked before
anything is stored, so a broken or hostile peer costs at most one frame of memory. A stream is
complete only when its end frame arrived: everything else is Unavailable.
"""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping
from contextlib import aclosing, asynccontextmanager, contextmanager
from typing import Any

import httpx

from sandmartin import errors
from sandmartin.errors import SandmartinError, TimedOut, Unavailable

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

Message = dict[str, Any]


def _malformed(what: str) -> Unavailable:
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
        raise _malformed("it is not JSON") from error
    if not isinstance(message, dict):
        raise _malformed("it is not a JSON object")
    return message


def encode_frame(message: Message) -> bytes:
    """One message of a stream."""
    body = json.dumps(message, separators=(",", ":")).encode()
    return b"\0" + len(body).to_bytes(4, "big") + body


class FrameReader:
    """Cuts a byte stream into messages; `ended` once the end frame came."""

    def __init__(self, max_frame_bytes: int = MAX_FRAME_BYTES) -> None:
        self._buffer = bytearray()
        self._max_frame_bytes = max_frame_bytes
        self.ended = False

    def feed(self, data: bytes) -> Iterator[Message]:
        """The messages that `data` completes. Raises what the end frame reports, Unavailable."""
        self._buffer += data
        while (frame := self._next_frame()) is not None:
            flags, body = frame
            if self.ended:
                raise _malformed("data follows the end of the stream")
            if flags & ~_END:
                raise _malformed(f"a frame has the flags {flags:#04x}")
            message = parse_message(body)
            if not flags & _END:
                yield message
                continue
            self.ended = True
            if "error" in message:
                raise error_from_body(message["error"])

    def _next_frame(self) -> tuple[int, bytes] | None:
        if len(self._buffer) < _HEADER_BYTES:
            return None
        length = int.from_bytes(self._buffer[1:_HEADER_BYTES], "big")
        if length > self._max_frame_bytes:
            raise _malformed(f"a frame of {length} bytes, more than {self._max_frame_bytes}")
        whole = _HEADER_BYTES + length
        if len(self._buffer) < whole:
            return None
        flags, body = self._buffer[0], bytes(self._buffer[_HEADER_BYTES:whole])
        del self._buffer[:whole]
        return flags, body


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
    """Text fields of a protobuf message by number; what is no text field ends the reading.

    An ErrorInfo is two strings, and `debug`, its JSON form, is optional by the protocol: these
    lines spare every user of the client a protobuf package.
    """
    found: dict[int, str] = {}
    try:
        data = base64.b64decode(value + "=" * (-len(value) % 4))
    except ValueError:
        return found
    at = 0
    while at < len(data) and data[at] & 0x87 == 0x02:
        number = data[at] >> 3
        length, at = _varint(data, at + 1)
        found[number] = data[at : at + length].decode(errors="replace")
        at += length
    return found


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """The variable-length integer at `at`, and where it ends."""
    number = 0
    for shift, byte in enumerate(data[at : at + 10]):
        number |= (byte & 0x7F) << 7 * shift
        at += 1
        if not byte & 0x80:
            break
    return number, at


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

    async def server_stream(self, method: str, message: Message) -> AsyncGenerator[Message, None]:
        """One request, many answers, for as long as they come."""
        timeout = httpx.Timeout(None, connect=5, write=60)
        async with aclosing(self._stream(method, encode_frame(message), timeout)) as answers:
            async for answer in answers:
                yield answer

    async def client_stream(
        self, method: str, messages: AsyncIterator[Message], *, deadline_s: float | None
    ) -> None:
        """Many requests; the answer of every such call is empty.

        `deadline_s` bounds each write and the wait for the answer, never the whole.
        """
        timeout = httpx.Timeout(deadline_s, connect=5)
        body = (encode_frame(message) async for message in messages)
        async with aclosing(self._stream(method, body, timeout)) as answers:
            async for _ in answers:
                pass

    async def _stream(
        self, method: str, body: bytes | AsyncIterator[bytes], timeout: httpx.Timeout
    ) -> AsyncGenerator[Message, None]:
        async with self._post(method, "application/connect+json", body, timeout) as response:
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
            raise _malformed(f"it is longer than {MAX_FRAME_BYTES} bytes")
    return bytes(answer)


def _parse_or_none(answer: bytes) -> object:
    try:
        return json.loads(answer)
    except (ValueError, RecursionError):
        return None
