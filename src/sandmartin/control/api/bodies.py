"""Bodies that come and go in pieces: nothing of them is kept but the piece at hand.

Whoever reads slowly slows down whoever writes. What breaks off in the middle never looks whole:
an upload that ends too early is refused, a download that fails is cut before its last piece.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from urllib.parse import quote

from fastapi import Request, Response
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from sandmartin.errors import Invalid, SandmartinError

_log = logging.getLogger(__name__)

#: Of all fields before the file together, and of the lines that head a part.
_MAX_FIELDS_BYTES = 16 << 10
BINARY = {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}
#: Of a route whose body is content.
RAW_BODY = {"requestBody": {"required": True, "content": BINARY}}
#: Whatever it is that a guest wrote, a browser that is led to it runs nothing of it as ours.
_HARMLESS = {
    "x-content-type-options": "nosniff",
    "content-security-policy": "default-src 'none'; sandbox",
    "cross-origin-resource-policy": "same-origin",
}
_FORM_HINT = "send multipart/form-data with the field `path`, then the part `file`"


class Streamed(Response):
    """An answer made piece by piece, which ends with its client, or when that one is `lost`."""

    def __init__(
        self,
        pieces: AsyncGenerator[bytes, None],
        media_type: str = "application/octet-stream",
        headers: Mapping[str, str] | None = None,
        lost: AbstractContextManager[asyncio.Event] | None = None,
    ) -> None:
        super().__init__(media_type=media_type, headers={**_HARMLESS, **(headers or {})})
        del self.headers["content-length"]
        self._pieces = pieces
        self._lost = lost

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._lost or contextlib.nullcontext(asyncio.Event()) as lost:
            tasks = {
                asyncio.ensure_future(self._send(scope, send)),
                asyncio.ensure_future(_hung_up(receive)),
                asyncio.ensure_future(lost.wait()),
            }
            try:
                await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.wait(tasks)
                # A failure of ours was told by the cut; what else it may be is a bug.
                for task in tasks:
                    if not task.cancelled():
                        task.result()

    async def _send(self, scope: Scope, send: Send) -> None:
        async with contextlib.aclosing(self._pieces) as pieces:
            await send(
                {
                    "type": "http.response.start",
                    "status": self.status_code,
                    "headers": self.raw_headers,
                }
            )
            try:
                async for piece in pieces:
                    await send({"type": "http.response.body", "body": piece, "more_body": True})
            except SandmartinError as error:
                # Without a last piece the server cuts the connection.
                _log.info("the answer to %s is cut: %s", scope["path"], error)
                return
            await send({"type": "http.response.body", "body": b"", "more_body": False})


def kept_as(name: str) -> dict[str, str]:
    """The header by which a browser keeps an answer under a name (RFC 6266) and shows nothing."""
    return {"content-disposition": f"attachment; filename*=UTF-8''{quote(name, safe='')}"}


async def _hung_up(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def begun(pieces: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
    """The same pieces, once the first is there: until then a failure is an ordinary error."""
    first = await anext(pieces, b"")

    async def all_of_them() -> AsyncGenerator[bytes, None]:
        async with contextlib.aclosing(pieces):
            yield first
            async for piece in pieces:
                yield piece

    return all_of_them()


async def pieces_of(request: Request) -> AsyncIterator[bytes]:
    """A request's body as it comes. Raises Invalid when its client breaks off."""
    try:
        async for piece in request.stream():
            if piece:
                yield piece
    except ClientDisconnect as error:
        raise Invalid("the upload was broken off") from error


# Forms.


@dataclass
class Upload:
    """A form with a file: its fields, and the file as it comes."""

    fields: Mapping[str, str]
    pieces: AsyncGenerator[bytes, None]


class _Form:
    """What a parser has told of a form so far."""

    def __init__(self, boundary: bytes) -> None:
        self.fields: dict[str, str] = {}
        self.file: list[bytes] = []
        self.file_begun = self.file_ended = self.ended = False
        self._size = 0
        self._part_name = ""
        self._value = bytearray()
        self._header = [bytearray(), bytearray()]
        self._parser = MultipartParser(
            boundary,
            {
                "on_part_begin": self._begin,
                "on_header_field": lambda data, start, end: self._head(0, data[start:end]),
                "on_header_value": lambda data, start, end: self._head(1, data[start:end]),
                "on_header_end": self._end_header,
                "on_headers_finished": self._end_headers,
                "on_part_data": lambda data, start, end: self._take(data[start:end]),
                "on_part_end": self._end,
                "on_end": self._end_all,
            },
        )

    def feed(self, piece: bytes) -> list[bytes]:
        """What of the file is in the next piece of the body. Raises Invalid."""
        try:
            self._parser.write(piece)
        except FormParserError as error:
            raise Invalid(f"the form is malformed: {error}", hint=_FORM_HINT) from error
        found, self.file = self.file, []
        return found

    def _begin(self) -> None:
        self._part_name = ""
        self._value.clear()

    def _count(self, size: int) -> None:
        self._size += size
        if self._size > _MAX_FIELDS_BYTES:
            raise Invalid("the form's fields are too long", hint=_FORM_HINT)

    def _head(self, which: int, data: bytes) -> None:
        self._count(len(data))
        self._header[which] += data

    def _end_header(self) -> None:
        name, value = (bytes(each) for each in self._header)
        self._header = [bytearray(), bytearray()]
        if name.lower() == b"content-disposition":
            _, options = parse_options_header(value)
            self._part_name = options.get(b"name", b"").decode(errors="replace")

    def _end_headers(self) -> None:
        if self._part_name == "file":
            if self.file_begun:
                raise Invalid("the form has two files", hint=_FORM_HINT)
            self.file_begun = True

    def _in_file(self) -> bool:
        return self.file_begun and not self.file_ended

    def _take(self, data: bytes) -> None:
        if self._in_file():
            self.file.append(data)
        else:
            self._count(len(data))
            self._value += data

    def _end(self) -> None:
        if self._in_file():
            self.file_ended = True
        elif self._part_name:
            self.fields[self._part_name] = self._value.decode(errors="replace")

    def _end_all(self) -> None:
        self.ended = True


async def read_form(request: Request) -> Upload:
    """A form up to the beginning of its file, which comes last. Raises Invalid."""
    kind, options = parse_options_header(request.headers.get("content-type", ""))
    if kind != b"multipart/form-data" or not options.get(b"boundary"):
        raise Invalid("the body is no form", hint=_FORM_HINT)
    try:
        form = _Form(options[b"boundary"])
    except FormParserError as error:
        raise Invalid(f"the form is malformed: {error}", hint=_FORM_HINT) from error
    body = pieces_of(request)
    found: list[bytes] = []
    while not form.file_begun:
        piece = await anext(body, b"")
        if not piece:
            raise Invalid("the form has no file", hint=_FORM_HINT)
        found = form.feed(piece)
    return Upload(dict(form.fields), _file_pieces(form, found, body))


async def _file_pieces(
    form: _Form, found: list[bytes], body: AsyncIterator[bytes]
) -> AsyncGenerator[bytes, None]:
    for each in found:
        yield each
    async for piece in body:
        for each in form.feed(piece):
            yield each
    if not form.ended:
        raise Invalid("the form ends before its last boundary")
