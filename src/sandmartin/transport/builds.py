"""Builds of templates at a control plane: the part of `/v1` that makes what sandboxes start from.

The only module of the client that knows these bodies. A log is followed to the build's end across
lost connections: its entries have numbers, and what was told is not told again.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Literal
from urllib.parse import quote

from sandmartin.errors import NotFound, TimedOut, Unavailable
from sandmartin.model import check_name, check_tag, random_id, split_tag
from sandmartin.transport.api import Api
from sandmartin.transport.fields import Message, integer, number, part, parts, text, texts

_CREATE_S = 60.0
_UPLOAD_S = 600.0
_PAGE = 100
#: Between two looks at a build whose log was cut off; so many of them in vain are the end.
_LOOK_S = 1.0
_LOOKS = 60
_FINAL = frozenset({"ready", "failed", "cancelled"})


@dataclass(frozen=True, kw_only=True)
class Script:
    """A build that is written down: a Dockerfile or a recipe."""

    kind: Literal["dockerfile", "recipe"]
    text: str
    #: What errors call it.
    file: str


@dataclass(frozen=True)
class BuildStep:
    """One step: COPY, ENV, RUN, USER or WORKDIR, and its arguments."""

    type: str
    args: tuple[str, ...]
    #: Of a COPY: the digest of the upload that holds its files.
    files_hash: str = ""
    #: Do it, and all after it, even if it is in the cache.
    force: bool = False


@dataclass(frozen=True, kw_only=True)
class Steps:
    """A build as steps, one after the other."""

    steps: tuple[BuildStep, ...] = ()
    #: Left running at the end; the template is ready once `ready_cmd` exits 0.
    start_cmd: str = ""
    ready_cmd: str = ""


@dataclass(frozen=True, kw_only=True)
class NewBuild:
    """A build to begin. What is None or empty is left to the other side's defaults."""

    #: `NAME` or `NAME:TAG`.
    name: str
    source: Script | Steps
    #: Further ones.
    tags: tuple[str, ...] = ()
    #: What it starts from, unless the source says so itself: one of these.
    from_template: str = ""
    from_image: str = ""
    #: Digest of an upload.
    from_archive: str = ""
    #: Name and password, with which its images are pulled.
    registry: tuple[str, str] | None = field(default=None, repr=False)
    #: Digest of the upload that holds its files.
    context: str = ""
    arguments: Mapping[str, str] = field(default_factory=dict)
    secrets: Mapping[str, str] = field(default_factory=dict, repr=False)
    vcpus: int | None = None
    memory_mb: int | None = None
    disk_size_mb: int | None = None
    no_cache: bool = False
    skip_pre_post: bool = False


@dataclass(frozen=True, kw_only=True)
class BuildError:
    """Why a build failed."""

    code: str
    message: str
    hint: str
    #: The step that failed, as the log names it; empty when none did.
    step: str


@dataclass(frozen=True, kw_only=True)
class Build:
    """A build of a template."""

    build_id: str
    name: str
    tags: tuple[str, ...]
    #: `waiting`, `building`, `ready`, `failed`, `cancelled`, or a word of a newer release.
    state: str
    #: Of what it made; empty until it is ready.
    template_id: str
    error: BuildError | None
    #: Seconds since the epoch, as are those below; 0 for not yet.
    created_at: float
    started_at: float
    finished_at: float
    steps_total: int
    steps_done: int
    steps_cached: int

    @property
    def is_over(self) -> bool:
        return self.state in _FINAL


@dataclass(frozen=True, kw_only=True)
class BuildLog:
    """One line of a build's log, in the words of what ran, which may be hostile."""

    number: int
    #: Seconds since the epoch.
    time: float
    #: `debug`, `info`, `warn` or `error`.
    level: str
    message: str
    #: What it belongs to; empty for the build as such.
    step: str
    phase: str
    #: Since the build began.
    elapsed_ms: int


@dataclass(frozen=True, kw_only=True)
class Tag:
    """A name of one build of a template."""

    tag: str
    template_id: str
    #: Seconds since the epoch.
    created_at: float


