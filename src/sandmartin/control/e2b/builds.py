"""Building templates as E2B's packages do it: reserve a build, send files, say the steps, watch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Literal

from fastapi import APIRouter, Query, Response

from sandmartin.control import tables
from sandmartin.control.api.access import TheCaller, ThePlatform
from sandmartin.control.builds.request import NewBuild, Source
from sandmartin.control.caller import Caller
from sandmartin.control.e2b import bodies
from sandmartin.control.e2b.names import TheName, plain_name
from sandmartin.control.platform import Platform
from sandmartin.control.states import BuildState
from sandmartin.errors import Invalid, NotFound, Unimplemented
from sandmartin.model import DEFAULT_DISK_SIZE_MB

router = APIRouter()

_MAX_PAGE = 100
#: What a root disk holds beside what is to be free.
_TAKEN_MB = 2048
#: Images of E2B's, which only their servers have, and what stands for them here.
_THEIR_IMAGES = {
    "e2bdev/base": "base",
    "e2bdev/code-interpreter": "code-interpreter-v1",
}
_STATUS: Mapping[str, Literal["waiting", "building", "ready"]] = {
    BuildState.WAITING: "waiting",
    BuildState.BUILDING: "building",
    BuildState.READY: "ready",
}
#: What is said of a step begins with its place.
_STEP = re.compile(r"steps:(?P<step>[0-9]+):[0-9]+: ")
Offset = Annotated[int, Query(alias="logsOffset", ge=0, lt=1 << 31)]


@router.post("/v3/templates", status_code=202)
@router.post("/v2/templates", status_code=202, include_in_schema=False)
async def reserve(
    body: bodies.NewTemplate, caller: TheCaller, platform: ThePlatform
) -> bodies.RequestedTemplate:
    """Reserve a build, whose steps are still to come."""
    asked = body.name or body.alias
    if not asked:
        raise Invalid("the template has no name", hint="send `name`")
    new = NewBuild(
        name=await plain_name(platform, caller, asked),
        tags=tuple(body.tags or ()),
        source=Source(kind="steps"),
        vcpus=body.cpu_count,
        memory_mb=body.memory_mb,
        disk_size_mb=_disk_size_mb(body.min_free_disk_mb),
    )
    row = await platform.builds.reserve(caller, new)
    return bodies.RequestedTemplate(
        template_id=row.name,
        build_id=row.build_id,
        names=[row.name],
        tags=row.tags,
        aliases=[row.name],
    )


def _disk_size_mb(min_free_mb: int | None) -> int | None:
    if min_free_mb is None:
        return None
    return max(DEFAULT_DISK_SIZE_MB, min_free_mb + _TAKEN_MB)


@router.post("/templates", include_in_schema=False)
async def refuse_pushed(_caller: TheCaller) -> Response:
    raise Unimplemented(
        "images cannot be pushed to us",
        hint="build with the `Template` of a package of E2B's, or with `sandmartin template build`",
    )


@router.post("/v2/templates/{name}/builds/{build_id}", status_code=202)
async def begin(
    name: TheName,
    build_id: str,
    body: bodies.BuildSteps,
    caller: TheCaller,
    platform: ThePlatform,
) -> Response:
    """Say what a reserved build does, and let it begin."""
    await _find(platform, caller, name, build_id)
    image, template = body.from_image or "", body.from_template or ""
    if (ours := _THEIR_IMAGES.get(image.removesuffix(":latest"))) is not None:
        image, template = "", ours
    elif template:
        template = await plain_name(platform, caller, template)
    steps = [
        {"type": each.type, "args": each.args, "filesHash": each.files_hash, "force": each.force}
        for each in body.steps
    ]
    source = Source(
        kind="steps",
        steps=steps,
        start_cmd=body.start_cmd or "",
        ready_cmd=body.ready_cmd or "",
        as_user=not image and await _has_no_user(platform, caller, template or "base"),
    )
    registry = _registry(body.from_image_registry)
    await platform.builds.begin(
        caller,
        build_id,
        lambda reserved: replace(
            reserved,
            source=source,
            from_image=image,
            from_template=template,
            registry=registry,
            no_cache=bool(body.force),
        ),
    )
    return Response(status_code=202)


async def _has_no_user(platform: Platform, caller: Caller, template: str) -> bool:
    """Whether a template leaves it to its sandboxes whose commands run. Raises NotFound."""
    row = await platform.templates.get(caller, template)
    return not row.defaults.get("user")


def _registry(registry: bodies.Registry | None) -> tuple[str, str] | None:
    if registry is None:
        return None
    if registry.type != "registry":
        raise Unimplemented(
            f"images are not pulled with the credentials of {registry.type}",
            hint="make a password for the registry, and use type `registry`",
        )
    return registry.username or "", registry.password or ""


@router.get("/templates/{name}/builds/{build_id}/status", response_model_exclude_none=True)
async def status(
    name: TheName,
    build_id: str,
    caller: TheCaller,
    platform: ThePlatform,
    logs_offset: Offset = 0,
    limit: Annotated[int, Query(ge=1, le=_MAX_PAGE)] = _MAX_PAGE,
) -> bodies.BuildStatus:
    """How a build goes, and what its log says after so many lines."""
    row = await _find(platform, caller, name, build_id)
    lines = await platform.builds.log(caller, build_id, logs_offset, limit)
    # Looked up before its lines: once it is over, the client reads these to their end.
    return bodies.BuildStatus(
        template_id=row.name,
        build_id=build_id,
        status=_STATUS.get(row.state, "error"),
        log_entries=[_entry(each) for each in lines],
        reason=_reason(row),
    )


@router.get("/templates/{name}/builds/{build_id}/logs", response_model_exclude_none=True)
async def logs(
    name: TheName,
    build_id: str,
    caller: TheCaller,
    platform: ThePlatform,
    logs_offset: Offset = 0,
    limit: Annotated[int, Query(ge=1, le=_MAX_PAGE)] = _MAX_PAGE,
) -> bodies.BuildLogs:
    """What the log of a build says after so many lines."""
    await _find(platform, caller, name, build_id)
    lines = await platform.builds.log(caller, build_id, logs_offset, limit)
    return bodies.BuildLogs(logs=[_entry(each) for each in lines])


async def _find(platform: Platform, caller: Caller, name: str, build_id: str) -> tables.Build:
    row = await platform.builds.get(caller, build_id)
    if row.name != name:
        raise NotFound(f"template {name!r} has no build {build_id[:80]!r}")
    return row


def _reason(row: tables.Build) -> bodies.BuildReason | None:
    if row.state == BuildState.CANCELLED:
        return bodies.BuildReason(message="the build was cancelled")
    if row.state != BuildState.FAILED:
        return None
    place = _STEP.match(row.error_message)
    if place is None:
        return bodies.BuildReason(message=row.error_message)
    return bodies.BuildReason(message=row.error_message[place.end() :], step=place["step"])


def _entry(line: tables.BuildLine) -> bodies.BuildLogEntry:
    return bodies.BuildLogEntry(
        timestamp=bodies.moment_of(line.at),
        message=line.message,
        level=line.level,
        step=str(line.step) if line.step else None,
    )
