"""Snapshots: templates made of a sandbox, which goes on."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query, Response

from sandmartin.control import tables
from sandmartin.control.api.access import TheCaller, ThePlatform
from sandmartin.control.e2b import bodies
from sandmartin.control.e2b.names import full_name, plain_name
from sandmartin.control.e2b.options import needs_memory
from sandmartin.control.e2b.steps import step
from sandmartin.errors import Conflict
from sandmartin.model import State, random_id

router = APIRouter()

_MAX_PAGE = 100


@router.post("/sandboxes/{sandbox_id}/snapshots", status_code=201)
async def create(
    sandbox_id: str,
    caller: TheCaller,
    platform: ThePlatform,
    body: bodies.NewSnapshot | None = None,
) -> bodies.Snapshot:
    """Make a template of a running sandbox, memory and all."""
    body = body or bodies.NewSnapshot()
    needs_memory(body.memory, "made a template of")
    name = f"snapshot-{random_id(8)}"
    if body.name:
        name = await plain_name(platform, caller, body.name)

    async def act(row: tables.Sandbox) -> tables.Template:
        if row.state == State.PAUSED:
            raise Conflict(f"sandbox {sandbox_id} is paused", hint="connect to it first")
        return await platform.sandboxes.snapshot(caller, sandbox_id, name, live=True)

    return _snapshot(await step(platform, caller, sandbox_id, act))


@router.get("/snapshots")
async def list_snapshots(
    response: Response,
    caller: TheCaller,
    platform: ThePlatform,
    sandbox_id: Annotated[str, Query(alias="sandboxID", max_length=100)] = "",
    name: Annotated[str, Query(max_length=300)] = "",
    limit: Annotated[int, Query(ge=1, le=_MAX_PAGE)] = _MAX_PAGE,
    next_token: Annotated[str, Query(alias="nextToken", max_length=200)] = "",
) -> list[bodies.Snapshot]:
    """The team's, newest first; `x-next-token` leads to the next page."""
    rows, following = await platform.templates.snapshots(
        caller,
        sandbox_id=sandbox_id,
        name=await plain_name(platform, caller, name) if name else "",
        limit=limit,
        cursor=next_token,
    )
    if following:
        response.headers["x-next-token"] = following
    return [_snapshot(each) for each in rows]


def _snapshot(row: tables.Template) -> bodies.Snapshot:
    return bodies.Snapshot(snapshot_id=full_name(row.name), names=[full_name(row.name)])
