"""Tags of templates, as E2B has them: names of builds."""

from __future__ import annotations

from fastapi import APIRouter, Response

from sandmartin.control.api.access import TheCaller, ThePlatform
from sandmartin.control.e2b import bodies
from sandmartin.control.e2b.names import TheName, plain_name

router = APIRouter()


@router.post("/templates/tags", status_code=201)
async def assign(
    body: bodies.TagAssignment, caller: TheCaller, platform: ThePlatform
) -> bodies.AssignedTags:
    """Let tags name what the target names."""
    target = await plain_name(platform, caller, body.target)
    row = await platform.tags.assign(caller, target, body.tags)
    return bodies.AssignedTags(build_id=row.template_id, tags=body.tags)


@router.delete("/templates/tags", status_code=204)
async def remove(body: bodies.TagRemoval, caller: TheCaller, platform: ThePlatform) -> Response:
    """Take tags away; a template without any is deleted."""
    await platform.tags.remove(caller, await plain_name(platform, caller, body.name), body.tags)
    return Response(status_code=204)


@router.get("/templates/{name}/tags")
async def list_tags(
    name: TheName, caller: TheCaller, platform: ThePlatform
) -> list[bodies.TemplateTag]:
    """The tags of a template, the oldest first."""
    return [
        bodies.TemplateTag(
            tag=row.tag, build_id=row.template_id, created_at=bodies.moment_of(row.created_at)
        )
        for row in await platform.tags.list(caller, name)
    ]
