"""`/v1/builds`: templates being built, and the files that they are built from."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Sequence
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Header, Path, Query, Request, Response
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, ConfigDict, Field

from sandmartin.control import tables
from sandmartin.control.actors import names_of
from sandmartin.control.api.access import TheCaller, TheKey, ThePlatform
from sandmartin.control.api.bodies import RAW_BODY, pieces_of
from sandmartin.control.builds.request import NewBuild, Source
from sandmartin.control.caller import Caller
from sandmartin.control.platform import Platform
from sandmartin.errors import Invalid, NotFound

router = APIRouter(tags=["builds"])

Strict = ConfigDict(extra="forbid")
_MAX_PAGE = 1000
_EVENT_STREAM = "text/event-stream"
_MOST = 1 << 31

TheDigest = Annotated[str, Path(pattern=r"^[0-9a-f]{64}$", description="SHA-256 of the body.")]


class StepBody(BaseModel):
    """A step as E2B's clients write it."""

    model_config = Strict

    type: str = Field(max_length=32)
    args: list[str] = Field(default_factory=list)
    files_hash: str = Field("", max_length=128, description="Of an upload for this step.")
    force: bool = False


class SourceBody(BaseModel):
    """How the build is written."""

    model_config = Strict

    kind: Literal["dockerfile", "recipe", "steps"]
    text: str = ""
    file: str = Field("Dockerfile", max_length=255, description="Its name, in errors.")
    steps: list[StepBody] = Field(default_factory=list, description="Of the kind `steps` alone.")
    from_image: str = Field("", max_length=512)
    from_template: str = Field("", max_length=200)
    start_cmd: str = ""
    ready_cmd: str = ""

    def source(self) -> Source:
        return Source(
            kind=self.kind,
            text=self.text,
            file=self.file or "Dockerfile",
            steps=[
                {
                    "type": each.type,
                    "args": each.args,
                    "filesHash": each.files_hash or None,
                    "force": each.force,
                }
                for each in self.steps
            ],
            start_cmd=self.start_cmd,
            ready_cmd=self.ready_cmd,
        )


class RegistryBody(BaseModel):
    """Who asks a registry for an image."""

    model_config = Strict

    username: str = Field(max_length=255)
    password: str = Field(max_length=1 << 14)


class NewBuildBody(BaseModel):
    model_config = Strict

    name: str = Field(min_length=1, max_length=200, description="`app`, or `app:tag`.")
    tags: list[str] = Field(default_factory=list, max_length=32)
    source: SourceBody
    from_template: str = Field("", max_length=200, description="Where the source does not say.")
    from_image: str = Field("", max_length=512)
    from_archive: str = Field("", max_length=64, description="SHA-256 of an upload.")
    registry: RegistryBody | None = None
    context: str | None = Field(None, max_length=64, description="SHA-256 of an upload.")
    arguments: dict[str, str] = Field(default_factory=dict)
    secrets: dict[str, str] = Field(default_factory=dict, description="In no layer, by name.")
    target: str = Field("", max_length=128, description="The last stage, of a Dockerfile.")
    vcpus: int | None = Field(None, ge=1, le=64)
    memory_mb: int | None = Field(None, ge=128, le=1 << 20)
    disk_size_mb: int | None = Field(None, ge=1, le=1 << 24)
    no_cache: bool = False
    skip_pre_post: bool = Field(False, description="Of a recipe: only what is written.")

    def new(self) -> NewBuild:
        """Raises Invalid."""
        grounds = {}
        for name in ("from_template", "from_image"):
            here, there = getattr(self, name), getattr(self.source, name)
            if here and there and here != there:
                raise Invalid(f"{name} is said twice, and differs")
            grounds[name] = here or there
        registry = self.registry
        return NewBuild(
            name=self.name,
            tags=tuple(self.tags),
            source=self.source.source(),
            **grounds,
            from_archive=self.from_archive,
            registry=(registry.username, registry.password) if registry else None,
            context=self.context or None,
            arguments=self.arguments,
            secrets=self.secrets,
            target=self.target,
            vcpus=self.vcpus,
            memory_mb=self.memory_mb,
            disk_size_mb=self.disk_size_mb,
            no_cache=self.no_cache,
            skip_pre_post=self.skip_pre_post,
        )


class BuildErrorBody(BaseModel):
    """Why a build failed."""

    code: str
    message: str
    hint: str
    step: int | None = Field(description="The step that failed, from 1.")


class BuildBody(BaseModel):
    """A template being built, or built."""

    id: str
    name: str
    tags: list[str]
    state: str = Field(description="`waiting`, `building`, `ready`, `failed` or `cancelled`.")
    template_id: str | None
    error: BuildErrorBody | None
    created_at: float
    created_by_name: str = Field(
        description="E-mail address of a person or name of a key; empty where that is not known."
    )
    started_at: float | None
    finished_at: float | None
    steps_total: int
    steps_done: int
    steps_cached: int = Field(description="Of those done, what was found done.")

    @classmethod
    def of(cls, row: tables.Build, created_by_name: str) -> BuildBody:
        error = None
        if row.error_code:
            error = BuildErrorBody(
                code=row.error_code,
                message=row.error_message,
                hint=row.error_hint,
                step=row.error_step,
            )
        return cls(
            id=row.build_id,
            name=row.name,
            tags=row.tags,
            state=row.state,
            template_id=row.template_id,
            error=error,
            created_at=row.created_at,
            created_by_name=created_by_name,
            started_at=row.started_at,
            finished_at=row.finished_at,
            steps_total=row.steps_total,
            steps_done=row.steps_done,
            steps_cached=row.steps_cached,
        )


