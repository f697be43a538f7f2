"""Chunks: pieces of 1 MiB, compressed, each an object whose name is the SHA-256 of its content.

What is the same in two artefacts is there once. What is read is of its name, or an error: a chunk
that is not is taken out of the store, so that the next who has it puts it there anew.
"""

from __future__ import annotations

import asyncio
import hashlib
import re

import zstandard

from sandmartin.artefacts.store import Store
from sandmartin.errors import Invalid, NotFound

CHUNK_BYTES = 1 << 20
PREFIX = "chunks/"
_LEVEL = 3
#: What does not compress gets a little longer.
_MAX_STORED_BYTES = CHUNK_BYTES + (64 << 10)
_DIGEST = re.compile(r"[0-9a-f]{64}")


def is_digest(text: object) -> bool:
    """Whether it can be the name of something by its content."""
    return isinstance(text, str) and _DIGEST.fullmatch(text) is not None


def digest_of(content: bytes | memoryview) -> str:
    return hashlib.sha256(content).hexdigest()


def name_of(digest: str) -> str:
    """The object of a chunk: spread over directories, for stores that are folders."""
    return f"{PREFIX}{digest[:2]}/{digest}"


def pack(content: bytes | memoryview) -> bytes:
    return zstandard.ZstdCompressor(level=_LEVEL).compress(content)


def unpack(packed: bytes, limit: int) -> bytes:
    """What was packed. Raises Invalid when it is damaged, or longer than `limit`."""
    try:
        # It says itself how long it will be, and memory is taken for that.
        size_bytes = zstandard.get_frame_parameters(packed).content_size
        if size_bytes <= limit:
            return zstandard.ZstdDecompressor().decompress(packed, max_output_size=limit)
    except zstandard.ZstdError as error:
        raise Invalid("it cannot be unpacked") from error
    raise Invalid(f"it says that it is longer than {limit} bytes")


async def add(store: Store, content: bytes | memoryview) -> tuple[str, int]:
    """Have a chunk in the store; its digest, and the bytes that it took: 0 where it was there.

    Raises DiskFull, Unavailable, Denied.
    """
    digest = await asyncio.to_thread(digest_of, content)
    name = name_of(digest)
    if await store.has(name):
        return digest, 0
    packed = await asyncio.to_thread(pack, content)
    await store.put(name, packed)
    return digest, len(packed)


async def get(store: Store, digest: str) -> bytes:
    """A chunk, verified. Raises Invalid when it is damaged or gone, Unavailable, Denied."""
    name = name_of(digest)
    try:
        packed = await store.get(name, _MAX_STORED_BYTES)
        return await asyncio.to_thread(_verified, packed, digest)
    except NotFound as error:
        raise Invalid(f"chunk {digest[:12]} is not in the artefact store") from error
    except Invalid as error:
        await store.delete([name])
        raise Invalid(
            f"chunk {digest[:12]} of the artefact store was damaged: {error.message}",
            hint="it was removed; it is stored anew from a host that has it",
        ) from error


def _verified(packed: bytes, digest: str) -> bytes:
    content = unpack(packed, CHUNK_BYTES)
    if digest_of(content) != digest:
        raise Invalid("it is not what its name says")
    return content
