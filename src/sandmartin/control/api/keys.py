"""`/v1/api-keys`: the keys of a team."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Response
from pydantic import BaseModel, ConfigDict, Field

from sandmartin.control import tables
from sandmartin.control.api.access import TheCaller, ThePlatform

router = APIRouter(prefix="/api-keys", tags=["keys"])


class NewKey(BaseModel):
    model_config = ConfigDict(extra="forbid")

    name: Annotated[str, Field(min_length=1, max_length=100)]
    admin: bool = Field(False, description="It administers the platform, as its maker must.")


class KeyBody(BaseModel):
    """An API key, but for its text."""

    id: str
    name: str
    prefix: str
    admin: bool
    created_by: str
    created_at: float
    last_used_at: float | None

    @classmethod
    def of(cls, row: tables.ApiKey) -> KeyBody:
        return cls(
            id=row.key_id,
            name=row.name,
            prefix=row.prefix,
            admin=row.is_admin,
            created_by=row.created_by,
            created_at=row.created_at,
            last_used_at=row.last_used_at,
        )


class CreatedKey(KeyBody):
    key: str = Field(description="Shown this once.")


@router.post("", status_code=201)
async def create(body: NewKey, caller: TheCaller, platform: ThePlatform) -> CreatedKey:
    row, key = await platform.keys.create(caller, body.name, is_admin=body.admin)
    return CreatedKey(**KeyBody.of(row).model_dump(), key=key)


@router.get("")
async def list_keys(caller: TheCaller, platform: ThePlatform) -> list[KeyBody]:
    return [KeyBody.of(row) for row in await platform.keys.list(caller)]


@router.delete("/{key_id}", status_code=204)
async def revoke(key_id: str, caller: TheCaller, platform: ThePlatform) -> Response:
    """End a key, at once."""
    await platform.keys.revoke(caller, key_id)
    return Response(status_code=204)
