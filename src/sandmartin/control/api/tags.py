"""`/v1/templates/{name}/tags`: names of one template beside others of the same name."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Path, Response
from pydantic import BaseModel, ConfigDict, Field

from sandmartin.control import tables
from sandmartin.control.api.access import TheCaller, ThePlatform
from sandmartin.control.templates import tagged_name
from sandmartin.model import DEFAULT_TAG

router = APIRouter(tags=["templates"])

TheTag = Annotated[str, Path(max_length=128)]


class TagBody(BaseModel):
    """A tag, and which template it is of."""

    tag: str
    template_id: str
    created_at: float

    @classmethod
    def of(cls, row: tables.TemplateTag) -> TagBody:
        return cls(tag=row.tag, template_id=row.template_id, created_at=row.created_at)


class TagList(BaseModel):
    items: list[TagBody]


class TagSource(BaseModel):
    model_config = ConfigDict(extra="forbid")

    source: str = Field(DEFAULT_TAG, max_length=128, description="A tag of the same template.")


@router.get("/templates/{name}/tags")
async def list_tags(name: str, caller: TheCaller, platform: ThePlatform) -> TagList:
    """The tags of a template, the oldest first."""
    return TagList(items=[TagBody.of(row) for row in await platform.tags.list(caller, name)])


@router.put("/templates/{name}/tags/{tag}")
async def assign(
    name: str, tag: TheTag, body: TagSource, caller: TheCaller, platform: ThePlatform
) -> TagBody:
    """Let a tag be of what another tag is of; it is taken from what had it."""
    await platform.tags.assign(caller, tagged_name(name, body.source), [tag])
    found = {row.tag: row for row in await platform.tags.list(caller, name)}
    return TagBody.of(found[tag])


@router.delete("/templates/{name}/tags/{tag}", status_code=204)
async def remove(name: str, tag: TheTag, caller: TheCaller, platform: ThePlatform) -> Response:
    """Take a tag away; a template without any is deleted, and what was made of it goes on."""
    await platform.tags.remove(caller, name, [tag])
    return Response(status_code=204)
