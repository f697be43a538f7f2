"""Stores: objects by name, in a folder or in any S3-compatible service, over `obstore`.

Whoever opens one gives its URL; credentials, region and endpoint of a service come from the
process's environment (`AWS_ACCESS_KEY_ID` and its like), and are in no URL, error or log. An
object appears whole or not at all.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from urllib.parse import unquote, urlsplit

from obstore import store as backends
from obstore.exceptions import (
    BaseError,
    GenericError,
    PermissionDeniedError,
    UnauthenticatedError,
)

from sandmartin.errors import Denied, DiskFull, Invalid, NotFound, SandmartinError, Unavailable

_TIMEOUT = timedelta(seconds=60)
_CONNECT_TIMEOUT = timedelta(seconds=5)
#: A service that is away for longer is told of; whoever asked tries again later.
_MAX_RETRIES = 3
_RETRY_TIMEOUT = timedelta(seconds=20)
_PAGE = 1000
_NO_SPACE = ("No space left on device", "Disk quota exceeded")


@dataclass(frozen=True, kw_only=True)
class Found:
    """An object that is there."""

    name: str
    size_bytes: int
    #: Seconds since the epoch.
    modified_at: float


class Store:
    """One artefact store."""

    def __init__(self, url: str, backend: backends.LocalStore | backends.S3Store) -> None:
        self.url = url
        self._backend = backend

    @classmethod
    def open(cls, url: str) -> Store:
        """The store at `file:///DIRECTORY` or `s3://BUCKET/PREFIX`. Raises Invalid, DiskFull."""
        try:
            parts = urlsplit(url)
            plain = not (parts.query or parts.fragment or "@" in parts.netloc)
        except ValueError:
            plain = False
        if plain and parts.scheme == "file" and not parts.netloc and parts.path.startswith("/"):
            return cls(url, _folder(Path(unquote(parts.path))))
        if plain and parts.scheme == "s3" and parts.netloc:
            return cls(url, _service(parts.netloc, parts.path.strip("/")))
        # What it is may hold a secret that does not belong there.
        raise Invalid(
            "the URL of the artefact store cannot be used",
            hint="use file:///DIRECTORY or s3://BUCKET/PREFIX; keys go into AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY",
        )

    async def has(self, name: str) -> bool:
        """Whether an object is there. Raises Unavailable, Denied."""
        try:
            async with self._errors(name):
                await self._backend.head_async(name)
        except NotFound:
            return False
        return True

    async def get(self, name: str, limit: int) -> bytes:
        """An object's content. Raises NotFound, Unavailable; Invalid for more than `limit`."""
        async with self._errors(name):
            found = await self._backend.get_async(name)
            if found.meta["size"] > limit:
                raise Invalid(f"{name} in the artefact store is larger than {limit} bytes")
            return bytes(await found.bytes_async())

    async def put(self, name: str, content: bytes) -> None:
        """Write an object, whole. Raises DiskFull, Unavailable, Denied."""
        async with self._errors(name):
            await self._backend.put_async(name, content, use_multipart=False)

    async def list(self, prefix: str) -> AsyncGenerator[Found, None]:
        """All objects below a prefix. Raises Unavailable, Denied."""
        async with self._errors(prefix):
            async for page in self._backend.list_async(prefix, chunk_size=_PAGE):
                for each in page:
                    yield Found(
                        name=each["path"],
                        size_bytes=each["size"],
                        modified_at=each["last_modified"].timestamp(),
                    )

    async def delete(self, names: Sequence[str]) -> None:
        """Remove objects; one that is gone is no error. Raises Unavailable, Denied."""
        # A folder stops at the first that is gone.
        if isinstance(self._backend, backends.S3Store):
            async with self._errors("objects"):
                await self._backend.delete_async(names)
            return
        for name in names:
            with contextlib.suppress(NotFound):
                async with self._errors(name):
                    await self._backend.delete_async(name)

    @contextlib.asynccontextmanager
    async def _errors(self, what: str) -> AsyncIterator[None]:
        """The library's errors become ours; its own texts may quote requests."""
        try:
            yield
        except FileNotFoundError as error:
            raise NotFound(f"{what} is not in the artefact store") from error
        except (PermissionDeniedError, UnauthenticatedError, PermissionError) as error:
            raise Denied(
                f"the artefact store {self.url} refuses us",
                hint="look at AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY of the process, "
                "and at what they may do",
            ) from error
        except (BaseError, OSError) as error:
            raise self._failure(error) from error

    def _failure(self, error: Exception) -> SandmartinError:
        if any(words in str(error) for words in _NO_SPACE):
            return DiskFull(f"the disk of the artefact store {self.url} is full")
        kind = "" if isinstance(error, GenericError) else f" ({type(error).__name__})"
        return Unavailable(
            f"the artefact store {self.url} cannot be used just now{kind}",
            hint="does it run, and is AWS_ENDPOINT of the process right?",
        )


def _folder(path: Path) -> backends.LocalStore:
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        return backends.LocalStore(path)
    except OSError as error:
        raise Invalid(
            f"the artefact store {path} cannot be made: {error.strerror or error}"
        ) from error


def _service(bucket: str, prefix: str) -> backends.S3Store:
    endpoint = os.environ.get("AWS_ENDPOINT") or os.environ.get("AWS_ENDPOINT_URL", "")
    try:
        return backends.S3Store(
            bucket,
            prefix=prefix or None,
            client_options={
                "allow_http": endpoint.startswith("http://"),
                "timeout": _TIMEOUT,
                "connect_timeout": _CONNECT_TIMEOUT,
            },
            retry_config={"max_retries": _MAX_RETRIES, "retry_timeout": _RETRY_TIMEOUT},
        )
    except (BaseError, ValueError) as error:
        raise Invalid(
            f"the artefact store s3://{bucket} cannot be used as it is set up",
            hint="look at the AWS_ variables of the process",
        ) from error
