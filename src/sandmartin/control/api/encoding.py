"""Compressed bodies, made and read piece by piece: of a bomb, no more is held than one piece."""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Annotated

from fastapi import Header, Response

from sandmartin.control.api.bodies import Streamed
from sandmartin.errors import Invalid

#: Fast: what is sent is bound by this more than by most networks.
_LEVEL = 1
_GZIP = 16 + zlib.MAX_WBITS
_MAX_PIECE_BYTES = 1 << 20

TheEncoding = Annotated[str, Header(alias="accept-encoding", include_in_schema=False)]


def encoded(pieces: AsyncGenerator[bytes, None], accepted: str) -> Response:
    """An answer of these pieces, gzipped if the client has said that it may be."""
    headers = {"vary": "accept-encoding"}
    if not _takes_gzip(accepted):
        return Streamed(pieces, headers=headers)
    return Streamed(_gzipped(pieces), headers=headers | {"content-encoding": "gzip"})


def _takes_gzip(accepted: str) -> bool:
    for each in accepted.lower().split(","):
        name, _, weight = each.replace(" ", "").partition(";q=")
        if name == "gzip":
            return weight.strip("0.") != "" or not weight
    return False


async def _gzipped(pieces: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
    packer = zlib.compressobj(_LEVEL, wbits=_GZIP)
    async with aclosing(pieces):
        async for piece in pieces:
            if packed := await asyncio.to_thread(packer.compress, piece):
                yield packed
    yield packer.flush()


def decoded(pieces: AsyncIterator[bytes], encoding: str) -> AsyncIterator[bytes]:
    """The same without its encoding. Raises Invalid for one that is not known."""
    match encoding.strip().lower():
        case "" | "identity":
            return pieces
        case "gzip":
            return _gunzipped(pieces)
    raise Invalid(f"the encoding {encoding[:40]!r} is not known", hint="use gzip, or none")


async def _gunzipped(pieces: AsyncIterator[bytes]) -> AsyncGenerator[bytes, None]:
    unpacker = zlib.decompressobj(wbits=_GZIP)
    async for piece in pieces:
        while piece and not unpacker.eof:
            try:
                content = await asyncio.to_thread(unpacker.decompress, piece, _MAX_PIECE_BYTES)
            except zlib.error as error:
                raise Invalid("the body is not gzip, or is damaged") from error
            piece = unpacker.unconsumed_tail
            yield content
    # What was held back when a piece was full.
    if rest := unpacker.flush():
        yield rest
    if not unpacker.eof:
        raise Invalid("the body ends too early")
