"""COPY and ADD: files of a context, of an upload, of another stage or of an image, put in place.

They are chosen by the rules of `context.tree`, from an archive that a child without rights has
read, whoever sent it; a sandbox is believed no more than a client. They go in as one tar, which
the sandbox itself unpacks.
"""

from __future__ import annotations

import asyncio
import hashlib
import io
import posixpath
import tarfile
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from typing import IO

from sandmartin.context.archive import Archive
from sandmartin.context.patterns import is_pattern
from sandmartin.context.source import InvalidBuild, quoted
from sandmartin.context.tree import Selection
from sandmartin.control.builds import plan
from sandmartin.control.builds.actions import Place
from sandmartin.control.builds.commands import is_directory
from sandmartin.control.builds.contexts import Contexts
from sandmartin.errors import NotFound
from sandmartin.transport.agent import Agent

_PIECE_BYTES = 1 << 19
_MOST_LINKS = 40
#: A sandbox whose files are copied: its agent, and its id.
Found = tuple[Agent, str]
#: Brings a stage or an image to work, so that its files can be read.
Reach = Callable[[plan.FromStage | plan.Image], Awaitable[Found]]


class Placing:
    """The files of one build. What is opened stays open until `stack` is closed."""

    def __init__(
        self,
        contexts: Contexts,
        team_id: str,
        context: str | None,
        stack: AsyncExitStack,
        reach: Reach,
    ) -> None:
        self._contexts = contexts
        self._team_id = team_id
        self._context = context
        self._stack = stack
        self._reach = reach
        self._archives: dict[str, Archive] = {}

    async def open(self, places: Sequence[plan.Copy]) -> None:
        """Open the uploads that these need. Raises NotFound, InvalidBuild."""
        for copy in places:
            if not copy.sources or isinstance(copy.origin, plan.FromStage | plan.Image):
                continue
            digest = self._upload_of(copy.origin, copy)
            if digest not in self._archives:
                opened = self._contexts.open(self._team_id, digest)
                self._archives[digest] = await self._stack.enter_async_context(opened)

    def _upload_of(self, origin: plan.Origin, step: plan.AnyStep) -> str:
        if isinstance(origin, plan.Upload):
            return origin.digest
        if self._context is None:
            raise InvalidBuild(
                "the build has no files to copy from",
                position=step.position,
                hint="send a context with it",
            )
        return self._context

    def digest_of(self, action: Place) -> str:
        """Of what is taken of an upload. Raises InvalidBuild."""
        return self._select(action).digest

    def _select(self, action: Place) -> Selection:
        archive = self._archives[self._upload_of(action.origin, action.step)]
        position = action.step.position
        return archive.tree.select(action.sources, position, archives=not action.is_add)

    # Putting them in place.

    async def place(self, agent: Agent, sandbox_id: str, action: Place) -> None:
        """Put the files of a COPY where they belong. Raises InvalidBuild, DiskFull, NotFound."""
        target: Found = (agent, sandbox_id)
        for name, content in action.inline:
            await self._write(target, action, name, _inline(content, action.mode))
        if not action.sources:
            return
        origin = action.origin
        if isinstance(origin, plan.FromStage | plan.Image):
            source = await self._reach(origin)
            for each in action.sources:
                await self._copy_across(source, each, target, action)
            return
        archive = self._archives[self._upload_of(origin, action.step)]
        await self._take(target, action, archive, self._select(action))

    async def _copy_across(self, source: Found, path: str, target: Found, action: Place) -> None:
        path = posixpath.normpath(posixpath.join("/", path))
        pattern = is_pattern(posixpath.basename(path))
        top = posixpath.dirname(path) if pattern else await _real(source, path, action)
        agent, sandbox_id = source
        async with self._contexts.open_tree(agent.read_tree(sandbox_id, top)) as archive:
            wanted = posixpath.join(posixpath.basename(top), posixpath.basename(path))
            wanted = wanted if pattern else posixpath.basename(top)
            chosen = archive.tree.select([wanted], action.step.position)
            name = posixpath.basename(path)
            if not pattern and not chosen.needs_directory:
                # A link that was named is followed, and keeps its name.
                chosen = replace(chosen, taken=(replace(chosen.taken[0], to=name),))
            await self._take(target, action, archive, chosen)

    async def _take(
        self, target: Found, action: Place, archive: Archive, chosen: Selection
    ) -> None:
        chosen = _with_mode(chosen, action.mode)
        if chosen.needs_directory:
            with tempfile.TemporaryFile() as tar:
                await asyncio.to_thread(archive.write_selection, chosen, tar)
                await _send(target, action.destination, tar, action.owner)
            return
        directory, name = await self._place_of(target, action, chosen.taken[0].to)
        with tempfile.TemporaryFile() as tar:
            await asyncio.to_thread(archive.write_selection, chosen, tar, name)
            await _send(target, directory, tar, action.owner)

    async def _write(self, target: Found, action: Place, name: str, info: _File) -> None:
        directory, name = await self._place_of(target, action, name)
        with tempfile.TemporaryFile() as out:
            info.write(name, out)
            await _send(target, directory, out, action.owner)

    async def _place_of(self, target: Found, action: Place, name: str) -> tuple[str, str]:
        """Directory and name of a single file: its own name only in a directory."""
        destination = action.destination
        if action.into_directory or await is_directory(*target, destination):
            return destination, name
        return posixpath.dirname(destination), posixpath.basename(destination)


class _File:
    def __init__(self, content: bytes, mode: int) -> None:
        self.content, self.mode = content, mode

    def write(self, name: str, out: IO[bytes]) -> None:
        info = tarfile.TarInfo(name)
        info.mode, info.size = self.mode, len(self.content)
        with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
            tar.addfile(info, io.BytesIO(self.content))


def _inline(content: str, mode: int | None) -> _File:
    return _File(content.encode(), 0o644 if mode is None else mode)


def _with_mode(chosen: Selection, mode: int | None) -> Selection:
    if mode is None:
        return chosen
    taken = (replace(each, entry=replace(each.entry, mode=mode)) for each in chosen.taken)
    return replace(chosen, taken=tuple(taken))


async def _send(target: Found, directory: str, tar: IO[bytes], owner: str) -> None:
    agent, sandbox_id = target
    tar.seek(0)
    await agent.write_tree(sandbox_id, directory, _pieces(tar), owner=owner)


async def _pieces(file: IO[bytes]) -> AsyncIterator[bytes]:
    while piece := await asyncio.to_thread(file.read, _PIECE_BYTES):
        yield piece


async def _real(source: Found, path: str, action: Place) -> str:
    """Where a path of a sandbox leads, its last link followed. Raises InvalidBuild."""
    agent, sandbox_id = source
    at = path
    for _ in range(_MOST_LINKS):
        try:
            found = await agent.stat_file(sandbox_id, at)
        except NotFound:
            break
        if not found.symlink_target:
            return at
        above = posixpath.dirname(at)
        at = posixpath.normpath(posixpath.join("/", above, found.symlink_target))
    raise InvalidBuild(
        f"there is no {quoted(path)} to copy",
        position=action.step.position,
        text=path,
        hint="is it made in the stage that it is copied from?",
    )


def digest_of_other(key: str, action: Place) -> str:
    """Of files that another stage or an image has: what that one is, and which."""
    return hashlib.sha256("\0".join((key, *action.sources)).encode()).hexdigest()
