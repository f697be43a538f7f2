"""Blobs: content by key, in a folder or in any store that speaks S3, whatever its size.

What is cut off while it is written is not there; what is written again replaces what was.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

import obstore
from obstore.exceptions import BaseError
from obstore.store import LocalStore, ObjectStore, from_url

from sandmartin.errors import Invalid, NotFound, Unavailable

_PIECE_BYTES = 1 << 20


@dataclass(frozen=True)
class Blob:
    """What is known of a content without reading it."""

    key: str
    size_bytes: int
    #: Seconds since the epoch.
    modified_at: float


class Blobs:
    """The blobs of one store."""

    def __init__(self, store: ObjectStore) -> None:
        self._store = store

    @classmethod
    def open(cls, url: str) -> Blobs:
        """The store at `url`: `file:///PATH`, `s3://BUCKET/PREFIX` and the like.

        Keys and endpoints of S3 come from the environment, as its own tools have them. Raises
        Invalid.
        """
        hint = "use file:///PATH or s3://BUCKET/PREFIX"
        try:
            parts = urlsplit(url)
            if parts.scheme == "file":
                path = Path(unquote(parts.path))
                return cls(LocalStore(path, automatic_cleanup=True, mkdir=True))
            if parts.username or parts.password:
                raise Invalid("the store's URL holds a name or a password", hint=hint)
            return cls(from_url(url))
        except (BaseError, ValueError, OSError) as error:
            # Not their own words, which may repeat the address.
            raise Invalid("the artefact store's URL is none that can be used", hint=hint) from error

    async def put(self, key: str, pieces: AsyncIterator[bytes]) -> None:
        """Write a content whole, or not at all if `pieces` raises. Raises Unavailable."""
        with _errors_as_ours(key):
            await obstore.put_async(self._store, key, pieces)

    async def get(self, key: str) -> AsyncGenerator[bytes, None]:
        """A content in pieces. Raises NotFound, Unavailable."""
        with _errors_as_ours(key):
            found = await obstore.get_async(self._store, key)
            async for piece in found.stream(min_chunk_size=_PIECE_BYTES):
                yield bytes(piece)

    async def find(self, key: str) -> Blob | None:
        """What is known of a content; None when it is not there. Raises Unavailable."""
        try:
            with _errors_as_ours(key):
                meta = await obstore.head_async(self._store, key)
        except NotFound:
            return None
        return Blob(meta["path"], meta["size"], meta["last_modified"].timestamp())

    async def list(self, prefix: str) -> AsyncGenerator[Blob, None]:
        """All below a prefix. Raises Unavailable."""
        with _errors_as_ours(prefix):
            async for batch in obstore.list(self._store, prefix=prefix):
                for meta in batch:
                    yield Blob(meta["path"], meta["size"], meta["last_modified"].timestamp())

    async def delete(self, key: str) -> None:
        """Remove a content; one that is not there is no error. Raises Unavailable."""
        with contextlib.suppress(NotFound), _errors_as_ours(key):
            await obstore.delete_async(self._store, key)


@contextlib.contextmanager
def _errors_as_ours(key: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise NotFound(f"the store has no {key!r}") from error
    except (BaseError, OSError) as error:
        raise Unavailable(
            f"the artefact store does not answer ({type(error).__name__})",
            hint="is its disk full, or its server away?",
        ) from error
