"""Building a template: its files are packed and sent if the server lacks them, its log followed.

Whatever ends the wait before the build is over cancels the build.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
import tempfile
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from contextlib import aclosing, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, ClassVar

from sandmartin.client.callbacks import OnEach, call
from sandmartin.client.template import Template
from sandmartin.context.directory import pack_directory, read_ignore_rules
from sandmartin.errors import Invalid, SandmartinError
from sandmartin.transport.builds import Build, BuildLog, Builds, NewBuild, Script, Steps

_PIECE_BYTES = 512 << 10
_CANCEL_S = 15.0
_COPIES = re.compile(r"^\s*(?:COPY|ADD)\b", re.IGNORECASE | re.MULTILINE)

#: Told what is sent, its size in bytes, and how many of them have just gone.
OnUpload = Callable[[str, int, int], None]


class BuildFailed(SandmartinError):
    """The template was not built; `build` has why, and `step` the step that failed."""

    code: ClassVar[str] = "build_failed"

    def __init__(self, build: Build) -> None:
        told = build.error
        message = f"build {build.build_id} was cancelled"
        if build.state != "cancelled":
            message = told.message if told else f"build {build.build_id} ended as {build.state}"
        super().__init__(message, hint=told.hint if told else "")
        self.build = build

    @property
    def step(self) -> str:
        """The step that failed, as the log names it; empty when none did."""
        return self.build.error.step if self.build.error else ""

    def __reduce__(self) -> tuple[type[BuildFailed], tuple[Build]]:
        return type(self), (self.build,)


@dataclass(frozen=True, kw_only=True)
class Terms:
    """What a build is given beside the template; as `Templates.build` has it."""

    name: str
    tags: tuple[str, ...] = ()
    arguments: Mapping[str, str] = field(default_factory=dict)
    secrets: Mapping[str, str] = field(default_factory=dict, repr=False)
    vcpus: int | None = None
    memory_mb: int | None = None
    disk_size_mb: int | None = None
    no_cache: bool = False


@asynccontextmanager
async def building(
    builds: Builds, template: Template, terms: Terms, on_upload: OnUpload | None = None
) -> AsyncGenerator[Build, None]:
    """A build that is begun, and is cancelled when what is in the context ends before it.

    Raises Invalid, NotFound, Exhausted, Unavailable.
    """
    build = await _create(builds, await _prepared(builds, template, terms, on_upload))
    try:
        yield build
    except BaseException as error:
        if not isinstance(error, BuildFailed):
            await _cancel(builds, build, error)
        raise


async def _prepared(
    builds: Builds, template: Template, terms: Terms, on_upload: OnUpload | None
) -> NewBuild:
    """What to ask for, once the server has all that it needs."""
    new = NewBuild(
        source=template.source,
        from_template=template.template,
        from_image=template.image,
        registry=template.registry,
        **{name: getattr(terms, name) for name in terms.__dataclass_fields__},
    )
    if template.archive is not None:
        with _opened(template.archive) as file:
            sent = await _send(builds, file, template.archive.name, on_upload)
        new = replace(new, from_archive=sent)
    if _needs_files(template):
        with tempfile.TemporaryFile() as packed:
            await asyncio.to_thread(_pack, template, packed)
            new = _with_files(new, await _send(builds, packed, "context", on_upload))
    return new


async def _create(builds: Builds, new: NewBuild) -> Build:
    """The build; who does not wait for the answer has it cancelled."""
    creating = asyncio.create_task(builds.create(new), name="create a build")
    try:
        return await asyncio.shield(creating)
    except asyncio.CancelledError as gone:
        with suppress(SandmartinError):
            await _cancel(builds, await creating, gone)
        raise


async def _cancel(builds: Builds, build: Build, reason: BaseException) -> None:
    try:
        async with asyncio.timeout(_CANCEL_S):
            await builds.cancel(build.build_id)
    except (SandmartinError, TimeoutError) as error:
        reason.add_note(f"build {build.build_id} may go on: {error or 'no answer in time'}")


def _needs_files(template: Template) -> bool:
    source = template.source
    if isinstance(source, Script):
        return _COPIES.search(source.text) is not None
    return any(each.type == "COPY" for each in source.steps)


def _with_files(new: NewBuild, sha256: str) -> NewBuild:
    if isinstance(new.source, Script):
        return replace(new, context=sha256)
    steps = (
        replace(each, files_hash=sha256) if each.type == "COPY" else each
        for each in new.source.steps
    )
    return replace(new, source=replace(new.source, steps=tuple(steps)))


def _pack(template: Template, out: IO[bytes]) -> None:
    source = template.source
    file = "Dockerfile" if isinstance(source, Steps) else source.file
    pack_directory(template.context, out, read_ignore_rules(template.context, file))


@contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    try:
        file = path.open("rb")
    except OSError as error:
        raise Invalid(f"{path} cannot be read: {error.strerror}") from error
    with file:
        yield file


async def _send(builds: Builds, file: IO[bytes], name: str, on_upload: OnUpload | None) -> str:
    """Send a file unless it is there; its SHA-256 in hex."""
    file.seek(0)
    sha256 = await asyncio.to_thread(_sha256, file)
    if await builds.has_upload(sha256):
        return sha256
    size = file.seek(0, os.SEEK_END)
    file.seek(0)

    async def pieces() -> AsyncGenerator[bytes, None]:
        while piece := await asyncio.to_thread(file.read, _PIECE_BYTES):
            yield piece
            if on_upload is not None:
                on_upload(name, size, len(piece))

    async with aclosing(pieces()) as sent:
        await builds.upload(sha256, sent)
    return sha256


def _sha256(file: IO[bytes]) -> str:
    digest = hashlib.sha256()
    while piece := file.read(_PIECE_BYTES):
        digest.update(piece)
    return digest.hexdigest()


async def finished(builds: Builds, build: Build, on_log: OnEach[BuildLog] | None = None) -> Build:
    """The build once it is ready, its log told as it comes. Raises BuildFailed, Unavailable."""
    async with aclosing(builds.follow(build.build_id)) as entries:
        async for entry in entries:
            await call(on_log, entry)
    done = await builds.get(build.build_id)
    if done.state != "ready":
        raise BuildFailed(done)
    return done