class Builds:
    """The builds of a team, and the tags of what they made."""

    def __init__(self, api: Api) -> None:
        self._api = api

    async def has_upload(self, sha256: str) -> bool:
        """Whether the server has this upload of the team's already."""
        return await self._api.exists(_upload_path(sha256))

    async def upload(self, sha256: str, pieces: AsyncIterator[bytes]) -> None:
        """Send files or an archive; `sha256` is its own. Raises Invalid, Exhausted."""
        await self._api.write("PUT", _upload_path(sha256), pieces, deadline_s=_UPLOAD_S)

    async def create(self, new: NewBuild) -> Build:
        """Begin a build. Raises Invalid, which says where; NotFound, Exhausted."""
        answer = await self._api.ask(
            "POST", "/v1/builds", _body(new), deadline_s=_CREATE_S, key=random_id(20)
        )
        return _build(answer)

    async def get(self, build_id: str) -> Build:
        """Raises NotFound."""
        return _build(await self._api.ask("GET", _path(build_id)))

    async def list(self, limit: int = _PAGE) -> tuple[Build, ...]:
        """The newest, the newest first."""
        found: list[Build] = []
        cursor = ""
        while len(found) < limit:
            params = {"limit": min(limit - len(found), _PAGE), "cursor": cursor}
            page = await self._api.ask("GET", "/v1/builds", params=params)
            found += map(_build, parts(page, "items"))
            if not (cursor := text(page, "next")):
                break
        return tuple(found)

    async def cancel(self, build_id: str) -> Build:
        """End a build; one that is over is as it is. Raises NotFound."""
        path = _path(build_id, "cancel")
        return _build(await self._api.ask("POST", path, deadline_s=_CREATE_S, repeatable=True))

    async def log(self, build_id: str, after: int = 0) -> AsyncGenerator[BuildLog, None]:
        """What its log says by now, after the entry of this number. Raises NotFound."""
        while True:
            params = {"after": after, "limit": _PAGE}
            page = await self._api.ask("GET", _path(build_id, "logs"), params=params)
            items = parts(page, "items")
            for each in items:
                yield _entry(each)
            if not items:
                return
            after = max(integer(each, "number") for each in items)

    async def follow(self, build_id: str, after: int = 0) -> AsyncGenerator[BuildLog, None]:
        """Its log as it comes, until the build is over. Raises NotFound, Unavailable."""
        looks = 0
        while True:
            try:
                async with aclosing(self._live(build_id, after)) as entries:
                    async for entry in entries:
                        after, looks = entry.number, 0
                        yield entry
                if (await self.get(build_id)).is_over:
                    break
            except (Unavailable, TimedOut):
                if looks == _LOOKS:
                    raise
            looks += 1
            await asyncio.sleep(_LOOK_S)
        # What was written between the last look and the end.
        async with aclosing(self.log(build_id, after)) as rest:
            async for entry in rest:
                yield entry

    async def _live(self, build_id: str, after: int) -> AsyncGenerator[BuildLog, None]:
        events = self._api.events("GET", _path(build_id, "logs"), params={"after": after})
        async with aclosing(events):
            async for _, fields in events:
                if "number" in fields and "message" in fields:
                    yield _entry(fields)

    # Tags.

    async def tags(self, name: str) -> tuple[Tag, ...]:
        """The tags of a template, by their names. Raises NotFound."""
        answer = await self._api.ask("GET", f"{_template_path(name)}/tags")
        return tuple(_tag(each) for each in parts(answer, "items"))

    async def assign_tag(self, target: str, tag: str) -> Tag:
        """Let `tag` name what `target`, `NAME` or `NAME:TAG`, names. Raises NotFound."""
        name, source = split_tag(target)
        path = f"{_template_path(name)}/tags/{check_tag(tag)}"
        return _tag(await self._api.ask("PUT", path, {"source": source}, repeatable=True))

    async def remove_tag(self, name: str, tag: str) -> None:
        """What only this tag named is deleted. Raises NotFound."""
        path = f"{_template_path(name)}/tags/{check_tag(tag)}"
        await self._api.ask("DELETE", path)


def _path(build_id: str, *below: str) -> str:
    if not build_id or "/" in build_id:
        raise NotFound(f"there is no build {build_id[:80]!r}")
    return "/".join(["/v1/builds", quote(build_id, safe=""), *below])


def _upload_path(sha256: str) -> str:
    return f"/v1/builds/contexts/{sha256}"


def _template_path(name: str) -> str:
    return f"/v1/templates/{check_name(name, 'template name')}"


def _body(new: NewBuild) -> Message:
    """What is as it would be anyway is left out."""
    registry = new.registry and {"username": new.registry[0], "password": new.registry[1]}
    fields: Message = {
        "name": new.name,
        "source": _source(new),
        "tags": list(new.tags),
        "from_archive": new.from_archive,
        "registry": registry,
        "context": new.context,
        "arguments": dict(new.arguments),
        "secrets": dict(new.secrets),
        "vcpus": new.vcpus,
        "memory_mb": new.memory_mb,
        "disk_size_mb": new.disk_size_mb,
        "no_cache": new.no_cache,
        "skip_pre_post": new.skip_pre_post,
    }
    if isinstance(new.source, Script):
        fields |= {"from_template": new.from_template, "from_image": new.from_image}
    return {name: value for name, value in fields.items() if value}


def _source(new: NewBuild) -> Message:
    source = new.source
    if isinstance(source, Script):
        return {"kind": source.kind, "text": source.text, "file": source.file}
    steps = [
        {
            "type": each.type,
            "args": list(each.args),
            **({"files_hash": each.files_hash} if each.files_hash else {}),
            **({"force": True} if each.force else {}),
        }
        for each in source.steps
    ]
    ground = {"from_image": new.from_image, "from_template": new.from_template}
    return {
        "kind": "steps",
        "steps": steps,
        **{name: value for name, value in ground.items() if value},
        "start_cmd": source.start_cmd,
        "ready_cmd": source.ready_cmd,
    }


def _build(body: Message) -> Build:
    return Build(
        build_id=text(body, "id"),
        name=text(body, "name"),
        tags=texts(body, "tags"),
        state=text(body, "state"),
        template_id=text(body, "template_id"),
        error=_error(part(body, "error")),
        created_at=number(body, "created_at"),
        started_at=number(body, "started_at"),
        finished_at=number(body, "finished_at"),
        steps_total=integer(body, "steps_total"),
        steps_done=integer(body, "steps_done"),
        steps_cached=integer(body, "steps_cached"),
    )


def _error(body: Message | None) -> BuildError | None:
    if body is None:
        return None
    return BuildError(
        code=text(body, "code"),
        message=text(body, "message"),
        hint=text(body, "hint"),
        step=_step(body),
    )


def _entry(body: Message) -> BuildLog:
    return BuildLog(
        number=integer(body, "number"),
        time=number(body, "time"),
        level=text(body, "level") or "info",
        message=text(body, "message"),
        step=_step(body),
        phase=text(body, "phase"),
        elapsed_ms=integer(body, "elapsed_ms"),
    )


def _step(body: Message) -> str:
    """The number of a step, from 1; empty for none."""
    value = body.get("step")
    return str(value) if value else ""


def _tag(body: Message) -> Tag:
    return Tag(
        tag=text(body, "tag"),
        template_id=text(body, "template_id"),
        created_at=number(body, "created_at"),
    )
