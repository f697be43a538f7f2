"""`/v1/snapshots` and `/v1/templates`: what sandboxes start from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

from fastapi import APIRouter, Query, Request, Response
from pydantic import BaseModel, ConfigDict, Field

from sandmartin.control import tables
from sandmartin.control.actors import names_of
from sandmartin.control.api.access import TheCaller, ThePlatform
from sandmartin.control.api.bodies import BINARY, RAW_BODY, begun, pieces_of
from sandmartin.control.api.encoding import TheEncoding, decoded, encoded
from sandmartin.control.caller import Caller
from sandmartin.control.platform import Platform
from sandmartin.control.tables import PLATFORM_TEAM_ID
from sandmartin.model import random_id

router = APIRouter(tags=["templates"])


class NewSnapshot(BaseModel):
    model_config = ConfigDict(extra="forbid")

    sandbox_id: str
    name: str = Field("", description="Empty for one that is made up.")
    live: bool = Field(False, description="Leave the sandbox running.")


class TemplateBody(BaseModel):
    """What sandboxes start from."""

    id: str
    name: str
    tags: list[str] = Field(description="All that it has; empty if it was never given one.")
    type: str = Field(description="`base` (a disk) or `snapshot` (disk and memory).")
    vcpus: int
    memory_mb: int
    disk_size_mb: int
    size_bytes: int = Field(description="Allocated blocks.")
    created_at: float
    platform: bool = Field(description="It belongs to the platform; no team can delete it.")
    sandbox_id: str | None = Field(description="The sandbox of which it is a snapshot.")
    build_id: str | None = Field(description="The build that made it.")
    created_by_name: str = Field(
        description="E-mail address of a person or name of a key; empty where that is not known."
    )

    @classmethod
    def of(
        cls, row: tables.Template, tags: Sequence[str] = (), names: Mapping[str, str] | None = None
    ) -> TemplateBody:
        """`names` are those of who made it, by id."""
        return cls(
            id=row.template_id,
            name=row.name,
            tags=list(tags),
            type="base" if row.kind == "image" else row.kind,
            vcpus=row.vcpus,
            memory_mb=row.memory_mb,
            disk_size_mb=row.disk_size_mb,
            size_bytes=row.size_bytes,
            created_at=row.created_at,
            platform=row.team_id == PLATFORM_TEAM_ID,
            # The sandboxes of builds are nobody's to see.
            sandbox_id=None if row.build_id else row.sandbox_id,
            build_id=row.build_id,
            created_by_name=(names or {}).get(row.created_by, ""),
        )


async def bodies_of(
    platform: Platform, caller: Caller, rows: Sequence[tables.Template]
) -> list[TemplateBody]:
    """Templates with their tags, and with their makers where those are of the caller's team."""
    tags = await platform.tags.of([row.template_id for row in rows])
    own = {row.created_by for row in rows if row.team_id == caller.team_id}
    names = await names_of(platform.db, own)
    return [
        TemplateBody.of(
            row, tags.get(row.template_id, ()), names if row.team_id == caller.team_id else None
        )
        for row in rows
    ]


@router.post("/snapshots", status_code=201)
async def create(body: NewSnapshot, caller: TheCaller, platform: ThePlatform) -> TemplateBody:
    """Make a template of a sandbox, which is paused then, or goes on if `live`."""
    name = body.name or f"snapshot-{random_id(8)}"
    made = await platform.sandboxes.snapshot(caller, body.sandbox_id, name, live=body.live)
    return TemplateBody.of(made, names={caller.actor_id: caller.name})


@router.get("/snapshots")
@router.get("/templates")
async def list_templates(
    caller: TheCaller,
    platform: ThePlatform,
    kind: Annotated[Literal["base", "snapshot"] | None, Query(alias="type")] = None,
) -> list[TemplateBody]:
    """The team's own and the platform's."""
    kinds = {"base": "image", "snapshot": "snapshot", None: ""}
    return await bodies_of(platform, caller, await platform.templates.list(caller, kinds[kind]))


@router.delete("/snapshots/{name}", status_code=204)
@router.delete("/templates/{name}", status_code=204)
async def delete(name: str, caller: TheCaller, platform: ThePlatform) -> Response:
    """Delete a template of the team."""
    await platform.templates.delete(caller, name)
    return Response(status_code=204)


# Contents.


@router.get(
    "/templates/{name}/content",
    response_class=Response,
    responses={200: {"content": BINARY, "description": "The archive."}},
)
async def download(
    name: str, caller: TheCaller, platform: ThePlatform, encoding: TheEncoding = ""
) -> Response:
    """A whole template: a tar archive with sparse files, gzipped if that is accepted."""
    return encoded(await begun(platform.contents.read(caller, name)), encoding)


@router.put("/templates/{name}/content", status_code=201, openapi_extra=RAW_BODY)
async def upload(
    name: str, request: Request, caller: TheCaller, platform: ThePlatform
) -> TemplateBody:
    """Make a template of such an archive, which is the body; it may be gzipped."""
    pieces = decoded(pieces_of(request), request.headers.get("content-encoding", ""))
    made = await platform.contents.write(caller, name, pieces)
    return TemplateBody.of(made, names={caller.actor_id: caller.name})