class BuildPage(BaseModel):
    items: list[BuildBody]
    next: str = Field(description="`cursor` of the next page; empty at the end.")


class LineBody(BaseModel):
    """A line of a build's log."""

    number: int
    time: float
    level: Literal["debug", "info", "warn", "error"]
    message: str
    step: int = Field(description="The step that it is of, from 1; 0 for none.")
    phase: str = Field(description="`pre`, `build`, `post`, or empty.")
    elapsed_ms: int = Field(description="Since the build was begun.")

    @classmethod
    def of(cls, row: tables.BuildLine) -> LineBody:
        return cls(
            number=row.number,
            time=row.at,
            level=row.level,  # type: ignore[arg-type]
            message=row.message,
            step=row.step,
            phase=row.phase,
            elapsed_ms=row.elapsed_ms,
        )


class LinePage(BaseModel):
    items: list[LineBody]
    next: int = Field(description="`after` of the next page.")


# Uploads.


@router.put("/builds/contexts/{sha256}", status_code=204, openapi_extra=RAW_BODY)
async def put_context(
    sha256: TheDigest, request: Request, caller: TheCaller, platform: ThePlatform
) -> Response:
    """Keep an archive for builds of the team: a tar, a gzipped tar, or a zip."""
    await platform.builds.contexts.put(caller, sha256, pieces_of(request))
    return Response(status_code=204)


@router.head("/builds/contexts/{sha256}", response_class=Response)
async def has_context(sha256: TheDigest, caller: TheCaller, platform: ThePlatform) -> Response:
    """Whether the team has sent that archive already, and need not do it again."""
    if not await platform.builds.contexts.has(caller, sha256):
        raise NotFound("there is no such upload")
    return Response()


# Builds.


@router.post("/builds", status_code=202)
async def create(
    body: NewBuildBody,
    caller: TheCaller,
    platform: ThePlatform,
    idempotency_key: TheKey = "",
) -> BuildBody:
    """Have a template built; `GET` tells how it goes.

    The same Idempotency-Key and body give the same build.
    """
    row = await platform.builds.create(caller, body.new(), idempotency_key)
    return BuildBody.of(row, caller.name)


@router.get("/builds")
async def list_builds(
    caller: TheCaller,
    platform: ThePlatform,
    name: Annotated[str, Query(max_length=64, description="Of one name alone.")] = "",
    limit: Annotated[int, Query(ge=1, le=_MAX_PAGE)] = 100,
    cursor: Annotated[str, Query(max_length=200)] = "",
) -> BuildPage:
    """The team's builds, newest first."""
    page = await platform.builds.list(caller, name=name, limit=limit, cursor=cursor)
    return BuildPage(items=await _bodies_of(platform, page.rows), next=page.next)


@router.get("/builds/{build_id}")
async def get(build_id: str, caller: TheCaller, platform: ThePlatform) -> BuildBody:
    return await _body_of(platform, await platform.builds.get(caller, build_id))


@router.post("/builds/{build_id}/cancel")
async def cancel(build_id: str, caller: TheCaller, platform: ThePlatform) -> BuildBody:
    """Call it off; it ends soon then, and leaves nothing."""
    return await _body_of(platform, await platform.builds.cancel(caller, build_id))


@router.get(
    "/builds/{build_id}/logs",
    response_model=LinePage,
    responses={200: {"content": {_EVENT_STREAM: {}}}},
)
async def log(
    build_id: str,
    caller: TheCaller,
    platform: ThePlatform,
    after: Annotated[int, Query(ge=0, lt=_MOST, description="Begin after this line.")] = 0,
    limit: Annotated[int, Query(ge=1, le=_MAX_PAGE)] = 100,
    accept: Annotated[str, Header(include_in_schema=False)] = "",
    last_event_id: Annotated[str, Header(max_length=32, include_in_schema=False)] = "",
) -> LinePage | Response:
    """Lines of the log; asked for as an event stream, all of them as they come, to its end."""
    if _EVENT_STREAM not in accept:
        lines = await platform.builds.log(caller, build_id, after, limit)
        return LinePage(
            items=[LineBody.of(each) for each in lines],
            next=lines[-1].number if lines else after,
        )
    if last_event_id.isdecimal():
        after = min(int(last_event_id), _MOST - 1)
    await platform.builds.get(caller, build_id)
    return StreamingResponse(
        _stream(platform, caller, build_id, after),
        media_type=_EVENT_STREAM,
        headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"},
    )


async def _stream(
    platform: Platform, caller: Caller, build_id: str, after: int
) -> AsyncIterator[str]:
    with platform.events.listening(caller.team_id, 100), platform.trust.watching(caller) as lost:
        async for line in platform.builds.follow(caller, build_id, after):
            if lost.is_set():
                return
            if line is None:
                yield ": nothing new\n\n"
            else:
                data = LineBody.of(line).model_dump()
                yield f"id: {line.number}\nevent: line\ndata: {json.dumps(data)}\n\n"
        row = await platform.builds.get(caller, build_id)
        ended: dict[str, Any] = (await _body_of(platform, row)).model_dump()
        yield f"event: end\ndata: {json.dumps(ended)}\n\n"


async def _body_of(platform: Platform, row: tables.Build) -> BuildBody:
    (body,) = await _bodies_of(platform, [row])
    return body


async def _bodies_of(platform: Platform, rows: Sequence[tables.Build]) -> list[BuildBody]:
    names = await names_of(platform.db, {row.created_by for row in rows})
    return [BuildBody.of(row, names.get(row.created_by, "")) for row in rows]
