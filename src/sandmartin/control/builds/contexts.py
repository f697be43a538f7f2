"""Uploads of builds: archives that a team has sent, by their SHA-256, kept in the artefact store.

What an archive holds is believed only after a child without rights has read it (`context`); what
the child writes is the one plain tar of the same files. Files that E2B's clients send for one step
are known by a hash of theirs, which says nothing about the bytes: each team has its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import IO

from sandmartin.context.__main__ import REFUSED
from sandmartin.context.archive import Archive, Limits, open_archive
from sandmartin.context.source import InvalidBuild
from sandmartin.control.blobs import Blobs
from sandmartin.control.builds.request import check_digest
from sandmartin.control.caller import Caller
from sandmartin.errors import Invalid, NotFound, TimedOut, ToolFailed

_PREFIX = "contexts"
_NOBODY = 65534
_DEADLINE_S = 600.0
_ANY_DIGEST = re.compile(r"[0-9a-f]{32,128}")


class Contexts:
    """The uploads of all teams. Those that nobody used for `keep_s` are forgotten."""

    def __init__(self, blobs: Blobs, directory: Path, *, keep_s: float, limits: Limits) -> None:
        self._blobs = blobs
        self._directory = directory
        self._keep_s = keep_s
        self._limits = limits

    async def put(self, caller: Caller, sha256: str, pieces: AsyncIterator[bytes]) -> None:
        """Keep an archive. Raises Invalid when it is another, or too large; Unavailable."""
        key = _key(caller.team_id, check_digest(sha256))
        await self._blobs.put(key, _checked(self._bounded(pieces), sha256))

    async def put_files(self, caller: Caller, name: str, pieces: AsyncIterator[bytes]) -> None:
        """Keep the archive of one step, by a hash that its client chose. Raises Invalid."""
        await self._blobs.put(_files_key(caller.team_id, name), self._bounded(pieces))

    async def has(self, caller: Caller, sha256: str) -> bool:
        found = await self._blobs.find(_key(caller.team_id, check_digest(sha256)))
        return found is not None and self._is_kept(found.modified_at)

    async def has_files(self, caller: Caller, name: str) -> bool:
        found = await self._blobs.find(_files_key(caller.team_id, name))
        return found is not None and self._is_kept(found.modified_at)

    def _is_kept(self, modified_at: float) -> bool:
        # A client that is told it is there will not send it again: there must be time to use it.
        return time.time() - modified_at < self._keep_s / 2

    def pieces(self, team_id: str, sha256: str) -> AsyncIterator[bytes]:
        """An archive as it was sent. Raises NotFound."""
        return self._blobs.get(_key(team_id, sha256))

    async def _bounded(self, pieces: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        size = 0
        async for piece in pieces:
            size += len(piece)
            if size > 2 * self._limits.size_bytes:
                raise Invalid("the upload is too large", hint="leave out what is not needed")
            yield piece

    @contextlib.asynccontextmanager
    async def open(self, team_id: str, sha256: str) -> AsyncIterator[Archive]:
        """The files of an upload. Raises NotFound, InvalidBuild for what cannot be taken."""
        keys = [_key(team_id, sha256)] if len(sha256) == 64 else []
        async with self._opened([*keys, _files_key(team_id, sha256)]) as archive:
            yield archive

    @contextlib.asynccontextmanager
    async def _opened(self, keys: list[str]) -> AsyncIterator[Archive]:
        with contextlib.ExitStack() as stack:
            sent = stack.enter_context(tempfile.TemporaryFile(dir=self._directory))
            plain = stack.enter_context(tempfile.TemporaryFile(dir=self._directory))
            await self._fetch(keys, sent)
            yield await self._read(sent, plain, stack)

    async def _read(
        self, sent: IO[bytes], plain: IO[bytes], stack: contextlib.ExitStack
    ) -> Archive:
        await _make_plain(sent, plain, self._limits)
        plain.seek(0)
        opened = open_archive(plain, self._limits)
        return await asyncio.to_thread(stack.enter_context, opened)

    @contextlib.asynccontextmanager
    async def open_tree(self, pieces: AsyncIterator[bytes]) -> AsyncIterator[Archive]:
        """The files of a tar that a sandbox sent, which is believed as little.

        Raises InvalidBuild.
        """
        with contextlib.ExitStack() as stack:
            sent = stack.enter_context(tempfile.TemporaryFile(dir=self._directory))
            plain = stack.enter_context(tempfile.TemporaryFile(dir=self._directory))
            async for piece in self._bounded(pieces):
                await asyncio.to_thread(sent.write, piece)
            sent.flush()
            sent.seek(0)
            yield await self._read(sent, plain, stack)

    async def _fetch(self, keys: list[str], into: IO[bytes]) -> None:
        for key in keys:
            with contextlib.suppress(NotFound):
                async for piece in self._blobs.get(key):
                    await asyncio.to_thread(into.write, piece)
                into.flush()
                into.seek(0)
                return
        raise NotFound(
            "the files of the build are not there", hint="send them again, and then the build"
        )

    async def prune(self, now: float) -> None:
        """Forget what is too old."""
        async for blob in self._blobs.list(f"{_PREFIX}/"):
            if blob.modified_at < now - self._keep_s:
                await self._blobs.delete(blob.key)


def _key(team_id: str, sha256: str) -> str:
    return f"{_PREFIX}/{team_id}/{sha256}"


def _files_key(team_id: str, name: str) -> str:
    if not _ANY_DIGEST.fullmatch(name):
        raise Invalid(f"{name[:80]!r} is no hash of files")
    return f"{_PREFIX}/{team_id}/files-{name}"


async def _checked(pieces: AsyncIterator[bytes], sha256: str) -> AsyncIterator[bytes]:
    whole = hashlib.sha256()
    async for piece in pieces:
        whole.update(piece)
        yield piece
    # The store keeps nothing of what raises.
    if whole.hexdigest() != sha256:
        raise Invalid(
            f"the body is not what its digest says: {whole.hexdigest()}", hint="send it again"
        )


async def _make_plain(sent: IO[bytes], plain: IO[bytes], limits: Limits) -> None:
    """Have a child read what was sent. Raises InvalidBuild, TimedOut."""
    words = [f"--size-bytes={limits.size_bytes}", f"--count={limits.count}"]
    if os.geteuid() == 0:
        words.append(f"--uid={_NOBODY}")
    child = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "sandmartin.context",
        *words,
        env={"PATH": os.defpath, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        stdin=sent,
        stdout=plain,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(_DEADLINE_S):
            _, said = await child.communicate()
    except TimeoutError as error:
        raise TimedOut(f"the archive was not read within {_DEADLINE_S:g} s") from error
    finally:
        with contextlib.suppress(ProcessLookupError):
            child.kill()
        await child.wait()
    if child.returncode == REFUSED:
        told = json.loads(said)
        raise InvalidBuild(told["message"], hint=told["hint"])
    if child.returncode:
        raise ToolFailed(f"the archive's reader ended with {child.returncode}")
