"""`/v1/snapshots` and `/v1/templates`: what sandboxes start from."""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import APIRouter, Query, Request, Response
from pydantic import BaseModel, ConfigDict, Field

from sandmartin.control import tables
from sandmartin.control.api.access import TheCaller, ThePlatform
from sandmartin.control.api.bodies import BINARY, RAW_BODY, begun, pieces_of
from sandmartin.control.api.encoding import TheEncoding, decoded, encoded
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

    name: str
    type: str = Field(description="`base` (a disk) or `snapshot` (disk and memory).")
    vcpus: int
    memory_mb: int
    disk_size_mb: int
    size_bytes: int = Field(description="Allocated blocks.")
    created_at: float
    platform: bool = Field(description="It belongs to the platform; no team can delete it.")

    @classmethod
    def of(cls, row: tables.Template) -> TemplateBody:
        return cls(
            name=row.name,
            type="base" if row.kind == "image" else row.kind,
            vcpus=row.vcpus,
            memory_mb=row.memory_mb,
            disk_size_mb=row.disk_size_mb,
            size_bytes=row.size_bytes,
            created_at=row.created_at,
            platform=row.team_id == PLATFORM_TEAM_ID,
        )


@router.post("/snapshots", status_code=201)
async def create(body: NewSnapshot, caller: TheCaller, platform: ThePlatform) -> TemplateBody:
    """Make a template of a sandbox, which is paused then, or goes on if `live`."""
    name = body.name or f"snapshot-{random_id(8)}"
    made = await platform.sandboxes.snapshot(caller, body.sandbox_id, name, live=body.live)
    return TemplateBody.of(made)


@router.get("/snapshots")
@router.get("/templates")
async def list_templates(
    caller: TheCaller,
    platform: ThePlatform,
    kind: Annotated[Literal["base", "snapshot"] | None, Query(alias="type")] = None,
) -> list[TemplateBody]:
    """The team's own and the platform's."""
    kinds = {"base": "image", "snapshot": "snapshot", None: ""}
    return [TemplateBody.of(row) for row in await platform.templates.list(caller, kinds[kind])]


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
    return TemplateBody.of(await platform.contents.write(caller, name, pieces))
