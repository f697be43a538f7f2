"""`/templates`: those that there are. How they are built is in `builds`."""

from __future__ import annotations

from fastapi import APIRouter, Response

from sandmartin.control import tables
from sandmartin.control.api.access import TheCaller, ThePlatform
from sandmartin.control.e2b import bodies
from sandmartin.control.e2b.names import TheName, full_name
from sandmartin.control.tables import PLATFORM_TEAM_ID
from sandmartin.errors import Denied, Unimplemented
from sandmartin.model import DEFAULT_DISK_SIZE_MB, DEFAULT_MEMORY_MB, DEFAULT_VCPUS

router = APIRouter()


@router.get("/templates")
async def list_templates(caller: TheCaller, platform: ThePlatform) -> list[bodies.Template]:
    """The team's own, and the platform's."""
    return [_template(row) for row in await platform.templates.list(caller)]


def _template(row: tables.Template) -> bodies.Template:
    at = bodies.moment_of(row.created_at)
    return bodies.Template(
        template_id=row.name,
        build_id=row.template_id,
        cpu_count=row.vcpus or DEFAULT_VCPUS,
        memory_mb=row.memory_mb or DEFAULT_MEMORY_MB,
        disk_size_mb=max(row.disk_size_mb, DEFAULT_DISK_SIZE_MB),
        public=row.team_id == PLATFORM_TEAM_ID,
        aliases=[row.name],
        names=[full_name(row.name)],
        created_at=at,
        updated_at=at,
    )


@router.get("/templates/aliases/{name}")
async def alias(name: TheName, caller: TheCaller, platform: ThePlatform) -> bodies.Alias:
    """Which template a name is of; a name that only tags have is one, too."""
    if ":" in name:
        row = await platform.templates.get(caller, name)
        return bodies.Alias(template_id=row.name, public=row.team_id == PLATFORM_TEAM_ID)
    first = (await platform.tags.list(caller, name))[0]
    return bodies.Alias(template_id=first.name, public=first.team_id == PLATFORM_TEAM_ID)


@router.delete("/templates/{name}", status_code=204)
async def delete(name: TheName, caller: TheCaller, platform: ThePlatform) -> Response:
    """Delete a template of the team, snapshots too; what was made of it goes on."""
    await platform.templates.retire(caller, name)
    return Response(status_code=204)


@router.patch("/v2/templates/{name}")
async def publish(
    name: TheName, body: bodies.TemplateUpdate, caller: TheCaller, platform: ThePlatform
) -> bodies.Names:
    """Keep a template of the team to the team: no other can be let use it."""
    row = await platform.templates.get(caller, name)
    if row.team_id != caller.team_id:
        raise Denied(f"template {name!r} belongs to the platform")
    if body.public:
        raise Unimplemented(
            "a team's template cannot be made public", hint="the other team can build its own"
        )
    return bodies.Names(names=[full_name(row.name)])
